"""Members → one score, and what becomes of answers on which they disagree: against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from reward_service.aggregate import (
    Aggregation,
    Uncertain,
    aggregate,
    judge_spread,
    on_one_scale,
    spread,
    spread_limit,
)

MEMBERS = (1.0, 2.0, 6.0)
"""Mean 3; deviations −2, −1, 3; population variance 14/3."""
STD = math.sqrt(14 / 3)


@pytest.mark.parametrize(
    ("how", "expected"), [("mean", 3.0), ("median", 2.0), ("min", 1.0), ("mean_minus_std", 3.0 - 0.5 * STD)]
)
def test_three_members(how: Aggregation, expected: float) -> None:
    assert aggregate(MEMBERS, how=how, std_coefficient=0.5) == pytest.approx(expected)
    assert aggregate(tuple(reversed(MEMBERS)), how=how, std_coefficient=0.5) == pytest.approx(expected)


@pytest.mark.parametrize("how", ["mean", "median", "min", "mean_minus_std"])
def test_a_single_member_is_itself(how: Aggregation) -> None:
    assert aggregate((2.5,), how=how) == 2.5
    assert spread((2.5,)) == 0.0


def test_members_that_order_answers_alike_do_not_disagree_for_their_offset_and_scale() -> None:
    """The second is the first, three times as steep and shifted: only on one scale is there nothing between them."""
    scales = [(0.0, 1.0), (10.0, 3.0)]
    for score in (-1.0, 0.0, 2.0):
        members = (score, 10.0 + 3.0 * score)
        assert spread(members) > 1.0
        assert on_one_scale(members, scales) == pytest.approx([2.0 * score] * 2), "the mean of the scales is 2"


def test_scores_without_scales_stay_and_a_constant_member_stays_finite() -> None:
    assert on_one_scale((2.5,), ()) == [2.5]
    assert on_one_scale((7.0, 1.0), [(7.0, 0.0), (0.0, 2.0)]) == [0.0, 0.5]


def test_the_median_of_an_even_number_is_between_the_two_in_the_middle() -> None:
    assert aggregate((9.0, 1.0, 2.0, 4.0), how="median") == 3.0


def test_no_members_are_no_score() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        aggregate(())


def test_the_spread_is_over_the_members_there_are() -> None:
    assert spread(MEMBERS) == pytest.approx(STD)
    assert spread((1e8, 1e8 + 2.0)) == pytest.approx(1.0)  # no cancellation far from 0


def test_a_limit_is_read_off_the_percentiles() -> None:
    percentiles = [float(number) / 10 for number in range(101)]  # 0.0, 0.1, … 10.0
    assert spread_limit(percentiles, quantile=0.95) == pytest.approx(9.5)
    assert spread_limit(percentiles, quantile=0.955) == pytest.approx(9.55)
    assert spread_limit(percentiles, quantile=1.0) == 10.0
    assert spread_limit(percentiles, quantile=0.0) == 0.0
    assert spread_limit([], quantile=0.95) is None


@pytest.mark.parametrize("uncertain", ["keep", "down_weight", "reject"])
def test_only_a_spread_over_the_limit_is_uncertain(uncertain: Uncertain) -> None:
    assert judge_spread(2.5, limit=2.4, uncertain=uncertain) == uncertain
    assert judge_spread(2.4, limit=2.4, uncertain=uncertain) == "keep"
    assert judge_spread(99.0, limit=None, uncertain=uncertain) == "keep"
