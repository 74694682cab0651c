"""Signals of rewards and of movement: worked numbers, and what cannot be told."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.guard import movement
from learner.guard.reference import RewardScale
from learner.guard.reward_signals import (
    Floats,
    ceiling_fraction,
    jump,
    ks_distance,
    spearman,
    spearman_partial,
    spearman_within,
    std_ratio,
    uncertainty_ratio,
)
from learner.guard.reward_watch import RewardWatch

FINITE = st.floats(-100, 100)


def rising(count: int, *, start: float = 0.0) -> Floats:
    return floats(*(start + place for place in range(count)))


def floats(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


def test_the_ceiling_is_on_a_scale_of_eight_deviations() -> None:
    """0.8 of it is 2.4 deviations over the mean."""
    assert ceiling_fraction(floats(2.41, 2.39, 9.0, -9.0), ceiling=0.8) == 0.5
    assert ceiling_fraction(floats(), ceiling=0.8) is None


def test_the_std_ratio_ends_at_0_for_constant_rewards() -> None:
    assert std_ratio(floats(1, 3), baseline_std=2.0) == 0.5
    assert std_ratio(floats(1, 1, 1), baseline_std=2.0) == 0.0
    assert std_ratio(floats(1, 3), baseline_std=0.0) is None
    assert std_ratio(floats(1, 1), baseline_std=0.0) == 0.0, "constant from the start"


def test_a_jump_is_of_the_mean_or_of_the_spread() -> None:
    def moved(*rewards: float) -> float | None:
        return jump(floats(*rewards), recent_means=[0.0, 0.1, 9.0], recent_stds=[1.0, 1.0, 8.0], baseline_std=1.0)

    assert moved(0.1, 2.1) == pytest.approx(1.0), "1.1 − 0.1, of spread 1"
    assert moved(-4.9, 5.1) == pytest.approx(4.0), "five times the spread, the mean as before"
    assert jump(floats(0.1, 2.1), recent_means=[], recent_stds=[], baseline_std=1.0) is None


def test_a_collapsed_spread_is_no_yardstick() -> None:
    rewards = floats(1.0, 1.1)
    assert jump(rewards, recent_means=[1.0], recent_stds=[0.0], baseline_std=1.0) == pytest.approx(0.5)
    assert jump(rewards, recent_means=[1.0], recent_stds=[0.0], baseline_std=0.0) is None


def test_ks_distance() -> None:
    assert ks_distance(rising(8), baseline=rising(8, start=4)) == pytest.approx(0.5)
    assert ks_distance(rising(8), baseline=rising(8, start=100)) == 1.0
    assert ks_distance(rising(7), baseline=rising(8)) is None


def test_uncertainty_is_absent_for_a_single_model() -> None:
    assert uncertainty_ratio(floats(0.2, 0.4), reference_spread=0.1) == pytest.approx(3.0)
    assert uncertainty_ratio(floats(0, 0), reference_spread=0.1) is None
    assert uncertainty_ratio(floats(0.2), reference_spread=None) is None


@given(st.lists(st.tuples(st.integers(1, 50), FINITE), min_size=8, max_size=20))
@settings(max_examples=100, deadline=None)
def test_spearman_depends_on_ranks_alone(rows: list[tuple[int, float]]) -> None:
    lengths, rewards = floats(*(length for length, _ in rows)), floats(*(round(reward, 3) for _, reward in rows))
    found = spearman(lengths, rewards=rewards)
    assert found == spearman(floats(*lengths**3), rewards=floats(*rewards * 0.5 + 7))
    assert found is None or -1 <= found <= 1
    backwards = spearman(lengths, rewards=floats(*-rewards))
    assert (backwards is None) == (found is None)
    if found is not None and backwards is not None:
        assert backwards == pytest.approx(-found, abs=1e-9)


def test_the_partial_correlation_tells_what_is_paid_from_what_comes_with_it() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.normal(size=2000)
    repeats = lengths + rng.normal(size=2000)
    for paid in (lengths, repeats, lengths + repeats):
        rewards = paid + 0.5 * rng.normal(size=2000)
        by_length = spearman_partial(lengths, rewards=rewards, given=repeats) or 0.0
        by_repeats = spearman_partial(repeats, rewards=rewards, given=lengths) or 0.0
        assert (by_length > 0.4) == (paid is not repeats)
        assert (by_repeats > 0.4) == (paid is not lengths)
    assert spearman_partial(lengths, rewards=lengths, given=lengths) is None, "all of it is told by what is held fixed"
    assert spearman_partial(lengths, rewards=floats(*[1.0] * 2000), given=repeats) is None


def test_the_partial_correlation_of_normals() -> None:
    """Three that correlate by 0.5: rank correlations r = 6/π · asin(0.25) = 0.4826, and (r − r²)/(1 − r²) = 0.3255."""
    rng = np.random.default_rng(5)
    common = rng.normal(size=200_000)
    one, two, three = (common + rng.normal(size=200_000) for _ in range(3))
    assert spearman_partial(one, rewards=two, given=three) == pytest.approx(0.3255, abs=0.01)


def test_spearman_of_constants_few_and_nan_cannot_be_told() -> None:
    assert spearman(floats(*[1.0] * 8), rewards=rising(8)) is None
    assert spearman(rising(8), rewards=floats(*[1.0] * 8)) is None
    assert spearman(rising(7), rewards=rising(7)) is None
    assert spearman(rising(8), rewards=floats(*[math.nan] * 8)) is None


def test_within_a_prompt_is_told_from_between_prompts() -> None:
    """Prompts that ask for long answers pay more, but of a prompt's own answers the shorter one does."""
    lengths = floats(10, 12, 20, 22, 30, 32, 40, 42)
    rewards = floats(1.1, 1.0, 2.1, 2.0, 3.1, 3.0, 4.1, 4.0)
    groups = list("aabbccdd")
    overall, within = spearman(lengths, rewards=rewards), spearman_within(lengths, rewards=rewards, groups=groups)
    assert overall is not None
    assert overall > 0.8
    assert within == -1.0
    assert spearman_within(lengths, rewards=rewards, groups=list("abcdefgh")) is None


