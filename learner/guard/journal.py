"""What the guard writes down: its verdicts and actions, answers to look at, and answers to learn from.

    <run>/guard.jsonl           {"time_s", "step", "version", "branch", "event", "signals", "why", …}, a line an event
    <run>/guard_samples.jsonl   {"step", "version", "branch", "moment", "prompt", "answer", "reward"}, a line an answer
    <run>/guard_left.jsonl      {"step", "version", "branch", "prompt", "answer", "reward"}, a line an answer

`time_s` is Unix time. `event` is the level when the level, or what is at it, has changed (`signals`: the values of the
signals concerned, null for NaN), or "action": then `action` names it, with its fields. The driver follows guard.jsonl
to do its part (keel/online/guard_actions.py). guard_left.jsonl has the last answers of each policy that was left by a
rollback, where the reward model can be refreshed: fresh pairs are made against them (keel/online/fresh_pairs.py).

Always holds: of each file at most the last line is torn; a learner that goes on from a checkpoint takes back what was
written after it, and leaves every earlier line as it is, byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from cluster.files import JsonlWriter, atomic_write_bytes
from learner.guard.actions import action_name
from learner.guard.record import Action, Alert, Verdict

GUARD_FILE: Final = "guard.jsonl"
SAMPLES_FILE: Final = "guard_samples.jsonl"
LEFT_FILE: Final = "guard_left.jsonl"

Moment = Literal["start", "steady", "alarm", "after_rollback"]


@dataclass(frozen=True)
class At:
    """When: `step` updates are done, which made policy `version`, after `branch` rollbacks."""

    step: int
    version: int
    branch: int


@dataclass(frozen=True)
class Sample:
    """One answer to look at."""

    prompt: object
    """As it was read: text, or messages."""
    answer: str
    reward: float


class Journal:
    """One a learner. `step`: of the checkpoint that it goes on from, 0 at the start."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        for name in (GUARD_FILE, SAMPLES_FILE, LEFT_FILE):
            _cut_back(run_dir / name, step=step)
        self._events = JsonlWriter(run_dir / GUARD_FILE)
        self._samples = JsonlWriter(run_dir / SAMPLES_FILE)
        self._left = run_dir / LEFT_FILE

    def level(self, verdict: Verdict, values: Mapping[str, float], *, at: At) -> None:
        """The level, or what is at it, has changed."""
        signals = {name: values.get(name) for name in (*verdict.act, *verdict.warn)}
        self._events.write({**_stamp(at), "event": verdict.level.value, "signals": signals, "why": verdict.why})

    def action(self, action: Action, *, at: At, why: str, **fields: Any) -> None:
        """An action was taken. `fields`: what came of it, beside the action's own."""
        why, own = (action.text, {}) if isinstance(action, Alert) else (why, asdict(action))
        head = {**_stamp(at), "event": "action", "action": action_name(action)}
        self._events.write({**head, **own, **fields, "signals": {}, "why": why})

    def samples(self, samples: Sequence[Sample], *, moment: Moment, at: At) -> None:
        for sample in samples:
            self._samples.write({**asdict(at), "moment": moment, **asdict(sample)})

    def left(self, samples: Sequence[Sample], *, at: At) -> None:
        """The policy that gave these answers is about to be left."""
        with contextlib.closing(JsonlWriter(self._left)) as file:
            for sample in samples:
                file.write({**asdict(at), **asdict(sample)})

    def close(self) -> None:
        self._events.close()
        self._samples.close()


def _stamp(at: At) -> dict[str, Any]:
    return {"time_s": round(time.time(), 3), **asdict(at)}


def _cut_back(path: Path, *, step: int) -> None:
    """Leave out lines of later steps, and what is torn; rewrite only what has any."""
    if not path.exists():
        return
    data = path.read_bytes()
    kept = b"".join(line for line in data.splitlines(keepends=True) if _is_of(line, step=step))
    if kept != data:
        atomic_write_bytes(path, kept)


def _is_of(line: bytes, *, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return (
        line.endswith(b"\n") and isinstance(record, dict) and isinstance(at := record.get("step"), int) and at <= step
    )
