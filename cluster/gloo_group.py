"""A group of processes that one of them sends bytes to: torch's gloo, on its own, without torch's global group.

Consumes: an address and a place in the group; then bytes, bucket by bucket. Produces: the same bytes in every follower.
Waits for: the other members while the group forms, and each bucket; both for the group's time-out at most. Who unblocks
a wait: the other side, its end (a closed connection fails at once), or the time-out.
Always holds: rank 0 leads, and listens on the given address alone; a failed group is never used again.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.weight_group import GroupBrokenError, GroupPlan
from cluster.weights import Bytes

if TYPE_CHECKING:
    import torch


class GlooLeader:
    """Rank 0 of a group. `port` is what the others need to know before `form`."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._group: Any = None
        try:
            listener = socket.create_server((address, 0))
            self.port: int = listener.getsockname()[1]
            self._store = _distributed().TCPStore(
                address,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_s),
                master_listen_fd=listener.detach(),
            )
        except (OSError, RuntimeError) as error:
            raise GroupBrokenError(
                "no weight group can be led from here",
                got=f"{address}: {_line(error)}",
                do="look at the node's network",
            ) from error

    def form(self, world_size: int) -> None:
        """Return when all members are connected. Raises GroupBrokenError after the time-out."""
        self._group = _connect(
            self._store, rank=0, world_size=world_size, here=self._address, timeout_s=self._timeout_s
        )

    def send(self, buffer: Bytes, *, bucket_bytes: int) -> Iterator[int]:
        """Send everything; yields the size of each bucket after it has gone. Raises GroupBrokenError."""
        yield from _broadcast(self._group, buffer, bucket_bytes=bucket_bytes, timeout_s=self._timeout_s)

    def close(self) -> None:
        _close(self._group)
        self._group = None


class GlooFollower:
    """Any other rank. Made by `join`, which returns when the whole group is connected."""

    def __init__(self, group: Any, *, bucket_bytes: int, timeout_s: float) -> None:
        self._group, self._bucket_bytes, self._timeout_s = group, bucket_bytes, timeout_s

    @classmethod
    def join(cls, plan: GroupPlan, *, rank: int) -> GlooFollower:
        """Blocks for plan.timeout_s at most, then raises GroupBrokenError."""
        try:
            store = _distributed().TCPStore(
                plan.address, plan.port, is_master=False, timeout=timedelta(seconds=plan.timeout_s)
            )
        except (RuntimeError, ValueError) as error:
            raise GroupBrokenError(f"the leader of group {plan.epoch} does not answer", got=_line(error)) from error
        here = address_towards(plan.address)
        group = _connect(store, rank=rank, world_size=plan.world_size, here=here, timeout_s=plan.timeout_s)
        return cls(group, bucket_bytes=plan.bucket_bytes, timeout_s=plan.timeout_s)

    def receive(self, size_bytes: int) -> Bytes:
        """A new buffer with what the leader sent. Raises GroupBrokenError."""
        buffer = np.empty(size_bytes, dtype=np.uint8)
        for _ in _broadcast(self._group, buffer, bucket_bytes=self._bucket_bytes, timeout_s=self._timeout_s):
            pass
        return buffer

    def close(self) -> None:
        _close(self._group)
        self._group = None


def address_towards(address: str) -> str:
    """This node's own address on the way to `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # nothing is sent: the kernel only picks the route
        here: str = probe.getsockname()[0]
        return here


def _connect(store: Any, *, rank: int, world_size: int, here: str, timeout_s: float) -> Any:
    options = _distributed().ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [_distributed().ProcessGroupGloo.create_device(hostname=here)]
    try:
        return _distributed().ProcessGroupGloo(store, rank, world_size, options)
    except RuntimeError as error:
        raise GroupBrokenError(
            "the weight group did not form", got=_line(error), do="see whether the other engines are alive"
        ) from error


def _broadcast(group: Any, buffer: Bytes, *, bucket_bytes: int, timeout_s: float) -> Iterator[int]:
    for start in range(0, len(buffer), bucket_bytes):
        bucket = _as_tensor(buffer[start : start + bucket_bytes])
        try:
            group.broadcast(bucket, 0).wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise GroupBrokenError(
                "a bucket of weights did not arrive",
                got=f"byte {start} of {len(buffer)}: {_line(error)}",
                do="nothing: the version is read from the object store and the group is built anew",
            ) from error
        yield len(bucket)


def _as_tensor(part: Bytes) -> torch.Tensor:
    """A view. The leader's buffer is read-only, which torch warns of; a root only reads it."""
    import torch

    from cluster.weights import writable_view

    return torch.from_numpy(writable_view(part))


def _close(group: Any) -> None:
    if group is not None:
        with contextlib.suppress(RuntimeError):
            group.abort()  # also wakes a thread that waits in it


def _distributed() -> Any:
    """Untyped: torch exports its stores and group options at run time only."""
    import torch.distributed as dist

    return dist


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
