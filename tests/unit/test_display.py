"""The terminal display: what it prints without a TTY, what it draws with one, and that gaps in the records are gaps."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from keel.display import Display, seconds_text

STAGES = ("sft", "rm", "ppo")
STEP = {
    "step": 2,
    "proxy_z": 0.51,
    "gold_mean": 1.25,
    "kl_nats_per_sequence": 1.5,
    "kl_target_nats_per_sequence": 3.0,
    "beta": 0.145,
    "tokens_per_second_rollout": 3210.4,
    "step_seconds": 4.0,
    "depth_prompts": 7,
    "depth_rollouts": 3,
    "depth_scored": 0,
    "staleness_mean": 0.5,
}


def append(path: Path, *records: object) -> None:
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write((record if isinstance(record, str) else json.dumps(record)) + "\n")


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False), out


def test_without_a_terminal_one_line_a_stage_and_a_step(tmp_path: Path) -> None:
    console, out = plain()
    (tmp_path / "config.yaml").write_text("learner: {steps: 10}\n")
    with Display(tmp_path, STAGES, console=console, clock=lambda: 200.0) as display:
        append(tmp_path / "progress.jsonl", {"t": 100, "stage": "sft", "event": "start", "steps": 50})
        append(tmp_path / "progress.jsonl", {"t": 112.5, "stage": "sft", "event": "end"})
        append(tmp_path / "progress.jsonl", {"t": 113, "stage": "ppo", "event": "start"})
        append(tmp_path / "progress.jsonl", {"t": 114, "stage": "ppo", "event": "progress", "note": "starting roles"})
        append(tmp_path / "progress.jsonl", {"t": 120, "stage": "ppo", "event": "progress", "step": 2})
        append(tmp_path / "metrics.jsonl", STEP)
        display.refresh()
        display.refresh()
    lines = out.getvalue().splitlines()
    assert lines[:4] == ["[sft] started", "[sft] done in 12.5 s", "[ppo] started", "[ppo] starting roles"]
    assert len(lines) == 5
    assert lines[4].startswith("[ppo] step 2/10  reward +0.51 z  gold +1.25  KL 1.50 of 3.00 nats  β 0.1450")
    assert "queues 7/3/0" in lines[4]
    assert "tokens/s 3210" in lines[4]
    assert lines[4].endswith("ETA 32.0 s")


def test_steps_of_offline_stages_are_thinned(tmp_path: Path) -> None:
    console, out = plain()
    with Display(tmp_path, STAGES, console=console):
        for second in range(11):
            record = {"t": second, "stage": "sft", "step": second, "steps": 11, "loss": 0.5}
            append(tmp_path / "progress.jsonl", record)
    assert out.getvalue().splitlines() == [f"[sft] {step}/11 loss 0.500" for step in (0, 5, 10)]


def test_what_an_earlier_run_left_is_taken_in_but_not_printed(tmp_path: Path) -> None:
    append(tmp_path / "progress.jsonl", {"t": 1, "stage": "sft", "event": "start"})
    append(tmp_path / "progress.jsonl", {"t": 5, "stage": "sft", "event": "end"})
    append(tmp_path / "metrics.jsonl", STEP)
    console, out = plain()
    with Display(tmp_path, STAGES, console=console) as display:
        display.refresh()
        assert display.view.stages["sft"].state == "done"
        assert display.view.step["step"] == 2
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"stage": 3},
        {"stage": "sft"},
        {"stage": "sft", "event": "end"},
        {"stage": "sft", "event": "end", "seconds": "x"},
        {"stage": "sft", "event": "skip"},
        {"stage": "sft", "done": True, "step": 3},
        {"stage": "new", "event": "start"},
        {"stage": "sft", "event": "progress", "step": None, "steps": "x", "loss": float("nan")},
        "not json",
        "[1]",
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_records_with_gaps_do_not_stop_it(tmp_path: Path, record: object, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Display(tmp_path, STAGES, console=console) as display:
        append(tmp_path / "progress.jsonl", record)
        append(tmp_path / "metrics.jsonl", record)
        display.refresh()


def test_with_a_terminal_it_draws_stages_and_readings(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110)
    (tmp_path / "config.yaml").write_text("learner: {steps: 10}\n")
    with Display(tmp_path, STAGES, console=console, clock=lambda: 130.0) as display:
        append(tmp_path / "progress.jsonl", {"t": 100, "stage": "sft", "event": "start", "steps": 50})
        append(tmp_path / "progress.jsonl", {"t": 110, "stage": "sft", "event": "end"})
        append(tmp_path / "progress.jsonl", {"t": 110, "stage": "ppo", "event": "start"})
        append(tmp_path / "metrics.jsonl", STEP)
        display.refresh()
    text = out.getvalue()
    for part in ("✓", "▶", "sft", "10.0 s", "20.0 s", "2/10", "+0.51 z", "1.50 of 3.00 nats", "7/3/0", "32.0 s"):
        assert part in text


def test_a_stage_done_in_an_earlier_run_keeps_its_time(tmp_path: Path) -> None:
    console, out = plain()
    with Display(tmp_path, STAGES, console=console, clock=lambda: 900.0):
        append(tmp_path / "progress.jsonl", {"t": 800, "stage": "sft", "event": "skip", "seconds": 75.0})
    assert out.getvalue() == "[sft] done earlier, in 1 min 15 s\n"


@pytest.mark.parametrize("text", ["", "learner: 3", "{", "learner: {steps: x}"])
def test_a_configuration_without_steps_means_no_eta(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    append(tmp_path / "metrics.jsonl", STEP)
    console, _ = plain()
    with Display(tmp_path, STAGES, console=console) as display:
        assert display.view.eta_s is None


def test_a_stage_that_starts_again_counts_anew(tmp_path: Path) -> None:
    console, _ = plain()
    with Display(tmp_path, STAGES, console=console) as display:
        append(tmp_path / "progress.jsonl", {"t": 1, "stage": "ppo", "event": "progress", "step": 7, "steps": 9})
        append(tmp_path / "progress.jsonl", {"t": 50, "stage": "ppo", "event": "start", "steps": 9})
        display.refresh()
        assert display.view.stages["ppo"].seconds(60.0) == 10.0
        assert display.view.stages["ppo"].step is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.0, "0.0 s"),
        (59.94, "59.9 s"),
        (61.0, "1 min 01 s"),
        (3599.6, "1 h 00 min"),
        (7380.0, "2 h 03 min"),
    ],
)
def test_seconds_in_words(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


def test_the_guards_words_are_told(tmp_path: Path) -> None:
    console, out = plain()
    with Display(tmp_path, STAGES, console=console) as display:
        append(tmp_path / "guard.jsonl", {"step": 7, "event": "warn", "why": "KL over 8 nats\x1b[2J\nfor 3 steps"})
        rollback = {"step": 9, "event": "action", "action": "roll_back", "to_step": 5, "rm_version": "rm-a"}
        append(tmp_path / "guard.jsonl", rollback | {"reason": "KL over 10 nats"})
        append(tmp_path / "guard.jsonl", {}, {"event": "action", "beta": "x", "why": 3})
        display.refresh()
        # The driver's note on an action that the journal has, and an alert that repeats the verdict.
        append(tmp_path / "progress.jsonl", {"t": 1, "role": "guard", "event": "roll_back", "note": "again"})
        verdict = {"step": 11, "event": "act", "why": "KL"}
        append(tmp_path / "guard.jsonl", verdict, verdict | {"event": "action", "action": "alert", "why": "act: KL"})
        display.refresh()
    lines = out.getvalue().splitlines()
    assert lines[0] == "[guard] step 7: warn: KL over 8 nats [2J for 3 steps"
    assert lines[1] == "[guard] step 9: roll_back (to_step 5, rm_version rm-a): KL over 10 nats"
    assert lines[4:] == ["[guard] step 11: act: KL"]
    drawn = io.StringIO()
    with Display(tmp_path, STAGES, console=Console(file=drawn, force_terminal=True, width=100)) as display:
        display.refresh()
    assert "[guard] step" in drawn.getvalue()


def test_what_happens_to_a_role_is_told_and_its_actors_are_counted(tmp_path: Path) -> None:
    console, out = plain()
    with Display(tmp_path, STAGES, console=console) as display:
        role = {"t": 1, "role": "rollout"}
        append(tmp_path / "progress.jsonl", role | {"event": "workers", "running": 1, "wanted": 3})
        append(tmp_path / "progress.jsonl", role | {"event": "restart", "note": "rollout 0 died and is replaced"})
        append(tmp_path / "metrics.jsonl", STEP)
        display.refresh()
        append(tmp_path / "progress.jsonl", role | {"event": "workers", "running": 3, "wanted": 3})
        append(tmp_path / "metrics.jsonl", STEP | {"step": 3})
        display.refresh()
    lines = out.getvalue().splitlines()
    assert lines[0] == "[rollout] rollout 0 died and is replaced"
    assert "actors 1 of 3 " in lines[1]
    assert "actors 3 " in lines[2]
    assert len(lines) == 3
