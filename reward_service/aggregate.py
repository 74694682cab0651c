"""Members of an ensemble → one score, their spread, and what becomes of an answer on which they disagree.

Pure Python on purpose: an ensemble has a few members, and this runs once for every answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final, Literal

MIN_STD: Final = 1e-6
"""A member whose score never changes says nothing, and must not be divided by 0."""

MemberScales = Sequence[tuple[float, float]]
"""Mean and standard deviation of each member's raw scores on the calibration set. Empty: scores stay as they are."""
Aggregation = Literal["mean", "median", "min", "mean_minus_std"]
Uncertain = Literal["keep", "down_weight", "reject"]


def on_one_scale(member_scores: Sequence[float], scales: MemberScales) -> list[float]:
    """[M] raw scores with each member's own offset and scale taken out, and the members' mean scale put in.

    The Bradley–Terry loss sees differences alone, so a member's scores have an arbitrary offset, and how long it was
    fitted sets their scale: raw, members seem to disagree where they order all answers alike.

    >>> on_one_scale((1.0, 12.0), [(0.0, 1.0), (10.0, 3.0)])
    [2.0, 1.3333333333333333]
    """
    if not scales:
        return list(member_scores)
    common = math.fsum(std for _, std in scales) / len(scales)
    pairs = zip(member_scores, scales, strict=True)
    return [common * (score - mean) / max(std, MIN_STD) for score, (mean, std) in pairs]


def aggregate(member_scores: Sequence[float], *, how: Aggregation = "mean", std_coefficient: float = 1.0) -> float:
    """[M] scores on one scale → one. `std_coefficient`: k in mean − k·std. Raises ValueError for no members.

    >>> aggregate((1.0, 3.0)), aggregate((1.0, 3.0), how="mean_minus_std", std_coefficient=0.5)
    (2.0, 1.5)
    >>> aggregate((1.0, 3.0, 8.0), how="median"), aggregate((1.0, 3.0), how="min")
    (3.0, 1.0)
    """
    if not member_scores:
        raise ValueError("an ensemble has at least one member")
    if how == "median":
        return float(statistics.median(member_scores))
    if how == "min":
        return float(min(member_scores))
    mean = math.fsum(member_scores) / len(member_scores)
    return mean - std_coefficient * spread(member_scores) if how == "mean_minus_std" else mean


def spread(member_scores: Sequence[float]) -> float:
    """Population standard deviation over members: 0.0 for one, and for none.

    >>> spread((1.0, 3.0)), spread((2.5,))
    (1.0, 0.0)
    """
    count = len(member_scores)
    if count < 2:
        return 0.0
    mean = math.fsum(member_scores) / count
    return math.sqrt(math.fsum((score - mean) ** 2 for score in member_scores) / count)


def spread_limit(percentiles: Sequence[float], *, quantile: float) -> float | None:
    """The spread that `quantile` of the calibration set does not exceed, between two percentiles by interpolation.
    `percentiles`: as RmManifest.spread_percentiles, 0 to 100. None where there are none: a single model.

    >>> spread_limit([0.0, 1.0, 4.0], quantile=0.75)
    2.5
    """
    if not percentiles:
        return None
    position = min(max(quantile, 0.0), 1.0) * (len(percentiles) - 1)
    below = int(position)
    above = min(below + 1, len(percentiles) - 1)
    return percentiles[below] + (position - below) * (percentiles[above] - percentiles[below])


def judge_spread(spread_now: float, *, limit: float | None, uncertain: Uncertain) -> Uncertain:
    """What becomes of an answer: "keep" unless the members disagree more than `limit`, then as `uncertain` says.

    >>> judge_spread(3.1, limit=2.4, uncertain="reject"), judge_spread(2.4, limit=2.4, uncertain="reject")
    ('reject', 'keep')
    """
    return uncertain if limit is not None and spread_now > limit else "keep"
