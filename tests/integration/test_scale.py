"""`keel scale` on a run that goes on: with the scripted engine, real Ray, Valkey, reward service and learner."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import KEEL, Run, adopt, settings, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BATCH = 32
SCRIPTED = ["rollout.engine=scripted", "rollout.probe_tolerance=1000", "redis.lease_s=5"]


def scale(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KEEL, "scale", str(run.path), *arguments], capture_output=True, text=True, timeout=200, check=False
    )


def of_role(run: Run, event: str) -> list[dict[str, Any]]:
    records = map(json.loads, (run.path / "progress.jsonl").read_text().splitlines())
    return [record for record in records if record.get("role") == "rollout" and record.get("event") == event]


def assert_nothing_lost(run: Run) -> None:
    metrics = run.metrics()
    assert [record["step"] for record in metrics] == list(range(1, len(metrics) + 1))
    last = metrics[-1]
    assert last["samples_trained"] == len(metrics) * BATCH
    assert last["samples_issued"] == last["samples_trained"] + last["samples_stale_dropped"] + last["samples_dead"]
    assert last["samples_dead"] == 0


def test_one_three_one_while_the_run_goes_on(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="scaled")
    run = start(tmp_path, "--resume", *settings(["learner.steps=400", *SCRIPTED]), name="scaled")
    run.wait_for_step(2)

    more = scale(run, "--actors", "3")
    assert more.returncode == 0, more.stderr
    assert "3 actors running" in more.stdout
    at = len(run.metrics())
    run.wait_for_step(at + 5)

    fewer = scale(run, "--actors", "1")
    assert fewer.returncode == 0, fewer.stderr
    assert "1 actor running" in fewer.stdout
    at = len(run.metrics())
    run.wait_for_step(at + 5)

    wrong = scale(run, "--actors", "0")
    assert wrong.returncode == 2
    assert "at least one actor" in wrong.stderr
    no_section = scale(run, "--auto")
    assert no_section.returncode == 2
    assert "rollout.autoscale is not set" in no_section.stderr

    run.interrupt()
    output = run.finish()
    assert run.process.returncode == 130, output
    assert [(record["running"], record["wanted"]) for record in of_role(run, "workers")][-1] == (1, 1)
    assert not of_role(run, "restart"), "an actor that drained is not replaced"

    gone = scale(run, "--actors", "2")
    assert gone.returncode == 2
    assert "does not run on this machine" in gone.stderr

    last = len(run.metrics())
    again = start(tmp_path, "--resume", *settings([f"learner.steps={last + 5}", *SCRIPTED]), name="scaled")
    output = again.finish()
    assert again.process.returncode == 0, output
    assert_nothing_lost(again)
    assert of_role(again, "workers")[-1]["wanted"] == 1, "a resumed run starts with its configuration's number"


def test_more_than_the_cluster_has_is_refused_and_the_number_stays(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="refused")
    changes = ["learner.steps=400", "placement.wait_s=3", *SCRIPTED]
    run = start(tmp_path, "--resume", *settings(changes), name="refused")
    run.wait_for_step(2)
    refused = scale(run, "--actors", "50")
    assert refused.returncode == 2
    for part in ("no room for rollout", "0.5 CPU asked for; the cluster has 4 CPU", "back to 1 actor"):
        assert part in refused.stderr
    at = len(run.metrics())
    run.wait_for_step(at + 3)
    run.interrupt()
    output = run.finish()
    assert run.process.returncode == 130, output
    assert not of_role(run, "restart")


def test_a_learner_that_waits_gets_another_actor(prepared_run: Path, tmp_path: Path) -> None:
    """A synchronous learner waits for an actor that takes one request at a time. Autoscaling finds it out by itself."""
    adopt(prepared_run, tmp_path, name="auto")
    section = "{min_actors: 1, max_actors: 2, window_s: 2, cool_down_s: 2, add_above_learner_idle: 0.1, "
    section += "remove_above_actor_idle: 0.99}"
    changes = ["learner.steps=400", "learner.max_staleness=0", f"rollout.autoscale={section}", *SCRIPTED]
    run = start(tmp_path, "--resume", *settings([*changes, "rollout.max_concurrent_requests=1"]), name="auto")
    run.wait_for(lambda: bool(of_role(run, "autoscale")), what="a decision")
    run.wait_for(lambda: of_role(run, "workers")[-1]["running"] == 2, what="a second actor")
    assert "1 → 2 actors: learner idle" in of_role(run, "autoscale")[0]["note"]
    by_hand = scale(run, "--actors", "1")
    assert by_hand.returncode == 0, by_hand.stderr
    assert "autoscaling pauses" in of_role(run, "scale")[-2]["note"]
    back = scale(run, "--auto")
    assert back.returncode == 0, back.stderr
    run.interrupt()
    output = run.finish()
    assert run.process.returncode == 130, output
