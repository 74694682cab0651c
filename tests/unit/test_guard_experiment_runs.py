"""How the runs of the experiment on the guard are done: what they share, what goes on, what is tried again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.guard_experiment import runs
from examples.guard_experiment.arms import ALL, Arm
from examples.guard_experiment.records import read_run
from examples.guard_experiment.runs import Plan, copy_base, do_runs, estimated_seconds

pytestmark = pytest.mark.timeout(60)

BY_NAME = {arm.name: arm for arm in ALL}


def _plan(tmp_path: Path, *arms: Arm, said: list[str] | None = None) -> Plan:
    lines = said if said is not None else []
    return Plan(out=tmp_path, arms=tuple(arms), common=(), say=lines.append)


def _base(plan: Plan, seed: int) -> Path:
    base = plan.base_dir(seed)
    (base / "sft").mkdir(parents=True)
    (base / "sft" / "weights").write_text("w")
    (base / "redis").mkdir()
    (base / "config.yaml").write_text("name: s0")
    stages = dict.fromkeys(("data", "sft", "collect", "rm", "evaluate"), 1.0)
    (base / "stages.json").write_text(json.dumps(stages))
    return base


def test_a_step_without_numbers_can_be_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "kl_nats_per_sequence": null, "gold_mean": null}\n')
    assert runs._standing(tmp_path, BY_NAME["guarded"]) == "step 7/70"


def test_a_diagnosis_that_hangs_does_not_stop_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(runs, "_DIAGNOSE_S", 0.01)
    runs.diagnose(_plan(tmp_path, said=said), tmp_path)
    assert "not done in 0.01 s" in said[0]


def test_a_copied_run_stands_after_its_offline_stages(tmp_path: Path) -> None:
    plan = _plan(tmp_path, BY_NAME["guarded"])
    target = plan.run_dir(BY_NAME["guarded"], 0)
    copy_base(_base(plan, 0), target)
    assert sorted(path.name for path in target.iterdir()) == ["config.yaml", "sft", "stages.json"]
    assert "evaluate" not in json.loads((target / "stages.json").read_text())
    assert plan.has_base(0)
    assert not plan.has_base(1)


class FakeKeel:
    """In place of `keel train`: writes what a run would leave, or dies."""

    def __init__(self, plan: Plan, *, exits: Sequence[int] = ()) -> None:
        self.calls: list[tuple[str, ...]] = []
        self._plan, self._exits = plan, list(exits)

    def train(self, stages: Sequence[str], settings: Sequence[str], *, log: Path, tick: Any) -> int:
        self.calls.append((log.stem, *stages))
        if log.stem.startswith("base-"):
            _base(self._plan, 0)
            return 0
        code = self._exits.pop(0) if self._exits else 0
        if code == runs.INTERRUPTED:
            raise KeyboardInterrupt
        run_dir = self._plan.out / "runs" / log.stem.rpartition("-")[0] / "s0"
        steps = 3 if code else 36
        (run_dir / "metrics.jsonl").write_text(
            "".join(f'{{"step": {step}, "gold_mean": 1.0}}\n' for step in range(1, steps + 1))
        )
        if code == 0:
            done = json.loads((run_dir / "stages.json").read_text()) | dict.fromkeys(stages, 1.0)
            (run_dir / "stages.json").write_text(json.dumps(done))
        tick()
        return code


def _fake(monkeypatch: pytest.MonkeyPatch, plan: Plan, *, exits: Sequence[int] = ()) -> FakeKeel:
    keel = FakeKeel(plan, exits=exits)
    monkeypatch.setattr(runs, "_keel_train", keel.train)
    monkeypatch.setattr(runs, "diagnose", lambda plan, run_dir: None)
    return keel


def test_what_is_complete_is_left_alone_and_the_rest_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    plan = _plan(tmp_path, BY_NAME["word"], BY_NAME["length"], said=said)
    keel = _fake(monkeypatch, plan)
    before_s = estimated_seconds(plan)
    assert do_runs(plan, finished=lambda: None) == []
    assert [call[0] for call in keel.calls] == ["base-s0", "word-s0", "length-s0"]
    assert do_runs(plan, finished=lambda: None) == []
    assert len(keel.calls) == 3
    assert any("there already" in line for line in said)
    assert estimated_seconds(plan) == 0.0 < before_s
    assert read_run(BY_NAME["word"], 0, plan.run_dir(BY_NAME["word"], 0)).complete


def test_a_run_that_dies_is_tried_again_and_then_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(tmp_path, BY_NAME["word"], BY_NAME["length"])
    keel = _fake(monkeypatch, plan, exits=[1, 0, 1, 1])
    failures = do_runs(plan, finished=lambda: None)
    assert [call[0] for call in keel.calls] == ["base-s0", "word-s0", "word-s0", "length-s0", "length-s0"]
    assert len(failures) == 1
    assert failures[0].startswith("length s0: ended with exit code 1")
    assert not plan.is_complete(BY_NAME["length"], 0)


def test_an_interrupt_stops_everything_and_the_next_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(tmp_path, BY_NAME["word"], BY_NAME["length"])
    _fake(monkeypatch, plan, exits=[0, runs.INTERRUPTED])
    with pytest.raises(KeyboardInterrupt):
        do_runs(plan, finished=lambda: None)
    assert plan.is_complete(BY_NAME["word"], 0)
    assert not plan.is_complete(BY_NAME["length"], 0)
    outcome = json.loads((plan.run_dir(BY_NAME["length"], 0) / "outcome.json").read_text())
    assert (outcome["complete"], outcome["exit_code"]) == (False, 130)
    keel = _fake(monkeypatch, plan)
    do_runs(plan, finished=lambda: None)
    assert [call[0] for call in keel.calls] == ["length-s0"]


def test_a_run_that_cannot_be_resumed_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(tmp_path, BY_NAME["jump"])
    run_dir = plan.run_dir(BY_NAME["jump"], 0)
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 20}\n')
    (run_dir / "stale").write_text("")
    _fake(monkeypatch, plan)
    assert do_runs(plan, finished=lambda: None) == []
    assert not (run_dir / "stale").exists()


def test_a_halted_run_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(tmp_path, BY_NAME["word"])
    keel = _fake(monkeypatch, plan, exits=[3, 3])
    run_dir = plan.run_dir(BY_NAME["word"], 0)
    copy_base(_base(plan, 0), run_dir)
    (run_dir / "guard.jsonl").write_text(json.dumps({"event": "action", "action": "halt", "step": 3}) + "\n")
    assert do_runs(plan, finished=lambda: None) == []
    assert len(keel.calls) == 1


def test_a_run_is_not_left_behind_by_an_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(runs, "_TICK_S", 0.01)
    process = subprocess.Popen(["sleep", "60"])
    with pytest.raises(BrokenPipeError):
        runs._waited_for(process, tick=closed)
    assert process.poll() == -signal.SIGTERM


def test_an_interrupt_reaches_the_process_and_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process that saves and ends with 130 on SIGINT; the signal comes to this process alone."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), os._exit(130)))\n"
        f"os.kill({os.getpid()}, signal.SIGINT)\n"
        "time.sleep(30)\n"
    )
    started = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started([command[0], script], **options))
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        runs._keel_train(("ppo",), (), log=log, tick=lambda: None)
    assert log.read_text() == "saved\n"
