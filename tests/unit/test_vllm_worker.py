"""A worker's end of the weight path without vLLM's engine: staging what NCCL brings, and jobs that come too late."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from actors import vllm_worker
from actors.vllm_worker import KeelUpdateInfo, KeelWeightTransfer, _join_nccl, _receive_nccl, _Stager
from cluster.errors import WeightSyncError
from cluster.weight_group import GroupBrokenError, GroupPlan
from cluster.weights import WeightBlob, pack, unpack

PLAN = GroupPlan(
    epoch=1, backend="nccl", address="127.0.0.1", port=1, world_size=2, offsets={"a": 1}, bucket_bytes=64, timeout_s=1.0
)


def version(number: int) -> WeightBlob:
    named = [
        ("a", torch.arange(40.0).view(8, 5) + number),
        ("b", torch.tensor([[7]], dtype=torch.int64)),
        ("c", torch.tensor(float(number))),
        ("d", torch.full((3, 3), 0.5, dtype=torch.bfloat16)),  # last: vLLM's buckets align nothing
    ]
    return pack(number, named)


def info_of(blob: WeightBlob) -> KeelUpdateInfo:
    return KeelUpdateInfo(
        location="staged",
        size_bytes=blob.size_bytes,
        names=[entry.name for entry in blob.manifest],
        dtypes=[entry.dtype for entry in blob.manifest],
        shapes=[list(entry.shape) for entry in blob.manifest],
        offsets_bytes=[entry.offset_bytes for entry in blob.manifest],
    )


def config() -> Any:
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    return SimpleNamespace(parallel_config=parallel, model_config=None)


def transfer() -> KeelWeightTransfer:
    return KeelWeightTransfer(None, config(), torch.device("cpu"), torch.nn.Linear(1, 1))


def wait_for(ended: Callable[[], bool]) -> None:
    limit = threading.Event()
    for _ in range(2000):
        if ended():
            return
        limit.wait(0.01)
    raise AssertionError("not in time")


# ---------------------------------------------------------------- the stager


def test_tensors_land_where_the_manifest_says() -> None:
    blob = version(3)
    stager = _Stager(blob.manifest, size_bytes=blob.size_bytes, wanted=lambda: True)
    tensors = list(unpack(blob))
    assert stager.load_weights(tensors[2:]) | stager.load_weights(tensors[:2]) == {"a", "b", "c", "d"}
    for (_, sent), (_, got) in zip(tensors, unpack(WeightBlob(3, blob.manifest, stager.buffer)), strict=True):
        assert torch.equal(sent, got)


def test_nothing_is_staged_once_the_job_is_not_wanted() -> None:
    blob = version(1)
    stager = _Stager(blob.manifest, size_bytes=blob.size_bytes, wanted=lambda: False)
    with pytest.raises(WeightSyncError, match="given up"):
        stager.load_weights(unpack(blob))


def test_a_group_that_is_aborted_during_a_copy_is_not_called_again() -> None:
    blob, answers = version(1), iter([True, False])
    stager = _Stager(blob.manifest, size_bytes=blob.size_bytes, wanted=lambda: next(answers))
    taken: list[str] = []

    def bucket() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in unpack(blob):
            taken.append(name)
            yield name, tensor

    with pytest.raises(WeightSyncError, match="given up"):
        stager.load_weights(bucket())
    assert taken == ["a"]


class Wire:
    """A communicator that keeps what is sent, and gives it out in order. `disabled` is vLLM's way to say: no NCCL."""

    def __init__(self, *, disabled: bool = False) -> None:
        self.disabled = disabled
        self.sent: list[torch.Tensor] = []
        self.sending = True
        self.destroyed = False

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        if self.sending:
            self.sent.append(tensor.clone())
        else:
            tensor.copy_(self.sent.pop(0))  # refuses a bucket of another size

    def destroy(self) -> None:
        self.destroyed = True


@pytest.fixture
def streamless(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's packed transfer on a machine without streams."""
    from vllm.distributed.weight_transfer import packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: (stream,) * count)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)


def receiver(monkeypatch: pytest.MonkeyPatch, wire: Wire) -> Any:
    from vllm.distributed.weight_transfer import nccl_engine

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda init_info, parallel: wire)
    here: Any = SimpleNamespace(config=None, vllm_config=config(), device=torch.device("cpu"), model=None)
    return _join_nccl(here, PLAN, first_rank=1)


