"""Weights for a reader on the same device: they stay in one buffer of the publisher's, which the reader opens in place.

On a GPU the buffer is device memory, opened through CUDA's inter-process handles; in host memory it is an anonymous
file, opened by way of the publisher's descriptor. Either travels as a line of text: plain numbers and base64.
Consumes: a version's tensors (`SharedWeights.share`). Produces: a blob without bytes; from it, for a reader
(`open_shared`), the buffer. Waits: never.
Lifetime: the buffer lives as long as its publisher, is written again for each version, and is opened for one update.
Always holds: a reader gets the version that it came for or WeightSyncError, since each version seals the buffer; that
none is written while another process reads is the turns' doing (cluster/turns.py).
"""

from __future__ import annotations

import base64
import json
import mmap
import os
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from cluster.errors import WeightSyncError
from cluster.weights import AdapterInfo, Probe, SharedBytes, WeightBlob, copy_entries, lay_out, writable_view

_SCHEME: Final = "shared"
_SEAL_BYTES: Final = 8
_OPEN_SEAL: Final = -1
"""Of a buffer that is being written."""
_CUDA_FIELDS: Final = (
    "size", "stride", "offset", "device", "handle", "storage_bytes", "storage_offset_bytes",
    "counter_handle", "counter_offset", "event_handle", "event_sync",
)  # fmt: skip


class SharedWeights:
    """The publisher's end. `share` for each version, with nobody reading; `close` at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storage: torch.Tensor | None = None
        self._where = ""
        self._descriptor: int | None = None

    def share(
        self,
        version: int,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        probe: Probe | None = None,
        adapter: AdapterInfo | None = None,
    ) -> WeightBlob:
        """Put a version into the buffer, in place of the one before. Raises WeightSyncError on a repeated name or a
        negative version."""
        if version < 0:
            raise WeightSyncError("a policy version cannot be negative", got=str(version), do="count versions from 0")
        tensors = list(named_tensors)
        manifest, size_bytes = lay_out(tensors)
        storage = self._room(size_bytes + _SEAL_BYTES)
        seal = storage[size_bytes:].view(torch.int64)
        seal.fill_(_OPEN_SEAL)
        copy_entries(tensors, manifest, storage)
        seal.fill_(version)
        if storage.is_cuda:
            torch.cuda.synchronize(storage.device)  # the reader is another process: no stream orders it after this
        shared = SharedBytes(f"{_SCHEME}:{version}:{self._where}", size_bytes)
        return WeightBlob(version, manifest, np.empty(0, dtype=np.uint8), probe, adapter, shared)

    def close(self) -> None:
        """Nothing can be opened from here on; what a reader has open stays readable."""
        self._storage = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _room(self, size_bytes: int) -> torch.Tensor:
        """The buffer; a new one where there is none of this size."""
        if self._storage is None or len(self._storage) != size_bytes:
            self.close()
            if self._device.type == "cuda":
                self._storage = torch.zeros(size_bytes, dtype=torch.uint8, device=self._device)
                self._where = _cuda_location(self._storage)
            else:
                self._descriptor = os.memfd_create("keel-weights", os.MFD_CLOEXEC)
                os.ftruncate(self._descriptor, size_bytes)
                view = mmap.mmap(self._descriptor, size_bytes)
                self._storage = torch.frombuffer(view, dtype=torch.uint8)
                self._where = f"file:/proc/{os.getpid()}/fd/{self._descriptor}"
        return self._storage


def is_shared(location: str) -> bool:
    """Whether `open_shared` is for this location."""
    return location.startswith(f"{_SCHEME}:")


def open_shared(shared: SharedBytes, *, device: torch.device) -> torch.Tensor:
    """The packed buffer, uint8 [size_bytes], never written to; valid while the publisher lives and shares nothing new.
    `device`: the reader's. Raises WeightSyncError when the version is not there any more, or cannot be opened here."""
    _, version, where = shared.location.split(":", 2)
    try:
        storage = _open(where, shared.size_bytes + _SEAL_BYTES, device)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightSyncError(
            f"the shared weights of version {version} cannot be opened",
            got=f"{type(error).__name__}: {error}",
            do="run learner and engine on one node and one GPU, as one user",
        ) from error
    sealed = int(storage[shared.size_bytes :].view(torch.int64).item())
    if sealed != int(version):
        raise WeightSyncError(
            f"the shared weights of version {version} are gone", got=f"version {sealed} in their place"
        )
    return storage[: shared.size_bytes]


def _open(where: str, size_bytes: int, device: torch.device) -> torch.Tensor:
    kind, _, place = where.partition(":")
    if kind == "cuda":
        return _open_cuda(place, device)
    with open(place, "rb") as file:
        view = mmap.mmap(file.fileno(), size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    return torch.from_numpy(writable_view(np.frombuffer(view, dtype=np.uint8)))


def _cuda_location(storage: torch.Tensor) -> str:
    """What another process needs to open this tensor, as torch's own queues would send it."""
    _, (_, size, stride, offset, _, _, device, handle, storage_bytes, storage_offset, _, *counters) = reduce_tensor(  # type: ignore[no-untyped-call]
        storage
    )
    values = (list(size), list(stride), offset, device, handle, storage_bytes, storage_offset, *counters)
    fields = {name: _to_json(value) for name, value in zip(_CUDA_FIELDS, values, strict=True)}
    fields["gpu"] = str(torch.cuda.get_device_properties(storage.device).uuid)
    return "cuda:" + json.dumps(fields)


def _open_cuda(place: str, device: torch.device) -> torch.Tensor:
    fields = json.loads(place)
    own = str(torch.cuda.get_device_properties(device).uuid)
    if fields["gpu"] != own:
        raise ValueError(f"they are on GPU {fields['gpu']}, the reader is on {own}")
    get = {name: _from_json(fields[name]) for name in _CUDA_FIELDS}
    opened: torch.Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        torch.Tensor,
        torch.Size(get["size"]),
        tuple(get["stride"]),
        get["offset"],
        torch.storage.TypedStorage,
        torch.uint8,
        device.index or 0,
        get["handle"],
        get["storage_bytes"],
        get["storage_offset_bytes"],
        False,
        get["counter_handle"],
        get["counter_offset"],
        get["event_handle"],
        get["event_sync"],
    )
    return opened


def _to_json(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value
