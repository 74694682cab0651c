"""What `keel top` knows of a run: its records, read as they come, and what they say of its state.

Consumes: progress.jsonl, metrics.jsonl, guard.jsonl, evaluations.jsonl and refreshes.jsonl of the run directory, new
bytes only. Produces: `TopView`. Waits for: nothing. Always holds: a file that is missing, torn or cut back is no error;
a run directory that is not there yet is a run that has not begun.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cluster.errors import ConfigError
from cluster.files import Json, JsonlTail
from configs.guard import GuardSection
from configs.yaml_text import parse_yaml
from keel.display import RunView, StageView, number
from keel.signal_levels import BY_INTERVAL, Limit, guard_of, level_of, limits, severity, signals_of
from learner.guard.record import Level

_QUIET_S: Final = 180.0
"""Without news for so long, or for this many steps' time, a run is said to be silent."""
_QUIET_STEPS: Final = 6.0
_EVENTS_KEPT: Final = 100
_FILES: Final = ("progress", "metrics", "guard", "evaluations", "refreshes")
_DEFAULT_STAGES: Final = ("data", "sft", "collect", "rm", "ppo", "evaluate", "report")


@dataclass
class Curve:
    """(step, value) of one quantity, steps rising."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        """What was recorded of this step and later ones, before a resume, goes."""
        keep = bisect.bisect_left(self.steps, step)
        self.steps[keep:], self.values[keep:] = [step], [value]


@dataclass(frozen=True)
class Concern:
    """A signal that the verdict names, or that is past a threshold by now. `named`: the former."""

    name: str
    value: float | None
    limit: Limit | None
    level: Level
    named: bool


@dataclass(frozen=True)
class RunState:
    """`word`: one of not begun, running, finished, halted, silent. `detail`: the rest, for people."""

    word: str
    detail: str


class TopView:
    """One run. Call `read` about once a second."""

    CURVES: Final = ("proxy_z", "gold_mean", "kl_nats_per_sequence", "beta", "entropy_nats_per_token",
                     "response_tokens_mean")  # fmt: skip

    def __init__(self, run_dir: Path) -> None:
        self.path: Final = run_dir
        self._tails = {name: JsonlTail(run_dir / f"{name}.jsonl") for name in _FILES}
        self._files: dict[str, tuple[int, int]] = {}
        """Inode and size of the files that are read anew when they were rewritten."""
        self.run = RunView.of(())
        self.stages: Sequence[str] = _DEFAULT_STAGES
        self.guard = GuardSection()
        self._configured = False
        self.curves = {name: Curve() for name in (*self.CURVES, "win_rate")}
        self.signals: dict[str, float] = {}
        """Newest value of each: those measured at intervals stay until the next one."""
        self.events: deque[Json] = deque(maxlen=_EVENTS_KEPT)
        self.evaluation: Json = {}
        self.refreshes: Counter[str] = Counter()
        self._told_s = 0.0

    def read(self) -> None:
        """Take in what is new."""
        self._configure()
        for record in self._tails["progress"].read():
            self._told_s = max(self._told_s, number(record, "t") or 0.0)
            if self.run.apply_progress(record) is None:
                self.run.apply_role(record)
        for record in self._tails["metrics"].read():
            self._apply_step(record)
        if self._rewritten("guard"):
            self.events.clear()
        self.events.extend(self._tails["guard"].read())
        for record in self._tails["evaluations"].read():
            self.evaluation = record
            self._add("win_rate", number(record, "step"), number(record, "win_rate"))
        if self._rewritten("refreshes"):
            self.refreshes.clear()
        for record in self._tails["refreshes"].read():
            if record.get("kind") == "refresh":
                self.refreshes[str(record.get("outcome"))] += 1

    def _configure(self) -> None:
        """Once there is a configuration."""
        if self._configured or not (self.path / "config.yaml").exists():
            return
        try:
            raw = parse_yaml((self.path / "config.yaml").read_text(encoding="utf-8"), where="config.yaml")
            steps, stages = raw.get("learner", {}).get("steps"), raw.get("stages")
        except (OSError, UnicodeDecodeError, ConfigError, AttributeError):
            return
        self._configured = True
        self.run.total_steps = steps if isinstance(steps, int) else None
        self.stages = [str(stage) for stage in stages] if isinstance(stages, list) else _DEFAULT_STAGES
        self.guard = guard_of(self.path)

    def _apply_step(self, record: Json) -> None:
        self.run.apply_step(record)
        step = number(record, "step")
        for name in self.CURVES:
            self._add(name, step, number(record, name))
        self.signals |= signals_of(record)

    def _add(self, name: str, step: float | None, value: float | None) -> None:
        if step is not None and value is not None:
            self.curves[name].add(step, value)

    def _rewritten(self, name: str) -> bool:
        """Whether a resumed process has cut this file back: then it is read anew, from its start."""
        try:
            status = (self.path / f"{name}.jsonl").stat()
        except OSError:
            return False
        inode, size_bytes = self._files.get(name, (status.st_ino, 0))
        self._files[name] = (status.st_ino, status.st_size)
        if status.st_ino == inode and status.st_size >= size_bytes:
            return False
        self._tails[name] = JsonlTail(self.path / f"{name}.jsonl")
        return True

    # ---------------------------------------------------------------- what it says

    @property
    def step(self) -> Json:
        return self.run.step

    @property
    def verdict(self) -> Json:
        section = self.step.get("guard")
        return section if isinstance(section, dict) else {}

    @property
    def level(self) -> Level:
        return level_of(self.verdict.get("level"))

    @property
    def rollbacks(self) -> int:
        told = len([event for event in self.events if event.get("action") == "roll_back"])
        return max(told, int(number(self.step, "branch") or 0))

    @property
    def halt(self) -> Json | None:
        """The guard's halt, unless steps were done after it."""
        for event in reversed(self.events):
            if event.get("action") == "halt":
                return event if (number(self.step, "step") or 0) <= (number(event, "step") or 0) else None
        return None

    def concerns(self) -> list[Concern]:
        """The worst first."""
        known = limits(self.guard.thresholds)
        named = {name: level for level in (Level.WARN, Level.ACT) for name in _names(self.verdict.get(level.value))}
        found = [Concern(name, self.signals.get(name), known.get(name), level, True) for name, level in named.items()]
        for name, value in self.signals.items():
            limit = known.get(name)
            if name in named or name in BY_INTERVAL:
                continue
            if limit is not None and (level := limit.level(value)) is not Level.OK:
                found.append(Concern(name, value, limit, level, False))
        return sorted(found, key=lambda one: (not one.named, -severity(one.level), one.name))

    def state(self, now_s: float) -> RunState:
        views = self.run.stages
        if not views and not self.step:
            return RunState("not begun", f"no record in {self.path}")
        halt = self.halt
        if halt is not None:
            return RunState("halted", f"by the guard at step {_whole(halt.get('step'))}")
        done = [name for name in self.stages if name in views and views[name].state == "done"]
        if views and len(done) == len(self.stages):
            return RunState("finished", "all stages done")
        quiet_s = now_s - self.news_s()
        steps_s = self.run.recent_step_s
        usual_s = sum(steps_s) / len(steps_s) if steps_s else 0.0
        if quiet_s > max(_QUIET_S, _QUIET_STEPS * usual_s):
            return RunState("silent", "stopped, stalled or crashed? see logs/")
        stage = self.open_stage()
        return RunState("running", stage.name if stage is not None else "between stages")

    def over(self, now_s: float) -> bool:
        """Nothing more will come."""
        word = self.state(now_s).word
        return word == "finished" or (word == "halted" and self.open_stage() is None)

    def open_stage(self) -> StageView | None:
        """The one that goes on; of several (a crash leaves one open) the one begun last."""
        going = [stage for stage in self.run.stages.values() if stage.state == "running"]
        return max(going, key=lambda stage: stage.started_s or 0.0, default=None)

    def news_s(self) -> float:
        """Unix time of the newest record."""
        newest = self._told_s
        for name in _FILES:
            try:
                newest = max(newest, (self.path / f"{name}.jsonl").stat().st_mtime)
            except OSError:
                continue
        return newest


def _names(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _whole(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, int | float) else "?"
