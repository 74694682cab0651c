"""When to add and when to remove an actor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.run import AutoscaleSection
from keel.online.autoscale import Autoscaler, Load, LoadWindow, decide

SECTION = AutoscaleSection(
    min_actors=1, max_actors=4, add_above_learner_idle=0.25, remove_above_actor_idle=0.5, window_s=10, cool_down_s=30
)
shares = st.one_of(st.none(), st.floats(0.0, 1.0))


@pytest.mark.parametrize(
    ("learner_idle", "actors_idle", "actors", "change"),
    [
        (0.4, 0.1, 2, 1),  # The learner waits: add.
        (0.4, 0.1, 4, 0),  # … but no more than max_actors.
        (0.1, 0.7, 2, -1),  # The actors wait: remove.
        (0.1, 0.7, 1, 0),  # … but no fewer than min_actors.
        (0.1, 0.1, 2, 0),  # All are busy.
        (0.6, 0.9, 2, 0),  # Both wait: the reward service is the limit.
        (None, 0.9, 2, 0),  # Not measured yet.
        (0.9, None, 2, 0),
        (None, None, 6, -2),  # Outside the bounds: back inside, whatever the load.
    ],
)
def test_what_a_load_calls_for(learner_idle: float, actors_idle: float, actors: int, change: int) -> None:
    assert decide(Load(learner_idle, actors_idle), actors=actors, section=SECTION).change == change


@given(learner=shares, actors_idle=shares, actors=st.integers(1, 10), low=st.integers(1, 5), more=st.integers(0, 5))
def test_the_bounds_hold_and_every_change_has_a_reason(
    learner: float | None, actors_idle: float | None, actors: int, low: int, more: int
) -> None:
    section = AutoscaleSection(min_actors=low, max_actors=low + more)
    decision = decide(Load(learner, actors_idle), actors=actors, section=section)
    assert low <= actors + decision.change <= low + more
    assert decision.reason or not decision.change


@given(learner=st.floats(0.0, 1.0), higher=st.floats(0.0, 1.0), actors_idle=shares, actors=st.integers(1, 4))
def test_a_learner_that_waits_longer_never_gets_fewer_actors(
    learner: float, higher: float, actors_idle: float | None, actors: int
) -> None:
    less, more = sorted((learner, higher))
    before = decide(Load(less, actors_idle), actors=actors, section=SECTION).change
    assert decide(Load(more, actors_idle), actors=actors, section=SECTION).change >= min(before, 0)


def feed(window: LoadWindow, *, until_s: int, idle_of_step: float, idle_of_actor: float) -> None:
    """One step and one look at the actor a second, from second 0."""
    for second in range(until_s + 1):
        window.add_actors({"a": idle_of_actor * second}, now_s=float(second))
        window.add_step(now_s=float(second), idle_s=idle_of_step, step_s=1.0)


def test_nothing_is_known_before_a_whole_window_was_measured() -> None:
    window = LoadWindow(10.0)
    feed(window, until_s=9, idle_of_step=0.5, idle_of_actor=0.25)
    assert window.load == Load(None, None)
    feed(window, until_s=10, idle_of_step=0.5, idle_of_actor=0.25)
    assert window.load == Load(0.5, 0.25)


def test_only_the_newest_window_counts() -> None:
    window = LoadWindow(10.0)
    for second in range(100):
        busy = second >= 80
        window.add_actors({"a": float(min(second, 80))}, now_s=float(second))
        window.add_step(now_s=float(second), idle_s=0.0 if busy else 1.0, step_s=1.0)
    assert window.load == Load(0.0, 0.0)


def test_one_long_step_covers_the_window() -> None:
    window = LoadWindow(10.0)
    window.add_actors({"a": 0.0}, now_s=0.0)
    window.add_step(now_s=40.0, idle_s=20.0, step_s=40.0)
    assert window.load.learner_idle == 0.5


def test_a_step_that_began_before_the_change_does_not_count() -> None:
    window = LoadWindow(10.0)
    feed(window, until_s=20, idle_of_step=1.0, idle_of_actor=1.0)
    window.clear()
    window.add_actors({"a": 0.0}, now_s=100.0)
    window.add_step(now_s=101.0, idle_s=30.0, step_s=30.0)
    assert window.load == Load(None, None)


def test_an_actor_that_was_replaced_starts_anew_and_idleness_is_the_mean_of_the_others() -> None:
    window = LoadWindow(10.0)
    for second in range(12):
        idle = {"a": 0.5 * second, "b": 0.1 * second}
        if second >= 8:
            idle["c"] = 0.0
        window.add_actors(idle, now_s=float(second))
    assert window.load.actors_idle == pytest.approx(0.3)


def test_no_further_change_within_the_cool_down() -> None:
    scaler = Autoscaler(SECTION)
    feed(scaler.window, until_s=20, idle_of_step=0.9, idle_of_actor=0.0)
    assert scaler.decide(actors=1, now_s=20.0).change == 1
    scaler.changed(now_s=20.0)
    for second in range(20, 60):
        scaler.window.add_actors({"a": 0.0}, now_s=float(second))
        scaler.window.add_step(now_s=float(second), idle_s=0.9, step_s=1.0)
        change = scaler.decide(actors=2, now_s=float(second)).change
        assert change == (1 if second >= 50 else 0)
