"""`keel submit` without a cluster: what is checked and uploaded, what the job's command is, how answers are read."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import ConfigError, SupervisionError
from configs.load import load_config
from keel.submission import package as submit_package
from keel.submission.options import SubmitOptions
from keel.submission.package import CONFIG_NAME, plan_package, write_package
from keel.submission.ray_jobs import JobState, RayJobs
from keel.submission.submit import Secret, entrypoint, parse_secret, read_env_file, submit

RUNS = "runs_dir=/shared/runs"


def config_file(folder: Path, **data: Any) -> str:
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({"name": "my-run", "runs_dir": "/shared/runs", "data": data}))
    return str(path)


def contents(package: submit_package.Package, target: Path) -> dict[str, bytes]:
    write_package(package, target)
    with zipfile.ZipFile(target) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ---------------------------------------------------------------- the package


def test_the_job_reads_the_configuration_that_was_checked(tmp_path: Path) -> None:
    package = plan_package("demo_ci", overrides=[RUNS, "learner.steps=3"], working_dir=None, secrets=[])
    written = contents(package, tmp_path / "a.zip")
    assert set(written) == {CONFIG_NAME}
    (tmp_path / "job.yaml").write_bytes(written[CONFIG_NAME])
    assert load_config(tmp_path / "job.yaml") == package.config
    assert (package.config.learner.steps, package.config.ray.address) == (3, "auto")
    write_package(package, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes(), "Ray names packages by content"


def test_relative_files_travel_and_absolute_ones_are_the_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("{}\n")
    config = config_file(
        tmp_path,
        preferences={"kind": "file", "path": "pairs.jsonl"},
        prompts={"kind": "file", "path": "/data/prompts.jsonl"},
    )
    package = plan_package(config, overrides=[], working_dir=None, secrets=["KEEL_REDIS_URL"])
    written = contents(package, tmp_path / "a.zip")
    in_job = yaml.safe_load(written[CONFIG_NAME])["data"]
    assert written[in_job["preferences"]["path"]] == b"{}\n"
    assert in_job["prompts"]["path"] == "/data/prompts.jsonl"
    assert [note.split()[0] for note in package.notes] == ["data.preferences.path", "data.prompts.path"]


def test_a_model_folder_travels_and_a_hub_name_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("policy").mkdir()
    Path("policy/config.json").write_text("{}")
    for path, expected in (("policy", "keel-files/model-path"), ("org/model", "org/model"), ("/m/x", "/m/x")):
        package = plan_package(
            "demo_ci", overrides=[RUNS, f"model={{kind: pretrained, path: {path}}}"], working_dir=None, secrets=[]
        )
        assert package.config.model.path == expected  # type: ignore[union-attr]
        assert ("keel-files/model-path/config.json" in package.files) == (path == "policy")


def test_reward_models_travel_as_the_policy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward").mkdir()
    Path("reward/config.json").write_text("{}")

    def plan(models: str) -> submit_package.Package:
        overrides = [RUNS, f"rm.models={models}"]
        return plan_package("demo_ci", overrides=overrides, working_dir=None, secrets=[])

    package = plan("[reward, /models/second]")
    assert package.config.rm.models == (Path("keel-files/reward-model-0"), Path("/models/second"))
    assert package.files["keel-files/reward-model-0/config.json"] == Path("reward/config.json")
    assert any("/models/second" in note for note in package.notes)
    with pytest.raises(ConfigError, match="no such folder here"):
        plan("[missing]")


def test_a_folder_of_code_travels_without_what_git_ignores(tmp_path: Path) -> None:
    code = tmp_path / "code"
    (code / "mine").mkdir(parents=True)
    (code / "__pycache__").mkdir()
    for name in ("mine/world.py", "big.bin", "__pycache__/x.pyc"):
        (code / name).write_text("x")
    (code / ".gitignore").write_text("*.bin\n")
    arguments: dict[str, Any] = {"overrides": [RUNS, "collect.judge=mine.world:judge"], "secrets": ["KEEL_REDIS_URL"]}
    without_git = plan_package("demo_ci", working_dir=code, **arguments)
    assert set(without_git.files) == {"mine/world.py", "big.bin", ".gitignore"}
    subprocess.run(["git", "init", "-q", str(code)], check=True)
    with_git = plan_package("demo_ci", working_dir=code, **arguments)
    assert set(with_git.files) == {"mine/world.py", ".gitignore"}
    assert with_git.notes == []
    nowhere = plan_package("demo_ci", working_dir=None, **arguments)
    assert any("collect.judge = mine.world:judge must be importable" in note for note in nowhere.notes)


def test_too_large_a_package_is_refused_with_the_culprit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_package, "MAX_PACKAGE_BYTES", 1 << 20)
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_bytes(random.Random(0).randbytes(1500 << 10))
    config = config_file(tmp_path, preferences={"kind": "file", "path": "pairs.jsonl"})
    package = plan_package(config, overrides=[], working_dir=None, secrets=[])
    with pytest.raises(ConfigError, match=r"too large(?s:.*)pairs\.jsonl 1 MiB"):
        write_package(package, tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("overrides", "secrets", "message"),
    [
        (["learner.stepz=3", RUNS], [], "learner.steps"),
        (["learner.minibatches=64", RUNS], [], "learner.minibatches"),
        ([], [], "runs_dir that outlives"),
        ([RUNS, "redis.url=redis://me:hunter2@host:6379"], [], "KEEL_REDIS_URL"),
        ([RUNS, "redis.url=redis://host:6379?password=hunter2"], [], "KEEL_REDIS_URL"),
        ([RUNS, "redis.url=redis://host:6379"], ["KEEL_REDIS_URL"], "exclude each other"),
        ([RUNS, "data={preferences: {kind: file, path: absent.jsonl}}"], [], "no such file here"),
    ],
)
def test_bad_configurations_are_refused_here(overrides: list[str], secrets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        plan_package("demo_ci", overrides=overrides, working_dir=None, secrets=secrets)
    assert "hunter2" not in str(raised.value)


# ---------------------------------------------------------------- secrets and environment


def run_entrypoint(tmp_path: Path, *secrets: Secret, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The job's command with a `keel` that prints its arguments and the secret."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "keel").write_text('#!/bin/sh\necho "$@ [$HF_TOKEN]"\n')
    (tools / "keel").chmod(0o755)
    return subprocess.run(
        ["sh", "-c", entrypoint(secrets=secrets, resume=True)],
        env={"PATH": f"{tools}:/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )


def test_secrets_are_found_on_the_cluster_and_missed_at_once(tmp_path: Path) -> None:
    trained = "train keel-job.yaml --resume [hush]\n"
    named, filed = Secret("HF_TOKEN", None), Secret("HF_TOKEN", str(tmp_path / "it's here"))
    assert run_entrypoint(tmp_path, named, env={"HF_TOKEN": "hush"}).stdout == trained
    missing = run_entrypoint(tmp_path, named, env={})
    assert (missing.returncode != 0, missing.stdout) == (True, "")
    assert "HF_TOKEN" in missing.stderr
    assert run_entrypoint(tmp_path, filed, env={}).returncode != 0
    (tmp_path / "it's here").write_text("hush\n")
    assert run_entrypoint(tmp_path, filed, env={}).stdout == trained


@pytest.mark.parametrize("text", ["HF_TOKEN=hf_abc123", "A B", "1A", "", "X=", "X;rm=/f"])
def test_a_value_is_not_taken_for_a_secrets_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--secret takes") as raised:
        parse_secret(text)
    assert "hf_abc123" not in str(raised.value)


def test_the_environment_file(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("# settings\n\nNCCL_DEBUG=INFO\nTOKENIZERS_PARALLELISM=false\nA=b=c\n")
    assert read_env_file(path) == {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false", "A": "b=c"}
    for line in ("HF_TOKEN=x", "WANDB_API_KEY=x", "DB_PASSWORD=x", "KEEL_REDIS_URL=x"):
        path.write_text(line)
        with pytest.raises(ConfigError, match="--secret"):
            read_env_file(path)
    path.write_text("export A=1")
    with pytest.raises(ConfigError, match=":1: not NAME=VALUE"):
        read_env_file(path)


# ---------------------------------------------------------------- the cluster's answers


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


@pytest.mark.timeout(60)
def test_a_cluster_that_does_not_answer_is_given_up(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started_s = time.monotonic()
    with pytest.raises(SupervisionError, match="does not answer"):
        RayJobs(f"http://127.0.0.1:{silent_port}", timeout_s=1.0)
    assert time.monotonic() - started_s < 20


@pytest.mark.parametrize("address", ["ray://head:10001", "auto", "http://", "http://head:port"])
def test_addresses_that_are_no_dashboard(address: str) -> None:
    with pytest.raises((ConfigError, SupervisionError)):
        RayJobs(address, connect_timeout_s=1.0)


class Server:
    """Ray's client, scripted: each element of `tails` is one connection's chunks; an exception breaks it."""

    def __init__(self, tails: list[list[str | Exception]]) -> None:
        self.tails = tails

    async def tail_job_logs(self, _job: str) -> AsyncIterator[str]:
        for chunk in self.tails.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


def follow(server: Server, monkeypatch: pytest.MonkeyPatch, *, final_log: str) -> tuple[str, JobState]:
    jobs = object.__new__(RayJobs)
    jobs._client = server

    def state(_job: str) -> JobState:
        ended = not server.tails
        return JobState("j", "SUCCEEDED" if ended else "RUNNING", "", 0 if ended else None, "")

    monkeypatch.setattr(jobs, "state", state)
    monkeypatch.setattr(jobs, "log", lambda _job: final_log)
    monkeypatch.setattr("keel.submission.ray_jobs._RETRY_S", 0.0)
    written: list[str] = []
    return_state = asyncio.run(jobs.follow("j", write=written.append))
    return "".join(written), return_state


def test_a_broken_connection_repeats_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server([["a1\n", "a2\n", RuntimeError("closed")], ["a1\na2\na3\n", OSError()], ["a1\n", "a2\na3\na4\n"]])
    text, state = follow(server, monkeypatch, final_log="a1\na2\na3\na4\na5\n")
    assert text == "a1\na2\na3\na4\na5\n"
    assert state.ended


def test_what_no_cluster_can_run_is_not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.submission.submit.prepare_ray_environment", lambda: None)  # it would stay for later tests
    options = SubmitOptions(
        config="demo_ci", overrides=[RUNS, "rollout.kv_cache_gib=0.00001"], address="http://127.0.0.1:1"
    )
    with pytest.raises(ConfigError, match="no cluster can run this") as caught:
        submit(options)
    assert "rollout.kv_cache_gib=" in str(caught.value)


def test_an_interrupt_does_not_wait_for_a_slow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, asked, answer = object.__new__(RayJobs), threading.Event(), threading.Event()
    jobs._client = Server([[]])

    def state(_job: str) -> JobState:
        asked.set()
        answer.wait()
        return JobState("j", "RUNNING", "", None, "")

    monkeypatch.setattr(jobs, "state", state)

    async def interrupted() -> None:
        following = asyncio.create_task(jobs.follow("j", write=lambda _text: None))
        await asyncio.to_thread(asked.wait)
        following.cancel()
        await following

    slow = threading.Timer(30.0, answer.set)  # With a pool's thread the loop would wait that long.
    slow.start()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert not answer.is_set()
    slow.cancel()
    answer.set()
