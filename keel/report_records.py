"""What a run directory holds, for the report. Each file may be missing, torn or from before it had today's fields."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cluster.errors import DataError
from cluster.files import Json, read_jsonl
from configs.guard import GuardSection
from keel.display import RunView, number
from keel.plots import ChartData, Rollback
from keel.signal_levels import limits

_NO_SUMMARY: Final = "summary.json is not there: the run has not finished, or its report was not asked for."


@dataclass(frozen=True)
class RunRecords:
    """`gaps` says in words what is not there. `events`: of guard.jsonl. `alarm_answers`: of guard_samples.jsonl."""

    steps: list[Json]
    summary: Json
    samples: list[Json]
    stage_seconds: dict[str, float]
    gaps: list[str]
    refreshes: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    evaluations: list[Json] = field(default_factory=list)
    alarm_answers: list[Json] = field(default_factory=list)
    diagnosis: Json = field(default_factory=dict)
    guard: GuardSection = field(default_factory=GuardSection)

    @property
    def actions(self) -> list[Json]:
        return [event for event in self.events if event.get("event") == "action"]

    @property
    def guarded(self) -> bool:
        """Whether a guard looked at this run at all."""
        return bool(self.events) or any("guard" in step or "signals" in step for step in self.steps)

    @property
    def words(self) -> list[str]:
        """Words that were over-used at some step, those of most steps first."""
        found: Counter[str] = Counter()
        for step in self.steps:
            words = guard_of_step(step).get("words")
            if isinstance(words, list):
                found.update(word for word in words if isinstance(word, str) and word.strip())
        return [word for word, _ in found.most_common()]

    @property
    def chart_data(self) -> ChartData:
        return ChartData(
            steps=self.steps,
            evaluations=self.evaluations,
            rollbacks=rollbacks(self.steps, self.actions),
            limits=limits(self.guard.thresholds),
        )


def guard_of_step(step: Json) -> Json:
    section = step.get("guard")
    return section if isinstance(section, dict) else {}


def rollbacks(steps: Sequence[Json], actions: Iterable[Json]) -> list[Rollback]:
    """By the guard's own account; where that is lost, by the steps at which another branch began."""
    told = [
        Rollback(at_step, number(action, "to_step"))
        for action in actions
        if action.get("action") == "roll_back" and (at_step := number(action, "step")) is not None
    ]
    if told:
        return told
    branches = [
        (step, branch)
        for record in steps
        if (step := number(record, "step")) is not None and (branch := number(record, "branch")) is not None
    ]
    return [Rollback(before, None) for (before, old), (_, new) in itertools.pairwise(branches) if new > old]


def read_records(run_dir: Path, guard: GuardSection) -> RunRecords:
    """The records of a run, finished or not. Damaged files become gaps."""
    gaps: list[str] = []
    steps = last_of_each_step(_lines(run_dir / "metrics.jsonl", gaps))
    if not steps:
        gaps.append("No PPO step is recorded yet: there are no curves.")
    summary = _object(
        run_dir / "summary.json",
        gaps,
        absent="summary.json is not there: the run has not come to its end, or was not asked for a report.",
    )
    samples = _lines(run_dir / "samples.jsonl", gaps)
    seconds = summary.get("stage_seconds")
    if not isinstance(seconds, dict):
        seconds = _seconds_from_progress(_lines(run_dir / "progress.jsonl", []))
    timed = {str(name): value for name in seconds if (value := number(seconds, name)) is not None}
    return RunRecords(
        steps=steps, summary=summary, samples=samples, stage_seconds=timed, gaps=gaps, guard=guard,
        refreshes=_optional(run_dir / "refreshes.jsonl", gaps),
        events=_optional(run_dir / "guard.jsonl", gaps),
        evaluations=last_of_each_step(_optional(run_dir / "evaluations.jsonl", gaps)),
        alarm_answers=_optional(run_dir / "guard_samples.jsonl", gaps),
        diagnosis=_object(run_dir / "diagnosis.json", gaps, absent=None),
    )  # fmt: skip


def _optional(path: Path, gaps: list[str]) -> list[Json]:
    """A file that not every run has."""
    return _lines(path, gaps) if path.exists() else []


def _lines(path: Path, gaps: list[str]) -> list[Json]:
    if not path.exists():
        gaps.append(f"{path.name} is not there: the run has not come so far.")
        return []
    try:
        return read_jsonl(path)
    except DataError as error:
        gaps.append(f"{path.name} is damaged and left out: {error.what} {error.got}")
        return []


def _object(path: Path, gaps: list[str], *, absent: str | None) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        gaps.extend([absent] if absent is not None else [])
        return {}
    except (OSError, ValueError) as error:
        gaps.append(f"{path.name} is damaged and left out: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def last_of_each_step(records: Iterable[Json]) -> list[Json]:
    """By step; a resumed run records again the steps after its checkpoint, and the later record is the true one."""
    by_step = {step: record for record in records if (step := number(record, "step")) is not None}
    return [by_step[step] for step in sorted(by_step)]


def _seconds_from_progress(records: Iterable[Json]) -> dict[str, float | None]:
    view, now_s = RunView.of(()), 0.0
    for record in records:
        now_s = max(now_s, number(record, "t") or 0.0)
        view.apply_progress(record)
    return {name: stage.seconds(now_s) for name, stage in view.stages.items()}