def test_vllm_s_receiver_stages_what_its_producer_sent(monkeypatch: pytest.MonkeyPatch, streamless: None) -> None:
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    blob, wire = version(5), Wire()
    packed_nccl_broadcast_producer(
        iterator=unpack(blob), group=wire, src=0, post_iter_func=lambda item: item[1], buffer_size_bytes=64
    )
    assert len(wire.sent) > 1, "more than one bucket"
    wire.sending = False
    native = receiver(monkeypatch, wire)
    buffer = _receive_nccl(native, info_of(blob), wanted=lambda: True)
    for (_, sent), (_, got) in zip(unpack(blob), unpack(WeightBlob(5, blob.manifest, buffer)), strict=True):
        assert torch.equal(sent, got)
    assert native.model is None
    native.shutdown()
    assert wire.destroyed


def test_a_communicator_that_does_nothing_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GroupBrokenError, match="cannot use NCCL"):
        receiver(monkeypatch, Wire(disabled=True))


# ---------------------------------------------------------------- jobs


class Native:
    """A receiver whose `receive_weights` waits for `go`."""

    def __init__(self) -> None:
        self.model: Any = None
        self.go, self.waiting = threading.Event(), threading.Event()
        self.closed = 0
        self.bytes: list[tuple[str, torch.Tensor]] = []

    def receive_weights(self, update: object) -> None:
        self.waiting.set()
        self.go.wait(20)
        self.model.load_weights(self.bytes)

    def shutdown(self) -> None:
        self.closed += 1
        self.go.set()  # an abort wakes whoever waits


def test_a_join_that_succeeds_too_late_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, native, go, joining = transfer(), Native(), threading.Event(), threading.Event()

    def join(*_: object, **__: object) -> Native:
        joining.set()
        go.wait(20)
        return native

    monkeypatch.setattr(vllm_worker, "_join_nccl", join)
    worker.begin("join", {**asdict(PLAN), "first_rank": 1})
    late = worker._job
    assert late is not None
    assert joining.wait(20)
    worker.begin("leave", {})
    wait_for(lambda: worker.job_state == "done")
    go.set()
    late.join(20)
    assert (worker._native, native.closed, worker.job_state) == (None, 1, "done")


def test_a_broadcast_that_is_left_stages_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, native, blob = transfer(), Native(), version(2)
    native.bytes = list(unpack(blob))
    monkeypatch.setattr(vllm_worker, "_join_nccl", lambda *_, **__: native)
    worker.begin("join", {**asdict(PLAN), "first_rank": 1})
    wait_for(lambda: worker.job_state == "done")
    worker.begin("receive", asdict(info_of(blob)))
    receiving = worker._job
    assert receiving is not None
    assert native.waiting.wait(20)
    assert worker.job_state == "busy"
    worker.begin("leave", {})
    wait_for(lambda: worker.job_state == "done")
    receiving.join(20)
    assert (worker._staged, worker._native, native.closed) == (None, None, 1)
    worker.begin("receive", asdict(info_of(blob)))
    wait_for(lambda: worker.job_state != "busy")
    assert "in no weight group" in worker.job_state


def test_what_nccl_brought_is_loaded_like_any_staged_version(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, native = transfer(), Native()
    blob = pack(4, [("weight", torch.full((1, 1), 4.0)), ("bias", torch.full((1,), -4.0))])
    native.bytes = list(unpack(blob))
    native.go.set()
    loaded: dict[str, float] = {}

    def load_weights(weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        loaded.update((name, float(tensor.sum())) for name, tensor in weights)
        return set(loaded)

    worker.model.load_weights = load_weights
    monkeypatch.setattr(vllm_worker, "_join_nccl", lambda *_, **__: native)
    worker.begin("join", {**asdict(PLAN), "first_rank": 1})
    wait_for(lambda: worker.job_state == "done")
    worker.begin("receive", asdict(info_of(blob)))
    wait_for(lambda: worker.job_state != "busy")
    assert worker.job_state == "done"
    assert loaded == {}, "the model is touched by the update alone"
    worker.receive_weights(info_of(blob))
    assert loaded == {"weight": 4.0, "bias": -4.0}
    with pytest.raises(WeightSyncError, match="not those of this update"):
        worker.receive_weights(info_of(blob))
