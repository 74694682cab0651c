"""KL controllers, budget and normaliser against tables computed by hand."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs import run as config
from learner.algo.kl import AdaptiveKl, ConstrainedKl, FixedKl, KlBudget, KlState
from learner.algo.normalise import RunningMoments, ScoreNormaliser
from learner.kl_control import kl_budget, kl_controller

ADAPTIVE = AdaptiveKl(beta_init=0.1, target_nats_per_sequence=6.0, horizon_samples=1000, beta_min=1e-4, beta_max=10.0)


@pytest.mark.parametrize(
    ("kl", "samples", "beta"),
    [
        (6.0, 100, 0.1),  # on target
        (6.6, 100, 0.101),  # error +0.1: 0.1·(1 + 0.1·0.1)
        (9.0, 100, 0.102),  # error 0.5, clamped to 0.2
        (5.4, 100, 0.099),  # error −0.1
        (0.0, 100, 0.098),  # error −1, clamped to −0.2
        (-1.0, 100, 0.098),  # a negative estimate is noise
        (0.0, 1000, 0.08),
        (0.0, 6000, 0.05),  # unbounded the multiplier would be 1 − 0.2·6 = −0.2; bounded it halves
        (60.0, 6000, 0.15),
    ],
)
def test_adaptive_table(kl: float, samples: int, beta: float) -> None:
    got = ADAPTIVE.update(KlState(0.1), kl_nats_per_sequence=kl, samples=samples)
    assert got.beta == pytest.approx(beta)


def test_adaptive_target_scales_with_the_budget() -> None:
    """Half the target of 6: a KL of 3.3 is 10 % over."""
    got = ADAPTIVE.update(KlState(0.1), kl_nats_per_sequence=3.3, samples=100, scale=0.5)
    assert got.beta == pytest.approx(0.101)


@given(st.lists(st.tuples(st.floats(-100, 1e6), st.integers(1, 10**6)), max_size=40))
def test_adaptive_beta_stays_positive_and_bounded(steps: list[tuple[float, int]]) -> None:
    state = ADAPTIVE.initial()
    for kl, samples in steps:
        state = ADAPTIVE.update(state, kl_nats_per_sequence=kl, samples=samples)
        assert 1e-4 <= state.beta <= 10.0


def test_fixed_never_moves() -> None:
    controller = FixedKl(beta=0.3)
    assert controller.update(controller.initial(), kl_nats_per_sequence=99.0, samples=10).beta == 0.3


@pytest.mark.parametrize(("kl", "beta"), [(6.0, 0.105127), (3.0, 0.1), (0.0, 0.095123), (1e9, 0.128403)])
def test_constrained_table(kl: float, beta: float) -> None:
    """Limit 3, rate 0.05: e^{±0.05} by one limit's worth, and e^{0.25} at most."""
    controller = ConstrainedKl(
        beta_init=0.1, limit_nats_per_sequence=3.0, dual_learning_rate=0.05, beta_min=1e-4, beta_max=10.0
    )
    got = controller.update(controller.initial(), kl_nats_per_sequence=kl, samples=128)
    assert got.beta == pytest.approx(beta, rel=1e-5)


def test_constrained_finds_the_multiplier_of_a_toy_problem() -> None:
    """A policy whose KL at price β is 1/β: the constraint KL ≤ 4 is met with β = 0.25."""
    controller = ConstrainedKl(
        beta_init=2.0, limit_nats_per_sequence=4.0, dual_learning_rate=0.2, beta_min=1e-4, beta_max=10.0
    )
    state = controller.initial()
    for _ in range(200):
        state = controller.update(state, kl_nats_per_sequence=1.0 / state.beta, samples=1)
    assert state.beta == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_controllers_refuse_a_kl_that_is_not_finite(kl: float) -> None:
    for controller in (ADAPTIVE, FixedKl(beta=0.1)):
        with pytest.raises(ValueError, match="finite"):
            controller.update(KlState(0.1), kl_nats_per_sequence=kl, samples=1)


