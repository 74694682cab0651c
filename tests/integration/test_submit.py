"""`keel submit` against a real Ray head node: its job server, its token, its way of stopping a job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.redis_server import EmbeddedServer
from tests.integration.ray_head import RayHead, ray_head
from tests.integration.runs import KEEL, adopt, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JOB = re.compile(r"keel: submitted (\S+);")


@dataclass(frozen=True)
class Cluster:
    """A head node and how a user of it starts `keel submit`."""

    head: RayHead

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        environment = os.environ | self.head.env | {"PYTHONUNBUFFERED": "1"} | (env or {})
        environment["RAY_ADDRESS"] = "http://127.0.0.1:1"  # Ray would prefer this to --address.
        # A shell's background job ignores SIGINT, and so does all that it starts: the tests may be one.
        return subprocess.Popen(
            ["env", "--default-signal=INT", *KEEL, "submit", *arguments, "--address", self.head.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def submit(self, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        process = self.start(*arguments, env=env)
        output, errors = process.communicate(timeout=200)
        return process.returncode, output, errors


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node whose environment names a queue server that is not the job's own."""
    with EmbeddedServer(tmp_path_factory.mktemp("redis")) as server:
        with ray_head(env={"KEEL_REDIS_URL": server.url}) as head:
            yield Cluster(head)


def test_a_job_is_followed_to_its_end_and_succeeds(cluster: Cluster, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    row = '{"prompt": "Hello %d", "chosen": "Good day to you", "rejected": "No"}\n'
    pairs.write_text("".join(row % number for number in range(40)))
    config = tmp_path / "my.yaml"
    config.write_text(
        "name: mine\nstages: [data, sft]\nsft: {epochs: 0.1, threads: 1}\nevaluation: {prompts: 4}\n"
        "model: {kind: new, hidden_size: 64, intermediate_size: 64, layers: 1, heads: 2}\n"
        "data: {preferences: {kind: file, path: pairs.jsonl}}\n"
    )
    process = subprocess.run(
        [*KEEL, "submit", str(config), "--set", f"runs_dir={tmp_path}/runs", "--secret", "KEEL_REDIS_URL",
         "--address", cluster.head.address],
        cwd=tmp_path, env=os.environ | cluster.head.env, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert "[sft] done" in process.stdout
    assert "data.preferences.path is uploaded" in process.stderr
    assert "redis://" not in process.stdout + process.stderr
    assert "redis://:" not in (tmp_path / "runs" / "mine" / "config.yaml").read_text()
    assert (tmp_path / "runs" / "mine" / "sft" / "model").is_dir()
    (job,) = JOB.findall(process.stderr)
    code, output, _ = cluster.submit("--status", job)
    assert (code, output) == (0, f"keel: {job}: succeeded, exit code 0\n")
    code, output, _ = cluster.submit("--logs", job, "--no-follow")
    assert (code, "[sft] done" in output) == (0, True)


def test_a_failed_job_says_so(cluster: Cluster, tmp_path: Path) -> None:
    runs = ["--set", f"runs_dir={tmp_path}", "--set", "stages=[data]"]
    code, output, errors = cluster.submit("demo_ci", *runs, "--secret", "NOT_THERE")
    assert code == 1
    assert "NOT_THERE" in output
    (job,) = JOB.findall(errors)
    code, again, _ = cluster.submit("--logs", job)
    assert (code, again) == (1, output)


def test_what_is_wrong_is_said_before_anything_runs(cluster: Cluster, tmp_path: Path) -> None:
    runs = f"runs_dir={tmp_path}/runs"
    nobody = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}
    for arguments, env, message in (
        (["demo_ci", "--set", runs, "--set", "learner.stepz=1"], None, "nearest valid: learner.steps"),
        (["demo_ci", "--set", runs, "--stop", "x"], None, "takes one of"),
        (["--status", "keel-nobody-000000"], None, "no such job"),
        (["demo_ci", "--set", runs], nobody, "RAY_AUTH_TOKEN_PATH"),
        (["demo_ci", "--set", runs], {**nobody, "RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_TOKEN_PATH"),
    ):
        code, output, errors = cluster.submit(*arguments, env=env)
        assert (code, output) == (2, ""), errors
        assert message in errors
        assert "keel: submitted" not in errors
    assert not (tmp_path / "runs").exists()


def test_a_detached_job_goes_on_and_a_stopped_one_saves(cluster: Cluster, prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="stopped")
    changes = [
        f"runs_dir={tmp_path}", "name=stopped", "learner.steps=4000", "checkpoint.every_steps=4000",
        "rollout.engine=scripted", "rollout.probe_tolerance=1000",
    ]  # fmt: skip
    process = cluster.start(
        "demo_ci", "--resume", "--name", "to-be-stopped", "--secret", "KEEL_REDIS_URL", *settings(changes)
    )
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    wait_for_lines(metrics, 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "keel submit --stop to-be-stopped" in errors
    code, output, _ = cluster.submit("--status", "to-be-stopped")
    assert (code, output) == (0, "keel: to-be-stopped: running\n"), "Ctrl-C detaches"
    seen = len(metrics.read_text().splitlines())
    wait_for_lines(metrics, seen + 1)

    code, _, errors = cluster.submit("--stop", "to-be-stopped")
    assert (code, "to-be-stopped: stopped" in errors) == (130, True), errors
    last = len(metrics.read_text().splitlines())
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{last:08d}").is_dir()
    _, log, _ = cluster.submit("--logs", "to-be-stopped", "--no-follow")
    assert "SIGTERM: saving and stopping" in log


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str] | None = None) -> None:
    deadline_s = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, f"no {count} steps"
        time.sleep(0.1)
