"""What follows from a verdict: worked cases of a run's life, and what holds for all of them."""

from __future__ import annotations

import itertools
import json
import typing
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.guard import GuardAction, GuardSection
from learner.guard.actions import ActionState, Circumstances, action_name, plan
from learner.guard.record import (
    Action,
    Alert,
    FreezeRm,
    Halt,
    Level,
    LowerLearningRate,
    RaiseBeta,
    RefreshRm,
    RollBack,
    Verdict,
)

OK = Verdict()
WARN = Verdict(Level.WARN, warn=("kl_slope_nats_per_step",), why="KL rises")
ACT = Verdict(Level.ACT, act=("kl_nats_per_sequence",), why="KL is over 10")


def section(**changes: Any) -> GuardSection:
    return GuardSection(**{"cool_down_steps": 5, "max_rollbacks": 9, **changes})


@dataclass
class Life:
    """A run, verdict by verdict."""

    section: GuardSection
    good: list[int] = field(default_factory=lambda: [0])
    refreshes: bool = False
    state: ActionState = field(default_factory=ActionState)

    def at(self, step: int, verdict: Verdict = ACT) -> tuple[Action, ...]:
        now = Circumstances(step=step, version=step + 100, good=self.good, refreshes=self.refreshes)
        actions, self.state = plan(verdict, self.state, section=self.section, now=now)
        for action in actions:
            if isinstance(action, RollBack):
                self.good = [good for good in self.good if good <= action.to_step]
        return actions

    def rolled_to(self, step: int) -> int | None:
        return next((action.to_step for action in self.at(step) if isinstance(action, RollBack)), None)


def names(actions: tuple[Action, ...]) -> list[str]:
    return [action_name(action) for action in actions]


def test_every_action_has_a_name() -> None:
    actions: list[Action] = [
        Alert(""), RaiseBeta(1, 1), LowerLearningRate(1), FreezeRm(1), RefreshRm(""), RollBack(1), Halt(""),
    ]  # fmt: skip
    assert {action_name(action) for action in actions} == set(typing.get_args(GuardAction))


def test_nothing_to_say_nothing_to_do() -> None:
    assert Life(section()).at(10, OK) == ()


def test_a_warning_alerts_once_for_each_signal() -> None:
    life = Life(section())
    assert life.at(1, WARN) == (Alert("warn at step 1: KL rises"),)
    assert life.at(2, WARN) == ()
    other = Verdict(Level.WARN, warn=("clip_fraction", "kl_slope_nats_per_step"), why="both")
    assert names(life.at(3, other)) == ["alert"]
    assert life.at(4, WARN) == ()
    assert life.at(5, OK) == ()
    assert names(life.at(6, WARN)) == ["alert"]


def test_the_round_of_the_defaults_is_alert_rollback_and_then_beta() -> None:
    life = Life(section(), good=[0, 10, 20])
    assert life.at(25) == (
        Alert("act at step 25: KL is over 10. rolling back to step 20, β × 2, at least 0.05"),
        RollBack(20),
        RaiseBeta(factor=2.0, floor=0.05),
    )


def test_after_a_round_none_for_the_cool_down() -> None:
    life = Life(section(actions=("alert", "raise_beta")))
    assert names(life.at(10)) == ["alert", "raise_beta"]
    assert [names(life.at(step)) for step in range(11, 16)] == [[]] * 5
    assert names(life.at(16)) == ["alert", "raise_beta"]


def test_a_signal_that_joins_in_a_cool_down_is_told_but_not_acted_on() -> None:
    life = Life(section(actions=("alert", "raise_beta")))
    life.at(10)
    joined = Verdict(Level.ACT, act=("entropy_nats_per_token", "kl_nats_per_sequence"), why="two")
    assert names(life.at(12, joined)) == ["alert"]
    assert life.at(13, joined) == ()


def test_no_alert_where_none_is_asked_for() -> None:
    life = Life(section(actions=("raise_beta",)))
    assert life.at(1, WARN) == ()
    assert names(life.at(2)) == ["raise_beta"]


def test_alarm_soon_after_a_rollback_goes_one_further_back_and_pushes_harder() -> None:
    life = Life(section(), good=[0, 10, 20])
    assert life.rolled_to(25) == 20
    again = life.at(32)
    assert again[1:] == (RollBack(10), RaiseBeta(factor=4.0, floor=0.1))
    assert life.at(39)[1:] == (RollBack(0), RaiseBeta(factor=8.0, floor=0.2))
    assert life.at(46)[1:] == (RollBack(0), RaiseBeta(factor=16.0, floor=0.4))  # there is none before it


def test_soon_is_two_cool_downs_or_until_there_is_a_new_good_checkpoint() -> None:
    life = Life(section(), good=[0, 10, 20])
    life.at(25)
    life.good.append(30)
    assert life.rolled_to(35) == 10, "two cool-downs are not over"
    life = Life(section(), good=[0, 10, 20])
    life.at(25)
    assert life.rolled_to(60) == 10, "nothing good came of the branch"


