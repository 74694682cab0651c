"""What a run left behind, read so that nothing in it can stop the reading: files may be missing, torn or from an older
version, and values may be of the wrong type. What cannot be read becomes a gap, said in words.
"""

from __future__ import annotations

import bisect
import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from cluster.files import Json
from configs.guard import Thresholds
from configs.yaml_text import parse_yaml
from keel.diagnose.last_error import LastError, last_error
from keel.display import number

Values = NDArray[np.float64]

MEASURED: Final = (
    "win_rate", "win_rate_low", "win_rate_high", "win_rate_length_controlled", "rm_judge_agreement",
    "anchor_perplexity_ratio", "canary_ks", "canary_z",
)  # fmt: skip
"""What evaluations.jsonl has numbers of; measured at intervals."""


@dataclass(frozen=True)
class Answer:
    """`moment`: start, steady, alarm, after_rollback, end."""

    text: str
    moment: str
    step: int
    reward: float | None = None
    gold: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """`steps`: rising. `series`: by name, one value a step, NaN where there is none."""

    path: Path
    config: Json = field(default_factory=dict)
    steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    series: Mapping[str, Values] = field(default_factory=dict)
    step_records: Sequence[Json] = ()
    guard_events: Sequence[Json] = ()
    evaluations: Sequence[Json] = ()
    refreshes: Sequence[Json] = ()
    progress: Sequence[Json] = ()
    answers: Sequence[Answer] = ()
    summary: Json = field(default_factory=dict)
    evaluated: Mapping[str, Json] = field(default_factory=dict)
    """By tag: sft, final."""
    error: LastError | None = None
    alive: bool = False
    """A process owns the run's directory."""
    gaps: Sequence[str] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)

    def values(self, name: str) -> Values:
        """The series, all NaN where it was not recorded."""
        found = self.series.get(name)
        return found if found is not None else np.full(len(self.steps), np.nan)

    def setting(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path of config.yaml."""
        node: Any = self.config
        for key in path.split("."):
            if not isinstance(node, dict) or key not in node:
                return default
            node = node[key]
        return node

    def setting_number(self, path: str, default: float) -> float:
        value = self.setting(path)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default

    def rm_versions(self) -> list[str | None]:
        """One a step."""
        found = (record.get("rm_version") for record in self.step_records)
        return [one if isinstance(one, str) else None for one in found]

    def branches(self) -> NDArray[np.int64]:
        """One a step: rollbacks before it; 0 in records of before there were any."""
        return np.nan_to_num(self.values("branch")).astype(np.int64)

    def acted(self) -> bool:
        """The guard's verdict was to act, at least once."""
        return any(line.get("event") == "act" for line in self.guard_events)

    def words(self) -> list[tuple[int, tuple[str, ...]]]:
        """(step, over-used words) of the steps at which the guard named some."""
        named: list[tuple[int, tuple[str, ...]]] = []
        for step, record in zip(self.steps, self.step_records, strict=True):
            guard = record.get("guard")
            words = guard.get("words") if isinstance(guard, dict) else None
            if isinstance(words, list) and words:
                named.append((int(step), tuple(str(word) for word in words)))
        return named


def read_record(run_dir: Path) -> RunRecord:
    """Raises DataError when there is no such directory."""
    if not run_dir.is_dir():
        raise DataError(f"no run directory {run_dir}", got="nothing there", do="give the directory of a run: runs/NAME")
    gaps: list[str] = []
    config = _config(run_dir, gaps)
    step_records = _last_of_each_step(_lines(run_dir / "metrics.jsonl", gaps))
    steps = np.array([int(number(record, "step") or 0) for record in step_records], dtype=np.int64)
    evaluated = {tag: _object(run_dir / "eval" / f"{tag}.json", []) for tag in ("sft", "final")}
    return RunRecord(
        path=run_dir,
        config=config,
        steps=steps,
        series=_series(step_records, evaluated),
        step_records=step_records,
        guard_events=_lines(run_dir / "guard.jsonl", gaps),
        evaluations=_lines(run_dir / "evaluations.jsonl", gaps),
        refreshes=_lines(run_dir / "refreshes.jsonl", gaps),
        progress=_lines(run_dir / "progress.jsonl", gaps),
        answers=_answers(run_dir, gaps, last_step=int(steps[-1]) if len(steps) else 0, alone=_model_alone(config)),
        summary=_object(run_dir / "summary.json", gaps),
        evaluated=evaluated,
        error=last_error(run_dir / "logs"),
        alive=_owned(run_dir / ".lock"),
        gaps=tuple(gaps),
        thresholds=_thresholds(config),
    )


# ---------------------------------------------------------------- files


def _lines(path: Path, gaps: list[str]) -> list[Json]:
    """Every line that is a JSON object; the others are counted as a gap, but for a torn last one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        gaps.append(f"{path.name} cannot be read: {error}")
        return []
    records, damaged = [], 0
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            records.append(value)
        elif index < len(lines) - 1:
            damaged += 1
    if damaged:
        gaps.append(f"{path.name}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return records


def _object(path: Path, gaps: list[str]) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        gaps.append(f"{path.name} is damaged and left out: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _config(run_dir: Path, gaps: list[str]) -> Json:
    path = run_dir / "config.yaml"
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except FileNotFoundError:
        gaps.append("config.yaml is not there: defaults are taken")
        return {}
    except Exception as error:  # whatever a damaged file makes of the parser
        gaps.append(f"config.yaml is damaged, defaults are taken: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _thresholds(config: Json) -> Thresholds:
    guard = config.get("guard")
    wanted = guard.get("thresholds") if isinstance(guard, dict) else None
    try:
        return Thresholds.model_validate(wanted or {})
    except ValueError:
        return Thresholds()


def _owned(lock: Path) -> bool:
    """Whether a process holds the run's lock. Asked shared, and given back at once."""
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# ---------------------------------------------------------------- steps


def _last_of_each_step(records: Sequence[Json]) -> list[Json]:
    by_step = {int(step): record for record in records if (step := number(record, "step")) is not None}
    return [by_step[step] for step in sorted(by_step)]


def _series(records: Sequence[Json], evaluated: Mapping[str, Json]) -> dict[str, Values]:
    """Numbers of the step records by name, the guard's signals among them; a signal that a record lacks is derived from
    its other numbers where they say it."""
    rows = [_numbers(record) for record in records]
    names = sorted({name for row in rows for name in row})
    series = {name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64) for name in names}
    for name, values in _derived(series, evaluated).items():
        known = series.get(name)
        series[name] = values if known is None else np.where(np.isnan(known), values, known)
    return series


