"""The critic: the value of the state before each response token, started from the reward model.

Shapes: B sequences, T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.errors import ModelError
from learner.algo.normalise import MIN_STD
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
from learner.packing import attend_packed, packs


class Critic(nn.Module):
    """A sequence classifier with `base_model` and a one-output `score` head, read at every position.

    V = (raw − mean) / std with the calibration of the reward model it started from, so its first values are in the unit
    of the normalised scores that it predicts. The two numbers are buffers: fixed, and saved with the state. As in
    Policy, all work is in `forward`, for FSDP2.
    """

    value_mean: Tensor
    value_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: float,
        std: float,
        gradient_checkpointing: bool = False,
        dtype: DtypeName = "float32",
        sequence_packing: bool = False,
    ) -> None:
        """Raises ModelError when the head does not give one number or the calibration cannot scale. `sequence_packing`:
        as in Policy."""
        super().__init__()
        head = named_head(model, "score")
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise ModelError(
                "the critic needs a linear `score` head with one output",
                got=repr(head),
                do="train the reward model with num_labels=1",
            )
        if not (math.isfinite(mean) and math.isfinite(std) and std >= 0.0):
            raise ModelError(
                "the reward model's calibration is not usable",
                got=f"mean {mean}, std {std}",
                do="calibrate the reward model on policy samples again",
            )
        inner_decoder(model)
        self.model = model
        self._dtype: DtypeName = dtype
        device = next(model.parameters()).device
        self.register_buffer("value_mean", torch.tensor(float(mean), device=device))
        self.register_buffer("value_std", torch.tensor(max(float(std), MIN_STD), device=device))
        self.packing = sequence_packing and torch.cuda.is_available() and attend_packed(model, inner_decoder(model))
        """Whether the weights take packed sequences: found by trying them."""
        set_gradient_checkpointing(model, enabled=gradient_checkpointing)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mean: float,
        std: float,
        vocab_size: int,
        gradient_checkpointing: bool = False,
        dtype: DtypeName = "float32",
        sequence_packing: bool = False,
    ) -> Critic:
        """From a reward model's directory. `vocab_size`: the policy's; ids past the critic's embeddings cannot be read.
        Nothing is random: a directory without a trained head is refused. Raises ModelError."""
        from transformers import AutoModelForSequenceClassification

        model = load_pretrained(AutoModelForSequenceClassification, path, num_labels=1)
        critic = cls(
            model,
            mean=mean,
            std=std,
            gradient_checkpointing=gradient_checkpointing,
            dtype=dtype,
            sequence_packing=sequence_packing,
        )
        own: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        if own.num_embeddings < vocab_size:
            raise ModelError(
                "the critic cannot read the policy's tokens",
                got=f"{own.num_embeddings} embeddings in {path}, {vocab_size} in the policy",
                do="use a reward model with the policy's tokenizer, or an estimator without a critic",
            )
        return critic

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: TrainBatch) -> Tensor:
        """values_BT, float32; 0 on padding. The value at t has seen the prompt and the tokens before t, not token t."""
        device = batch.response_tokens_B.device
        with compute_dtype(device, self._dtype):
            packed = self.packing and packs(device, dtype=self._dtype)
            states_NH = response_states(inner_decoder(self.model), batch, packed=packed)
            raw_N = named_head(self.model, "score")(states_NH)[:, 0].float()
        return to_rows((raw_N - self.value_mean) / self.value_std, batch)

    def values(self, batch: TrainBatch) -> Tensor:
        """`forward`, by its name."""
        result: Tensor = self(batch)
        return result

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's weights under their own names. Live views."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()
