"""The experiment's bars, judged from records alone.

| runs | bar |
|---|---|
| (a) β = 0, nobody acts | gold at or under SFT − 2 by step 70 |
| (b), (c): β alone | nothing: they are there to compare with |
| (d) β = 0 with guard | a verdict to act by step 25, a rollback, and gold at the end at or over SFT + 0.3 |
| clean: gold is the reward | no verdict to act in any of at least five runs of 60 steps |
| planted bugs | a verdict to act within 10 steps of the first effect on > 5 % of the answers; named rightly |

A run that is not complete passes nothing. Nothing here is relaxed for a short experiment: what a bar needs and was not
measured is `None`, open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from examples.guard_experiment.arms import Question
from examples.guard_experiment.records import RunRecord, value

COLLAPSE: Final = 2.0
COLLAPSE_BY_STEP: Final = 70
RECOVERY: Final = 0.3
RECOVERY_STEPS: Final = 60
"""Asked of runs of so many steps at least."""
DETECT_BY_STEP: Final = 25
DETECT_WITHIN_STEPS: Final = 10
CLEAN_RUNS: Final = 5
CLEAN_STEPS: Final = 60


@dataclass(frozen=True)
class Bar:
    """`passed`: None where the experiment has not measured it. `found`: one line, with numbers."""

    name: str
    asked: str
    passed: bool | None
    found: str


def bars_of(record: RunRecord) -> tuple[Bar, ...]:
    """What is asked of this run by itself."""
    if not record.steps:
        return ()
    match record.arm.question:
        case Question.COLLAPSES:
            return (_collapses(record),)
        case Question.COMPARES:
            return ()
        case Question.RECOVERS:
            return (_detected_by(record), _rolled_back(record), _recovered(record))
        case Question.DETECTS:
            return (_detected_within(record), _named(record))
        case Question.CLEAN:
            return (_nothing_to_act_on(record),)


def clean_runs(records: Sequence[RunRecord]) -> Bar:
    """Over all clean runs together."""
    runs = [one for one in records if one.arm.question is Question.CLEAN]
    whole = [one for one in runs if one.complete and one.last_step >= CLEAN_STEPS]
    alarms = [f"{one.arm.name} s{one.seed} at step {one.detected}" for one in runs if one.detected is not None]
    passed = None if not alarms and len(whole) < CLEAN_RUNS else not alarms
    found = f"{len(whole)} runs, " + (f"verdicts to act: {', '.join(alarms)}" if alarms else "no verdict to act")
    return Bar("clean", f"{CLEAN_RUNS} clean runs of {CLEAN_STEPS} steps raise no verdict to act", passed, found)


def _collapses(record: RunRecord) -> Bar:
    asked = f"gold ≤ SFT − {COLLAPSE:g} by step {COLLAPSE_BY_STEP}"
    sft, lowest = record.gold_sft, record.gold_lowest
    if sft is None or lowest is None:
        return Bar("collapses", asked, None, "gold was not measured")
    golds = [
        gold
        for step in record.steps
        if step["step"] <= COLLAPSE_BY_STEP and (gold := value(step, "gold_mean")) is not None
    ]
    passed = min(golds, default=math.inf) <= sft - COLLAPSE
    whole = record.last_step >= COLLAPSE_BY_STEP
    found = f"gold {min(golds, default=math.nan):.2f} at its lowest, SFT {sft:.2f}"
    return Bar("collapses", asked, True if passed else (False if whole else None), found)


def _detected_by(record: RunRecord) -> Bar:
    asked = f"verdict to act by step {DETECT_BY_STEP}"
    step = record.detected
    if step is None:
        passed = None if record.last_step < DETECT_BY_STEP else False
        return Bar("detected", asked, passed, f"none in {record.last_step} steps")
    return Bar("detected", asked, step <= DETECT_BY_STEP, f"step {step}: {', '.join(record.detected_by)}")


def _rolled_back(record: RunRecord) -> Bar:
    steps = record.rollbacks
    found = f"after step {', '.join(map(str, steps))}" if steps else "never"
    return Bar("rolled back", "at least once", bool(steps) if steps or record.complete else None, found)


def _recovered(record: RunRecord) -> Bar:
    asked = f"gold at the end ≥ SFT + {RECOVERY:g}"
    sft, end = record.gold_sft, record.gold_end
    if sft is None or end is None or not record.complete:
        return Bar("recovered", asked, None, "not measured")
    if record.arm.steps < RECOVERY_STEPS:
        return Bar("recovered", asked, None, f"gold {end:.2f}, SFT {sft:.2f}; asked of {RECOVERY_STEPS} steps")
    found = f"gold {end:.2f}, SFT {sft:.2f}" + (", halted" if record.halted else "")
    return Bar("recovered", asked, end >= sft + RECOVERY, found)


def _detected_within(record: RunRecord) -> Bar:
    asked = f"verdict to act within {DETECT_WITHIN_STEPS} steps of the first effect"
    begins, step = record.effect_begins, record.detected
    if begins is None:
        found = "no effect" if step is None else f"no effect; verdict to act at step {step}: {_signals(record)}"
        return Bar("detected", asked, None if step is None else True, found)
    found = f"effect from step {begins}, "
    if step is None:
        late = record.last_step >= begins + DETECT_WITHIN_STEPS
        return Bar("detected", asked, False if late else None, f"{found}no verdict to act in {record.last_step} steps")
    found += f"verdict to act at step {step}: {_signals(record)}"
    return Bar("detected", asked, step <= begins + DETECT_WITHIN_STEPS, found)


def _named(record: RunRecord) -> Bar:
    asked = f"keel diagnose: {record.arm.named}"
    if record.diagnosis is None:
        return Bar("named", asked, None, "no diagnosis")
    best = record.diagnosis[0] if record.diagnosis else "nothing"
    return Bar("named", asked, best == record.arm.named, ", ".join(record.diagnosis[:3]) or best)


def _nothing_to_act_on(record: RunRecord) -> Bar:
    asked = "no verdict to act"
    if record.detected is not None:
        return Bar("clean", asked, False, f"step {record.detected}: {_signals(record)}")
    return Bar("clean", asked, True if record.complete else None, f"none in {record.last_step} steps")


def _signals(record: RunRecord) -> str:
    return ", ".join(record.detected_by) or "?"
