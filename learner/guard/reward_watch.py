"""The rewards' signals over a run: on one scale across reward-model versions, against the start and the recent steps.

A version with a calibration counts in deviations of it (z). For one without, as where other sources count too, the
batch of the run's first step is the baseline, which the policy before training wrote: it holds for that version alone,
and for another one the signals that need a baseline are absent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from learner.guard import reward_signals
from learner.guard.reference import RewardScale
from learner.guard.reward_signals import Floats

RECENT_STEPS: Final = 8
MIN_RECENT_STEPS: Final = 3
KEPT_REWARDS: Final = 512
"""Of the first step."""


class RewardView(Protocol):
    """The part of a StepView that is about rewards."""

    @property
    def step(self) -> int: ...
    @property
    def rewards(self) -> tuple[float, ...]: ...
    @property
    def spreads(self) -> tuple[float, ...]: ...
    @property
    def rm_versions(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class _Start:
    """The first step's. `version`: whose scale the rewards are on; None: in deviations of a calibration. `spread`: 0
    where it is not known."""

    version: str | None
    rewards: tuple[float, ...]
    spread: float


class RewardWatch:
    """`rewards`: the reference's, raw, on the scale of `rewards_version`."""

    def __init__(
        self,
        scales: Callable[[str], RewardScale | None],
        *,
        ceiling: float,
        rewards: Floats,
        rewards_version: str | None,
    ) -> None:
        self._scales, self._ceiling = scales, ceiling
        scale = scales(rewards_version) if rewards_version is not None else None
        self._reference_z = np.zeros(0) if scale is None else (rewards - scale.mean) / scale.std
        self._start: _Start | None = None
        self._version: str | None = None
        """Of the window's last step."""
        self._means: deque[float] = deque(maxlen=RECENT_STEPS)
        self._stds: deque[float] = deque(maxlen=RECENT_STEPS)

    def read(self, view: RewardView) -> dict[str, float | None]:
        scales = {version: self._scales(version) for version in view.rm_versions}
        known = {version: scale for version, scale in scales.items() if scale is not None}
        if len(known) == len(scales):
            rewards_B = _in_deviations(view, known)
            scale_of = None
        elif len(scales) == 1:
            rewards_B, scale_of = np.array(view.rewards), view.rm_versions[0]
        else:
            self.reset()
            return {}
        if not np.isfinite(rewards_B).all():
            return {}
        if view.step <= 1:
            spread = float(np.mean(view.spreads))
            kept = tuple(rewards_B[:KEPT_REWARDS].tolist())
            self._start = _Start(scale_of, kept, spread if math.isfinite(spread) else 0.0)
        baseline = self._baseline(scale_of)
        baseline_std = 1.0 if scale_of is None else float(baseline.std()) if len(baseline) else 0.0
        return {
            "score_ceiling_fraction": self._over_ceiling(rewards_B, scale_of, baseline),
            "reward_std_ratio": reward_signals.std_ratio(rewards_B, baseline_std=baseline_std),
            "reward_ks": reward_signals.ks_distance(rewards_B, baseline=baseline),
            "reward_jump": self._jump(view, rewards_B, baseline_std),
            "uncertainty_ratio": reward_signals.uncertainty_ratio(
                np.array(view.spreads), reference_spread=self._reference_spread(view, known)
            ),
        }

    def reset(self) -> None:
        self._means.clear()
        self._stds.clear()
        self._version = None

    def to_state(self) -> dict[str, Any]:
        start = self._start
        return {
            "start": start and {"version": start.version, "rewards": list(start.rewards), "spread": start.spread},
            "version": self._version,
            "means": list(self._means),
            "stds": list(self._stds),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        start = state["start"]
        self._start = start and _Start(start["version"], tuple(map(float, start["rewards"])), float(start["spread"]))
        self._version = state["version"]
        self._means = deque(map(float, state["means"]), maxlen=RECENT_STEPS)
        self._stds = deque(map(float, state["stds"]), maxlen=RECENT_STEPS)

    def _baseline(self, scale_of: str | None) -> Floats:
        """Rewards before training, on the batch's scale; none where they are not known."""
        if scale_of is None and len(self._reference_z):
            return self._reference_z
        if self._start is not None and self._start.version == scale_of:
            return np.array(self._start.rewards)
        return np.zeros(0)

    def _over_ceiling(self, rewards_B: Floats, scale_of: str | None, baseline: Floats) -> float | None:
        if scale_of is None:
            return reward_signals.ceiling_fraction(rewards_B, ceiling=self._ceiling)
        if len(baseline) < reward_signals.MIN_ANSWERS or baseline.std() <= 0:
            return None
        rewards_z = (rewards_B - baseline.mean()) / baseline.std()
        return reward_signals.ceiling_fraction(rewards_z, ceiling=self._ceiling)

    def _jump(self, view: RewardView, rewards_B: Floats, baseline_std: float) -> float | None:
        """Against steps of the same version only: a refreshed reward model judges the same policy otherwise."""
        versions = set(view.rm_versions)
        if versions != {self._version}:
            self.reset()
        if len(versions) > 1:
            return None
        self._version = view.rm_versions[-1]
        moved = None
        if len(self._means) >= MIN_RECENT_STEPS:
            moved = reward_signals.jump(
                rewards_B, recent_means=self._means, recent_stds=self._stds, baseline_std=baseline_std
            )
        self._means.append(float(rewards_B.mean()))
        self._stds.append(float(rewards_B.std()))
        return moved

    def _reference_spread(self, view: RewardView, known: Mapping[str, RewardScale]) -> float | None:
        """Of the version's calibration set; without one, of the run's first step."""
        newest = known.get(view.rm_versions[-1])
        if newest is not None:
            return newest.spread
        same = self._start is not None and self._start.version == view.rm_versions[-1]
        return self._start.spread if same and self._start is not None else None


def _in_deviations(view: RewardView, scales: Mapping[str, RewardScale]) -> Floats:
    means = np.array([scales[version].mean for version in view.rm_versions])
    stds = np.array([scales[version].std for version in view.rm_versions])
    deviations: Floats = (np.array(view.rewards) - means) / stds
    return deviations
