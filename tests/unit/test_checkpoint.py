"""Checkpoints are whole or absent, verified when read, and survive a full disk, a kill and damage."""

from __future__ import annotations

import json
import logging
import math
import os
import pickletools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cluster import checkpoint as checkpoint_module
from cluster import checkpoint_tensors
from cluster.checkpoint import CheckpointStore
from cluster.checkpoint_tensors import read_tensors, read_whole, saved_groups, write_tensors
from cluster.errors import CheckpointError
from tests.unit.helpers import names, refuse

ROOT = Path(__file__).parents[2]
TENSORS = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def writing(**groups: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda directory: write_tensors(directory, groups, collective=False)


def save(store: CheckpointStore, step: int, value: float = 1.0) -> Path:
    return store.save(step, state={"beta": value}, write_tensors=writing(policy={"w": torch.full((3,), value)}))


# ---------------------------------------------------------------- round trip


def test_tensors_and_state_come_back(store: CheckpointStore) -> None:
    policy = {"w": torch.arange(6.0).reshape(2, 3), "half": torch.tensor([1.5], dtype=torch.bfloat16)}
    optimiser = {"step": torch.tensor(7.0), "moment": torch.tensor([[1, 2]], dtype=torch.int64)}
    state = {"beta": 0.25, "rng": [1, 2**63], "name": "ü", "none": None, "nested": {"a": [True, "x"]}}
    store.save(3, state=state, write_tensors=writing(policy=policy, policy_optimiser=optimiser))
    loaded = store.load()
    assert loaded.step == 3
    assert loaded.state == state
    tensors = read_whole(loaded.path)
    assert set(tensors) == saved_groups(loaded.path) == {"policy", "policy_optimiser"}
    assert tensors["policy"]["half"].dtype == torch.bfloat16
    assert torch.equal(tensors["policy"]["w"], policy["w"])
    assert torch.equal(tensors["policy_optimiser"]["step"], optimiser["step"])
    assert torch.equal(tensors["policy_optimiser"]["moment"], optimiser["moment"])


def test_tied_transposed_trained_and_empty_tensors(store: CheckpointStore) -> None:
    embedding = torch.nn.Parameter(torch.arange(4.0).reshape(2, 2))
    tensors = {"embed": embedding, "head": embedding, "transposed": embedding.T, "empty": torch.zeros(0)}
    loaded = read_whole(store.save(0, state={}, write_tensors=writing(policy=tensors)))["policy"]
    assert loaded["embed"].tolist() == loaded["head"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert loaded["transposed"].tolist() == [[0.0, 2.0], [1.0, 3.0]]
    assert loaded["empty"].shape == (0,)


def test_live_tensors_are_read_into(store: CheckpointStore) -> None:
    path = store.save(0, state={}, write_tensors=writing(policy={"w": torch.tensor([1.0, 2.0])}))
    module = torch.nn.Linear(2, 1, bias=False)
    read_tensors(path, {"policy": {"w": module.weight[0]}}, collective=False)
    assert module.weight.tolist() == [[1.0, 2.0]]


def test_no_file_is_larger_than_can_be_held_twice(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_tensors, "FILE_BYTES", 40)
    tensors = {f"w{number}": torch.full((number,), float(number)) for number in (4, 6, 2, 30, 0, 1)}
    path = store.save(0, state={}, write_tensors=writing(policy=tensors))
    held = []
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            held.append({name.removeprefix("policy/") for name in opened.keys()})  # noqa: SIM118 — no mapping
    assert held == [{"w4", "w6"}, {"w2"}, {"w30"}, {"w0", "w1"}]
    loaded = read_whole(store.load().path)["policy"]
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "live", [{"w": torch.zeros(3)}, {"v": torch.zeros(2)}, {"w": torch.zeros(2), "v": torch.zeros(1)}, {}]
)
def test_tensors_that_do_not_fit_are_refused(store: CheckpointStore, live: dict[str, torch.Tensor]) -> None:
    path = store.save(0, state={}, write_tensors=writing(policy={"w": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        read_tensors(path, {"policy": live}, collective=False)
    assert all(bool((tensor == 0).all()) for tensor in live.values()), "and nothing was read"


def test_nothing_on_disk_is_pickled(store: CheckpointStore) -> None:
    path = save(store, 1)
    assert names(path) == ["manifest.json", TENSORS, "state.json"]
    assert not any(pickletools_reads(path / name) for name in names(path))


def pickletools_reads(path: Path) -> bool:
    try:
        list(pickletools.genops(path.read_bytes()))
    except ValueError:
        return False
    return True


def test_a_checkpoint_of_the_format_before_is_refused_by_name(store: CheckpointStore) -> None:
    path = save(store, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    with pytest.raises(CheckpointError) as caught:
        store.load()
    assert "schema version 1, this build reads 2" in caught.value.got


@pytest.mark.parametrize(
    "state",
    [{"kl": math.nan}, {"a": [1.0, math.inf]}, {"a": {1: 2}}, {"a": torch.tensor(1)}, {"a": [{2: 3}]}],
)
def test_a_state_that_json_cannot_hold_is_refused(store: CheckpointStore, state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        store.save(1, state=state, write_tensors=writing())
    assert store.list() == []


# ---------------------------------------------------------------- keeping and pruning


def test_the_last_k_and_the_pinned_are_kept(store: CheckpointStore) -> None:
    for step in (10, 20):
        save(store, step)
    store.pin(10)
    for step in (30, 40, 50):
        save(store, step)
    assert store.list() == [10, 40, 50]
    assert store.latest() == 50
    assert store.pinned() == {10}


def test_what_is_no_longer_pinned_goes_with_the_next_save(store: CheckpointStore) -> None:
    for step in (10, 20):
        save(store, step)
        store.pin(step)
    for step in (30, 40, 50):
        save(store, step)
    store.unpin(10)
    store.unpin(30)  # It never was.
    assert store.pinned() == {20}
    assert 10 in store.list()
    save(store, 60)
    assert 20 in store.list()
    assert 10 not in store.list()


def test_an_absent_step_cannot_be_pinned(store: CheckpointStore) -> None:
    save(store, 1)
    with pytest.raises(CheckpointError, match="cannot pin step 2"):
        store.pin(2)


def test_unreadable_pins_stop_pruning_rather_than_lose_them(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1)
    (tmp_path / "checkpoints" / "pinned.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"pinned\.json"):
        save(store, 2)
    assert store.list() == [1, 2]


def test_saving_a_step_again_replaces_it(store: CheckpointStore, tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        save(store, 5, value)
    assert store.list() == [5]
    assert store.load().state == {"beta": 3.0}
    assert len(names(tmp_path / "checkpoints")) == 1


def test_steps_are_ordered_as_numbers(store: CheckpointStore) -> None:
    save(store, 999_999_999)
    save(store, 1_000_000_000)
    assert store.latest() == 1_000_000_000


def test_no_checkpoint_is_said_so(store: CheckpointStore) -> None:
    assert store.latest() is None
    assert store.list() == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.load()
    save(store, 4)
    with pytest.raises(CheckpointError, match="steps there: 4"):
        store.load(9)


# ---------------------------------------------------------------- damage


def damage(path: Path, how: str) -> None:
    target = path / TENSORS
    if how == "truncated":
        target.write_bytes(target.read_bytes()[:-4])
    elif how == "flipped":
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(bytes(data))
    elif how == "missing":
        target.unlink()
    elif how == "manifest":
        (path / "manifest.json").write_text("{")
    elif how == "manifest of other shape":
        (path / "manifest.json").write_text('{"step": 2, "schema_version": 1, "files": {"state.json": {}}}')
    elif how == "schema":
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "manifest", "manifest of other shape", "schema"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    save(store, 1, 1.0)
    damage(save(store, 2, 2.0), how)
    with caplog.at_level(logging.WARNING):
        assert store.load().step == 1
    assert "step-00000002 is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="step 2 is damaged"):
        store.load(2)


def test_all_damaged_is_an_error_naming_each(store: CheckpointStore) -> None:
    for step in (1, 2):
        damage(save(store, step), "flipped")
    with pytest.raises(CheckpointError) as caught:
        store.load()
    assert "step-00000001" in caught.value.got
    assert "step-00000002" in caught.value.got


# ---------------------------------------------------------------- a disk that refuses


@pytest.mark.parametrize("moment", ["tensors", "manifest", "rename"])
def test_a_full_disk_leaves_what_was_there(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(store, 1)
    with monkeypatch.context() as patch:
        if moment == "tensors":
            patch.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", refuse)
        elif moment == "manifest":
            patch.setattr(checkpoint_module, "_manifest", refuse)
        else:
            patch.setattr(Path, "rename", refuse)
        with pytest.raises(CheckpointError) as caught:
            save(store, 2)
    assert "No space left" in caught.value.got
    assert "free disk space" in caught.value.do
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
    assert store.load().step == 1
    save(store, 2)
    assert store.latest() == 2


def test_a_real_write_limit_leaves_what_was_there(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse inside safetensors' own writer."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from cluster.checkpoint import CheckpointStore
from cluster.checkpoint_tensors import write_tensors
from cluster.errors import CheckpointError
store = CheckpointStore(Path(sys.argv[1]), keep_last=2)
def write(size):
    return lambda directory: write_tensors(directory, {"policy": {"w": torch.zeros(size)}}, collective=False)
store.save(1, state={}, write_tensors=write(10))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    store.save(2, state={}, write_tensors=write(100_000))
except CheckpointError as error:
    print(error)
print(store.list(), store.load().step)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "cannot write the checkpoint of step 2" in done.stdout
    assert done.stdout.endswith("[1] 1\n")
    assert names(tmp_path / "c") == ["step-00000001"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only directories")
def test_a_read_only_directory_is_said_so(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1)
    (tmp_path / "checkpoints").chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            save(store, 2)
    finally:
        (tmp_path / "checkpoints").chmod(0o700)


def test_a_kill_between_files_leaves_no_checkpoint_and_is_cleaned_up(tmp_path: Path) -> None:
    code = """
import os, signal, sys, torch
from pathlib import Path
from cluster import checkpoint
from cluster.checkpoint_tensors import write_tensors
def write(directory):
    write_tensors(directory, {"policy": {"w": torch.zeros(10)}}, collective=False)
store = checkpoint.CheckpointStore(Path(sys.argv[1]), keep_last=2)
store.save(1, state={}, write_tensors=write)
checkpoint._manifest = lambda step, directory: os.kill(os.getpid(), signal.SIGKILL)
store.save(2, state={}, write_tensors=write)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(".tmp-" in name for name in names(tmp_path / "c"))
    store = CheckpointStore(tmp_path / "c", keep_last=2)
    assert store.list() == [1]
    assert store.load().step == 1
    save(store, 2)
    assert names(tmp_path / "c") == ["step-00000001", "step-00000002"]
