"""What a running job looks like in the terminal: live with a TTY, one line a step and stage without.

Consumes: `progress.jsonl`, `metrics.jsonl` and `guard.jsonl` of the run directory, by tailing, so a display may start
late, or in another process. Produces: text. Waits for: nothing; the driver polls `refresh`. Always holds: a missing
file, an unknown stage or a record without some field shows as a gap, never as an error.

progress.jsonl: {"t": unix seconds, "stage", "event": "start" | "progress" | "end" | "skip", "step", "steps", "loss",
                "note", "seconds"}; a record without an event is progress
                {"t", "role", "event": "workers" | "restart" | "scale" | …, "running", "wanted", "note"}
metrics.jsonl:  one record a PPO step
guard.jsonl:    {"step", "event": "warn" | "act" | "ok" | "action", "why"}; of an action also "action" and its fields
config.yaml:    learner.steps, for the ETA
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cluster.errors import ConfigError
from cluster.files import Json, JsonlTail
from configs.yaml_text import parse_yaml

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

GAP = "–"
_ACTION_FIELDS = ("to_step", "beta", "factor", "rm_version", "until_version")
_RECENT_STEPS = 8
"""Steps that the ETA averages over."""
_LINE_EVERY_S = 5.0
"""Seconds of run time between two log lines of an offline stage."""


def number(record: Json, key: str) -> float | None:
    """The finite number at `key`; None when it is absent or no number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(record: Json, key: str, template: str = "{:.2f}") -> str:
    value = number(record, key)
    return GAP if value is None else template.format(value)


