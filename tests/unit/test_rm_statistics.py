"""Statistics of a reward model against hand-worked numbers, and against what a simulation must give."""

from __future__ import annotations

import math
import random

import pytest

from cluster.errors import DataError
from reward_service.card.statistics import (
    histogram,
    histogram_edges,
    ks_distance,
    logistic,
    partial_out,
    rank_correlation,
    rate,
    reliability,
)


def test_a_share_has_wilsons_interval_and_counts_a_tie_as_half() -> None:
    found = rate([1.0] * 7 + [0.0] * 2 + [-1.0])  # 8 of 10
    assert (found.share, found.n) == (0.8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(DataError):
        rate([])


def test_calibration_error_by_hand() -> None:
    """All pairs at confidence 3/4, half of them right: off by 1/4 in whatever order they come, and the slope of a coin
    is 0."""
    found = reliability([math.log(3)] * 20 + [-math.log(3)] * 20)
    assert reliability([math.log(3), -math.log(3)] * 20).error == pytest.approx(found.error)
    assert found.error == pytest.approx(0.25)
    assert found.slope == pytest.approx(0.0, abs=1e-9)
    assert sum(each.right.n for each in found.bins) == 40


@pytest.mark.parametrize(("stretch", "calibrated"), [(1.0, True), (3.0, False)])
def test_a_stretched_scale_is_miscalibrated_by_its_slope(stretch: float, calibrated: bool) -> None:
    rng = random.Random(0)
    margins = []
    for _ in range(2000):
        size = abs(rng.gauss(0.0, 1.5))
        right = rng.random() < 1 / (1 + math.exp(-size))
        margins.append(stretch * (size if right else -size))
    found = reliability(margins)
    assert (found.error <= found.chance) == calibrated
    assert found.slope == pytest.approx(1 / stretch, abs=3 * found.slope_error)
    assert len(found.bins) == 10


def test_few_pairs_make_few_bins() -> None:
    assert len(reliability([0.1, -0.2, 0.3]).bins) == 1
    assert [each.right.n for each in reliability([0.1] * 30 + [2.0] * 30).bins] == [30, 30]


def test_the_slope_of_one_sign_column_is_the_log_odds() -> None:
    """300 of 400 right: log 3, with standard error √(400/(300·100)); the ridge moves it by less than a thousandth."""
    fit = logistic([[1.0] * 300 + [-1.0] * 100])
    assert fit.slopes[0] == pytest.approx(math.log(3), abs=2e-3)
    assert fit.errors[0] == pytest.approx(math.sqrt(400 / 30_000), abs=1e-3)


def test_of_two_columns_the_one_that_matters_has_the_slope() -> None:
    rng = random.Random(1)
    quality, length = [], []
    for _ in range(1500):
        q = rng.gauss(0, 1)
        n = q + rng.gauss(0, 1)  # length goes with quality, and adds nothing of its own
        sign = 1 if rng.random() < 1 / (1 + math.exp(-1.3 * q)) else -1
        quality.append(sign * q)
        length.append(sign * n)
    fit = logistic([quality, length])
    assert fit.slopes[0] == pytest.approx(1.3, abs=3 * fit.errors[0])
    assert abs(fit.z(1)) < 3
    assert logistic([length]).z(0) > 8


def test_separable_and_empty_columns_stay_finite() -> None:
    fit = logistic([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    assert math.isfinite(fit.slopes[0])
    assert fit.slopes[0] > 0
    assert fit.slopes[1] == 0.0


def test_what_length_explains_is_taken_out() -> None:
    pure = partial_out([3.0, -6.0, 1.5], [2.0, -4.0, 1.0])
    assert (pure.slope, pure.r2) == (1.5, 1.0)
    assert pure.residuals == pytest.approx((0.0, 0.0, 0.0))
    other = partial_out([1.0, 1.0], [1.0, -1.0])
    assert (other.slope, other.r2) == (0.0, 0.0)
    assert other.residuals == (1.0, 1.0)
    assert partial_out([1.0, 2.0], [0.0, 0.0]).residuals == (1.0, 2.0)


def test_distances_between_distributions() -> None:
    assert ks_distance([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])[0] == 0.0
    assert ks_distance([1.0, 2.0], [3.0, 4.0])[0] == 1.0
    assert ks_distance([1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0])[0] == 0.5


def test_rank_correlations() -> None:
    up = [float(i) for i in range(12)]
    ranks = rank_correlation(up, [value**3 for value in up])
    assert ranks is not None
    assert (ranks.spearman, ranks.kendall) == pytest.approx((1.0, 1.0))
    down = rank_correlation(up, up[::-1])
    assert down is not None
    assert down.spearman == pytest.approx(-1.0)
    # One neighbouring swap in 12: ρ = 1 − 6·2/(12·143), τ = 1 − 2/66.
    swapped = rank_correlation(up, [1.0, 0.0, *up[2:]])
    assert swapped is not None
    assert swapped.spearman == pytest.approx(1 - 12 / 1716)
    assert swapped.kendall == pytest.approx(1 - 2 / 66)
    assert swapped.low < swapped.spearman < swapped.high < 1


def test_no_rank_correlation_where_there_is_nothing_to_rank() -> None:
    assert rank_correlation([1.0] * 20, [float(i) for i in range(20)]) is None
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    both = [float(i) for i in range(12)]
    assert rank_correlation(both, both, n=6) is None, "twelve points of six pairs are six"


def test_histograms_hold_every_value() -> None:
    values = [float(i) for i in range(1000)] + [1e9]
    edges = histogram_edges([values, [5.0]], bins=10)
    assert len(edges) == 11
    assert sum(histogram(values, edges)) == 1001
    assert sum(histogram([7.0, 7.0], histogram_edges([[7.0, 7.0]]))) == 2
