"""Answers from a policy directory with plain transformers: a look at the result, not a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cluster.errors import ModelError
from cluster.text import decode_answer, load_tokenizer


def answer_prompts(
    model_dir: Path, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[tuple[str, str]]:
    """Yield (prompt, answer). Raises ModelError when the directory holds no model."""
    if not (model_dir / "config.json").is_file():
        raise ModelError("no policy here", got=str(model_dir), do="give a directory such as runs/demo/policy/final")
    tokenizer = load_tokenizer(str(model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, top_k=0, top_p=1.0, **sampling
            )
        yield prompt, decode_answer(tokenizer, output[0, ids.shape[1] :].tolist())
