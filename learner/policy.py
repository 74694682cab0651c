"""The policy in training: a causal language model, asked only for the log-probabilities of its responses.

Shapes: B sequences, T response tokens, N valid response tokens of a batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cluster.errors import ModelError
from learner.backbone import (
    DtypeName,
    compute_dtype,
    inner_decoder,
    load_pretrained,
    named_head,
    response_states,
    set_gradient_checkpointing,
    to_rows,
)
from learner.batch import TrainBatch

MAX_LIVE_LOGITS: Final = 1 << 27
"""Logits alive at once (float32: 512 MiB). Above it the vocabulary projection runs in recomputed slices: a 150 000-word
vocabulary would otherwise need several GiB for each copy of a micro-batch's logits."""
_PROBE_TOLERANCE: Final = 1e-3


class Policy(nn.Module):
    """A causal language model with `base_model` and `lm_head`.

    A module of its own, with all work in `forward`, so that FSDP2 can shard it: `fully_shard` each decoder layer, then
    the Policy with reshard_after_forward=True (a forward without a backward would leave its own weights whole, and the
    optimiser without them). Raises ModelError for a model whose logits are not lm_head(hidden state), for instance
    soft-capped ones.
    """

    def __init__(self, model: nn.Module, *, gradient_checkpointing: bool = False, dtype: DtypeName = "float32") -> None:
        super().__init__()
        inner_decoder(model)
        named_head(model, "lm_head")
        self.model = model
        self._dtype: DtypeName = dtype
        set_gradient_checkpointing(model, enabled=False)
        self._check_head()
        set_gradient_checkpointing(model, enabled=gradient_checkpointing)

    @classmethod
    def load(cls, path: str | Path, *, gradient_checkpointing: bool = False, dtype: DtypeName = "float32") -> Policy:
        """From a Hugging Face directory. Raises ModelError."""
        from transformers import AutoModelForCausalLM

        model = load_pretrained(AutoModelForCausalLM, path)
        return cls(model, gradient_checkpointing=gradient_checkpointing, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def vocab_size(self) -> int:
        """Ids the model can take."""
        embeddings: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings.num_embeddings

    def forward(self, batch: TrainBatch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """(logprobs_BT, entropy_BT) of the response tokens, at each row's own temperature; 0 on padding.

        Float32 log-softmax over the whole vocabulary, projected at response positions only. `entropy_grad`: keep the
        entropy's graph, for an entropy bonus; else it is detached.
        """
        valid_BT = batch.mask_BT.bool()
        targets_N = batch.response_ids_BT[valid_BT]
        temperature_N = batch.temperature_B[:, None].expand_as(valid_BT)[valid_BT]
        with compute_dtype(self.device, self._dtype):
            states_NH = response_states(inner_decoder(self.model), batch)
            logprobs_N, entropy_N = self._project(states_NH, targets_N, temperature_N, entropy_grad)
        return to_rows(logprobs_N, batch), to_rows(entropy_N, batch)

    def response_logprobs(self, batch: TrainBatch, *, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """`forward`, by its name."""
        result: tuple[Tensor, Tensor] = self(batch, entropy_grad)
        return result

    @torch.no_grad()
    def probe_logprobs(self, token_ids: Tensor) -> Tensor:
        """[L] ids → [L − 1] log-probability of each token after the first, at temperature 1: to compare an engine's
        weights with these."""
        with compute_dtype(self.device, self._dtype):
            logits_LV = self.model(input_ids=token_ids[None].to(self.device), use_cache=False).logits[0, :-1]
        logprobs_LV = torch.log_softmax(logits_LV.float(), dim=-1)
        return logprobs_LV.gather(1, token_ids[1:, None].to(self.device))[:, 0]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's weights under their own (Hugging Face) names; tied weights once. Live views, not copies."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a Hugging Face directory (safetensors)."""
        self.model.save_pretrained(directory)  # type: ignore[operator]

    def _project(
        self, states_NH: Tensor, targets_N: Tensor, temperature_N: Tensor, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N), in slices when all logits at once would be too many."""
        head = named_head(self.model, "lm_head")
        slice_tokens = max(1, MAX_LIVE_LOGITS // self.vocab_size)
        if len(states_NH) <= slice_tokens:
            return _head_outputs(head, states_NH, targets_N, temperature_N, entropy_grad)
        slices = zip(
            *(torch.split(values, slice_tokens) for values in (states_NH, targets_N, temperature_N)), strict=True
        )
        parts: list[Any] = [checkpoint(_head_outputs, head, *one, entropy_grad, use_reentrant=False) for one in slices]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    @torch.no_grad()
    def _check_head(self) -> None:
        ids_BL = torch.arange(4, device=self.device)[None] % self.vocab_size
        states_BLH = inner_decoder(self.model)(input_ids=ids_BL, use_cache=False).last_hidden_state
        ours = named_head(self.model, "lm_head")(states_BLH)
        theirs = self.model(input_ids=ids_BL, use_cache=False).logits
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=_PROBE_TOLERANCE, rtol=_PROBE_TOLERANCE):
            raise ModelError(
                "the model's logits are not lm_head(hidden state)",
                got=f"{type(self.model).__name__}, which scales or caps its logits after the head",
                do="use a model without logit scaling or soft-capping",
            )


def _head_outputs(
    head: nn.Module, states_NH: Tensor, targets_N: Tensor, temperature_N: Tensor, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    logits_NV = head(states_NH).float() / temperature_N[:, None]
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None])[:, 0], entropy_N
