"""Answers from a policy directory with plain transformers: a look at the result, not a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cluster.errors import ConfigError, ModelError
from cluster.hf_training import silence_progress_bars
from cluster.text import Rejection, decode_answer, encode_prompt, load_tokenizer


@dataclass(frozen=True)
class Sampled:
    """token_ids: prompt and answer, with the end-of-sequence token unless the answer was cut."""

    answer: str
    token_ids: list[int]


class Sampler:
    """A policy in memory. Raises ModelError when the directory holds none."""

    def __init__(self, model_dir: Path, *, seed: int) -> None:
        if not (model_dir / "config.json").is_file():
            raise ModelError("no policy here", got=str(model_dir), do="give a directory such as runs/demo/policy/final")
        silence_progress_bars()
        self._tokenizer = load_tokenizer(str(model_dir))
        self._model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
        torch.manual_seed(seed)

    def sample(self, prompt: str, *, count: int, max_new_tokens: int, temperature: float) -> list[Sampled]:
        """`count` answers; at temperature 0 the likeliest one, `count` times. The prompt is encoded as in training.

        Raises ConfigError for a prompt that is empty or does not fit the model's context together with its answer.
        """
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        ids = torch.tensor([self._encoded(prompt, max_new_tokens=max_new_tokens)]).repeat(count, 1)
        with torch.inference_mode():
            output = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, top_k=0, top_p=1.0, **sampling
            )
        return [self._sampled(row.tolist(), prompt_tokens=ids.shape[1]) for row in output]

    def _encoded(self, prompt: str, *, max_new_tokens: int) -> list[int]:
        context = int(self._model.config.get_text_config().max_position_embeddings)
        encoded = encode_prompt(self._tokenizer, prompt, max_tokens=context, long_prompt="reject")
        if isinstance(encoded, Rejection) or len(encoded.ids) + max_new_tokens > context:
            empty = not prompt.strip()
            raise ConfigError(
                "empty prompt" if empty else "the prompt and its answer do not fit the model's context",
                got=f"{prompt[:80]!r}, --max-new-tokens {max_new_tokens}, context {context}",
                do="give a prompt" if empty else "lower --max-new-tokens, or shorten the prompt",
            )
        return list(encoded.ids)

    def _sampled(self, ids: list[int], *, prompt_tokens: int) -> Sampled:
        answer, end = ids[prompt_tokens:], self._tokenizer.eos_token_id
        if end in answer:
            answer = answer[: answer.index(end) + 1]  # shorter answers are padded to the longest
        return Sampled(decode_answer(self._tokenizer, answer), ids[:prompt_tokens] + answer)


def answer_prompts(
    model_dir: Path, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[tuple[str, str]]:
    """Yield (prompt, answer). Raises ModelError when the directory holds no model, ConfigError as Sampler.sample."""
    sampler = Sampler(model_dir, seed=seed)
    for prompt in prompts:
        (sampled,) = sampler.sample(prompt, count=1, max_new_tokens=max_new_tokens, temperature=temperature)
        yield prompt, sampled.answer
