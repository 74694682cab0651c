"""Weights over Ray: the payload in Ray's object store, and a small actor, the board, that knows which is newest.

Consumes: blobs from the learner's process. Produces: read-only, zero-copy views of the newest payload on every node.
Waits for: the board's answer and the payload's arrival, each with a deadline. Who unblocks a long poll: the board, at
the next `publish` or at the poll's timeout.
Always holds: the board keeps a reference to the newest payload only; older ones are freed when their last reader lets
go. The board's process owns the payload, so the learner's death loses no weights; should the board's node go down, the
versions it held count as never published, and consumers wait for the next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from cluster.errors import DeadlineError, WeightSyncError
from cluster.weights import Bytes, Probe, TensorEntry, WeightBlob, check_newer

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Notice:
    """What the board hands out: all of a blob but its bytes. `payload` holds one reference into the object store,
    wrapped in a tuple so that Ray passes the reference on and does not fetch it."""

    version: int
    manifest: tuple[TensorEntry, ...]
    probe: Probe | None
    payload: tuple[Any]


class WeightBoard:
    """The Ray actor behind the channel, as a plain class: every method runs on its one event loop."""

    def __init__(self) -> None:
        self._newest: Notice | None = None
        self._changed = asyncio.Event()

    async def publish(
        self, version: int, manifest: tuple[TensorEntry, ...], probe: Probe | None, buffer: Bytes
    ) -> int | None:
        """None when taken; otherwise the version that stands in its way. `buffer` arrives as a view of the caller's
        object; the copy put here belongs to this process and outlives the caller."""
        import ray

        if self._newest is not None and version <= self._newest.version:
            return self._newest.version
        # Not in a thread: no later `publish` may overtake this one. Long polls can wait out a memory copy.
        self._newest = Notice(version=version, manifest=manifest, probe=probe, payload=(ray.put(buffer),))
        self._changed.set()
        self._changed = asyncio.Event()
        return None

    async def latest(self) -> Notice | None:
        return self._newest

    async def wait_newer(self, than_version: int, timeout_s: float) -> Notice | None:
        try:
            async with asyncio.timeout(timeout_s):
                while self._newest is None or self._newest.version <= than_version:
                    await self._changed.wait()
        except TimeoutError:
            return None
        return self._newest


@dataclass(frozen=True)
class RayWeightChannel:
    """A WeightChannel for processes of one Ray cluster. Picklable: pass it to other actors as it is.

    `call_timeout_s` bounds a board's answer (on top of a long poll's own timeout), `fetch_timeout_s` a payload's way
    from node to node. Raises DeadlineError when they pass, WeightSyncError when the board is gone.
    """

    board: Any
    call_timeout_s: float = 30.0
    fetch_timeout_s: float = 300.0

    @classmethod
    def create(cls, *, name: str | None = None, namespace: str | None = None) -> RayWeightChannel:
        """Start a board and return its channel. The board lives as long as a handle to it, or until `close`."""
        import ray

        remote = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(WeightBoard)
        options = {} if name is None else {"name": name, "namespace": namespace}
        return cls(board=remote.options(**options).remote())

    @classmethod
    def connect(cls, name: str, *, namespace: str | None = None) -> RayWeightChannel:
        """The channel whose board was created under `name`. Raises WeightSyncError when there is none."""
        import ray

        try:
            return cls(board=ray.get_actor(name, namespace=namespace))
        except ValueError as error:
            raise WeightSyncError(
                f"no weight board named {name}", got=str(error), do="start the run before its actors"
            ) from error

    def publish(self, blob: WeightBlob) -> None:
        import ray

        if blob.version < 0:
            raise WeightSyncError("a policy version cannot be negative", got=str(blob.version))
        answer = self.board.publish.remote(blob.version, blob.manifest, blob.probe, blob.buffer)
        try:
            obstacle = ray.get(answer, timeout=self.fetch_timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise _late(f"publishing weights {blob.version}", self.fetch_timeout_s) from error
        except ray.exceptions.RayActorError as error:
            raise _board_gone(error) from error
        check_newer(blob.version, than_version=obstacle)

    async def latest(self) -> WeightBlob | None:
        notice = await self._ask(self.board.latest.remote(), timeout_s=self.call_timeout_s)
        return None if notice is None else await self._fetch(notice)

    async def wait_newer(self, than_version: int, *, timeout_s: float) -> WeightBlob | None:
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            poll = self.board.wait_newer.remote(than_version, left_s)
            notice = await self._ask(poll, timeout_s=left_s + self.call_timeout_s)
            if notice is None:
                return None
            blob = await self._fetch(notice)
            if blob is not None:
                return blob
            than_version = notice.version

    def close(self) -> None:
        """Stop the board. For whoever created it; later calls on any copy of the channel raise WeightSyncError."""
        import ray

        ray.kill(self.board, no_restart=True)

    async def _ask(self, answer: Awaitable[Notice | None], *, timeout_s: float) -> Notice | None:
        import ray

        try:
            return await _within(answer, timeout_s=timeout_s, what="the weight board's answer")
        except ray.exceptions.RayActorError as error:
            raise _board_gone(error) from error

    async def _fetch(self, notice: Notice) -> WeightBlob | None:
        """The notice's blob, or None when the board died before the payload came here."""
        import ray

        try:
            buffer = await _within(
                notice.payload[0], timeout_s=self.fetch_timeout_s, what=f"fetching weights {notice.version}"
            )
        except ray.exceptions.ObjectLostError as error:
            _log.warning("weights %d were lost with the board, waiting for newer ones: %s", notice.version, error)
            return None
        if not isinstance(buffer, np.ndarray) or buffer.dtype != np.uint8:
            raise WeightSyncError(f"weights {notice.version} are no byte array", got=str(type(buffer)))
        return WeightBlob(version=notice.version, manifest=notice.manifest, buffer=buffer, probe=notice.probe)


async def _within(answer: Awaitable[_T], *, timeout_s: float, what: str) -> _T:
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError as error:
        raise _late(what, timeout_s) from error


def _late(what: str, timeout_s: float) -> DeadlineError:
    return DeadlineError(f"{what} took too long", got=f"nothing in {timeout_s:g} s", do="look at Ray's node and board")


def _board_gone(error: Exception) -> WeightSyncError:
    return WeightSyncError("the weight board is gone", got=type(error).__name__, do="restart the run; it resumes")
