"""A guard that decides what the test says, for tests of what the learner does about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.run import RunConfig
from learner.guard.record import Action, Decision, Halt, Level, Reading, Verdict

OK = Decision(reading=Reading(), verdict=Verdict(), actions=(), good=True)


def alarm(*actions: Action) -> Decision:
    return Decision(reading=Reading(), verdict=Verdict(level=Level.ACT), actions=actions, good=False)


class ScriptedGuard:
    """`script`: step → decision; other steps are good. `log`: what it was told."""

    def __init__(self, script: Mapping[int, Decision] | None = None) -> None:
        self.script = dict(script or {})
        self.halted = ""
        self.log: list[tuple[Any, ...]] = []
        self.seen: list[tuple[int, int, tuple[int, ...]]] = []
        self.texts: list[str] = []
        self.level = "ok"

    def __call__(self, config: RunConfig, run_dir: Path, *, step: int, branch: int) -> ScriptedGuard:
        """In the place of make_guard."""
        self.log.append(("made", step))
        return self

    def observe(self, view: Any, *, step: int, version: int, good_steps: Sequence[int] = ()) -> Decision:
        self.seen.append((step, version, tuple(good_steps)))
        self.texts = list(view.texts)
        decision = self.script.pop(step, OK)
        self.level = decision.verdict.level.value
        for action in decision.actions:
            if isinstance(action, Halt):
                self.halted = action.reason
        return decision

    def applied(self, action: Action, *, why: str | None = None, **fields: Any) -> None:
        self.log.append((action, fields))

    def measured(self, values: Mapping[str, float | None], version: int) -> None:
        self.log.append((dict(values), version))

    def record(self) -> dict[str, Any]:
        return {"signals": {}, "guard": {"level": self.level, "warn": [], "act": [], "actions": [], "words": []}}

    def to_state(self) -> dict[str, Any]:
        return {"halted": self.halted}

    def from_state(self, saved: Mapping[str, Any]) -> None:
        self.halted = saved["halted"]

    def go_on(self) -> None:
        self.halted = ""

    def close(self) -> None:
        self.log.append(("closed",))
