"""keel diagnose on faults of the machinery, on how runs ended, and on what the guard did meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keel.diagnose.record import read_record
from keel.diagnose.story import diagnose_record
from tests.unit import diagnosis_runs as runs


def test_a_failed_critic(tmp_path: Path) -> None:
    run = runs.clean(0)
    run.series["value_error_ratio"] = np.full(runs.STEPS, 1.8)
    assert runs.diagnosed(run, tmp_path / "run").best.name == "critic_failure"


def test_engine_and_trainer_that_part_are_seen_on_fresh_samples_alone(tmp_path: Path) -> None:
    run = runs.clean(0)
    run.series["behaviour_gap_max_nats"] = np.full(runs.STEPS, 3.0)
    late = replace(run, series=run.series | {"staleness_mean": np.ones(runs.STEPS)})
    assert runs.diagnosed(run, tmp_path / "run").best.name == "engine_mismatch"
    assert runs.diagnosed(late, tmp_path / "late").best.name == "healthy"


def test_stale_samples(tmp_path: Path) -> None:
    run = runs.clean(0)
    run.series["samples_stale_dropped"] = run.series["samples_issued"] * 0.3
    assert runs.diagnosed(run, tmp_path / "run").best.name == "staleness"


def test_a_judge_that_parts_from_the_reward_model(tmp_path: Path) -> None:
    run = runs.clean(0)
    del run.series["gold_mean"]
    run.evaluations = [
        {
            "step": step,
            "win_rate": rate,
            "win_rate_low": rate - 0.08,
            "win_rate_high": rate + 0.08,
            "rm_judge_agreement": a,
        }
        for step, rate, a in ((10, 0.6, 0.8), (30, 0.5, 0.62), (50, 0.3, 0.45))
    ]
    best = runs.diagnosed(run, tmp_path / "run").best
    assert best.name == "rm_judge_disagreement"
    assert best.first_step == 50


def test_answers_that_are_cut_off(tmp_path: Path) -> None:
    run = runs.clean(0)
    run.series["truncated_fraction"] = np.full(runs.STEPS, 0.6)
    found = runs.diagnosed(run, tmp_path / "run")
    assert found.best.name == "truncation"
    assert found.best.first_step == 1


def test_a_collapsed_policy(tmp_path: Path) -> None:
    run = runs.clean(0)
    run.series["entropy_nats_per_token"] = runs.rise(0.5, 0.01, at=10, over=20)
    run.series["gold_mean"] = np.full(runs.STEPS, 0.5)
    assert runs.diagnosed(run, tmp_path / "run").best.name == "mode_collapse"


@pytest.mark.parametrize(
    ("log", "name"),
    [
        ("cluster.errors.StallError: no rollout came back for 300 s\n  got: 3 tasks issued\n", "stalled"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", "out_of_memory"),
        ("cluster.errors.NonFiniteError: the policy's loss is not finite\n", "crashed"),
        ("cluster.errors.ConfigError: model not found\n\nkeel.interrupt.InterruptedRun: stopped\n", "stopped_early"),
        ("INFO all is well\n", "stopped_early"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, log: str, name: str) -> None:
    path = runs.write(runs.clean(0), tmp_path / "run", steps=23, finished=False)
    (path / "logs").mkdir()
    (path / "logs" / "learner-0.0.log").write_text(log)
    found = diagnose_record(read_record(path))
    assert found.best.name == name
    assert found.best.first_step == 23
    assert found.state == "ended early"


def test_errors_of_a_run_that_finished_say_nothing(tmp_path: Path) -> None:
    path = runs.write(runs.clean(0), tmp_path / "run")
    (path / "logs").mkdir()
    (path / "logs" / "reward-0.log").write_text("cluster.errors.StreamError: the server is away\n")
    assert diagnose_record(read_record(path)).best.name == "healthy"


def test_a_run_that_lives_is_running(tmp_path: Path) -> None:
    import fcntl

    path = runs.write(runs.clean(0), tmp_path / "run", steps=23, finished=False)
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = diagnose_record(read_record(path))
    assert (found.state, found.best.name) == ("running", "healthy")


def test_a_run_that_writes_its_report_is_finished(tmp_path: Path) -> None:
    import fcntl

    path = runs.write(runs.clean(0), tmp_path / "run")
    with (path / "progress.jsonl").open("a") as progress:
        progress.write(json.dumps({"stage": "report", "event": "start"}) + "\n")
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert diagnose_record(read_record(path)).state == "finished"


def test_what_the_guard_did_and_whether_it_helped(tmp_path: Path) -> None:
    helped, vain = runs.length(0), runs.length(1)
    back = np.arange(1, runs.STEPS + 1) > 20
    helped.series["response_tokens_ratio"] = np.where(back, 1.0, helped.series["response_tokens_ratio"])
    halt = {"step": runs.STEPS, "event": "action", "action": "halt", "reason": "a fourth rollback would be due"}
    vain.guard.append(halt)
    first, second = runs.diagnosed(helped, tmp_path / "helped"), runs.diagnosed(vain, tmp_path / "vain")
    assert {one.action: one.helped for one in first.guard} == {"raise_beta": True, "roll_back": True}
    assert {one.action: one.helped for one in second.guard}["roll_back"] is False
    assert second.state == "halted by the guard"
    assert second.best.name == "length_bias"
    assert "halted_by_guard" in [match.name for match in second.matches]
    assert any("a fourth rollback would be due" in match.evidence[0] for match in second.matches)


def test_a_halt_that_steps_follow_is_over(tmp_path: Path) -> None:
    run = runs.clean(0)
    run.guard.append({"step": 40, "event": "action", "action": "halt", "reason": "enough"})
    found = runs.diagnosed(run, tmp_path / "run")
    assert found.state == "finished"
    assert "halted_by_guard" not in [match.name for match in (*found.matches, *found.weaker)]
