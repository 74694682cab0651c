"""Numbers of an evaluation against worked examples."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.winrate import (
    MIN_LENGTH_CONTROLLED,
    agreement,
    length_controlled,
    perplexity_ratio,
    shift,
    versus_fields,
    win_rate,
)

OUTCOMES = st.sampled_from([0.0, 0.5, 1.0, None])


def test_a_win_rate_counts_ties_half_and_has_wilsons_interval() -> None:
    rate = win_rate([1.0] * 70 + [0.0] * 20 + [0.5] * 10 + [None] * 5)
    assert rate is not None
    assert (rate.share, rate.n) == (0.75, 100)
    # (75.5 + 1.92073)/103.84146 ± … by Wilson's formula with z = 1.959964, p = 0.75, n = 100
    z = 1.959964
    centre = (0.75 + z * z / 200) / (1 + z * z / 100)
    reach = z / (1 + z * z / 100) * math.sqrt(0.75 * 0.25 / 100 + z * z / 40_000)
    assert (rate.low, rate.high) == pytest.approx((centre - reach, centre + reach), abs=1e-9)
    assert (rate.low, rate.high) == pytest.approx((0.6570, 0.8246), abs=2e-4)
    assert win_rate([None, None]) is None
    assert win_rate([]) is None


@given(st.lists(OUTCOMES, max_size=60))
def test_swapping_the_sides_mirrors_the_win_rate(outcomes: list[float | None]) -> None:
    rate = win_rate(outcomes)
    mirrored = win_rate([None if won is None else 1.0 - won for won in outcomes])
    if rate is None or mirrored is None:
        assert rate is mirrored
        return
    assert rate.low - 1e-9 <= rate.share <= rate.high + 1e-9
    assert (mirrored.share, mirrored.low, mirrored.high) == pytest.approx((1 - rate.share, 1 - rate.high, 1 - rate.low))


def test_a_judge_of_length_alone_leaves_no_win_at_equal_length() -> None:
    rng = random.Random(0)
    deltas = [rng.gauss(10.0, 12.0) for _ in range(400)]
    outcomes: list[float | None] = [float(rng.random() < 1 / (1 + math.exp(-delta / 6))) for delta in deltas]
    rate = win_rate(outcomes)
    assert rate is not None
    assert rate.share > 0.7
    controlled = length_controlled(outcomes, deltas)
    assert controlled == pytest.approx(0.5, abs=0.08)


def test_a_policy_that_is_better_at_any_length_keeps_its_win_rate() -> None:
    rng = random.Random(1)
    deltas = [rng.gauss(0.0, 12.0) for _ in range(400)]
    outcomes: list[float | None] = [float(rng.random() < 0.8) for _ in deltas]
    assert length_controlled(outcomes, deltas) == pytest.approx(0.8, abs=0.05)


def test_without_a_length_effect_theta_is_the_log_odds() -> None:
    """Lengths as often longer as shorter in wins and in losses: φ = 0 and σ(θ) = the share of wins, 3 of 4."""
    outcomes: list[float | None] = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0] * 10
    deltas = [4.0, -4.0, 4.0, -4.0, 4.0, -4.0, 4.0, -4.0] * 10
    assert length_controlled(outcomes, deltas) == pytest.approx(0.75, abs=2e-3)
    assert length_controlled([0.5] * 40, [1.0, -1.0] * 20) == pytest.approx(0.5, abs=1e-6)


def test_equal_length_is_not_guessed_at_from_longer_answers_alone_or_from_a_few() -> None:
    outcomes: list[float | None] = [1.0, 0.0] * 20
    assert length_controlled(outcomes, [5.0 + number for number in range(40)]) is None
    few = MIN_LENGTH_CONTROLLED - 1
    assert length_controlled(outcomes[:few], [1.0, -1.0, 1.0, -1.0] * 4 + [0.0] * 3) is None


def test_agreement_is_over_pairs_with_a_winner() -> None:
    outcomes = [1.0, 1.0, 0.0, 0.0, 0.5, None]
    margins = [2.0, -1.0, -3.0, 0.0, 9.0, 9.0]
    assert agreement(5 * outcomes, 5 * margins) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert agreement(4 * outcomes, 4 * margins) is None, "16 pairs with a winner say too little to roll back for"
    assert agreement([0.5, None], [1.0, 1.0]) is None


def test_a_shift_is_in_standard_deviations_of_the_baseline() -> None:
    baseline = [-1.0, 1.0, -1.0, 1.0]
    moved = shift([2.0, 4.0, 2.0, 4.0], baseline=baseline)
    assert moved is not None
    assert (moved.ks, moved.z) == (1.0, 3.0)
    down = shift([-1.0, -1.0, -1.0, 1.0], baseline=baseline)
    assert down is not None
    assert (down.ks, down.z) == (0.25, -0.5)
    assert shift([1.0], baseline=baseline) is None


def test_perplexity_ratio() -> None:
    assert perplexity_ratio(2.0 + math.log(1.5), before=2.0) == pytest.approx(1.5)
    assert math.isfinite(perplexity_ratio(1e6, before=0.0))


def test_what_cannot_be_told_is_null() -> None:
    fields = versus_fields([None, 1.0], token_differences=[1.0, 2.0], reward_margins=None)
    assert fields["win_rate"] == 1.0
    assert fields["win_rate_length_controlled"] is None
    assert fields["rm_judge_agreement"] is None
    assert versus_fields([None], token_differences=[1.0], reward_margins=[1.0])["win_rate_low"] is None
