"""The guard of a run: reads each step's signals, judges them, plans what is to be done, and remembers.

Consumes: each step's batch and numbers (`observe`); what is measured beside training (`measured`, from any thread);
what the learner has carried out (`applied`). Produces: a Decision a step, guard.jsonl, guard_samples.jsonl,
guard_left.jsonl, its fields of metrics.jsonl. Waits: never.
Always holds: the learner carries a decision's actions out in their order before it saves a checkpoint, so the state
that is saved is that of a run in which they were; measurements of a branch that was left are dropped.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, Generic, Protocol, TypeVar

from configs.guard import GuardSection
from learner.guard.actions import ActionState, Circumstances, action_name, plan
from learner.guard.journal import At, Journal, Moment, Sample
from learner.guard.record import Action, Decision, Level, Reading, RollBack, Verdict
from learner.guard.verdict import MEASURED, VerdictState, is_leaving, judge, over_threshold

SAMPLES_SHOWN: Final = 8
BUDGETS: Final = frozenset(("kl_budget_share",))
"""What is nearly used up speaks of the run's end and not against the policy: its checkpoints are good all the same."""


class View(Protocol):
    """What the guard itself needs of a step's batch; row by row the same answer."""

    @property
    def prompts(self) -> Sequence[object]:
        """As they were read: text, or messages."""
        ...

    @property
    def texts(self) -> Sequence[str]: ...

    @property
    def rewards(self) -> Sequence[float]: ...


ViewT = TypeVar("ViewT", bound=View, contravariant=True)


class Reader(Protocol[ViewT]):
    """Signals from batches: learner/guard/reading.py. `reset`: after a rollback, its running windows start anew."""

    def read(self, view: ViewT) -> Reading: ...

    def reset(self) -> None: ...

    def to_state(self) -> dict[str, Any]: ...

    def from_state(self, state: Mapping[str, Any]) -> None: ...


