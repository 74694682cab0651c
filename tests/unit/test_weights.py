"""Packing and unpacking of weights, against tensors and offsets written out by hand."""

from __future__ import annotations

import asyncio
import pickle
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster import weights
from cluster.errors import WeightSyncError
from cluster.weights import AdapterInfo, MemoryWeightChannel, Probe, WeightBlob, pack, unpack


def blob(version: int) -> WeightBlob:
    return pack(version, [("w", torch.full((2,), float(version)))])


def test_layout_is_contiguous_and_aligned() -> None:
    packed = pack(3, [("a", torch.tensor([1.0, 2.0, 3.0])), ("b", torch.tensor([[7]], dtype=torch.int64))])
    assert [(e.name, e.dtype, e.shape, e.offset_bytes) for e in packed.manifest] == [
        ("a", "float32", (3,), 0),
        ("b", "int64", (1, 1), 64),
    ]
    assert packed.buffer.dtype == np.uint8
    assert len(packed.buffer) == 128
    assert packed.buffer[:12].tobytes() == np.array([1, 2, 3], dtype="<f4").tobytes()
    assert packed.buffer[64:72].tobytes() == (7).to_bytes(8, "little")
    assert packed.shapes == {"a": (3,), "b": (1, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_survives(dtype: torch.dtype) -> None:
    original = torch.tensor([[0.5, -2.0], [1.25, 96.0]], dtype=dtype)
    ((name, tensor),) = unpack(pack(0, [("w", original)]))
    assert name == "w"
    assert tensor.dtype == dtype
    assert torch.equal(tensor, original)


def test_transposed_scalar_and_empty_tensors_survive() -> None:
    transposed = torch.arange(6.0).view(2, 3).t()
    tensors = dict(unpack(pack(0, [("t", transposed), ("s", torch.tensor(4.0)), ("e", torch.empty(0, 3))])))
    assert tensors["t"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert tensors["s"].item() == 4.0
    assert tensors["e"].shape == (0, 3)


def test_unpack_makes_views_and_keeps_the_buffer_alive() -> None:
    packed = blob(1)
    address = packed.buffer.ctypes.data
    ((_, tensor),) = unpack(packed)
    assert tensor.data_ptr() == address
    del packed
    assert tensor.tolist() == [1.0, 1.0]


def test_packing_copies_so_later_training_steps_do_not_show() -> None:
    weight = torch.zeros(2)
    packed = pack(0, [("w", weight)])
    weight += 1
    ((_, tensor),) = unpack(packed)
    assert tensor.tolist() == [0.0, 0.0]


def test_packing_lets_each_tensor_go_once_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gathered model and its packed copy, both whole at one time, need twice the memory."""
    alive: list[weakref.ref[np.ndarray]] = []
    left: list[int] = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            array = np.full(8, number, dtype=np.float32)
            alive.append(weakref.ref(array))
            yield f"w{number}", torch.from_numpy(array)

    def watched(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for item in tensors:
            yield item
            del item
            left.append(sum(array() is not None for array in alive))

    copy = weights.copy_entries
    monkeypatch.setattr(weights, "copy_entries", lambda tensors, *rest: copy(watched(tensors), *rest))
    packed = pack(0, gathered())
    # The copying loop's own names hold one; torch lets the array go with its tensor.
    assert left == [4, 3, 2, 1], left
    assert [tensor.tolist() for _, tensor in unpack(packed)] == [[float(number)] * 8 for number in range(4)]


def test_the_buffer_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        blob(0).buffer[0] = 1


def test_a_blob_pickles() -> None:
    probe = Probe(token_ids=np.array([1, 2], dtype=np.int32), logprobs=np.array([-0.5], dtype=np.float32))
    copy = pickle.loads(pickle.dumps(replace(blob(2), probe=probe)))
    assert copy.version == 2
    assert copy.probe.logprobs.tolist() == [-0.5]
    ((_, tensor),) = unpack(copy)
    assert tensor.tolist() == [2.0, 2.0]


def test_a_blob_says_what_adapter_it_holds() -> None:
    info = AdapterInfo(rank=8, alpha=16.0, target_modules=("q_proj", "v_proj"))
    held = pack(3, [("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(8, 4))], adapter=info)
    assert pickle.loads(pickle.dumps(held)).adapter == info
    assert blob(3).adapter is None


def test_a_manifest_beyond_the_buffer_is_refused() -> None:
    packed = blob(0)
    with pytest.raises(WeightSyncError, match="outside the weight buffer"):
        list(unpack(replace(packed, manifest=(replace(packed.manifest[0], shape=(100,)),))))


def test_an_unknown_dtype_is_refused() -> None:
    packed = blob(0)
    with pytest.raises(WeightSyncError, match="unknown dtype"):
        list(unpack(replace(packed, manifest=(replace(packed.manifest[0], dtype="nn"),))))


def test_a_repeated_name_and_a_negative_version_are_refused() -> None:
    with pytest.raises(WeightSyncError, match="twice"):
        pack(0, [("w", torch.zeros(1)), ("w", torch.zeros(1))])
    with pytest.raises(WeightSyncError, match="negative"):
        pack(-1, [("w", torch.zeros(1))])


def test_a_probe_needs_one_logprob_less_than_tokens() -> None:
    ids = np.array([1, 2, 3], dtype=np.int32)
    with pytest.raises(WeightSyncError, match="L-1"):
        Probe(token_ids=ids, logprobs=np.zeros(3, dtype=np.float32))


async def test_publishing_from_another_thread_wakes_a_waiter() -> None:
    channel = MemoryWeightChannel()
    waiter = asyncio.create_task(channel.wait_newer(-1, timeout_s=30))
    await asyncio.sleep(0)
    thread = threading.Thread(target=channel.publish, args=(blob(0),))
    thread.start()
    got = await waiter
    thread.join()
    assert got is not None
    assert got.version == 0
