"""What the offline stages share: quiet, seeded Hugging Face trainer settings, progress, and all-or-nothing output.

transformers is imported inside the functions: this file is on the command line's path.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import KeelError, NonFiniteError
from cluster.files import atomic_directory, remove_directory

if TYPE_CHECKING:
    from transformers import TrainerCallback

Emit = Callable[[dict[str, Any]], None]
"""Takes one progress event: JSON-able, with at least "stage"."""

LOG_EVERY_STEPS = 10


@dataclass(frozen=True)
class FitSettings:
    """One fit of one model. `examples`: size of the training set, from which the number of steps follows."""

    examples: int
    epochs: float
    batch_size: int
    learning_rate: float
    seed: int
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole fit."""
        return max(1, math.ceil(math.ceil(self.examples / self.batch_size) * self.epochs))


def trainer_arguments(settings: FitSettings, *, scratch: Path) -> dict[str, Any]:
    """Keyword arguments for a TRL config: no checkpoints, no trackers, no worker processes, no progress bars.

    Those defaults cost more than the training itself for a model of a million parameters. A NaN loss is logged as it
    is (the trainer would show the last good one instead), so that the progress callback can stop the run.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(scratch),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(settings.warmup_fraction * settings.steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": min(LOG_EVERY_STEPS, settings.steps),
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def progress_callback(emit: Emit, *, stage: str, steps: int, fields: dict[str, Any] | None = None) -> TrainerCallback:
    """Emits {"stage", "step", "steps", "loss", …fields} at each log; raises NonFiniteError on a loss that is not."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the {stage} loss is not finite",
                    got=f"{loss} at step {state.global_step} of {steps}",
                    do=f"lower {stage}.learning_rate, and look for damaged records in the data",
                )
            emit({"stage": stage, "step": int(state.global_step), "steps": steps, "loss": loss, **(fields or {})})

    return Progress()


def silence_progress_bars() -> None:
    """Hugging Face draws a bar for each load and save; the run has its own display."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def run_trainer(trainer: Any, *, stage: str) -> None:
    """Train without the printer that replaces the progress bar; then see that every weight is finite."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.config.use_cache = True  # the trainer switches it off and would save it so: slow generation
    for name, parameter in trainer.model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise NonFiniteError(
                f"{stage} training left weights that are not finite", got=name, do=f"lower {stage}.learning_rate"
            )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Intra-op threads of torch inside the block; more than the machine's cores only spin, so they are capped."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(count, os.cpu_count() or 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def whole_directory(target: Path, *, error: type[KeelError]) -> Iterator[Path]:
    """A directory to fill; it becomes `target` only when the block ends well, replacing what was there.

    A disk that fills up raises `error`; the half-written directory is removed and the old `target` stays.
    """
    from safetensors import SafetensorError  # what a full disk raises while weights are written

    beside = target.with_name(target.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with atomic_directory(beside) as directory:
            yield directory
        if target.exists():
            remove_directory(target)
        beside.rename(target)
    except (OSError, SafetensorError) as cause:
        raise error(
            f"cannot write {target}", got=str(cause), do="free some disk space or choose another runs_dir"
        ) from cause
