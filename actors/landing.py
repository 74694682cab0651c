"""Where a weight buffer lies while vLLM's workers read it: this process's memory, or a memory file they can open."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from cluster.errors import WeightSyncError
from cluster.weights import Bytes

_BUFFERS: Final[dict[str, Bytes]] = {}


@contextlib.contextmanager
def land_in_process(buffer: Bytes) -> Iterator[str]:
    """For workers in threads of this process: no copy. Yields the location to send them."""
    key = str(id(buffer))
    _BUFFERS[key] = buffer
    try:
        yield f"memory:{key}"
    finally:
        del _BUFFERS[key]


@contextlib.contextmanager
def land_in_memory_file(buffer: Bytes) -> Iterator[str]:
    """For workers in other processes of this node and user: one copy into anonymous memory, which they map by way of
    this process's descriptor. No name in a file system: no orphan after a kill, and no /dev/shm size limit."""
    descriptor = os.memfd_create("keel-weights", os.MFD_CLOEXEC)
    try:
        view = buffer.data
        while len(view):  # one write moves at most 2 GiB
            view = view[os.write(descriptor, view) :]
        yield f"file:/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def in_process_buffer(key: str) -> Bytes:
    """The buffer that `land_in_process` put under `key`. Raises WeightSyncError once it is gone."""
    try:
        return _BUFFERS[key]
    except KeyError as error:
        raise WeightSyncError(
            "the weight buffer is not in this process", got=key, do="report a bug: wrong landing for this engine"
        ) from error
