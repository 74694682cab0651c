"""One fit of one reward model, with TRL's trainer around Keel's loss.

A score is read at the last real token of prompt ids + answer ids, right-padded; which one that is follows from lengths,
never from comparing ids with the pad token, which answers may use.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from cluster.hf_training import Emit, FitSettings, progress_callback, run_trainer, trainer_arguments
from cluster.text import load_tokenizer
from reward_service.rm.loss import LossSettings, pair_losses, weighted_mean
from reward_service.rm.pairs import EncodedPair
from reward_service.rm.take import save_member


@dataclass(frozen=True)
class FitJob:
    """What one process needs to train one model. `start`: a language model (its `score` head starts at zero) or, with
    `has_head`, a reward model. `fields` go into every progress event."""

    start: Path
    has_head: bool
    target: Path
    tokenizer_dir: Path
    pairs: Sequence[EncodedPair]
    settings: FitSettings
    loss: LossSettings
    largest_margin: float
    on_gpu: bool
    fields: dict[str, Any]


def fit(job: FitJob, emit: Emit) -> None:
    """Train, and write the model with its tokenizer to `job.target`. `emit` gets {"stage": "rm", "step", "steps",
    "loss", …fields} every ten steps. Raises DataError where all weights are 0, NonFiniteError, and ModelError when the
    disk refuses."""
    from cluster.hf_training import silence_progress_bars

    silence_progress_bars()
    tokenizer: Any = load_tokenizer(job.tokenizer_dir)
    model = _start(job, pad_id=int(tokenizer.pad_token_id))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(job, model, tokenizer=tokenizer, scratch=Path(scratch))
        trainer.add_callback(progress_callback(emit, stage="rm", steps=job.settings.steps, fields=job.fields))
        run_trainer(trainer, stage="rm")
    save_member(model, target=job.target, tokenizer=tokenizer)


def _start(job: FitJob, *, pad_id: int) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(
            job.start, num_labels=1, dtype=torch.float32, local_files_only=True, pad_token_id=pad_id
        )
    if not job.has_head:
        # A zero head starts every pair at a margin of 0; a random one starts members at arbitrary preferences.
        torch.nn.init.zeros_(model.score.weight)
    return model


def records_of(job: FitJob) -> list[dict[str, Any]]:
    """What the trainer reads, a record a pair; the weights' mean is 1. Raises DataError where all are 0."""
    mean = sum(pair.weight for pair in job.pairs) / len(job.pairs)
    if not mean:
        raise DataError("no pair that a reward model would learn from has a weight", got="0 for all", do="see `weight`")
    return [
        {
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
            "margin": pair.margin(job.largest_margin),
            "weight": pair.weight / mean,
            "length": max(len(pair.chosen_ids), len(pair.rejected_ids)),
        }
        for pair in job.pairs
    ]


def _trainer(job: FitJob, model: Any, *, tokenizer: Any, scratch: Path) -> Any:
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class Collator(DataCollatorForPreference):  # type: ignore[misc]
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = super().torch_call(examples)
            batch["weight"] = torch.tensor([example["weight"] for example in examples], dtype=torch.float32)
            return batch

    class Trainer(RewardTrainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            del return_outputs, num_items_in_batch  # asked for when it evaluates alone, and when it accumulates
            classifier = self.accelerator.unwrap_model(model)
            with self.accelerator.autocast():
                hidden_BLH = classifier.base_model(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
                ).last_hidden_state
            last_B = inputs["attention_mask"].sum(1) - 1
            last_BH = hidden_BLH[torch.arange(len(last_B), device=last_B.device), last_B].float()
            chosen_B, rejected_B = classifier.score(last_BH).squeeze(-1).chunk(2)
            losses_B = pair_losses(chosen_B, rejected_B, margins_B=inputs["margin"], settings=job.loss)
            return weighted_mean(losses_B, inputs["weight"])

    arguments = trainer_arguments(job.settings, scratch=scratch) | {"use_cpu": not job.on_gpu, "bf16": job.on_gpu}
    return Trainer(
        model=model,
        args=RewardConfig(
            **arguments,
            max_length=None,  # lengths were cut by cluster.text
            # A third less padding. The loss is a mean over pairs, so batches of like length bias nothing.
            train_sampling_strategy="group_by_length",
            length_column_name="length",
        ),
        data_collator=Collator(pad_token_id=int(tokenizer.pad_token_id)),
        train_dataset=Dataset.from_list(records_of(job)),
        processing_class=tokenizer,
    )


def load_libraries() -> None:
    """Import what a fit needs, so that the first one does not wait for it."""
    import datasets  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401
