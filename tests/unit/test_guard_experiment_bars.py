"""The bars of the experiment on the guard, and its table and figure, on records written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.guard_experiment.arms import ALL
from examples.guard_experiment.bars import bars_of, clean_runs
from examples.guard_experiment.records import RunRecord, was_halted
from examples.guard_experiment.table import FIGURE, TABLE, write_table

pytestmark = pytest.mark.timeout(60)

BY_NAME = {arm.name: arm for arm in ALL}


def _steps(count: int, **values: Any) -> list[dict[str, Any]]:
    """Records of steps 1 … count; a value may be a function of the step."""
    return [
        {"step": step, "kl_nats_per_sequence": 0.1 * step}
        | {key: made(step) if callable(made) else made for key, made in values.items()}
        for step in range(1, count + 1)
    ]


def _guard(step: int, *, acts_from: int, signal: str = "proxy_z") -> dict[str, Any]:
    level = "act" if step >= acts_from else "ok"
    return {"level": level, "warn": [], "act": [signal] if level == "act" else [], "actions": [], "words": []}


def _run(name: str, steps: Sequence[dict[str, Any]], **fields: Any) -> RunRecord:
    return replace(RunRecord(BY_NAME[name], 0, steps=steps, complete=True, gold_sft=0.9), **fields)


def _passed(record: RunRecord) -> dict[str, bool | None]:
    return {bar.name: bar.passed for bar in bars_of(record)}


def test_a_collapse_is_two_points_by_step_seventy() -> None:
    assert _passed(_run("unguarded", _steps(70, gold_mean=lambda step: 0.9 - 0.04 * step))) == {"collapses": True}
    assert _passed(_run("unguarded", _steps(70, gold_mean=lambda step: 0.9 - 0.02 * step))) == {"collapses": False}
    late = _run("unguarded", _steps(90, gold_mean=lambda step: 0.9 if step <= 70 else -3.0))
    assert _passed(late) == {"collapses": False}
    assert _passed(_run("unguarded", _steps(30, gold_mean=0.9))) == {"collapses": None}
    assert _passed(_run("unguarded", _steps(70))) == {"collapses": None}
    null = _steps(70, gold_mean=lambda step: 0.9 if step < 40 else None)  # as a number that is none is written
    assert _passed(_run("unguarded", null)) == {"collapses": False}


def test_the_guarded_run_detects_goes_back_and_ends_well() -> None:
    steps = _steps(70, gold_mean=1.5, guard=lambda step: _guard(step, acts_from=25))
    went_back = [{"event": "action", "action": "roll_back", "step": 25, "to_step": 10}]
    good = _run("guarded", steps, events=went_back, gold_evaluated=1.2)
    assert _passed(good) == {"detected": True, "rolled back": True, "recovered": True}
    assert good.rollbacks == (25,)
    late = _steps(70, gold_mean=1.5, guard=lambda step: _guard(step, acts_from=26))
    assert _passed(_run("guarded", late, gold_evaluated=1.19)) == {
        "detected": False, "rolled back": False, "recovered": False,
    }  # fmt: skip
    short = replace(good, arm=replace(good.arm, steps=28), gold_evaluated=0.5)
    assert _passed(short)["recovered"] is None


@pytest.mark.parametrize(("acts_from", "passed"), [(30, True), (31, False), (5, True), (99, False)])
def test_a_planted_bug_is_to_be_found_within_ten_steps_of_its_effect(acts_from: int, passed: bool) -> None:
    steps = _steps(
        40,
        flagged_fraction=lambda step: 0.05 if step < 20 else 0.06,
        guard=lambda step: _guard(step, acts_from=acts_from),
    )
    record = _run("word", steps, diagnosis=("over_used_phrase", "beta_too_low"))
    assert record.effect_begins == 20
    assert _passed(record) == {"detected": passed, "named": True}


def test_what_did_not_happen_is_open_and_never_passed() -> None:
    quiet = _run("length", _steps(36, flagged_fraction=0.02))
    assert _passed(quiet) == {"detected": None, "named": None}
    early = _run("length", _steps(24, flagged_fraction=lambda step: 0.5 if step >= 20 else 0.0))
    assert _passed(early)["detected"] is None
    assert _passed(replace(early, diagnosis=()))["named"] is False
    assert _passed(replace(early, diagnosis=("truncation", "length_bias")))["named"] is False
    assert bars_of(_run("length", [])) == ()


def test_a_constant_shows_from_the_first_step() -> None:
    steps = _steps(16, guard=lambda step: _guard(step, acts_from=6, signal="reward_std_ratio"))
    record = _run("constant", steps)
    assert (record.effect_begins, record.detected, record.detected_by) == (1, 6, ("reward_std_ratio",))
    assert _passed(record)["detected"] is True


def test_five_clean_runs_and_not_one_alarm() -> None:
    quiet = _run("clean", _steps(60, guard=lambda step: _guard(step, acts_from=99)))
    assert clean_runs([quiet] * 5).passed is True
    assert clean_runs([quiet] * 4).passed is None
    assert clean_runs([quiet] * 4 + [replace(quiet, complete=False)]).passed is None
    loud = _run("clean_fixed", _steps(60, guard=lambda step: _guard(step, acts_from=60)))
    assert clean_runs([*[quiet] * 5, loud]).passed is False
    assert "clean_fixed s0 at step 60" in clean_runs([*[quiet] * 5, loud]).found
    assert _passed(quiet) == {"clean": True}
    assert _passed(loud) == {"clean": False}
    gamed = _run("adaptive", _steps(60, guard=lambda step: _guard(step, acts_from=40)))  # rightly, perhaps
    assert (_passed(gamed), clean_runs([*[quiet] * 5, gamed]).passed) == ({}, True)


def test_records_from_before_the_guard_are_read() -> None:
    record = _run("fixed", _steps(60, gold_mean=1.0))
    assert (record.detected, record.first_warning, record.rollbacks, record.halted) == (None, None, (), False)


def test_a_halt_is_the_last_word() -> None:
    halt = {"event": "action", "action": "halt", "step": 40}
    assert was_halted([{"event": "act"}, {"event": "action", "action": "alert"}, halt])
    assert not was_halted([{"event": "act"}, {"event": "action", "action": "roll_back"}])


# ---------------------------------------------------------------- the table


def test_the_table_has_every_run_and_the_figure_every_arm(tmp_path: Path) -> None:
    steps = _steps(70, gold_mean=lambda step: 0.9 - 0.04 * step, guard=lambda step: _guard(step, acts_from=12))
    records = [
        _run("unguarded", steps, diagnosis=("beta_too_low",)),
        _run("guarded", steps, events=[{"action": "roll_back", "step": 12}], gold_evaluated=1.4),
        _run("word", _steps(36, flagged_fraction=0.2, guard=lambda step: _guard(step, acts_from=9))),
        _run("fixed", []),
    ]
    bars = write_table(tmp_path, records)
    text = (tmp_path / TABLE).read_text()
    assert "| (a) β = 0, nobody acts, seed 0 | 70 | 0.90 | -1.90 (70) |" in text
    assert "12: proxy_z" in text
    assert "beta_too_low" in text
    assert "FAIL" not in text
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["arm"] for row in rows["runs"]] == ["unguarded", "guarded", "word"]
    assert rows["runs"][1]["rollbacks_after_steps"] == [12]
    assert bars[-1].passed is None
    svg = (tmp_path / FIGURE).read_text()
    assert svg.lstrip().startswith("<?xml")
    assert "#cf222e" in svg
    assert "#1a7f37" in svg
    assert "#0969da" not in svg


def test_nothing_done_yet_is_a_table_without_runs(tmp_path: Path) -> None:
    bars = write_table(tmp_path, [_run("fixed", [])])
    assert [bar.passed for bar in bars] == [None]
    assert not (tmp_path / FIGURE).exists()
