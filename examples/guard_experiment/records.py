"""What one run of the experiment left behind, read from its directory, and what can be told from it: gold, distance,
the first step of an effect, the guard's verdicts and actions, and what `keel diagnose` calls it.

Steps are counted from 1 and go on upward after a rollback.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from cluster.files import Json, read_jsonl
from examples.guard_experiment.arms import Arm

EFFECT_SHARE: Final = 0.05
"""An effect is there when more than this share of a step's answers shows it."""
LAST_STEPS: Final = 5
"""Gold at the end: the mean over so many last steps, where the run was not evaluated."""


@dataclass(frozen=True)
class RunRecord:
    """One run. `steps`, `events`: lines of metrics.jsonl and guard.jsonl. `gold_sft`: of the policy before training, on
    held-out prompts; `gold_evaluated`: of the last one, None where it was not measured. `diagnosis`: names, the best
    match first; None where nobody asked. `complete`: the run came to its end, or to a halt."""

    arm: Arm
    seed: int
    steps: Sequence[Json] = ()
    events: Sequence[Json] = ()
    gold_sft: float | None = None
    gold_evaluated: float | None = None
    diagnosis: tuple[str, ...] | None = None
    complete: bool = False
    seconds: float | None = None

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def halted(self) -> bool:
        return was_halted(self.events)

    @property
    def rollbacks(self) -> tuple[int, ...]:
        """Steps after which the run went back."""
        return tuple(int(event["step"]) for event in self.events if event.get("action") == "roll_back")

    @property
    def first_warning(self) -> int | None:
        return self._first(lambda record: _level(record) in ("warn", "act"))

    @property
    def detected(self) -> int | None:
        """The first step whose verdict was to act."""
        return self._first(lambda record: _level(record) == "act")

    @property
    def detected_by(self) -> tuple[str, ...]:
        """The signals of that verdict."""
        found = next((record for record in self.steps if _level(record) == "act"), None)
        return tuple(found["guard"].get("act", ())) if found else ()

    @property
    def effect_begins(self) -> int | None:
        """The first step at which more than EFFECT_SHARE of the answers show what the planted bug pays for."""
        if self.arm.from_start:
            return int(self.steps[0]["step"]) if self.steps else None
        return self._first(lambda record: (record.get("flagged_fraction") or 0.0) > EFFECT_SHARE)

    @property
    def gold_lowest(self) -> tuple[int, float] | None:
        """(step, gold)."""
        found = [(int(record["step"]), value(record, "gold_mean")) for record in self.steps]
        golds = [(step, gold) for step, gold in found if gold is not None]
        return min(golds, key=lambda pair: pair[1], default=None)

    @property
    def gold_end(self) -> float | None:
        if self.gold_evaluated is not None:
            return self.gold_evaluated
        golds = [gold for record in self.steps[-LAST_STEPS:] if (gold := value(record, "gold_mean")) is not None]
        return fmean(golds) if golds else None

    @property
    def kl_end(self) -> float | None:
        kls = [kl for record in self.steps[-LAST_STEPS:] if (kl := value(record, "kl_nats_per_sequence")) is not None]
        return fmean(kls) if kls else None

    def _first(self, holds: Callable[[Json], bool]) -> int | None:
        return next((int(record["step"]) for record in self.steps if holds(record)), None)


def read_run(arm: Arm, seed: int, run_dir: Path) -> RunRecord:
    """As much as there is; a run that never began is an empty record."""
    outcome = read_json(run_dir / OUTCOME_FILE)
    return RunRecord(
        arm=arm,
        seed=seed,
        steps=lines_of(run_dir / "metrics.jsonl"),
        events=lines_of(run_dir / "guard.jsonl"),
        gold_sft=read_json(run_dir / "eval" / "sft.json").get("gold"),
        gold_evaluated=read_json(run_dir / "eval" / "final.json").get("gold"),
        diagnosis=_diagnosis(run_dir / "diagnosis.json"),
        complete=bool(outcome.get("complete")),
        seconds=outcome.get("seconds"),
    )


OUTCOME_FILE: Final = "outcome.json"
"""Written by the experiment when a run has ended: exit code, seconds, whether it is complete."""


def was_halted(events: Sequence[Json]) -> bool:
    """The guard's last word was to halt."""
    return any(event.get("action") == "halt" for event in events[-3:])


def value(record: Json, key: str) -> float | None:
    """A finite number, else None."""
    found = record.get(key)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def lines_of(path: Path) -> list[Json]:
    return read_jsonl(path) if path.exists() else []


def read_json(path: Path) -> Json:
    """{} where there is no such file."""
    found: Json = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _level(record: Json) -> str:
    """ "ok" for records from before there was a guard."""
    level: str = (record.get("guard") or {}).get("level", "ok")
    return level


def _diagnosis(path: Path) -> tuple[str, ...] | None:
    if not path.exists():
        return None
    return tuple(match["name"] for match in read_json(path).get("matches", ()))