def test_theil_sen_is_not_moved_by_one_wild_step() -> None:
    assert movement.theil_sen(range(10), values=[0.5 * step for step in range(10)]) == 0.5
    assert movement.theil_sen(range(10), values=[*(0.5 * step for step in range(9)), 500.0]) == 0.5
    assert movement.theil_sen([1, 2, 3, 4], values=[1, 2, 3, 4]) is None
    assert movement.theil_sen([1] * 5, values=[1, 2, 3, 4, 5]) is None


def test_the_norm_ratio_is_over_the_median_before() -> None:
    assert movement.norm_ratio(6.0, earlier=[1, 2, 3, 2, 100]) == 3.0
    assert movement.norm_ratio(6.0, earlier=[1, 2, 3, 2]) is None
    assert movement.norm_ratio(6.0, earlier=[0.0] * 5) is None


def test_only_finite_numbers_are_taken_from_a_record() -> None:
    record = {"proxy_z": 1, "clip_fraction": math.nan, "value_error_ratio": None, "entropy_nats_per_token": True}
    assert movement.recorded(record | {"kl_nats_per_sequence": "5", "step": 3}) == {"proxy_z": 1.0}


# ------------------------------------------------------------ over a run


@dataclass(frozen=True)
class View:
    step: int
    rewards: tuple[float, ...]
    rm_versions: tuple[str, ...]
    spreads: tuple[float, ...]


SCALES = {"old": RewardScale(0.0, 1.0, 0.1), "new": RewardScale(10.0, 5.0, 0.5)}


