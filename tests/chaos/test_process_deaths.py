"""Processes of a run are killed; the run goes on, or ends with the reason. Nothing is lost, nothing is left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.runs import Run, adopt, assert_all_gone, settings, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, BATCH = 40, 32
SCRIPTED = ["rollout.engine=scripted", "rollout.probe_tolerance=1000", "redis.lease_s=5"]


def named(run: Run, part: str) -> list[psutil.Process]:
    """Processes of the run with `part` in their command line; Ray titles a worker by what it runs."""
    found = []
    for process in run.descendants():
        try:
            if part in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(victims: list[psutil.Process]) -> None:
    assert victims
    for victim in victims:
        victim.send_signal(signal.SIGKILL)


def restarts(run: Run) -> list[dict[str, Any]]:
    """What the run's record says about restarts."""
    records = map(json.loads, (run.path / "progress.jsonl").read_text().splitlines())
    return [record for record in records if record.get("event") == "restart"]


def assert_whole(run: Run, *, steps: int = STEPS) -> None:
    """All steps are there once, and every sample is accounted for."""
    metrics = run.metrics()
    assert [record["step"] for record in metrics] == list(range(1, steps + 1))
    last = metrics[-1]
    assert last["samples_trained"] == steps * BATCH
    assert last["samples_issued"] == last["samples_trained"] + last["samples_stale_dropped"] + last["samples_dead"]


@pytest.mark.parametrize("role", ["RolloutActor", "RewardActor"])
def test_a_killed_worker_is_replaced_and_no_sample_is_lost(prepared_run: Path, tmp_path: Path, role: str) -> None:
    adopt(prepared_run, tmp_path, name="killed")
    run = start(tmp_path, "--resume", *settings([f"learner.steps={STEPS}", *SCRIPTED]), name="killed")
    run.wait_for_step(2)
    kill(named(run, role))
    output = run.finish()
    assert run.process.returncode == 0, output
    assert_whole(run)
    assert "died and is replaced" in (run.path / "logs" / "driver-0.log").read_text()
    assert restarts(run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_learner_goes_on_from_its_checkpoint(prepared_run: Path, tmp_path: Path, ranks: int) -> None:
    """Of two ranks one is killed, not always the first; both are replaced, and no other role is."""
    adopt(prepared_run, tmp_path, name="killed")
    changes = [f"learner.steps={STEPS}", f"learner.ranks={ranks}", *SCRIPTED]
    run = start(tmp_path, "--resume", *settings(changes), name="killed")
    run.wait_for_step(6)  # Two steps after a checkpoint, and so two to do again.
    others = [process.pid for role in ("RolloutActor", "RewardActor") for process in named(run, role)]
    learners = named(run, "LearnerActor")
    assert len(learners) == ranks
    kill(learners[-1:])
    run.wait_for(lambda: bool(restarts(run)), what="a new learner")
    run.wait_for_step(12)
    assert [process.pid for role in ("RolloutActor", "RewardActor") for process in named(run, role)] == others
    output = run.finish()
    assert run.process.returncode == 0, output
    assert_whole(run)
    versions = [record["version"] for record in run.metrics()]
    assert versions == sorted(set(versions)), "a version that actors have seen never comes again"
    assert [record["role"] for record in restarts(run)] == ["learner"]
    assert not set(learners) & set(psutil.process_iter())


def test_a_learner_without_restarts_left_ends_the_run(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="ended")
    changes = ["learner.steps=400", "learner.max_restarts=0", *SCRIPTED]
    run = start(tmp_path, "--resume", *settings(changes), name="ended")
    run.wait_for_step(2)
    started = run.descendants()
    kill(named(run, "LearnerActor"))
    output = run.finish(timeout_s=120)
    assert run.process.returncode == 2, output
    assert "learner died (restarts used: 0 of 0)" in output
    assert_all_gone(started)


def test_a_killed_queue_server_ends_the_run_with_the_reason(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="ended")
    run = start(tmp_path, "--resume", *settings(["learner.steps=400", *SCRIPTED]), name="ended")
    run.wait_for_step(2)
    started = run.descendants()
    kill(named(run, "valkey-server"))
    output = run.finish(timeout_s=120)
    assert run.process.returncode == 2, output
    assert "queue server" in output
    assert_all_gone(started)
