"""A reward worker outside Ray, started by hand, with rights of its own on a server that the run was pointed to."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from pathlib import Path

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from cluster.redis_client import acl_rules
from cluster.redis_server import EmbeddedServer
from tests.integration.runs import KEEL, adopt, settings, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def scored_by_outsiders(targets: Path) -> float:
    """Samples scored by workers numbered 1000 and up, from their own /metrics."""
    groups = json.loads(targets.read_text()) if targets.exists() else []
    total = 0.0
    for group in groups:
        if group["labels"]["instance"].startswith("reward-1000"):
            with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=10) as response:
                families = text_string_to_metric_families(response.read().decode())
            total += sum(s.value for f in families for s in f.samples if s.name == "keel_reward_samples_total")
    return total


def test_it_shares_the_work_and_stops_cleanly(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="shared")
    with EmbeddedServer(tmp_path / "redis") as server:
        admin = redis.Redis.from_url(server.url)
        admin.execute_command("ACL", "SETUSER", "scorer", "on", ">secret", *acl_rules("worker", run="shared"))  # type: ignore[no-untyped-call]
        changes = [f"redis.url={server.url}", "learner.steps=2000", "rollout.engine=scripted"]
        run = start(tmp_path, "--resume", *settings([*changes, "rollout.probe_tolerance=1000"]), name="shared")
        run.wait_for_step(1)
        worker = subprocess.Popen(
            [*KEEL, "reward-worker", "--run", str(run.path)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "KEEL_REDIS_URL": f"redis://scorer:secret@{server.address}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        targets = run.path / "prometheus_targets.json"
        run.wait_for(lambda: scored_by_outsiders(targets) > 0, what="a sample scored outside Ray")
        worker.terminate()
        output, _ = worker.communicate(timeout=60)
        assert worker.returncode == 0, output
        assert "secret" not in output
        run.interrupt()
        output = run.finish(timeout_s=90)
    assert run.process.returncode == 130, output
    last = run.metrics()[-1]
    assert last["samples_dead"] == 0