def test_state_survives_json() -> None:
    state = KlState(0.1).moved(0.25).moved(-0.1).moved(0.5)
    assert state.cumulative_nats_per_sequence == 0.75
    assert KlState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_budget_widens_linearly() -> None:
    budget = KlBudget(start=0.2, widen_steps=4)
    assert [budget.scale_at(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert KlBudget().scale_at(0) == 1.0
    assert KlBudget(start=0.0, widen_steps=4).scale_at(0) > 0.0


def test_budget_is_spent_past_its_bound_only() -> None:
    budget = KlBudget(cumulative_nats_per_sequence=1.0)
    assert not budget.is_spent(KlState(0.1, 1.0))
    assert budget.is_spent(KlState(0.1, 1.0001))
    assert not KlBudget().is_spent(KlState(0.1, 1e9))


def test_the_spent_share_is_of_the_bound_and_past_1_once_it_is_spent() -> None:
    budget = KlBudget(cumulative_nats_per_sequence=8.0)
    assert [budget.spent_share(KlState(0.1, spent)) for spent in (0.0, 2.0, 8.0, 10.0)] == [0.0, 0.25, 1.0, 1.25]
    assert KlBudget().spent_share(KlState(0.1, 1e9)) is None


def test_controllers_from_the_configuration() -> None:
    assert kl_controller(config.FixedKl(beta=0.2)) == FixedKl(beta=0.2)
    adaptive = kl_controller(config.AdaptiveKl(target_nats_per_sequence=5.0))
    assert adaptive.target_nats_per_sequence == 5.0
    assert adaptive.initial().beta == 0.1
    assert kl_controller(config.ConstrainedKl(limit_nats_per_sequence=2.0)).target_nats_per_sequence == 2.0
    assert kl_budget(config.KlBudget(start=0.5, widen_steps=2)).scale_at(1) == 0.75


# ---------------------------------------------------------------- normaliser


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=8), min_size=1, max_size=6))
def test_merged_moments_are_the_moments_of_everything(chunks: list[list[float]]) -> None:
    moments = RunningMoments()
    for chunk in chunks:
        moments = moments.merge(chunk)
    everything = [score for chunk in chunks for score in chunk]
    assert moments.count == len(everything)
    if everything:
        assert moments.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
        assert moments.std == pytest.approx(statistics.pstdev(everything), abs=1e-5)


def test_normalise_by_hand() -> None:
    """Calibrated with mean 3, std 2: 4 → 0.5, 9 → 3, clipped to 1.5."""
    normaliser = ScoreNormaliser().calibrated("rm-1", mean=3.0, std=2.0, count=100)
    got = normaliser.normalise("rm-1", torch.tensor([4.0, 9.0, -9.0]), clip=1.5)
    assert got.tolist() == pytest.approx([0.5, 1.5, -1.5])


def test_calibration_counts_as_so_many_scores() -> None:
    """100 scores with mean 0, std 1, and 100 equal to 2: mean 1, variance (100 + 100·4)/200 − 1 = 1.5."""
    normaliser = ScoreNormaliser().calibrated("rm-1", mean=0.0, std=1.0, count=100).observe("rm-1", [2.0] * 100)
    assert normaliser.moments["rm-1"].mean == pytest.approx(1.0)
    assert normaliser.moments["rm-1"].std == pytest.approx(math.sqrt(1.5))
    assert normaliser.calibrated("rm-1", mean=9.0, std=9.0, count=9) is normaliser


def test_versions_do_not_mix() -> None:
    normaliser = ScoreNormaliser().observe("rm-1", [0.0, 2.0]).observe("rm-2", [100.0, 300.0])
    assert normaliser.normalise("rm-1", torch.tensor([2.0]), clip=5.0).item() == pytest.approx(1.0)
    assert normaliser.normalise("rm-2", torch.tensor([300.0]), clip=5.0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("score", [0.0, 0.1, 1e6])
def test_a_constant_score_is_zero(score: float) -> None:
    normaliser = ScoreNormaliser()
    for _ in range(50):
        normaliser = normaliser.observe("rm-1", [score] * 7)
    assert normaliser.normalise("rm-1", torch.tensor([score], dtype=torch.float64), clip=5.0).item() == pytest.approx(
        0.0, abs=1e-3
    )


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(score: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        ScoreNormaliser().observe("rm-1", [0.0, score])
    with pytest.raises(ValueError, match="finite"):
        ScoreNormaliser().normalise("rm-1", torch.tensor([score]), clip=5.0)


def test_normaliser_survives_json() -> None:
    normaliser = ScoreNormaliser().calibrated("rm-1", mean=0.5, std=2.0, count=10).observe("rm-2", [1.0, 4.0])
    assert ScoreNormaliser.from_dict(json.loads(json.dumps(normaliser.to_dict()))) == normaliser