def seconds_text(seconds: float | None) -> str:
    """12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds is None:
        return GAP
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def event_of(record: Json) -> str:
    return str(record.get("event", "progress"))


@dataclass
class StageView:
    """What is known of one stage."""

    name: str
    started_s: float | None = None
    ended_s: float | None = None
    took_s: float | None = None
    """Its own account of its time, once it is over."""
    skipped: bool = False
    """Done in an earlier run that this one resumes."""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    note: str = ""

    def apply(self, record: Json) -> None:
        event, at_s = event_of(record), number(record, "t")
        if event == "start":
            self.started_s, self.ended_s, self.took_s, self.skipped = at_s, None, None, False
            self.step, self.loss = None, None
        elif event in ("end", "skip"):
            self.started_s = at_s if self.started_s is None else self.started_s
            self.ended_s, self.took_s, self.skipped = at_s, number(record, "seconds"), event == "skip"
        elif self.started_s is None:
            self.started_s = at_s
        note = record.get("note")
        self.note = note if isinstance(note, str) else ""
        step, steps, loss = number(record, "step"), number(record, "steps"), number(record, "loss")
        self.step = self.step if step is None else int(step)
        self.steps = self.steps if steps is None else int(steps)
        self.loss = self.loss if loss is None else loss

    def seconds(self, now_s: float) -> float | None:
        if self.took_s is not None or self.started_s is None:
            return self.took_s
        return max(0.0, (self.ended_s if self.ended_s is not None else now_s) - self.started_s)

    @property
    def state(self) -> str:
        return "waiting" if self.started_s is None else "running" if self.ended_s is None else "done"

    @property
    def position(self) -> str:
        if self.step is None:
            return ""
        return f"{self.step}/{self.steps}" if self.steps else str(self.step)


@dataclass
class RunView:
    """The run so far, from its records."""

    stages: dict[str, StageView]
    step: Json = field(default_factory=dict)
    """The newest PPO step's record."""
    recent_step_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    total_steps: int | None = None
    workers: Json = field(default_factory=dict)
    """The newest record of how many rollout actors run."""
    guard_event: Json = field(default_factory=dict)
    """The newest of guard.jsonl."""

    @classmethod
    def of(cls, stages: Iterable[str], *, total_steps: int | None = None) -> RunView:
        return cls(stages={name: StageView(name) for name in stages}, total_steps=total_steps)

    def apply_progress(self, record: Json) -> StageView | None:
        """The stage that `record` is about; one not announced is added at the end. None for a record without stage."""
        name = record.get("stage")
        if not isinstance(name, str):
            return None
        stage = self.stages.setdefault(name, StageView(name))
        stage.apply(record)
        return stage

    def apply_role(self, record: Json) -> str | None:
        """A record about a role, which is about no stage. The line that tells of it, if it is worth one."""
        role, note = record.get("role"), record.get("note")
        if role == "rollout" and event_of(record) == "workers":
            self.workers = record
        return f"[{role}] {note}" if isinstance(role, str) and isinstance(note, str) else None

    def apply_step(self, record: Json) -> None:
        self.step = record
        seconds = number(record, "step_seconds")
        if seconds is not None:
            self.recent_step_s.append(seconds)

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end of PPO, at the mean of recent steps."""
        step = number(self.step, "step")
        if self.total_steps is None or step is None or not self.recent_step_s:
            return None
        return max(0.0, self.total_steps - step) * sum(self.recent_step_s) / len(self.recent_step_s)

    @property
    def step_position(self) -> str:
        total = f"/{self.total_steps}" if self.total_steps else ""
        return _text(self.step, "step", "{:.0f}") + total


# ---------------------------------------------------------------- text


def stage_line(stage: StageView, *, now_s: float) -> str:
    """One log line for the start or end of a stage, or a step of it."""
    if stage.state == "done":
        return f"[{stage.name}] done {'earlier, ' if stage.skipped else ''}in {seconds_text(stage.seconds(now_s))}"
    parts = [f"[{stage.name}]", stage.position or stage.note or "started"]
    if stage.loss is not None:
        parts.append(f"loss {stage.loss:.3f}")
    return " ".join(parts)


def step_line(view: RunView) -> str:
    """One log line for the newest PPO step."""
    return "[ppo] step " + view.step_position + "  " + "  ".join(f"{name} {value}" for name, value in _readings(view))


def guard_line(record: Json) -> str:
    """One log line for a word or an action of the guard."""
    step, why = _text(record, "step", "{:.0f}"), record.get("reason") or record.get("why")
    what = str(record.get("action") if event_of(record) == "action" else event_of(record))
    fields = ", ".join(
        f"{key} {value if isinstance(value, str) else f'{value:.4g}'}"
        for key in _ACTION_FIELDS
        if isinstance(value := record.get(key), str | int | float)
    )
    text = f"[guard] step {step}: {what}" + (f" ({fields})" if fields else "")
    return one_line(f"{text}: {why}" if isinstance(why, str) and why else text)


def says_again(alert: Json, before: Json) -> bool:
    """Whether an alert only repeats the line before it: a verdict of the same step, with the same reason."""
    if alert.get("action") != "alert" or event_of(before) not in ("warn", "act"):
        return False
    return alert.get("step") == before.get("step") and str(alert.get("why")).endswith(str(before.get("why")))


def one_line(text: str) -> str:
    """Without what a terminal would take for a command, or a log for another line."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _readings(view: RunView) -> list[tuple[str, str]]:
    record = view.step
    depths = "/".join(_text(record, f"depth_{name}", "{:.0f}") for name in ("prompts", "rollouts", "scored"))
    return [
        ("reward", f"{_text(record, 'proxy_z', '{:+.2f}')} z"),
        ("gold", _text(record, "gold_mean", "{:+.2f}")),
        ("KL", f"{_text(record, 'kl_nats_per_sequence')} of {_text(record, 'kl_target_nats_per_sequence')} nats"),
        ("β", _text(record, "beta", "{:.4f}")),
        ("entropy", _text(record, "entropy_nats_per_token")),
        ("tokens", _text(record, "response_tokens_mean", "{:.0f}")),
        ("staleness", _text(record, "staleness_mean")),
        ("queues", depths),
        ("actors", _headcount(view.workers)),
        ("tokens/s", _text(record, "tokens_per_second_rollout", "{:.0f}")),
        ("step", f"{_text(record, 'step_seconds', '{:.1f}')} s"),
        ("ETA", seconds_text(view.eta_s)),
    ]


def _headcount(record: Json) -> str:
    """ "3", or "1 of 3" while not all of them run."""
    running, wanted = _text(record, "running", "{:.0f}"), _text(record, "wanted", "{:.0f}")
    return running if running == wanted else f"{running} of {wanted}"


