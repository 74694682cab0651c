"""From a verdict to what is done about it. Pure; its state is plain data for the checkpoint.

To act is to take all of `guard.actions` together that make sense, and then none for `cool_down_steps`, until their
effect shows. A warning only alerts, once for each signal that comes to it; so does a signal that comes to `act` in a
cool-down. While `act` lasts, each end of a cool-down is a new round; but none is begun at a step at which all that is
at `act` is back within its threshold, and patience alone keeps it there.

Rolling back: to the newest good checkpoint. When alarm comes again soon (no good checkpoint was saved since, or within
two cool-downs), the one before it: what went wrong may have begun earlier. Restoring brings back the β and the learning
rate of that checkpoint, so each further rollback that no good checkpoint came after multiplies their factors once more.
After `max_rollbacks` the run halts. Halting is final: no action follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from configs.guard import GuardAction, GuardSection
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

_SOON_COOL_DOWNS: Final = 2


@dataclass(frozen=True)
class ActionState:
    """Steps count updates, abandoned ones included."""

    acted_at: int | None = None
    """Step of the last round of actions."""
    alerted: tuple[str, ...] = ()
    """Signals at warn or act that an alert has named, as "name:level"."""
    rollbacks: int = 0
    rolled_at: int | None = None
    """Step of the last rollback,"""
    rolled_to: int | None = None
    """and that of the checkpoint it restored."""
    in_a_row: int = 0
    """Rollbacks since a good checkpoint was saved that holds what they changed."""
    halted: str = ""
    """Why, once it is."""

    def to_state(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"alerted": list(self.alerted)}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> ActionState:
        return cls(**{**saved, "alerted": tuple(saved["alerted"])})


@dataclass(frozen=True)
class Circumstances:
    """Of the step at hand. `good`: steps with a good checkpoint, in any order, the start's among them. `refreshes`: the
    run has a reward model that can be refreshed. `leaving`: learner.guard.verdict.is_leaving."""

    step: int
    version: int
    good: Sequence[int] = ()
    refreshes: bool = False
    leaving: bool = False


def plan(
    verdict: Verdict, state: ActionState, *, section: GuardSection, now: Circumstances
) -> tuple[tuple[Action, ...], ActionState]:
    """What is to be done now, in this order, and the state once it is done."""
    if state.halted:
        return (), state
    concerned = tuple(sorted([f"{name}:act" for name in verdict.act] + [f"{name}:warn" for name in verdict.warn]))
    news = set(concerned) - set(state.alerted)
    state = replace(state, alerted=concerned)
    if verdict.level is Level.ACT and not now.leaving and _cooled_down(state, section, step=now.step):
        measures, state, notes = _measures(verdict, state, section=section, now=now)
        state = replace(state, acted_at=now.step)
        return (*_alert(verdict, notes, section=section, now=now), *measures), state
    if news and verdict.level is not Level.OK:
        return tuple(_alert(verdict, [], section=section, now=now)), state
    return (), state


def action_name(action: Action) -> GuardAction:
    """As the configuration calls it."""
    names: dict[type[Action], GuardAction] = {
        Alert: "alert", RaiseBeta: "raise_beta", LowerLearningRate: "lower_lr", FreezeRm: "freeze_rm",
        RefreshRm: "refresh_rm", RollBack: "roll_back", Halt: "halt",
    }  # fmt: skip
    return names[type(action)]


# ---------------------------------------------------------------- one round


def _measures(
    verdict: Verdict, state: ActionState, *, section: GuardSection, now: Circumstances
) -> tuple[list[Action], ActionState, list[str]]:
    """Everything but the alert; the state, but for `acted_at`; and what the alert has to say."""
    if "halt" in section.actions:
        return _halted(state, f"the guard's verdict is to act: {verdict.why}")
    times, notes = 1, list[str]()
    rolling: list[Action] = []
    if "roll_back" in section.actions:
        if state.rollbacks >= section.max_rollbacks:
            limit = f"another rollback is due, and guard.max_rollbacks = {section.max_rollbacks}"
            return _halted(state, f"{limit}: {verdict.why}")
        target = _target(state, section, now=now)
        if target is None:
            notes.append("there is no good checkpoint to roll back to")
        else:
            state = _rolled_back(state, target, step=now.step)
            times = state.in_a_row
            rolling.append(RollBack(target))
            notes.append(f"rolling back to step {target}")
    others = _milder(verdict, section, now=now, times=times)
    if "roll_back" in section.actions and not rolling and not others:
        return _halted(state, f"there is no good checkpoint to roll back to: {verdict.why}")
    notes.extend(_words(action) for action in others)
    return [*rolling, *others], state, notes


def _milder(verdict: Verdict, section: GuardSection, *, now: Circumstances, times: int) -> list[Action]:
    """What changes the run from here on; after a rollback, for it is applied to what was restored. `times`: how often
    the factors are to be applied."""
    actions: list[Action] = []
    if "raise_beta" in section.actions:
        factor, floor = section.beta_factor**times, section.beta_floor * section.beta_factor ** (times - 1)
        actions.append(RaiseBeta(factor=factor, floor=floor))
    if "lower_lr" in section.actions:
        actions.append(LowerLearningRate(section.learning_rate_factor**times))
    if now.refreshes and "refresh_rm" in section.actions:
        actions.append(RefreshRm(f"the guard asked for it: {verdict.why}"))
    if now.refreshes and "freeze_rm" in section.actions:
        actions.append(FreezeRm(now.version + section.freeze_versions))
    return actions


def _halted(state: ActionState, reason: str) -> tuple[list[Action], ActionState, list[str]]:
    return [Halt(reason)], replace(state, halted=reason), ["the run halts"]


def _cooled_down(state: ActionState, section: GuardSection, *, step: int) -> bool:
    return state.acted_at is None or step - state.acted_at > section.cool_down_steps


# ---------------------------------------------------------------- rolling back


def _target(state: ActionState, section: GuardSection, *, now: Circumstances) -> int | None:
    """Which good checkpoint; None without one."""
    good = sorted(step for step in now.good if step <= now.step)
    if not good:
        return None
    if state.rolled_at is None or state.rolled_to is None:
        return good[-1]
    rolled_to = state.rolled_to
    soon = now.step - state.rolled_at <= _SOON_COOL_DOWNS * section.cool_down_steps
    if not soon and good[-1] > state.rolled_at:
        return good[-1]
    earlier = [step for step in good if step < rolled_to]
    return earlier[-1] if earlier else good[0]


def _rolled_back(state: ActionState, target: int, *, step: int) -> ActionState:
    fresh = state.rolled_at is None or target > state.rolled_at
    return replace(
        state,
        rollbacks=state.rollbacks + 1,
        rolled_at=step,
        rolled_to=target,
        in_a_row=1 if fresh else state.in_a_row + 1,
        alerted=(),
    )


# ---------------------------------------------------------------- words


def _alert(verdict: Verdict, notes: Sequence[str], *, section: GuardSection, now: Circumstances) -> list[Action]:
    if "alert" not in section.actions:
        return []
    done = f". {', '.join(notes)}" if notes else ""
    return [Alert(f"{verdict.level} at step {now.step}: {verdict.why}{done}")]


def _words(action: Action) -> str:
    match action:
        case RaiseBeta(factor, floor):
            return f"β × {factor:g}, at least {floor:g}"
        case LowerLearningRate(factor):
            return f"learning rate × {factor:g}"
        case FreezeRm(until):
            return f"no refresh of the reward model before version {until}"
        case RefreshRm():
            return "a refresh of the reward model"
        case _:
            return action_name(action)
