"""How the policy moves: what an update's own numbers say over time. Pure functions on a step's record and on windows.

None: it cannot be told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

import numpy as np

RECORDED: Final = (
    "proxy_z",
    "kl_nats_per_sequence",
    "kl_budget_share",
    "entropy_nats_per_token",
    "clip_fraction",
    "ratio_tail_fraction",
    "behaviour_gap_max_nats",
    "value_error_ratio",
)
"""Signals that the step's record holds as they are: learner/experience.py, learner/update_stats.py,
learner/telemetry.py."""
SLOPE_STEPS: Final = 10
"""Window of the KL's slope."""
MIN_SLOPE_STEPS: Final = 5
NORM_STEPS: Final = 200
"""Window of the gradient norm's median."""
MIN_NORM_STEPS: Final = 5


def recorded(record: Mapping[str, object]) -> dict[str, float]:
    """Those of RECORDED that are there and finite."""
    found = ((name, number(record, name)) for name in RECORDED)
    return {name: value for name, value in found if value is not None}


def number(record: Mapping[str, object], name: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def theil_sen(steps: Sequence[float], *, values: Sequence[float]) -> float | None:
    """Median of the slopes between all pairs of points (Theil 1950, Sen 1968), per step: up to 29 % of wild points do
    not move it. None under MIN_SLOPE_STEPS points.

    >>> theil_sen([1, 2, 3, 4, 5], values=[0.0, 0.5, 1.0, 9.0, 2.0])
    0.5
    """
    if len(steps) < MIN_SLOPE_STEPS:
        return None
    first, second = np.triu_indices(len(steps), k=1)
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    apart = x[second] != x[first]
    slopes = (y[second] - y[first])[apart] / (x[second] - x[first])[apart]
    return float(np.median(slopes)) if len(slopes) else None


def norm_ratio(norm: float, *, earlier: Sequence[float]) -> float | None:
    """A gradient norm over the median of those before. None under MIN_NORM_STEPS of them."""
    if len(earlier) < MIN_NORM_STEPS or (middle := median(earlier)) <= 0:
        return None
    return norm / middle
