"""The whole job with a guard that rolls it back, and halts it in the end: real Ray and Valkey, a scripted engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.checkpoint import CheckpointStore
from tests.integration.runs import adopt, assert_all_gone, settings, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLUMBING = ["rollout.engine=scripted", "rollout.probe_tolerance=1000", "checkpoint.every_steps=2"]
ALARM = [
    # Every entropy is under this one: an alarm after two steps of warm-up and two of patience, and again later.
    "guard.enabled=true", "guard.actions=[alert,raise_beta,roll_back]",
    "guard.thresholds.entropy_nats_per_token={warn: 1e6, act: 1e6}", "guard.warmup_steps=2",
    "guard.patience_steps=2", "guard.cool_down_steps=2", "guard.max_rollbacks=1", "learner.steps=40",
]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, path.read_text().splitlines()))


def test_a_run_is_rolled_back_halted_and_let_go_on(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="guarded")
    run = start(tmp_path, "--resume", *settings([*PLUMBING, *ALARM]), name="guarded")
    run.wait_for_step(1)
    started: list[psutil.Process] = run.descendants()
    output = run.finish()
    assert run.process.returncode not in (0, 130), output
    assert "the guard has halted the run" in output
    assert f"keel diagnose {run.path}" in output
    assert_all_gone(started)

    records = run.metrics()
    steps = [record["step"] for record in records]
    assert steps == list(range(1, len(steps) + 1))
    versions = [record["version"] for record in records]
    assert versions == sorted(set(versions))
    assert {record["branch"] for record in records} == {0, 1}
    assert records[-1]["samples_abandoned"] > 0
    actions = [event for event in lines(run.path / "guard.jsonl") if event["event"] == "action"]
    assert [event["action"] for event in actions if event["action"] != "alert"] == ["roll_back", "raise_beta", "halt"]
    rollback, raised = (event for event in actions if event["action"] in ("roll_back", "raise_beta"))
    assert rollback["to_step"] == 0
    assert raised["beta"] == pytest.approx(2.0 * rollback["beta"])
    notes = [event for event in lines(run.path / "progress.jsonl") if event.get("role") == "guard"]
    assert {"alert", "roll_back", "raise_beta", "halt"} <= {event["event"] for event in notes}
    store = CheckpointStore(run.path / "checkpoints", keep_last=9)
    assert store.list()[0] == 0
    assert store.latest() == steps[-1]

    again = start(tmp_path, "--resume", *settings([*PLUMBING, *ALARM]), name="guarded")
    assert "the guard has halted the run" in again.finish()
    assert len(again.metrics()) == len(records)

    calm = start(
        tmp_path, "--resume", "--stages", "ppo",
        *settings([*PLUMBING, "guard.enabled=true", f"learner.steps={len(records) + 2}"]), name="guarded",
    )  # fmt: skip
    output = calm.finish()
    assert calm.process.returncode == 0, output
    after = calm.metrics()
    assert [record["step"] for record in after] == list(range(1, len(records) + 3))
    assert [record["branch"] for record in after[len(records) :]] == [2, 2]