def test_a_new_good_checkpoint_holds_the_raised_beta_so_the_factor_starts_anew() -> None:
    life = Life(section(), good=[0, 10, 20])
    life.at(25)
    life.good.append(40)
    assert life.at(60)[1:] == (RollBack(40), RaiseBeta(factor=2.0, floor=0.05))


def test_one_rollback_too_many_halts_for_good() -> None:
    life = Life(section(max_rollbacks=1), good=[0, 10])
    life.at(12)
    alert, halt = life.at(20)
    assert halt == Halt("another rollback is due, and guard.max_rollbacks = 1: KL is over 10")
    assert isinstance(alert, Alert)
    assert alert.text.endswith("the run halts")
    assert life.state.halted
    assert life.at(40) == ()
    assert Life(section(max_rollbacks=0)).at(3)[1:] == (
        Halt("another rollback is due, and guard.max_rollbacks = 0: KL is over 10"),
    )


def test_without_a_good_checkpoint_the_milder_actions_are_taken_and_it_is_said() -> None:
    alert, raised = Life(section(), good=[]).at(9)
    assert isinstance(alert, Alert)
    assert "no good checkpoint" in alert.text
    assert isinstance(raised, RaiseBeta)


def test_without_a_good_checkpoint_and_nothing_milder_the_run_halts() -> None:
    assert names(Life(section(actions=("alert", "roll_back")), good=[]).at(9)) == ["alert", "halt"]


def test_halt_is_taken_at_once() -> None:
    life = Life(section(actions=("alert", "halt")))
    assert names(life.at(9)) == ["alert", "halt"]
    assert life.at(30) == ()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("freeze_rm", FreezeRm(until_version=129)), ("refresh_rm", RefreshRm("the guard asked for it: KL is over 10"))],
)
def test_the_reward_model_is_left_alone_where_it_is_never_refreshed(wanted: GuardAction, expected: Action) -> None:
    one = section(actions=("alert", wanted), freeze_versions=20)
    assert Life(one, refreshes=True).at(9)[1:] == (expected,)
    assert names(Life(one).at(9)) == ["alert"]


def test_the_learning_rate_falls_once_more_for_each_rollback_in_a_row() -> None:
    life = Life(section(actions=("roll_back", "lower_lr")), good=[0, 10])
    assert life.at(12) == (RollBack(10), LowerLearningRate(0.5))
    assert life.at(19) == (RollBack(0), LowerLearningRate(0.25))


# ---------------------------------------------------------------- what holds for all runs

a_verdict = st.sampled_from([OK, OK, WARN, ACT, ACT])
chosen: st.SearchStrategy[list[GuardAction]] = st.lists(
    st.sampled_from(("alert", "raise_beta", "lower_lr", "freeze_rm", "roll_back")), unique=True
)
settings_of = st.builds(
    lambda actions, cool_down, most: section(actions=tuple(actions), cool_down_steps=cool_down, max_rollbacks=most),
    chosen | st.just(["alert", "halt"]),
    st.integers(0, 6),
    st.integers(0, 3),
)
steps_of = st.lists(st.tuples(a_verdict, st.booleans()), max_size=60)


def live(one: GuardSection, steps: list[tuple[Verdict, bool]], *, restart_at: int = -1) -> list[tuple[Action, ...]]:
    """A checkpoint is good where the flag says so and nothing was said."""
    life, found = Life(one, refreshes=True), []
    for step, (verdict, good) in enumerate(steps, start=1):
        if step == restart_at:
            life.state = ActionState.from_state(json.loads(json.dumps(life.state.to_state())))
        found.append(life.at(step, verdict))
        if good and verdict is OK:
            life.good.append(step)
    return found


@settings(deadline=None)
@given(settings_of, steps_of)
def test_what_holds_for_all_runs(one: GuardSection, steps: list[tuple[Verdict, bool]]) -> None:
    rounds = live(one, steps)
    measures = [[a for a in actions if not isinstance(a, Alert)] for actions in rounds]
    at = [step for step, taken in enumerate(measures) if taken]
    assert all(later - earlier > one.cool_down_steps for earlier, later in itertools.pairwise(at))
    assert all(steps[step][0] is ACT for step in at)
    rollbacks = [a for taken in measures for a in taken if isinstance(a, RollBack)]
    assert len(rollbacks) <= one.max_rollbacks
    halts = [step for step, taken in enumerate(measures) if any(isinstance(a, Halt) for a in taken)]
    assert len(halts) <= 1
    if halts:
        assert [names(tuple(measures[halts[0]]))] == [["halt"]]
        assert not any(rounds[halts[0] + 1 :])
    for step, taken in enumerate(measures):
        assert len(set(names(tuple(taken)))) == len(taken)
        assert set(names(tuple(taken))) <= set(one.actions) | {"halt"}
        assert all(a.to_step <= step for a in taken if isinstance(a, RollBack))
        if taken and "alert" in one.actions:
            assert isinstance(rounds[step][0], Alert)


@settings(max_examples=60, deadline=None)
@given(settings_of, steps_of, st.integers(1, 60))
def test_the_state_comes_back_from_json(one: GuardSection, steps: list[tuple[Verdict, bool]], at: int) -> None:
    assert live(one, steps, restart_at=at) == live(one, steps)
