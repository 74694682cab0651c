"""What a batch's rewards look like. Pure functions; None: it cannot be told.

Rewards come on one scale: deviations from the mean of the reward model's calibration where it has one (`z`), raw where
it has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

MIN_ANSWERS: Final = 8
"""Fewer tell nothing of a distribution or a correlation."""
SPREAD_FLOOR: Final = 0.1
"""Of the baseline's standard deviation: under it the recent one is no yardstick."""
ROUNDING: Final = 1e-6
"""Rewards that differ by no more than this share of their size are one number."""


def ceiling_fraction(rewards_z: Floats, *, ceiling: float) -> float | None:
    """Share of answers over `ceiling` on the 0–1 scale, on which 0 is four deviations under the calibration's mean and
    1 four over it: (z + 4)/8, clipped."""
    if not _told(rewards_z, least=1):
        return None
    return float((np.clip((rewards_z + 4.0) / 8.0, 0.0, 1.0) > ceiling).mean())


def std_ratio(rewards: Floats, *, baseline_std: float) -> float | None:
    """Standard deviation over the baseline's: near 0, every answer is worth the same and nothing can be learnt. A batch
    of one reward is 0 whatever the baseline: a reward may have been constant from the start."""
    if not _told(rewards, least=2):
        return None
    spread = float(rewards.std())
    if spread <= ROUNDING * max(1.0, abs(float(rewards.mean()))):
        return 0.0
    return spread / baseline_std if baseline_std > 0 else None


def jump(
    rewards: Floats, *, recent_means: Sequence[float], recent_stds: Sequence[float], baseline_std: float
) -> float | None:
    """How far the batch's mean or standard deviation is from the recent steps' medians, whichever is farther, in
    recent standard deviations: max(|m − med mᵢ|, |s − med sᵢ|) / max(med sᵢ, SPREAD_FLOOR · baseline).

    Medians, since one odd step must not move the yardstick. The second term sees a scale that jumps around a mean of 0:
    rewards five times as large give 4.

    >>> jump(np.array([1.0, 3.0]), recent_means=[0.0], recent_stds=[2.0], baseline_std=2.0)  # |2 − 0| / 2
    1.0
    """
    if not _told(rewards, least=2) or not recent_means:
        return None
    spread = float(np.median(recent_stds))
    yardstick = max(spread, SPREAD_FLOOR * baseline_std)
    if yardstick <= 0:
        return None
    moved = max(abs(float(rewards.mean()) - float(np.median(recent_means))), abs(float(rewards.std()) - spread))
    return moved / yardstick


def ks_distance(rewards: Floats, *, baseline: Floats) -> float | None:
    """Kolmogorov–Smirnov: the largest distance between the two empirical distribution functions, in [0, 1]."""
    if not _told(rewards, least=MIN_ANSWERS) or not _told(baseline, least=MIN_ANSWERS):
        return None
    return float(stats.ks_2samp(rewards, baseline, method="asymp").statistic)


def uncertainty_ratio(spreads: Floats, *, reference_spread: float | None) -> float | None:
    """Mean spread between an ensemble's members over that on the reference's answers. None for a single model."""
    if not reference_spread or not _told(spreads, least=1) or not spreads.any():
        return None
    return float(spreads.mean()) / reference_spread


def spearman(lengths: Floats, *, rewards: Floats) -> float | None:
    """Spearman's rank correlation of length and reward, in [−1, 1]. None under MIN_ANSWERS or where either is constant.

    >>> spearman(np.arange(8.0), rewards=np.arange(8.0) ** 3)
    1.0
    """
    found = _rank_correlations(lengths, rewards)
    return None if found is None else float(found[0, 1])


def spearman_partial(values: Floats, *, rewards: Floats, given: Floats) -> float | None:
    """Spearman's rank correlation of values and rewards with `given` held fixed, in [−1, 1]. None where `spearman` of
    any two is, or where `given` tells one of them whole."""
    found = _rank_correlations(values, rewards, given)
    if found is None:
        return None
    both, first, second = float(found[0, 1]), float(found[0, 2]), float(found[1, 2])
    if (1.0 - first * first) * (1.0 - second * second) < ROUNDING:
        return None
    return partial_correlation(both, first=first, second=second)


def partial_correlation(both: float, *, first: float, second: float) -> float:
    """Of two things that correlate by `both`, with a third held fixed that they correlate with by `first` and `second`:
    (r − r₁·r₂)/√((1 − r₁²)(1 − r₂²)) (Yule 1907; on ranks, Kendall 1942). A factor under 10⁻⁶ counts as that.

    >>> round(partial_correlation(0.5, first=0.5, second=0.5), 6)  # (0.5 − 0.25) / 0.75
    0.333333
    """
    free = max(1.0 - first * first, 1e-6) * max(1.0 - second * second, 1e-6)
    return float(np.clip((both - first * second) / np.sqrt(free), -1.0, 1.0))


def spearman_within(lengths: Floats, *, rewards: Floats, groups: Sequence[str]) -> float | None:
    """The same with each group's own mean taken off both, over the groups of two or more: a prompt that asks for long
    answers and pays well for them is no length bias. None where there are no such groups."""
    if not _told(lengths, least=1) or not _told(rewards, least=1):
        return None
    _, index, sizes = np.unique(np.array(groups), return_inverse=True, return_counts=True)
    several = sizes[index] >= 2
    if not several.any():
        return None

    def centred(values: Floats) -> Floats:
        means = np.bincount(index, weights=values) / sizes
        # Rounded, so that a group of equal values is one of ties.
        rounded: Floats = np.round(values - means[index], 9)[several]
        return rounded

    return spearman(centred(lengths), rewards=centred(rewards))


def _rank_correlations(*columns: Floats) -> Floats | None:
    """Spearman's, of each with each. None where a column is short, not finite or constant."""
    if not all(_told(column, least=MIN_ANSWERS) and np.ptp(column) > 0 for column in columns):
        return None
    found: Floats = np.asarray(np.corrcoef([stats.rankdata(column) for column in columns]), dtype=np.float64)
    return found.round(12)


def _told(values: Floats, *, least: int) -> bool:
    return len(values) >= least and bool(np.isfinite(values).all())