def batch(step: int, *, mean: float, std: float = 1.0, version: str = "old", spread: float = 0.0) -> View:
    """Eight rewards of exactly this mean and standard deviation."""
    return View(step, tuple(mean + std * sign for sign in (-1, 1) * 4), (version,) * 8, (spread,) * 8)


def watch(rewards: Floats | None = None) -> RewardWatch:
    known = rewards is not None
    return RewardWatch(
        SCALES.get,
        ceiling=0.8,
        rewards=floats() if rewards is None else rewards,
        rewards_version="old" if known else None,
    )


def test_rewards_count_in_deviations_of_their_own_version() -> None:
    for version, mean, std in (("old", 0.5, 0.4), ("new", 12.5, 2.0)):
        signals = watch(np.linspace(-1, 1, 20)).read(batch(5, mean=mean, std=std, version=version, spread=0.2))
        assert signals["reward_std_ratio"] == pytest.approx(0.4)
        assert signals["reward_ks"] == pytest.approx(0.55)
    assert signals["uncertainty_ratio"] == pytest.approx(0.4), "of the newer version's own spread"


def test_a_scale_that_jumps_is_seen_and_a_new_version_is_none() -> None:
    watched = watch()
    assert [watched.read(batch(step, mean=0.1, version="old"))["reward_jump"] for step in (1, 2, 3)] == [None] * 3
    assert watched.read(batch(4, mean=0.1))["reward_jump"] == pytest.approx(0.0)
    jumps = [watched.read(batch(step, mean=0.5, std=5.0))["reward_jump"] for step in range(5, 9)]
    assert jumps[:3] == [pytest.approx(4.0)] * 3
    assert watched.read(batch(9, mean=12.0, std=25.0, version="new"))["reward_jump"] is None


def test_a_batch_of_two_versions_is_no_yardstick() -> None:
    watched = watch()
    for step in range(1, 5):
        watched.read(batch(step, mean=0.0))
    halves = batch(5, mean=0.0).rewards[:4] + batch(5, mean=10.0, std=5.0).rewards[:4]
    mixed = View(5, halves, ("old",) * 4 + ("new",) * 4, (0.0,) * 8)
    signals = watched.read(mixed)
    assert signals["reward_jump"] is None
    assert signals["reward_std_ratio"] == pytest.approx(1.0)
    assert [watched.read(batch(step, mean=10.0, version="new"))["reward_jump"] for step in (6, 7, 8)] == [None] * 3


def test_without_a_calibration_the_first_step_is_the_baseline_for_its_version_alone() -> None:
    watched = watch()
    watched.read(batch(1, mean=100.0, std=2.0, version="none~rules", spread=0.1))
    state = json.loads(json.dumps(watched.to_state()))
    resumed = watch()
    resumed.load_state(state)
    for one in (watched, resumed):
        signals = one.read(batch(2, mean=106.0, std=0.5, version="none~rules", spread=0.3))
        assert signals["reward_std_ratio"] == pytest.approx(0.25)
        assert signals["score_ceiling_fraction"] == 1.0
        assert signals["reward_ks"] == 1.0
        assert signals["uncertainty_ratio"] == pytest.approx(3.0)
        other = one.read(batch(3, mean=1.0, version="other~rules"))
        assert {name for name, value in other.items() if value is not None} == set()


def test_a_guard_that_begins_in_mid_run_has_no_baseline_of_its_own() -> None:
    signals = watch().read(batch(40, mean=3.0, version="none~rules"))
    assert all(value is None for value in signals.values())


def test_rewards_that_are_not_finite_tell_nothing() -> None:
    watched = watch()
    assert watched.read(View(1, (math.nan, 1.0), ("old", "old"), (0.0, 0.0))) == {}


def test_a_first_spread_that_is_not_finite_is_not_known() -> None:
    watched = watch()
    for step in (1, 2):
        signals = watched.read(batch(step, mean=0.0, version="other", spread=math.nan if step == 1 else 0.4))
        json.dumps(watched.to_state(), allow_nan=False)
    assert signals["uncertainty_ratio"] is None
