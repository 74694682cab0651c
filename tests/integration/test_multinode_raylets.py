"""One run over several Ray nodes of one machine; needs no root. The hosts of test_multinode.py are the harder test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.runs import Run, adopt, settings
from tests.multinode.jobs import SCRIPTED, assert_nothing_counted_twice, notes
from tests.multinode.raylets import Raylets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

BATCH = 32
BOOT_S, EVENT_S = 180.0, 60.0


def test_a_node_is_lost_and_another_joins(prepared_run: Path, tmp_path: Path) -> None:
    with Raylets(3) as cluster:
        run = start(cluster, prepared_run, tmp_path)
        try:
            run.wait_for(lambda: len(run.metrics()) >= 3, what="three steps", timeout_s=BOOT_S)
            cluster.lose(2)
            run.wait_for(lambda: "replaced" in "\n".join(notes(run)), what="word of the loss", timeout_s=EVENT_S)
            cluster.join()
            before = len(run.metrics())
            run.wait_for(lambda: len(run.metrics()) >= before + 10, what="ten more steps", timeout_s=EVENT_S)
            run.interrupt()
            output = run.finish(timeout_s=EVENT_S)
        finally:
            run.process.kill()
            run.process.wait()
    assert run.process.returncode == 130, output
    assert_nothing_counted_twice(run.metrics(), batch_size=BATCH)


def start(cluster: Raylets, prepared: Path, runs_dir: Path) -> Run:
    """The job, with an actor on each node: the nodes have no room for more."""
    adopt(prepared, runs_dir, name="raylets")
    changes = [
        f"runs_dir={runs_dir}", "name=raylets", f"ray.address={cluster.address}", "learner.steps=100000",
        "rollout.actors=3", "placement.spread=spread", "rollout.cpus_per_actor=1", "redis.lease_s=5", *SCRIPTED,
    ]  # fmt: skip
    command = [sys.executable, "-m", "keel.cli", "train", "demo_ci", "--resume", *settings(changes)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=cluster.environment,
        start_new_session=True,
    )
    return Run(process, runs_dir / "raylets")
