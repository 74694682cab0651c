"""`keel top`: what it says of a run's state, that a frame fits its terminal, that it reads files as they grow, are cut
back or are torn, and that it ends."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from keel.top import top
from keel.top_frame import frame, sparkline
from keel.top_view import Curve, TopView
from learner.guard.record import Level
from tests.guarded_run import ALARM_STEP, STEPS, write_guarded_run, write_lines

BEGAN_S = 1000.0
NOW_S = BEGAN_S + 100 + 4 * STEPS


def viewed(run: Path) -> TopView:
    view = TopView(run)
    view.read()
    return view


def drawn(
    view: TopView, *, now_s: float = NOW_S, width: int = 80, height: int | None = None, plain: bool = False
) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, no_color=True)
    console.print(frame(view, now_s=now_s, width=width, height=height))
    return out.getvalue()


def append(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def alarmed(tmp_path: Path) -> Path:
    """At its alarm."""
    return write_guarded_run(tmp_path / "run", steps=ALARM_STEP, began_s=BEGAN_S)


def test_a_frame_says_what_matters(alarmed: Path) -> None:
    text = drawn(viewed(alarmed), now_s=BEGAN_S + 100 + 4 * ALARM_STEP)
    for part in ("RUNNING ppo", "step 24/60", "40%", "elapsed 1 min 36 s", "ETA 2 min 24 s", "ACT", "rollbacks 1 of 2",
                 "12.14", "warn > 8, act > 10", "of 3.00", "0.37 (0.25–0.48)", "prompts 12 · rollouts 3 · scored 40",
                 "actors 2", "38% of it waiting", "dead 1", "model rm-a", "roll_back → step 10"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 24), (20, 10), (1, 1), (80, 5), (200, 60)])
@pytest.mark.parametrize("steps", [0, 1, ALARM_STEP, STEPS])
def test_a_frame_fits_its_terminal(tmp_path: Path, width: int, height: int, steps: int) -> None:
    view = viewed(write_guarded_run(tmp_path / "run", steps=steps))
    lines = drawn(view, width=width, height=height).splitlines()
    assert len(lines) <= max(1, height - 1)
    assert max(map(len, lines)) <= width


def test_the_common_terminal_shows_signals_curves_and_events(alarmed: Path) -> None:
    text = drawn(viewed(alarmed), width=80, height=24)
    for part in ("kl_nats_per_sequence", "overused_words_share", "length", "samples", "roll_back"):
        assert part in text, part


def test_concerns_named_by_the_verdict_come_first(alarmed: Path) -> None:
    concerns = viewed(alarmed).concerns()
    assert [(one.name, one.level) for one in concerns if one.named] == [
        ("kl_nats_per_sequence", Level.ACT), ("overused_words_share", Level.ACT), ("proxy_z", Level.WARN),
    ]  # fmt: skip
    assert all(one.named for one in concerns[:3])
    assert any(one.name == "entropy_nats_per_token" and one.level is Level.ACT for one in concerns[3:])
    assert all(one.name != "win_rate" for one in concerns), "its interval is judged, by the verdict"


def test_a_quiet_run_names_its_nearest_signal(tmp_path: Path) -> None:
    text = drawn(viewed(write_guarded_run(tmp_path / "run", steps=5)))
    assert "OK" in text
    assert "nearest: distinct_bigrams_ratio 1 (warn < 0.8)" in text


# ---------------------------------------------------------------- states


def test_no_run_yet_then_its_first_records(tmp_path: Path) -> None:
    run = tmp_path / "run"
    view = viewed(run)
    assert view.state(NOW_S).word == "not begun"
    assert "NOT BEGUN" in drawn(view)
    run.mkdir()
    append(run / "progress.jsonl", {"t": NOW_S, "stage": "sft", "event": "start"},
           {"t": NOW_S, "stage": "sft", "step": 3, "steps": 9, "loss": 1.25})  # fmt: skip
    view.read()
    assert view.state(NOW_S).word == "running"
    assert "now: sft 3/9 loss 1.250" in drawn(view)


def test_silence_is_said(alarmed: Path) -> None:
    view = viewed(alarmed)
    news_s = BEGAN_S + 100 + 4 * ALARM_STEP
    assert view.state(news_s + 170).word == "running"
    assert view.state(news_s + 200).word == "silent"
    assert "SILENT for 3 min 20 s" in drawn(view, now_s=news_s + 200)
    # The time of a run that stopped does not go on.
    assert "elapsed 1 min 36 s" in drawn(view, now_s=news_s + 200)


def test_slow_steps_are_no_silence(alarmed: Path) -> None:
    append(alarmed / "metrics.jsonl", *({"step": 25 + at, "step_seconds": 100.0} for at in range(8)))
    os.utime(alarmed / "metrics.jsonl", (NOW_S, NOW_S))
    assert viewed(alarmed).state(NOW_S + 500).word == "running"


def test_finished_is_every_stage_that_was_asked_for(alarmed: Path) -> None:
    (alarmed / "config.yaml").write_text("stages: [sft, ppo]\nlearner: {steps: 24}\n")
    assert viewed(alarmed).state(NOW_S).word == "running"
    append(alarmed / "progress.jsonl", {"t": NOW_S, "stage": "ppo", "event": "end", "seconds": 96.0})
    view = viewed(alarmed)
    assert view.state(NOW_S + 1e6).word == "finished"
    assert "elapsed 1 min 36 s" in drawn(view, now_s=NOW_S + 1e6)


def test_a_halt_holds_until_steps_follow_it(alarmed: Path) -> None:
    halt = {"time_s": 97.0, "step": 24, "event": "action", "action": "halt", "reason": "enough"}
    append(alarmed / "guard.jsonl", halt)
    view = viewed(alarmed)
    assert view.state(NOW_S).word == "halted"
    assert not view.over(NOW_S), "evaluation may follow"
    append(alarmed / "metrics.jsonl", {"step": 25})
    view.read()
    assert view.state(NOW_S).word == "running"


# ---------------------------------------------------------------- files


def test_only_new_lines_are_read_and_a_torn_one_waits(alarmed: Path) -> None:
    view = viewed(alarmed)
    with (alarmed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "bet')
    view.read()
    assert view.step["step"] == 24
    with (alarmed / "metrics.jsonl").open("a") as file:
        file.write('a": 0.5}\n')
    view.read()
    assert view.step["step"] == 25
    assert view.curves["beta"].values[-1] == 0.5


def test_what_a_resumed_run_records_again_replaces_what_was(alarmed: Path) -> None:
    view = viewed(alarmed)
    assert len(view.events) == 6
    lines = (alarmed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (alarmed / "metrics.jsonl").write_text("".join(lines[:20]) + '{"step": 21, "beta": 0.7}\n')
    events = (alarmed / "guard.jsonl").read_text().splitlines(keepends=True)
    (alarmed / "guard.jsonl").unlink()
    (alarmed / "guard.jsonl").write_text("".join(events[:2]) + '{"step": 20, "event": "ok"}\n')
    view.read()
    assert view.curves["beta"].steps == [float(step) for step in range(1, 22)]
    assert [(event["step"], event["event"]) for event in view.events] == [(17, "warn"), (17, "action"), (20, "ok")]


@pytest.mark.parametrize("name", ["progress", "metrics", "guard", "evaluations", "refreshes"])
def test_odd_records_are_no_error(tmp_path: Path, name: str) -> None:
    run = write_guarded_run(tmp_path / "run", steps=2)
    odd: list[dict[str, Any]] = [
        {}, {"step": "x", "signals": 3, "guard": [], "event": 3, "stage": None},
        {"step": None, "guard": {"level": 3, "act": "x", "warn": [None]}, "signals": {"proxy_z": "nan"}},
        {"step": 1, "win_rate": []},
        {"event": "action", "action": "roll_back", "to_step": "x", "why": "\x1b[2J\n\x07"},
        {"kind": "refresh"}, {"t": "x", "stage": "ppo", "event": "end"},
    ]  # fmt: skip
    write_lines(run / f"{name}.jsonl", odd)
    text = drawn(viewed(run), height=24)
    assert "\x1b" not in text
    assert "\x07" not in text


def test_a_run_from_before_the_guard(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "proxy_z": 0.5, "beta": 0.1, "step_seconds": 2.0}])
    text = drawn(viewed(tmp_path))
    assert "guard  nothing recorded" in text
    assert "+0.50" in text


# ---------------------------------------------------------------- the command


def test_without_a_terminal_it_prints_one_frame(alarmed: Path) -> None:
    out = io.StringIO()

    def never(_: float) -> None:
        raise AssertionError("it waits")

    top(alarmed, console=Console(file=out, force_terminal=False, width=80), clock=lambda: NOW_S, sleep=never)
    assert out.getvalue().count("keel top run") == 1
    assert "\x1b" not in out.getvalue()


def test_it_follows_the_run_and_ends_with_it(alarmed: Path) -> None:
    (alarmed / "config.yaml").write_text("stages: [sft, ppo]\nlearner: {steps: 25}\n")
    out = io.StringIO()
    waits = iter((
        lambda: append(alarmed / "metrics.jsonl", {"step": 25, "proxy_z": 1.0}),
        lambda: append(alarmed / "progress.jsonl", {"t": NOW_S, "stage": "ppo", "event": "end"}),
    ))  # fmt: skip
    console = Console(file=out, force_terminal=True, width=80, height=24)
    top(alarmed, console=console, clock=lambda: NOW_S, sleep=lambda _: next(waits)())
    assert "step 25/25" in out.getvalue()
    assert "FINISHED" in out.getvalue()


def test_ctrl_c_leaves_the_last_frame(alarmed: Path) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24)
    top(alarmed, console=console, clock=lambda: NOW_S, sleep=interrupt)
    after = out.getvalue().rpartition("\x1b[?1049l")[2]
    assert "step 24/60" in after


@pytest.mark.parametrize(
    ("values", "width", "marks"),
    [
        ([0.0, 1.0], 8, "▁█"),
        ([1.0, 1.0, 1.0], 8, "▁▁▁"),
        ([0.0, 0.0, 7.0, 7.0], 2, "▁█"),
        ([float(at) for at in range(8)], 8, "▁▂▃▄▅▆▇█"),
        ([5.0], 0, "▁"),
    ],
)
def test_sparklines(values: list[float], width: int, marks: str) -> None:
    curve = Curve([float(at) for at in range(len(values))], values)
    assert sparkline(curve, width) == marks
    assert sparkline(curve, width, plain=True).isascii()
