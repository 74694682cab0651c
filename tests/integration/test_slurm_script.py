"""deploy/slurm/keel.sbatch for real, with one node: in namespaces of its own, as `ray symmetric-run` stops every Ray
process that it sees. srun and scontrol are stand-ins."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.runs import adopt, settings

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "keel.sbatch"
ISOLATE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "bash", "-c"]
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo 10.77.0.1 ;;
  requeue) echo "requeue $2" >> "$SCONTROL_LOG" ;;
esac
"""


def can_isolate() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run([*ISOLATE, "ip link set lo up"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not can_isolate(), reason="no right to make namespaces here (unshare, ip)"),
]


class Job:
    """The batch script on its one node."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.shared = folder / "shared"
        self.log = folder / "keel.log"
        self.scontrol_log = folder / "scontrol.log"
        tools = folder / "bin"
        for directory in (self.shared, tools):
            directory.mkdir(exist_ok=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SCONTROL_LOG": str(self.scontrol_log),
            "KEEL_SHARED": str(self.shared),
            "KEEL_VENV": sys.prefix,
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "KEEL_REDIS_URL"):
            environment.pop(name, None)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *ISOLATE,
                    'ip link set lo up; ip address add 10.77.0.1/24 dev lo; exec bash "$0" "$@"',
                    str(SCRIPT),
                    *arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_for_step(self, step: int, *, name: str, timeout_s: float = 150.0) -> None:
        metrics = self.shared / "runs" / name / "metrics.jsonl"
        deadline_s = time.monotonic() + timeout_s
        while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.2)

    def signal_script(self, number: signal.Signals) -> None:
        """What Slurm sends to the batch script alone: `--signal=B:…`."""
        (script,) = [child for child in psutil.Process(self.process.pid).children() if str(SCRIPT) in child.cmdline()]
        script.send_signal(number)

    def finish(self, *, timeout_s: float = 150.0) -> str:
        self.process.wait(timeout_s)
        return self.log.read_text()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Jobs of the test; what is left of them is killed, by the end of their namespace."""
    started: list[Job] = []
    yield started
    for job in started:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def test_it_runs_the_job_and_exits_as_the_driver_does(tmp_path: Path, jobs: list[Job]) -> None:
    jobs.append(Job(tmp_path, "demo_ci", *settings(["stages=[data]", "name=short"])))
    output = jobs[0].finish()
    assert jobs[0].process.returncode == 0, output
    assert (tmp_path / "shared" / "runs" / "short" / "data").is_dir()
    assert not list((tmp_path / "shared" / "jobs").iterdir()), "the token is deleted with the job"
    assert not jobs[0].scontrol_log.exists()


def test_before_the_time_limit_it_saves_and_is_queued_again(
    prepared_run: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    runs = tmp_path / "shared" / "runs"
    runs.mkdir(parents=True)
    adopt(prepared_run, runs, name="limited")
    changes = ["name=limited", "learner.steps=4000", "rollout.engine=scripted", "rollout.probe_tolerance=1000"]
    job = Job(tmp_path, "demo_ci", *settings(changes))
    jobs.append(job)
    job.wait_for_step(3, name="limited")
    job.signal_script(signal.SIGUSR1)
    output = job.finish()
    assert job.process.returncode == 130, output
    assert "a checkpoint is saved" in output
    assert list((runs / "limited" / "checkpoints").glob("step-*"))
    assert job.scontrol_log.read_text() == "requeue 4711\n"
