"""What the process that refreshes reward models holds at its peak, counted as in cluster/footprint.py.

It trains one model of the ensemble after another; what that took is gone when it measures two versions, the one that
scores and the one it made, each with its discriminator. So the larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.architecture import Architecture
from cluster.footprint import (
    DTYPE_BYTES,
    FLOAT32,
    MEASURED_ROWS,
    Footprint,
    inference_bytes,
    offline_stage,
    scorer_bytes,
)
from configs.run import RunConfig


def refreshes(config: RunConfig) -> bool:
    """A run that goes on has this process."""
    return config.rm.refresh is not None and config.reward.needs_model


def trains_on_gpu(config: RunConfig) -> bool:
    """It has a GPU, and reward models are trained where the learner is."""
    return config.rm.refresh is not None and config.rm.refresh.gpus > 0 and config.learner.on_gpu


def refresh_trainer(architecture: Architecture, config: RunConfig) -> Footprint:
    on_gpu = trains_on_gpu(config)
    one = config.rm.model_copy(update={"models": (), "parallel": 1})
    there = config.learner.model_copy(update={"gpus_per_rank": float(on_gpu)})
    training = offline_stage(architecture, config.model_copy(update={"rm": one, "learner": there}), stage="rm")
    measuring = _measuring(architecture, config)
    if on_gpu and config.reward.dtype != "int8":
        return Footprint(host=training.host, gpu=_larger(training.gpu, measuring))
    return Footprint(host=_larger(training.host, measuring), gpu=training.gpu)


def _measuring(architecture: Architecture, config: RunConfig) -> dict[str, int]:
    models, longest = config.rm.ensemble + config.rm.discriminator, config.max_sequence_tokens
    width = FLOAT32 if config.reward.dtype == "int8" else DTYPE_BYTES[config.reward.dtype]
    return {
        "weights": 2 * models * scorer_bytes(architecture, config),
        "activations": inference_bytes(
            architecture, tokens=MEASURED_ROWS * longest, sequence_tokens=longest, width=width
        ),
    }


def _larger(training: Mapping[str, int], measuring: Mapping[str, int]) -> Mapping[str, int]:
    """`training` has the process's base, which measuring needs too."""
    whole = {**measuring, "base": training["base"]}
    return max(training, whole, key=lambda parts: sum(parts.values()))
