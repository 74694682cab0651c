"""Policy weights on their way from the learner to the actors: one packed buffer per version, and the channel's seam.

Consumes: named tensors from the learner (`pack`), blobs (`publish`). Produces: the newest blob, to any number of
consumers. Waits for: `wait_newer` alone waits, for its timeout at most. Who unblocks it: the next `publish`.
Always holds: versions published strictly increase; only the newest blob is kept; a blob never changes after `pack`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.errors import WeightSyncError
from cluster.records import Float32s, Int32s

if TYPE_CHECKING:
    import torch

    from cluster.weight_group import GroupJoiner, GroupUpdate, WeightFeed

UNSYNCED: Final = -1
"""The version of an engine that still holds the weights of its model directory: before any published one."""
_ALIGN_BYTES: Final = 64

Bytes = NDArray[np.uint8]
Transport = Literal["object_store", "collective", "ipc"]
"""How a version's bytes came to an engine."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the buffer. `dtype` is torch's name without the prefix, as in "float32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


@dataclass(frozen=True)
class Probe:
    """A sequence and what the learner says about it, to compare an engine with after its first sync.

    token_ids: int32 [L]. logprobs: float32 [L-1], log p(token l+1 | tokens 0..l) in nats at temperature 1.
    """

    token_ids: Int32s
    logprobs: Float32s

    def __post_init__(self) -> None:
        if len(self.token_ids) < 2 or len(self.logprobs) != len(self.token_ids) - 1:
            raise WeightSyncError(
                "a probe needs L >= 2 token ids and L-1 log-probs",
                got=f"{len(self.token_ids)} ids, {len(self.logprobs)} log-probs",
                do="pass one log-prob for every token but the first",
            )


@dataclass(frozen=True)
class AdapterInfo:
    """Of a blob that holds a low-rank adapter alone: ΔW = alpha / rank · B·A on the linear layers in `target_modules`
    (last parts of their names, as in "q_proj"). The blob's `probe` then speaks of base and adapter together."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class SharedBytes:
    """A version's bytes that stay with their publisher, for a reader on the same device (cluster/weight_sharing.py)."""

    location: str
    size_bytes: int


@dataclass(frozen=True, eq=False)
class WeightBlob:
    """One policy version, contiguous. `buffer` may be read-only shared memory: nobody writes to it.

    Without `adapter`: all weights, under the model's own names. With it: the adapter's alone, under peft's names
    ("base_model.model.….lora_A.weight"), for the base model that the engine has loaded.
    """

    version: int
    manifest: tuple[TensorEntry, ...]
    buffer: Bytes
    probe: Probe | None = None
    adapter: AdapterInfo | None = None
    shared: SharedBytes | None = None
    """Where the bytes are, when they are not in `buffer`, which then is empty."""

    @property
    def transport(self) -> Transport:
        """How its bytes come to an engine."""
        return "object_store" if self.shared is None else "ipc"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape."""
        return {entry.name: entry.shape for entry in self.manifest}

    @property
    def size_bytes(self) -> int:
        return len(self.buffer) if self.shared is None else self.shared.size_bytes


class WeightChannel(Protocol):
    """How weights travel. The learner calls `publish` and `close_publisher`; any number of consumers the others."""

    def publish(self, blob: WeightBlob) -> None:
        """Make `blob` the newest. Raises WeightSyncError unless its version is above every one published before."""
        ...

    async def latest(self) -> WeightBlob | None:
        """The newest blob, or None before the first."""
        ...

    async def newest_version(self) -> int | None:
        """The newest blob's version, without the blob; None before the first."""
        ...

    async def wait_newer(self, than_version: int, *, timeout_s: float) -> WeightBlob | None:
        """The newest blob as soon as its version is above `than_version`; None when none came within `timeout_s`."""
        ...

    def feed(self, name: str, joiner: GroupJoiner) -> WeightFeed:
        """The updates of one running consumer, which may come through a group of processes that `joiner` joins."""
        ...

    def close_publisher(self) -> None:
        """End whatever `publish` has started in this process, once what is on its way has gone. May block, for a
        deadline of the channel's own. What is published stays."""
        ...


@dataclass(frozen=True)
class StoreFeed:
    """A feed that reads every version from the channel."""

    channel: WeightChannel

    async def next(self, than_version: int, *, timeout_s: float) -> WeightBlob | None:
        return await self.channel.wait_newer(than_version, timeout_s=timeout_s)

    async def report(self, update: GroupUpdate, *, error: WeightSyncError | None) -> None:
        """There is no group."""

    async def close(self) -> None:
        """Nothing is held."""


def pack(
    version: int,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    probe: Probe | None = None,
    adapter: AdapterInfo | None = None,
) -> WeightBlob:
    """Copy tensors, each aligned to 64 bytes, into one buffer. `adapter`: what the tensors are an adapter for.

    Tensors must be whole (gather sharded ones first) and may lie on any device; each is moved to the CPU as it is
    yielded, so an iterator that gathers lazily holds one on the device at a time. Raises WeightSyncError on a
    repeated name or a negative version.
    """
    import torch

    if version < 0:
        raise WeightSyncError("a policy version cannot be negative", got=str(version), do="count versions from 0")
    tensors = [(name, tensor.detach().to("cpu").contiguous()) for name, tensor in named_tensors]
    manifest, size = lay_out(tensors)
    buffer = np.zeros(size, dtype=np.uint8)
    copy_entries(_let_go(tensors), manifest, torch.from_numpy(buffer))
    buffer.flags.writeable = False
    return WeightBlob(version=version, manifest=manifest, buffer=buffer, probe=probe, adapter=adapter)


