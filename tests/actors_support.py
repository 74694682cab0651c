"""A tiny random Llama on disk, and what Hugging Face says about it: the reference that engine tests compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.records import Float32s
from cluster.weights import Probe, WeightBlob, pack

VOCAB = 64
EOS = 1


def save_tiny_llama(directory: Path) -> Path:
    """Two layers, two heads of 32 dimensions, tied embeddings, and no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@contextmanager
def contained_vllm() -> Iterator[None]:
    """Undo what vLLM, run inside the test process, does to the process: environment, thread setter, generator."""
    environment, set_num_threads, random_state = dict(os.environ), torch.set_num_threads, torch.get_rng_state()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads = set_num_threads
        torch.set_rng_state(random_state)


class Reference:
    """The learner's side: a float32 model that changes, and log-probs by its own forward pass."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def train(self, version: int) -> None:
        """Move every matrix a good way, differently for each version."""
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(0.8).add_(torch.randn(parameter.shape, generator=generator) * 0.05)

    def logprobs(self, ids: list[int], *, temperature: float = 1.0) -> Float32s:
        """[L] ids → [L-1] log p(next id)."""
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, :-1].float() / temperature
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        logprobs: Float32s = picked.numpy().astype(np.float32)
        return logprobs

    def blob(self, version: int) -> WeightBlob:
        ids = [3, 9, 27, 17, 51, 25]
        probe = Probe(token_ids=np.array(ids, dtype=np.int32), logprobs=self.logprobs(ids))
        return pack(version, self.model.named_parameters(), probe=probe)