def _total_steps(run_dir: Path) -> int | None:
    """learner.steps of the run's own configuration; None when there is none yet, as for a foreign directory."""
    try:
        raw = parse_yaml((run_dir / "config.yaml").read_text(encoding="utf-8"), where="config.yaml")
        return int(raw["learner"]["steps"])
    except (OSError, ValueError, TypeError, KeyError, ConfigError):
        return None


class Display:
    """Shows one run while it runs. `refresh` reads what is new and shows it; call it about once a second.

    What the run directory holds already when the display starts (a resumed run) is taken in, not printed again.
    Without a TTY, steps of offline stages are thinned to one line in five seconds; every PPO step has its line.
    """

    def __init__(
        self,
        run_dir: Path,
        stages: Sequence[str],
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        from rich.console import Console

        self._console = console if console is not None else Console()
        self._name = run_dir.name
        self._clock = clock
        self._progress, self._metrics = JsonlTail(run_dir / "progress.jsonl"), JsonlTail(run_dir / "metrics.jsonl")
        self._guard = JsonlTail(run_dir / "guard.jsonl")
        self._live: Live | None = None
        self._line_at_s: dict[str, float] = {}
        self.view = RunView.of(stages, total_steps=_total_steps(run_dir))

    def __enter__(self) -> Display:
        self._read(lambda line: None)
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(self._render(), console=self._console, auto_refresh=False, transient=False)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def refresh(self) -> None:
        """Take in new records and show them."""
        self._read(self._print if self._live is None else lambda line: None)
        if self._live is not None:
            self._live.update(self._render(), refresh=True)

    def _print(self, line: str) -> None:
        print(line, file=self._console.file, flush=True)

    def _read(self, show: Callable[[str], None]) -> None:
        now_s = self._clock()
        for record in self._progress.read():
            stage = self.view.apply_progress(record)
            line = self.view.apply_role(record) if stage is None else None
            # The guard's own lines come from its journal.
            if line is not None and record.get("role") != "guard":
                show(line)
            if stage is not None and self._deserves_line(stage.name, record):
                show(stage_line(stage, now_s=now_s))
        for record in self._metrics.read():
            self.view.apply_step(record)
            show(step_line(self.view))
        for record in self._guard.read():
            if not says_again(record, self.view.guard_event):
                show(guard_line(record))
                self.view.guard_event = record

    def _deserves_line(self, stage: str, record: Json) -> bool:
        if event_of(record) != "progress" or record.get("note"):
            return True
        # A step of PPO has its own, fuller line, from its metrics.
        if stage == "ppo":
            return False
        at_s = number(record, "t") or 0.0
        if at_s - self._line_at_s.get(stage, -math.inf) < _LINE_EVERY_S:
            return False
        self._line_at_s[stage] = at_s
        return True

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        parts: list[RenderableType] = [self._stage_table()]
        if self.view.step:
            parts.append(self._step_table())
        if self.view.guard_event:
            parts.append(Text(guard_line(self.view.guard_event), style="dim", no_wrap=True, overflow="ellipsis"))
        return Panel(Group(*parts), title=f"keel · {self._name}", title_align="left", expand=False)

    def _stage_table(self) -> Table:
        from rich.table import Table

        now_s = self._clock()
        marks = {"waiting": "[dim]·[/dim]", "running": "[yellow]▶[/yellow]", "done": "[green]✓[/green]"}
        table = Table.grid(padding=(0, 2))
        for stage in self.view.stages.values():
            detail = "  ".join(
                filter(None, (stage.position, "" if stage.loss is None else f"loss {stage.loss:.3f}", stage.note))
            )
            table.add_row(marks[stage.state], stage.name, seconds_text(stage.seconds(now_s)), detail)
        return table

    def _step_table(self) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        cells = [("PPO step", self.view.step_position), *_readings(self.view)]
        for start in range(0, len(cells), 3):
            row = cells[start : start + 3]
            table.add_row(*(part for name, value in row for part in (f"[dim]{name}[/dim]", value)))
        return table