def _let_go(tensors: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in order, none of them kept: else the model would be in memory twice by the end of a copy."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()


def lay_out(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[tuple[TensorEntry, ...], int]:
    """(where each tensor goes in a packed buffer, the buffer's size in bytes). Raises WeightSyncError on a repeated
    name."""
    manifest, size, names = [], 0, set()
    for name, tensor in tensors:
        if name in names:
            raise WeightSyncError("a tensor name occurs twice", got=name, do="yield each parameter once")
        names.add(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        manifest.append(TensorEntry(name=name, dtype=dtype, shape=tuple(tensor.shape), offset_bytes=size))
        size += -(-tensor.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return tuple(manifest), size


def copy_entries(
    tensors: Iterable[tuple[str, torch.Tensor]], manifest: Iterable[TensorEntry], storage: torch.Tensor
) -> None:
    """Copy tensors to their places in `storage` (uint8), on whatever device each lies."""
    import torch

    for entry, (_, tensor) in zip(manifest, tensors, strict=True):
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        storage[entry.offset_bytes : entry.offset_bytes + len(raw)].copy_(raw)


def unpack(blob: WeightBlob) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each entry, as views of the buffer: no copy, valid as long as the buffer, never written to.
    For a blob with its bytes in it; others: cluster.weight_sharing.open_shared.

    Raises WeightSyncError when the manifest does not fit the buffer.
    """
    return unpack_entries(blob.manifest, blob.buffer)


def unpack_entries(manifest: Iterable[TensorEntry], buffer: Bytes) -> Iterator[tuple[str, torch.Tensor]]:
    """`unpack` for a manifest and a buffer that travelled apart."""
    import torch

    return unpack_storage(manifest, torch.from_numpy(writable_view(buffer)))


def unpack_storage(manifest: Iterable[TensorEntry], storage: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """`unpack_entries` for a buffer (uint8) on any device."""
    for entry in manifest:
        dtype = _torch_dtype(entry)
        size_bytes = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
        end_bytes = entry.offset_bytes + size_bytes
        if not 0 <= entry.offset_bytes <= end_bytes <= len(storage):
            raise WeightSyncError(
                f"tensor {entry.name} lies outside the weight buffer",
                got=f"bytes {entry.offset_bytes} to {end_bytes} of {len(storage)}",
                do="publish the version again",
            )
        yield entry.name, storage[entry.offset_bytes : end_bytes].view(dtype).view(entry.shape)


def _torch_dtype(entry: TensorEntry) -> torch.dtype:
    import torch

    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(f"tensor {entry.name} has an unknown dtype", got=entry.dtype, do="run one torch version")
    return dtype


def writable_view(buffer: Bytes) -> Bytes:
    """The same memory without its read-only flag, which some libraries warn of. The caller vouches that none writes."""
    return np.asarray(_ReadOnlyHolder(buffer))


class _ReadOnlyHolder:
    """Presents an array's memory as writable to NumPy and keeps the array alive meanwhile."""

    def __init__(self, array: Bytes) -> None:
        self._array = np.ascontiguousarray(array)
        self.__array_interface__ = {
            "shape": self._array.shape,
            "typestr": "|u1",
            "data": (self._array.ctypes.data, False),
            "version": 3,
        }


def check_newer(version: int, *, than_version: int | None) -> None:
    """Raise WeightSyncError unless `version` is above the last one published."""
    if than_version is not None and version <= than_version:
        raise WeightSyncError(
            "policy versions must increase",
            got=f"version {version} after {than_version}",
            do="publish under a version above every earlier one, also after a rollback or a resume",
        )


class MemoryWeightChannel:
    """A channel within one process. `publish` may be called from any thread, the others from any event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: WeightBlob | None = None
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def publish(self, blob: WeightBlob) -> None:
        with self._lock:
            check_newer(blob.version, than_version=None if self._newest is None else self._newest.version)
            self._newest = blob
            for loop, event in self._waiters:
                loop.call_soon_threadsafe(event.set)

    async def latest(self) -> WeightBlob | None:
        return self._newest

    async def newest_version(self) -> int | None:
        newest = self._newest
        return None if newest is None else newest.version

    async def wait_newer(self, than_version: int, *, timeout_s: float) -> WeightBlob | None:
        event = asyncio.Event()
        waiter = (asyncio.get_running_loop(), event)
        with self._lock:
            self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                while (blob := self._newest) is None or blob.version <= than_version:
                    await event.wait()
                    event.clear()
                return blob
        except TimeoutError:
            return None
        finally:
            with self._lock:
                self._waiters.discard(waiter)

    def feed(self, name: str, joiner: GroupJoiner) -> WeightFeed:
        del name, joiner
        return StoreFeed(self)

    def close_publisher(self) -> None:
        """Nothing was started."""
