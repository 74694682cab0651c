"""What a user gets wrong, through the command line: one clear message, exit code 2, nothing left running."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.redis_server import EmbeddedServer
from cluster.reward_models import RewardModels
from tests.integration.runs import KEEL, Run, adopt, assert_all_gone, settings, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAIRS = '{"q": "how?", "good": "so", "bad": "no"}\n'


def keel(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KEEL, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def refused(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert "Traceback" not in output
    for part in expected:
        assert part in output, output


def preferences(path: Path, text: str) -> str:
    file = path / "pairs.jsonl"
    file.write_text(text)
    columns = "{prompt: q, chosen: good, rejected: bad}"
    return f"data={{world: null, max_prompt_tokens: 16, max_response_tokens: 48, " \
           f"preferences: {{kind: file, path: {file}, columns: {columns}}}}}"  # fmt: skip


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    refused(keel("train", "demo_ci", "--set", "learner.stepz=3"), "learner.stepz", "learner.steps")


def test_an_unknown_preset_lists_what_there_is() -> None:
    refused(keel("train", "demoo"), "demoo", "demo")


def test_a_missing_model_is_named_before_anything_starts(tmp_path: Path) -> None:
    arguments = settings([f"runs_dir={tmp_path}", "model={kind: pretrained, path: /nowhere/model}"])
    refused(keel("train", "demo_ci", *arguments), "model not found", "/nowhere/model")


def test_a_wrong_column_lists_the_columns_found(tmp_path: Path) -> None:
    source = preferences(tmp_path, PAIRS).replace("chosen: good", "chosen: best")
    refused(keel("train", "demo_ci", *settings([f"runs_dir={tmp_path}", source])), "best", "good")


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    source = preferences(tmp_path, PAIRS + '{"q": "how?", "go\n')
    refused(keel("train", "demo_ci", *settings([f"runs_dir={tmp_path}", source])), "pairs.jsonl:2")
    (log,) = tmp_path.glob("*/logs/driver-0.log")
    assert "pairs.jsonl:2" in log.read_text()  # keel diagnose reads it there.


def test_empty_prompts_are_counted_and_none_left_is_an_error(tmp_path: Path) -> None:
    source = preferences(tmp_path, '{"q": "  ", "good": "so", "bad": "no"}\n')
    refused(keel("train", "demo_ci", *settings([f"runs_dir={tmp_path}", source])), "empty prompt: 1")


def test_prompts_longer_than_the_context_contradict_the_model() -> None:
    refused(keel("config", "demo_ci", "--set", "data.max_prompt_tokens=500"), "max_position_embeddings", "548")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(prepared_run: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(prepared_run / "sft" / "model", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["outlandish"] = 100_000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = settings([f"runs_dir={tmp_path}", f"model={{kind: pretrained, path: {model}}}"])
    refused(keel("train", "demo_ci", *arguments), "tokenizer and model do not fit", "100000")


def test_an_unreachable_server_is_named_before_the_long_stages(tmp_path: Path) -> None:
    arguments = settings([f"runs_dir={tmp_path}", "redis.url=redis://127.0.0.1:1", "redis.command_timeout_s=2"])
    refused(keel("train", "demo_ci", *arguments), "127.0.0.1:1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "redis") as server:
        yield server


def test_a_wrong_password_is_named_and_not_shown(server: EmbeddedServer, tmp_path: Path) -> None:
    url = f"redis://:not-the-password@{server.address}"
    result = keel("train", "demo_ci", *settings([f"runs_dir={tmp_path}", f"redis.url={url}"]))
    refused(result, "password", server.address)
    assert "not-the-password" not in result.stdout + result.stderr
    assert "not-the-password" not in (tmp_path / "demo-ci" / "config.yaml").read_text()


def test_a_read_only_server_is_refused(server: EmbeddedServer, tmp_path: Path) -> None:
    import redis

    redis.Redis.from_url(server.url).replicaof("127.0.0.1", "1")
    result = keel("train", "demo_ci", *settings([f"runs_dir={tmp_path}", f"redis.url={server.url}"]))
    refused(result, "read-only")


def test_a_second_run_of_a_name_is_refused_living_or_dead(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="demo-ci")
    refused(keel("train", "demo_ci", "--set", f"runs_dir={tmp_path}"), "exists", "--resume", "--fresh")
    script = (
        "import fcntl, sys\n"
        f"lock = open({str(tmp_path / 'demo-ci' / '.lock')!r}, 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        result = keel("train", "demo_ci", "--resume", "--set", f"runs_dir={tmp_path}")
        holder.communicate(b"")
    refused(result, "another process runs demo-ci")


def test_a_loss_that_is_not_finite_stops_the_run(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="nan")
    changes = ["learner.policy.learning_rate=1e30", "rollout.engine=scripted", "rollout.probe_tolerance=1000"]
    run = start(tmp_path, "--resume", *settings(changes), name="nan")
    ended(run, "not finite")


def test_a_full_disk_at_a_checkpoint_keeps_what_was_done(prepared_run: Path, tmp_path: Path) -> None:
    adopt(prepared_run, tmp_path, name="full")
    checkpoints = tmp_path / "full" / "checkpoints"
    checkpoints.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(checkpoints)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        run = start(
            tmp_path, "--resume", *settings(["rollout.engine=scripted", "rollout.probe_tolerance=1000"]), name="full"
        )
        ended(run, "checkpoint", "No space left")
        assert run.metrics(), "the steps before stay on record"
        assert RewardModels(run.path / "rm").exists()
    finally:
        subprocess.run(["umount", str(checkpoints)], check=True)


def ended(run: Run, *expected: str) -> None:
    """The run ended with exit code 2 and these words, and nothing of it lives on."""
    started: dict[int, psutil.Process] = {}
    while run.process.poll() is None:
        started |= {process.pid: process for process in run.descendants()}
        try:
            run.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
    output = run.finish()
    assert run.process.returncode == 2, output
    for part in expected:
        assert part in output, output
    assert_all_gone(list(started.values()))
