"""Processes of a run are killed; the run goes on, or ends with the reason. Nothing is lost, nothing is left behind."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.integration.runs import Run, adopt, assert_all_gone, settings, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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


@pytest.mark.parametrize("role", ["RolloutActor", "RewardActor"])
def test_a_killed_worker_is_replaced_and_no_sample_is_lost(prepared_run: Path, tmp_path: Path, role: str) -> None:
    adopt(prepared_run, tmp_path, name="killed")
    changes = ["learner.steps=40", "redis.lease_s=5", "rollout.engine=scripted", "rollout.probe_tolerance=1000"]
    run = start(tmp_path, "--resume", *settings(changes), name="killed")
    run.wait_for_step(2)
    victims = named(run, role)
    assert victims
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    output = run.finish()
    assert run.process.returncode == 0, output
    last = run.metrics()[-1]
    assert last["samples_trained"] == 40 * 32
    assert last["samples_issued"] == last["samples_trained"] + last["samples_stale_dropped"] + last["samples_dead"]
    assert "died and is replaced" in (run.path / "logs" / "driver-0.log").read_text()


@pytest.mark.parametrize(("part", "message"), [("LearnerActor", "learner"), ("valkey-server", "queue server")])
def test_what_cannot_be_replaced_ends_the_run_with_the_reason(
    prepared_run: Path, tmp_path: Path, part: str, message: str
) -> None:
    adopt(prepared_run, tmp_path, name="ended")
    changes = ["learner.steps=400", "rollout.engine=scripted", "rollout.probe_tolerance=1000"]
    run = start(tmp_path, "--resume", *settings(changes), name="ended")
    run.wait_for_step(2)
    started, victims = run.descendants(), named(run, part)
    assert victims
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    output = run.finish(timeout_s=120)
    assert run.process.returncode == 2, output
    assert message in output
    assert_all_gone(started)