def _numbers(record: Json) -> dict[str, float]:
    found = {name: value for name in record if (value := number(record, name)) is not None}
    signals = record.get("signals")
    if isinstance(signals, dict):
        found |= {str(name): value for name in signals if (value := number(signals, name)) is not None}
    return found


def _derived(series: Mapping[str, Values], evaluated: Mapping[str, Json]) -> dict[str, Values]:
    derived: dict[str, Values] = {}
    if (length := series.get("response_tokens_mean")) is not None:
        before = number(evaluated.get("sft", {}), "response_tokens") or _first(length)
        if before:
            derived["response_tokens_ratio"] = length / before
    if (explained := series.get("value_explained_variance")) is not None:
        # MSE/var(returns) = 1 − explained variance + bias²/var: at least this.
        derived["value_error_ratio"] = 1.0 - explained
    if (norm := series.get("grad_norm_policy")) is not None:
        derived["grad_norm_ratio"] = _over_median_so_far(norm)
    if (spread := series.get("reward_std")) is not None and (before := _first(spread)):
        derived["reward_std_ratio"] = spread / before
    return derived


def _first(values: Values, count: int = 3) -> float | None:
    known = values[~np.isnan(values)][:count]
    middle = float(np.median(known)) if len(known) else 0.0
    return middle if middle > 0 else None


def _over_median_so_far(values: Values) -> Values:
    result = np.full(len(values), np.nan)
    before: list[float] = []
    for index, value in enumerate(values):
        if np.isnan(value):
            continue
        half = len(before) // 2
        middle = (before[half] + before[-half - 1]) / 2 if before else 0.0
        if middle > 0:
            result[index] = value / middle
        bisect.insort(before, float(value))
    return result


# ---------------------------------------------------------------- answers


def _answers(run_dir: Path, gaps: list[str], *, last_step: int, alone: bool) -> list[Answer]:
    """Answers of the run's moments; whole evaluations of the first and the last policy where they are there. `alone`:
    their rewards, which are the reward model's, are what training paid."""
    found = []
    for row in _lines(run_dir / "guard_samples.jsonl", gaps):
        if isinstance(row.get("answer"), str):
            step = int(number(row, "step") or 0)
            found.append(Answer(row["answer"], str(row.get("moment", "steady")), step, number(row, "reward")))
    for tag, moment, step in (("sft", "start", 0), ("final", "end", last_step)):
        rows = _lines(run_dir / "eval" / f"{tag}.rows.jsonl", gaps)
        found += [
            Answer(row["answer"], moment, step, number(row, "reward") if alone else None, number(row, "gold"))
            for row in rows
            if isinstance(row.get("answer"), str)
        ]
    if not any(answer.moment == "end" for answer in found):
        for row in _lines(run_dir / "samples.jsonl", gaps):
            for key, moment, step in (("before", "start", 0), ("after", "end", last_step)):
                if isinstance(row.get(key), str):
                    found.append(Answer(row[key], moment, step, number(row, f"reward_{key}") if alone else None))
    return found


def _model_alone(config: Json) -> bool:
    """Nothing but the reward model pays."""
    reward = config.get("reward")
    sources = reward.get("sources") if isinstance(reward, dict) else None
    kinds = [one.get("kind") for one in sources if isinstance(one, dict)] if isinstance(sources, list) else ["model"]
    return kinds == ["model"]