class Guard(Generic[ViewT]):
    """One a learner. `branch`: rollbacks of the run so far. `refreshes`: it has a reward model that can be refreshed.
    `sample_every_steps`: how often answers are kept while nothing happens."""

    def __init__(
        self,
        section: GuardSection,
        *,
        reader: Reader[ViewT],
        journal: Journal,
        branch: int = 0,
        refreshes: bool = False,
        sample_every_steps: int = 10,
    ) -> None:
        self.section = section
        self.branch = branch
        """Rollbacks that were carried out."""
        self._reader = reader
        self._journal = journal
        self._refreshes = refreshes
        self._sample_every_steps = sample_every_steps
        self._verdict = VerdictState()
        self._actions = ActionState()
        self._at = At(step=0, version=0, branch=branch)
        self._told: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        """What the last level event said: signals at act, at warn."""
        self._next_moment: Moment | None = "start"
        self._decision = Decision(reading=Reading(), verdict=Verdict(), actions=(), good=False)
        self._watched = _Watched()

    # ------------------------------------------------------------ each step

    def observe(self, view: ViewT, *, step: int, version: int, good_steps: Sequence[int] = ()) -> Decision:
        """After the update that made `version`. `good_steps`: of checkpoints on disk that were good when they were
        saved, those of branches that were left taken out.

        The caller carries the actions out in their order, telling `applied` of each; Alert, FreezeRm and RefreshRm
        need nothing else.
        """
        self._at = at = At(step=step, version=version, branch=self.branch)
        reading = self._reader.read(view)
        new = self._watched.take(step=step, version=version, section=self.section)
        values = {**reading.values, **new}
        self._verdict, verdict = judge(self._verdict, values, section=self.section)
        known = {**reading.values, **self._watched.judged}
        now = Circumstances(
            step=step,
            version=version,
            good=self._watched.passed_of(good_steps, section=self.section),
            refreshes=self._refreshes,
            leaving=is_leaving(verdict, known, section=self.section),
        )
        actions, self._actions = plan(verdict, self._actions, section=self.section, now=now)
        over = over_threshold(known, section=self.section)
        good = {*verdict.warn, *verdict.act, *over} <= BUDGETS and not actions
        shown = Reading({**reading.values, **self._watched.shown}, reading.words)
        self._decision = Decision(reading=shown, verdict=verdict, actions=actions, good=good)
        self._keep_samples(view, verdict, at=at)
        if self._refreshes and any(isinstance(action, RollBack) for action in actions):
            self._journal.left(_samples(view, range(len(view.texts))), at=at)
        self._tell_level(verdict, values, at=at)
        return self._decision

    def measured(self, values: Mapping[str, float | None], version: int) -> None:
        """Policy `version` was measured beside training: by the names of the signals, and `win_rate_high`, which is
        judged in place of win_rate. What is absent, None or NaN could not be told. From any thread."""
        self._watched.add(values, version)

    def applied(self, action: Action, *, why: str | None = None, **fields: Any) -> None:
        """An action of the last decision was carried out. `fields`: what came of it (beta, rm_version); after a
        RollBack also `to_step`, where that is an earlier one than was planned. The signals start anew then. `why`: in
        place of the verdict's reason, where it was not the verdict that led to it."""
        if isinstance(action, RollBack):
            self._left_branch(int(fields.get("to_step", action.to_step)))
        why = self._decision.verdict.why if why is None else why
        self._journal.action(action, at=self._at, why=why, **fields)

    def _left_branch(self, to_step: int) -> None:
        self.branch += 1
        self._actions = replace(self._actions, rolled_to=to_step)
        self._reader.reset()
        self._verdict = VerdictState()
        self._watched.leave(to_step=to_step, version=self._at.version)
        self._next_moment = "after_rollback"

    @property
    def halted(self) -> str:
        """Why the run was halted; empty when it was not."""
        return self._actions.halted

    def go_on(self) -> None:
        """Take a halt back: someone has changed what led to it. Signals and cool-down start anew, the count of
        rollbacks too."""
        self._verdict, self._actions = VerdictState(), ActionState()

    def record(self) -> dict[str, Any]:
        """Of the last decision: the guard's fields in its step's line of metrics.jsonl."""
        decision = self._decision
        return {
            "signals": dict(decision.reading.values),
            "guard": {
                "level": decision.verdict.level.value,
                "warn": list(decision.verdict.warn),
                "act": list(decision.verdict.act),
                "actions": [action_name(action) for action in decision.actions],
                "words": list(decision.reading.words),
            },
            "branch": self._at.branch,
        }

    def close(self) -> None:
        self._journal.close()

    # ------------------------------------------------------------ checkpoint

    def to_state(self) -> dict[str, Any]:
        """Plain finite JSON."""
        return {
            "at": asdict(self._at),
            "branch": self.branch,
            "verdict": self._verdict.to_state(),
            "actions": self._actions.to_state(),
            "told": [list(names) for names in self._told],
            "next_moment": self._next_moment,
            "reader": self._reader.to_state(),
            "watched": self._watched.to_state(),
        }

    def from_state(self, saved: Mapping[str, Any]) -> None:
        """Inverse of to_state."""
        self._at = At(**saved["at"])
        self.branch = saved["branch"]
        self._verdict = VerdictState.from_state(saved["verdict"])
        self._actions = ActionState.from_state(saved["actions"])
        act, warn = saved["told"]
        self._told = tuple(act), tuple(warn)
        self._next_moment = saved["next_moment"]
        self._reader.from_state(saved["reader"])
        self._watched.from_state(saved["watched"])
        if self.section.watch is None:
            # Nothing is measured any more: what was measured last would count for ever.
            self._verdict = self._verdict.without(MEASURED)
            self._watched.forget()

    # ------------------------------------------------------------ files

    def _tell_level(self, verdict: Verdict, values: Mapping[str, float], *, at: At) -> None:
        told = verdict.act, verdict.warn
        if told != self._told:
            self._told = told
            self._journal.level(verdict, values, at=at)

    def _keep_samples(self, view: ViewT, verdict: Verdict, *, at: At) -> None:
        """Before the level is told: an alarm is new then."""
        moment, self._next_moment = self._next_moment, None
        if verdict.level is Level.ACT and not self._told[0]:
            moment = "alarm"
        elif moment is None and at.step % self._sample_every_steps == 0:
            moment = "steady"
        if moment is not None:
            self._journal.samples(_samples(view, _some_rows(len(view.texts))), moment=moment, at=at)


