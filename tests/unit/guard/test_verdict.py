"""Patience, hysteresis and levels: worked sequences, and what holds for all of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.guard import Above, Below, GuardSection, Thresholds
from learner.guard.record import Level, Verdict
from learner.guard.verdict import MEASURED, SIGNALS, VerdictState, describe, judge, over_threshold

KL = "kl_nats_per_sequence"
ENTROPY = "entropy_nats_per_token"
RANK = {Level.OK: 0, Level.WARN: 1, Level.ACT: 2}
NAN = math.nan


LIMITS = Thresholds(kl_nats_per_sequence=Above(warn=8.0, act=10.0), entropy_nats_per_token=Below(warn=0.15, act=0.1))


def section(**changes: Any) -> GuardSection:
    return GuardSection(**{"warmup_steps": 0, "patience_steps": 3, "thresholds": LIMITS, **changes})


def verdicts(steps: Sequence[dict[str, float]], settings: GuardSection | None = None) -> list[Verdict]:
    state, found = VerdictState(), []
    for values in steps:
        state, verdict = judge(state, values, section=settings or section())
        found.append(verdict)
    return found


def levels(values: Sequence[float], settings: GuardSection | None = None, *, name: str = KL) -> str:
    """A letter a step: o, w, a. KL warns over 8 and acts over 10."""
    return "".join(verdict.level.value[0] for verdict in verdicts([{name: value} for value in values], settings))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([9, 9, 9], "oow"),
        ([11, 11, 11], "ooa"),
        ([9, 9, 11, 11, 11], "oowwa"),
        ([11, 11, 7, 11, 11], "ooooo"),  # one back within starts the count anew
        ([11, 11, 11, 8.5, 8.5, 8.5], "ooaaaw"),  # clear of act (9) and not of warn (7.2)
        ([11, 11, 11, 9.5, 9.5, 9.5, 9.5], "ooaaaaa"),  # under the threshold, but not by a tenth
        ([11, 11, 11, 7, 7, 7], "ooaaao"),
        ([11, 11, 11, 7, 7, 9.5, 7, 7, 7], "ooaaaaaao"),
        ([10, 10, 10], "oow"),  # at the threshold is not over it
        ([NAN, NAN, NAN], "ooa"),
        ([math.inf] * 3, "ooa"),
        ([-math.inf] * 3, "ooo"),
    ],
)
def test_sequences(values: list[float], expected: str) -> None:
    assert levels(values) == expected


def test_low_is_bad_for_some() -> None:
    assert levels([0.12] * 3 + [0.05] * 3 + [0.14] * 3 + [0.2] * 3, name=ENTROPY) == "oowwwaaawwwo"


def test_a_warm_up_counts_for_nothing() -> None:
    assert levels([99.0] * 5, section(warmup_steps=2)) == "oooo" + "a"


def test_an_absent_signal_stays_as_it_is() -> None:
    steps: list[dict[str, float]] = [{KL: 11}, {KL: 11}, {}, {}, {KL: 11}, {}]
    assert [verdict.level.value for verdict in verdicts(steps)] == ["ok", "ok", "ok", "ok", "act", "act"]


def test_a_signal_that_can_be_told_no_more_does_not_count_for_ever() -> None:
    alarmed: list[dict[str, float]] = [{KL: 11}] * 3
    assert [one.level.value for one in verdicts([*alarmed, *[{}] * 6], section(cool_down_steps=4))] == [
        "ok", "ok", "act", "act", "act", "act", "act", "ok", "ok",
    ]  # fmt: skip
    seen_again: list[dict[str, float]] = [*alarmed, {}, {}, {}, {KL: 11}, {}, {}, {}]
    assert verdicts(seen_again, section(cool_down_steps=4))[-1].level is Level.ACT
    measured: list[dict[str, float]] = [{"win_rate": 0.3}] * 2 + [{}] * 9
    assert verdicts(measured, section(cool_down_steps=4))[-1].level is Level.ACT, "until it is measured again"


def test_measurements_have_a_patience_of_their_own() -> None:
    assert {"win_rate", "canary_z"} <= MEASURED <= set(SIGNALS)
    steps: list[dict[str, float]] = [{"win_rate": 0.3}, {}, {}, {"win_rate": 0.3}]
    assert [verdict.level.value for verdict in verdicts(steps)] == ["ok", "ok", "ok", "act"]
    assert verdicts(steps, section(patience_measurements=1))[0].act == ("win_rate",)


def test_the_level_is_that_of_the_worst_and_says_why() -> None:
    last = verdicts([{KL: 9.0, ENTROPY: 0.05, "canary_z": 1.0}] * 3)[-1]
    assert (last.level, last.act, last.warn) == (Level.ACT, (ENTROPY,), (KL,))
    assert last.why == "entropy_nats_per_token 0.05 (act under 0.1); kl_nats_per_sequence 9 (warn over 8)"


def test_a_threshold_that_is_off_never_speaks() -> None:
    off = section(thresholds=Thresholds(kl_nats_per_sequence=Above()))
    assert levels([1e9, NAN, 1e9, 1e9], off) == "oooo"
    warn_only = section(thresholds=Thresholds(kl_nats_per_sequence=Above(warn=1.0)))
    assert levels([1e9] * 5, warn_only) == "oowww"
    act_only = section(thresholds=Thresholds(kl_nats_per_sequence=Above(act=1.0)))
    assert levels([1e9] * 5, act_only) == "ooaaa"


def test_a_threshold_that_was_taken_away_speaks_no_more_though_its_signal_is_absent() -> None:
    """As after a resume with other settings, before the next measurement."""
    state = VerdictState()
    for _ in range(5):
        state, verdict = judge(state, {KL: 11.0, ENTROPY: 0.11}, section=section())
    assert (verdict.act, verdict.warn) == ((KL,), (ENTROPY,))
    off = section(thresholds=Thresholds(kl_nats_per_sequence=Above()))
    state, verdict = judge(VerdictState.from_state(state.to_state()), {}, section=off)
    assert (verdict.level, verdict.act, verdict.warn) == (Level.WARN, (), (ENTROPY,))
    assert list(state.signals) == [ENTROPY]
    only_warn = section(thresholds=Thresholds(entropy_nats_per_token=Below(act=0.1)))
    assert judge(state, {}, section=only_warn)[1].level is Level.OK


def test_negative_thresholds_and_zero() -> None:
    """Back within is a tenth of its size further on the good side; of 0, anywhere on it."""
    negative = section(patience_steps=1, thresholds=Thresholds(kl_nats_per_sequence=Above(act=-1.0)))
    assert levels([-0.5, -1.05, -1.1], negative) == "aao"
    zero = section(patience_steps=1, thresholds=Thresholds(win_rate=Below(warn=0.0)), patience_measurements=1)
    assert levels([-0.1, 0.0], zero, name="win_rate") == "wo"


def test_over_threshold_needs_no_patience() -> None:
    assert over_threshold({KL: 8.5, ENTROPY: 1.0, "canary_z": NAN}, section=section()) == (KL, "canary_z")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="no_such"):
        judge(VerdictState(), {"no_such": 1.0}, section=section())


def test_descriptions() -> None:
    text = describe("win_rate", 0.31, level=Level.WARN, section=section())
    assert text == "win_rate 0.31 (warn under 0.5, the upper end of its interval)"
    assert describe(KL, None, level=Level.ACT, section=section()) == "kl_nats_per_sequence (act over 10)"


# ---------------------------------------------------------------- what holds for all sequences

number = st.floats(min_value=-20.0, max_value=20.0) | st.sampled_from([7.2, 8.0, 9.0, 10.0, math.inf, NAN])
above = st.tuples(number, number).filter(lambda two: two[0] <= two[1] and math.isfinite(two[1])).filter(
    lambda two: math.isfinite(two[0])
)  # fmt: skip
some_settings = st.builds(
    lambda limits, patience, hysteresis, warmup: section(
        thresholds=Thresholds(kl_nats_per_sequence=Above(warn=limits[0], act=limits[1])),
        patience_steps=patience,
        hysteresis=hysteresis,
        warmup_steps=warmup,
    ),
    above,
    st.integers(1, 4),
    st.floats(0.0, 1.0),
    st.integers(0, 3),
)
sequences = st.lists(number, max_size=40)


def is_over(value: float, threshold: float | None) -> bool:
    assert threshold is not None
    return math.isnan(value) or value > threshold


@settings(deadline=None)
@given(sequences, some_settings)
def test_a_level_rises_only_after_patience(values: list[float], one: GuardSection) -> None:
    limits = one.thresholds.kl_nats_per_sequence
    before = Level.OK
    for place, verdict in enumerate(verdicts([{KL: value} for value in values], one)):
        recent = values[one.warmup_steps : place + 1][-one.patience_steps :]
        enough = len(recent) == one.patience_steps
        if RANK[verdict.level] > RANK[before]:
            threshold = limits.act if verdict.level is Level.ACT else limits.warn
            assert enough
            assert all(is_over(value, threshold) for value in recent)
        if enough and all(is_over(value, limits.act) for value in recent):
            assert verdict.level is Level.ACT
        before = verdict.level


@settings(deadline=None)
@given(sequences, some_settings)
def test_a_value_inside_never_raises_and_one_over_never_lowers(values: list[float], one: GuardSection) -> None:
    limits = one.thresholds.kl_nats_per_sequence
    before = Level.OK
    for value, verdict in zip(values, verdicts([{KL: value} for value in values], one), strict=True):
        if not is_over(value, limits.warn):
            assert RANK[verdict.level] <= RANK[before]
        if is_over(value, limits.act):
            assert RANK[verdict.level] >= RANK[before]
        before = verdict.level


@settings(deadline=None)
@given(st.lists(st.floats(9.01, 10.99), max_size=60), st.integers(1, 4))
def test_no_flapping_at_the_threshold(values: list[float], patience: int) -> None:
    """A signal that wanders about its threshold, but never clears it by a tenth, changes its level once at most."""
    one = section(patience_steps=patience, thresholds=Thresholds(kl_nats_per_sequence=Above(act=10.0)))
    found = levels(values, one)
    assert found == found.replace("a", "") + "a" * found.count("a")


@settings(deadline=None)
@given(st.lists(st.tuples(number, st.floats(0.0, 10.0)), max_size=40), some_settings)
def test_worse_values_never_give_a_better_level(steps: list[tuple[float, float]], one: GuardSection) -> None:
    good = verdicts([{KL: value} for value, _ in steps], one)
    bad = verdicts([{KL: value + more} for value, more in steps], one)
    assert all(RANK[a.level] <= RANK[b.level] for a, b in zip(good, bad, strict=True))


many = st.dictionaries(st.sampled_from(SIGNALS), st.floats(-100, 100), max_size=len(SIGNALS))


@settings(max_examples=50, deadline=None)
@given(st.lists(many, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_signals_does_not_matter(steps: list[dict[str, float]], rng: random.Random) -> None:
    def shuffled(values: dict[str, float]) -> dict[str, float]:
        return dict(rng.sample(sorted(values.items()), len(values)))

    assert verdicts(steps) == verdicts([shuffled(values) for values in steps])


@settings(max_examples=50, deadline=None)
@given(st.lists(many, max_size=12))
def test_signals_do_not_meddle_and_the_level_is_the_worst(steps: list[dict[str, float]]) -> None:
    together = verdicts(steps)
    alone = {name: verdicts([{name: v[name]} if name in v else {} for v in steps]) for name in SIGNALS}
    for place, verdict in enumerate(together):
        each = {name: one[place].level for name, one in alone.items()}
        assert verdict.act == tuple(name for name in SIGNALS if each[name] is Level.ACT)
        assert verdict.warn == tuple(name for name in SIGNALS if each[name] is Level.WARN)
        assert RANK[verdict.level] == max(RANK[level] for level in each.values())


@settings(max_examples=50, deadline=None)
@given(st.lists(many, max_size=12), st.integers(0, 12))
def test_the_state_comes_back_from_json_at_any_step(steps: list[dict[str, float]], at: int) -> None:
    state, whole = VerdictState(), verdicts(steps)
    found = []
    for place, values in enumerate(steps):
        if place == at:
            restored = VerdictState.from_state(json.loads(json.dumps(state.to_state(), allow_nan=False)))
            assert restored == state
            state = restored
        state, verdict = judge(state, values, section=section())
        found.append(verdict)
    assert found == whole


def test_a_signal_that_is_not_known_any_more_is_left_out() -> None:
    saved = {"steps": 4, "signals": {"gone": [True, 0, False, 0, 0], KL: [True, 0, False, 1, 0]}}
    assert list(VerdictState.from_state(saved).signals) == [KL]
