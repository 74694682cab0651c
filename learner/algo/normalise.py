"""Running statistics of reward-model scores, one set per reward-model version, and their normalisation.

A score of one reward model says nothing about another's scale, so each version starts from its own calibration.
States are frozen; an update returns a new one. `to_dict`/`from_dict` are plain JSON, for the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

MIN_STD: Final = 1e-4
RELATIVE_MIN_STD: Final = 1e-6
"""A constant score has no variance, only rounding noise in proportion to its size: dividing by that invents signal."""


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores seen. Merged by Chan et al. 1979's formula."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def from_calibration(cls, *, mean: float, std: float, count: float) -> RunningMoments:
        """Start as if `count` scores with this mean and standard deviation had been seen."""
        if not (math.isfinite(mean) and math.isfinite(std) and std >= 0 and count >= 0):
            raise ValueError(f"calibration must be finite with std, count >= 0: mean {mean}, std {std}, count {count}")
        return cls(count=float(count), mean=float(mean), m2=float(std) ** 2 * float(count))

    @property
    def std(self) -> float:
        """Population standard deviation; 1.0 before anything was seen."""
        return math.sqrt(self.m2 / self.count) if self.count > 0 else 1.0

    def merge(self, scores: Sequence[float]) -> RunningMoments:
        """With these scores seen too. Raises ValueError on a score that is not finite.

        Example: (1, 3) then (5): count 3, mean 3, m2 = 4 + 0 + 4 = 8.
        """
        if not scores:
            return self
        if not all(math.isfinite(score) for score in scores):
            raise ValueError(f"scores must be finite: {[score for score in scores if not math.isfinite(score)][:3]}")
        count = len(scores)
        mean = math.fsum(scores) / count
        m2 = math.fsum((score - mean) ** 2 for score in scores)
        total, delta = self.count + count, mean - self.mean
        return RunningMoments(
            count=total,
            mean=self.mean + delta * count / total,
            m2=self.m2 + m2 + delta**2 * self.count * count / total,
        )

    def normalise(self, scores_B: Tensor, *, clip: float) -> Tensor:
        """(score − mean) / std, clipped to ±clip. Keeps shape; raises ValueError on a score that is not finite.

        Example: mean 3, std 2, clip 1.5: 4 → 0.5, 9 → 1.5.
        """
        if not bool(torch.isfinite(scores_B).all()):
            raise ValueError("scores must be finite")
        floor = max(MIN_STD, RELATIVE_MIN_STD * abs(self.mean))
        return ((scores_B.double() - self.mean) / max(self.std, floor)).clamp(-clip, clip).to(scores_B.dtype)


@dataclass(frozen=True)
class ScoreNormaliser:
    """Moments by reward-model version."""

    moments: Mapping[str, RunningMoments] = field(default_factory=dict)

    def calibrated(self, rm_version: str, *, mean: float, std: float, count: float) -> ScoreNormaliser:
        """With a warm start for a version that has none yet; a version already running keeps its statistics."""
        if rm_version in self.moments:
            return self
        start = RunningMoments.from_calibration(mean=mean, std=std, count=count)
        return ScoreNormaliser({**self.moments, rm_version: start})

    def observe(self, rm_version: str, scores: Sequence[float]) -> ScoreNormaliser:
        """With these scores of that version seen too."""
        merged = self.moments.get(rm_version, RunningMoments()).merge(scores)
        return ScoreNormaliser({**self.moments, rm_version: merged})

    def normalise(self, rm_version: str, scores_B: Tensor, *, clip: float) -> Tensor:
        """Normalised and clipped scores of one version."""
        return self.moments.get(rm_version, RunningMoments()).normalise(scores_B, clip=clip)

    def to_dict(self) -> dict[str, dict[str, float]]:
        return {name: {"count": m.count, "mean": m.mean, "m2": m.m2} for name, m in self.moments.items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Mapping[str, float]]) -> ScoreNormaliser:
        return cls({name: RunningMoments(m["count"], m["mean"], m["m2"]) for name, m in state.items()})
