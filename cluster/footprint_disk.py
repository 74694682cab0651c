"""What a run's directory holds at its peak: arithmetic on the model's sizes and the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.architecture import Architecture
from cluster.footprint import FLOAT32, models_of
from configs.run import RunConfig


@dataclass(frozen=True)
class DiskUse:
    """Bytes in the run directory. peak: everything, one checkpoint more than are kept (it is written before the oldest
    goes), and one exported policy more for the same reason."""

    checkpoint: int
    checkpoints: int
    models: int
    peak: int


def disk_use(architecture: Architecture, config: RunConfig) -> DiskUse:
    """A checkpoint holds what is trained and its two Adam moments, in float32. Models are exported in float32; those
    that are taken as they are keep their type, which may be smaller. Every refresh on schedule is taken to leave a
    version of the reward models; of those refused, only the last few keep their weights."""
    checkpoint = 3 * FLOAT32 * sum(model.trained for model in models_of(architecture, config))
    kept = kept_checkpoints(config) * checkpoint
    exported = FLOAT32 * architecture.policy_parameters
    initial = exported if config.model.kind == "new" else 0
    version = (config.rm.ensemble + config.rm.discriminator) * FLOAT32 * architecture.scorer_parameters
    offline = initial + exported + (1 + _refreshes(config)) * version * config.reward.needs_model
    models = offline + 2 * exported  # policy/best and policy/final
    return DiskUse(checkpoint=checkpoint, checkpoints=kept, models=models, peak=kept + checkpoint + models + exported)


def kept_checkpoints(config: RunConfig) -> int:
    """The newest, and those that the guard may roll back to: the good ones and the start's."""
    guard = config.guard
    good = guard.keep_good + 1 if guard.enabled and "roll_back" in guard.actions else 0
    return config.checkpoint.keep_last + good


def _refreshes(config: RunConfig) -> int:
    """Of the reward model, that the schedule brings in a whole run."""
    refresh = config.rm.refresh
    if refresh is None or refresh.every_versions is None:
        return 0
    return config.learner.steps // refresh.every_versions