class _Watched:
    """What was measured beside training, last. `shown`: by the name of the signal; `judged`: the same, but for the win
    rate the upper end of its interval. Always holds: what another thread adds is seen at the next `take`, whole."""

    def __init__(self) -> None:
        self.shown: dict[str, float] = {}
        self.judged: dict[str, float] = {}
        self._passed_step = 0
        """Of the newest policy that passed; the start's did."""
        self._abandoned_version = -1
        """This policy version and those before it are of branches that were left."""
        self._pending: list[tuple[dict[str, float], int]] = []
        self._lock = threading.Lock()

    def add(self, values: Mapping[str, float | None], version: int) -> None:
        told = {name: float(value) for name, value in values.items() if value is not None and not math.isnan(value)}
        with self._lock:
            self._pending.append((told, version))

    def take(self, *, step: int, version: int, section: GuardSection) -> dict[str, float]:
        """What is new and to be judged. `step`, `version`: as they stand now."""
        with self._lock:
            pending, self._pending = self._pending, []
        new: dict[str, float] = {}
        for values, of_version in pending:
            if of_version <= self._abandoned_version:
                continue
            self.shown.update({name: _finite(values[name]) for name in values.keys() & MEASURED})
            judged = {name: _finite(values[name]) for name in values.keys() & MEASURED}
            if "win_rate_high" in values:
                judged["win_rate"] = _finite(values["win_rate_high"])
            new.update(judged)
            self.judged.update(judged)
            if not self._failed(section):
                # Versions run ahead of steps, never behind: at worst the step before is taken for the one that passed.
                self._passed_step = max(self._passed_step, step - (version - of_version))
        return new

    def passed_of(self, good_steps: Sequence[int], *, section: GuardSection) -> tuple[int, ...]:
        """Those that no failed measurement speaks against: while the last one failed, up to the last that passed."""
        failed = self._failed(section)
        return tuple(step for step in good_steps if not failed or step <= self._passed_step)

    def forget(self) -> None:
        """As if nothing had been measured."""
        self.shown, self.judged = {}, {}

    def leave(self, *, to_step: int, version: int) -> None:
        """The branch up to `version` was left for the checkpoint of `to_step`, which had passed."""
        self.forget()
        self._passed_step = to_step
        self._abandoned_version = version

    def to_state(self) -> dict[str, Any]:
        return {
            "shown": self.shown,
            "judged": self.judged,
            "passed_step": self._passed_step,
            "abandoned_version": self._abandoned_version,
        }

    def from_state(self, saved: Mapping[str, Any]) -> None:
        self.shown = {name: value for name, value in saved["shown"].items() if name in MEASURED}
        self.judged = {name: value for name, value in saved["judged"].items() if name in MEASURED}
        self._passed_step, self._abandoned_version = saved["passed_step"], saved["abandoned_version"]

    def _failed(self, section: GuardSection) -> bool:
        return bool(over_threshold(self.judged, section=section))


def _some_rows(count: int) -> list[int]:
    """Evenly from the whole batch: answers lie in the order in which they came, the short ones first."""
    return sorted({place * count // SAMPLES_SHOWN for place in range(SAMPLES_SHOWN)}) if count else []


def _samples(view: View, rows: Iterable[int]) -> list[Sample]:
    return [Sample(view.prompts[row], view.texts[row], float(view.rewards[row])) for row in rows]


def _finite(value: float) -> float:
    """Infinities as the largest number: a checkpoint holds none."""
    return min(max(value, -sys.float_info.max), sys.float_info.max)
