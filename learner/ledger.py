"""The learner's account of every task: what was issued, and the one outcome that each task gets.

Pure bookkeeping, no input or output. Always holds: issued = trained + stale_dropped + dead + rejected + abandoned +
outstanding + held.
That identity is what lets a run lose actors, reward workers or a whole queue server and still lose no sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.records import PromptTask, ScoredRollout


@dataclass(frozen=True)
class Gate:
    """Bounds staleness: how many tasks may have been issued when `step` updates are done (DESIGN §3)."""

    batch_size: int
    max_staleness: int
    total_steps: int

    def allowance(self, *, step: int, dropped: int) -> int:
        """Tasks that may be issued in all by now. `dropped` tasks trained nothing and are replaced."""
        batches = min(step + 1 + self.max_staleness, self.total_steps)
        return batches * self.batch_size + dropped


@dataclass
class Counts:
    """Totals since the start of the run."""

    issued: int = 0
    trained: int = 0
    stale_dropped: int = 0
    dead: int = 0
    rejected: int = 0
    """Answers that the reward service refused as too uncertain."""
    abandoned: int = 0
    """Out or held when the run went back to an earlier checkpoint."""
    duplicates: int = 0
    """Results for tasks that had an outcome already, or that another incarnation of the run had issued."""
    reissued: int = 0

    @property
    def dropped(self) -> int:
        return self.stale_dropped + self.dead + self.rejected + self.abandoned


@dataclass
class _Outstanding:
    task: PromptTask
    deadline_s: float


class Ledger:
    """Outstanding tasks, held results, and totals."""

    def __init__(self, *, task_deadline_s: float) -> None:
        self.counts = Counts()
        self._task_deadline_s = task_deadline_s
        self._outstanding: dict[str, _Outstanding] = {}
        self._held: dict[str, ScoredRollout] = {}
        self._groups: dict[str, set[str]] = {}
        """Group → its tasks that still count. In issue order, as dicts keep it."""
        self._broken: set[str] = set()

    # ------------------------------------------------------------ issue

    def issue(self, tasks: Sequence[PromptTask], *, now_s: float) -> None:
        """Enter new tasks."""
        for task in tasks:
            self._outstanding[task.task_id] = _Outstanding(task, now_s + self._task_deadline_s)
            self._groups.setdefault(task.group_id, set()).add(task.task_id)
        self.counts.issued += len(tasks)

    def overdue(self, *, now_s: float) -> list[PromptTask]:
        """Tasks past their deadline, as their next attempt, entered anew. They are to be published again."""
        late = [entry for entry in self._outstanding.values() if entry.deadline_s <= now_s]
        return [self._retry(entry, now_s=now_s) for entry in late]

    def retry_all(self, *, now_s: float) -> list[PromptTask]:
        """Every outstanding task as its next attempt: for a resumed run, whose queue may be gone."""
        return [self._retry(entry, now_s=now_s) for entry in self._outstanding.values()]

    def _retry(self, entry: _Outstanding, *, now_s: float) -> PromptTask:
        entry.task = msgspec.structs.replace(entry.task, attempt=entry.task.attempt + 1)
        entry.deadline_s = now_s + self._task_deadline_s
        self.counts.reissued += 1
        return entry.task

    # ------------------------------------------------------------ outcomes

    def accept(self, result: ScoredRollout) -> bool:
        """Hold a result for training. False: the task has its outcome already; the result is counted and dropped."""
        task = result.rollout.task
        if self._outstanding.pop(task.task_id, None) is None:
            self.counts.duplicates += 1
            return False
        self._held[task.task_id] = result
        if task.group_id in self._broken:
            self._drop(task.group_id)
        return True

    def bury(self, task_id: str, *, rejected: bool = False) -> bool:
        """A task was dead-lettered, or its answer refused. Its group (of one, unless the estimator compares answers) is
        given up with it."""
        entry = self._outstanding.pop(task_id, None)
        if entry is None:
            self.counts.duplicates += 1
            return False
        if rejected:
            self.counts.rejected += 1
        else:
            self.counts.dead += 1
        group = entry.task.group_id
        self._groups[group].discard(task_id)
        self._broken.add(group)
        self._drop(group)
        return True

    def drop_stale(self, *, version: int, max_staleness: int) -> int:
        """Drop held results of which some token is more than `max_staleness` versions old. Returns how many."""
        before = self.counts.stale_dropped
        for task_id, result in list(self._held.items()):
            if task_id in self._held and version - result.rollout.oldest_version > max_staleness:
                group = result.rollout.task.group_id
                self._broken.add(group)
                self._drop(group)
        return self.counts.stale_dropped - before

    def abandon(self) -> int:
        """Give up everything that is out or held: it belongs to a branch of the run that is left. Results that come in
        late are duplicates. Returns how many."""
        count = len(self._outstanding) + len(self._held)
        self.counts.abandoned += count
        for kept in (self._outstanding, self._held, self._groups, self._broken):
            kept.clear()
        return count

    def _drop(self, group: str) -> None:
        """Give up the held members of a broken group; members that are still out follow when they come in."""
        for task_id in [task_id for task_id in self._groups[group] if task_id in self._held]:
            del self._held[task_id]
            self._groups[group].discard(task_id)
            self.counts.stale_dropped += 1
        if not self._groups[group]:
            del self._groups[group]
            self._broken.discard(group)

    def take(self, count: int) -> list[ScoredRollout] | None:
        """The `count` oldest tasks' results, in whole groups and in the order they were issued; None while one of them
        is still out.

        Strictly in that order: taking whatever came in first would fill batches with short answers, which finish first,
        and teach the policy about them twice.
        """
        chosen: list[str] = []
        for group, members in self._groups.items():
            if group in self._broken:
                continue
            if len(chosen) + len(members) > count or not members <= self._held.keys():
                break
            chosen.extend(sorted(members))
        if len(chosen) < count:
            return None
        batch = [self._held.pop(task_id) for task_id in chosen]
        for result in batch:
            self._groups.pop(result.rollout.task.group_id, None)
        self.counts.trained += count
        return batch

    # ------------------------------------------------------------ views and state

    @property
    def outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def held(self) -> int:
        return len(self._held)

    def to_state(self) -> dict[str, Any]:
        """JSON-able. Held results are not kept: their tasks are entered as outstanding and sampled again on resume."""
        tasks = [entry.task for entry in self._outstanding.values()]
        tasks += [result.rollout.task for result in self._held.values()]
        return {
            "counts": vars(self.counts).copy(),
            "outstanding": [msgspec.to_builtins(task) for task in sorted(tasks, key=lambda task: task.task_id)],
            "broken": sorted(self._broken),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, task_deadline_s: float, incarnation: str) -> Ledger:
        """Inverse of to_state, for a new incarnation of the run: outstanding tasks take its name, so that a late result
        of the abandoned branch cannot pass for theirs. They are to be published again (`retry_all`)."""
        ledger = cls(task_deadline_s=task_deadline_s)
        for fields in state["outstanding"]:
            old = msgspec.convert(fields, PromptTask)
            task = msgspec.structs.replace(
                old, task_id=_renamed(old.task_id, incarnation), group_id=_renamed(old.group_id, incarnation)
            )
            ledger._outstanding[task.task_id] = _Outstanding(task, float("-inf"))
            ledger._groups.setdefault(task.group_id, set()).add(task.task_id)
        ledger._broken = {_renamed(group, incarnation) for group in state["broken"]}
        ledger.counts = Counts(**state["counts"])
        return ledger


def _renamed(name: str, incarnation: str) -> str:
    return f"{incarnation}-{name.rpartition('-')[2]}"
