"""Weights by broadcast: the store's channel, and beside it a group in which rank 0 sends each version to all engines.

Consumes: blobs from the learner's process. Produces: for members of the group, an update to receive from it; for
everybody else, and whenever a broadcast is not to be had, the newest blob from the store.
Waits for: see cluster/weight_publisher.py (the sending side) and `GroupFeed` (a member's).
Always holds: the newest version is in the store before it is offered to the group, so no failure of the group can lose
it; adapters, which are small, go by the store alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from cluster.errors import KeelError, WeightSyncError
from cluster.gloo_group import GlooLeader
from cluster.weight_board import BoardAccess, Notice
from cluster.weight_group import GroupJoiner, GroupPlan, GroupSettings, GroupUpdate, WeightFeed
from cluster.weight_publisher import BroadcastStats, GroupLeader, GroupPublisher
from cluster.weights import WeightBlob, WeightChannel

_log = logging.getLogger(__name__)


class BoardChannel(WeightChannel, BoardAccess, Protocol):
    """A channel over a board: cluster.weights_ray.RayWeightChannel, or its twin within a process."""

    def publish_to(self, blob: WeightBlob, *, epoch: int | None) -> bool: ...

    def close(self) -> None: ...


class CollectiveWeightChannel:
    """A WeightChannel. Picklable; the copy that first publishes leads the group, from a thread of that process."""

    def __init__(self, store: BoardChannel, *, settings: GroupSettings) -> None:
        self._store, self._settings = store, settings
        self._publisher: GroupPublisher | None = None
        self._starting = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_store"], settings=state["_settings"])  # type: ignore[misc]

    def publish(self, blob: WeightBlob) -> None:
        """Into the store, and on its way to the group. Does not wait for the members."""
        publisher = self._started()
        epoch = None if blob.adapter is not None else publisher.reserve()
        offered = False
        try:
            offered = self._store.publish_to(blob, epoch=epoch)
        finally:
            if offered:
                publisher.broadcast(blob)
            elif epoch is not None:
                publisher.release()

    async def latest(self) -> WeightBlob | None:
        return await self._store.latest()

    async def newest_version(self) -> int | None:
        return await self._store.newest_version()

    async def wait_newer(self, than_version: int, *, timeout_s: float) -> WeightBlob | None:
        return await self._store.wait_newer(than_version, timeout_s=timeout_s)

    def feed(self, name: str, joiner: GroupJoiner) -> WeightFeed:
        """Makes `name` a member from the first `next` to `close`."""
        return GroupFeed(self._store, name=name, joiner=joiner, settings=self._settings)

    @property
    def stats(self) -> BroadcastStats:
        """Of the publisher in this process."""
        return BroadcastStats() if self._publisher is None else self._publisher.stats

    def close_publisher(self) -> None:
        """End this process's part: the thread and its group, after a broadcast in progress, or its deadline. The store
        stays."""
        with self._starting:
            publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.close()

    def close(self) -> None:
        """Stop the board too. For whoever created the channel."""
        self.close_publisher()
        self._store.close()

    def _started(self) -> GroupPublisher:
        with self._starting:
            if self._publisher is None:
                address = self._settings.address or _node_address()
                lead = _lead_nccl if self._settings.backend == "nccl" else GlooBlobLeader
                self._publisher = GroupPublisher(self._store, settings=self._settings, address=address, lead=lead)
            return self._publisher


class GlooBlobLeader(GlooLeader):
    """Sends a blob's packed buffer as it is."""

    def __init__(self, address: str, timeout_s: float) -> None:
        super().__init__(address, timeout_s=timeout_s)

    def broadcast(self, blob: WeightBlob, *, bucket_bytes: int) -> Iterator[int]:
        yield from self.send(blob.buffer, bucket_bytes=bucket_bytes)


def _lead_nccl(address: str, timeout_s: float) -> GroupLeader:
    from cluster.weights_nccl import NcclLeader

    return NcclLeader(address, timeout_s=timeout_s)


def _node_address() -> str:
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


class GroupFeed:
    """A member's side. Polls the board; joins groups in the background, while versions still come from the store."""

    def __init__(self, board: BoardAccess, *, name: str, joiner: GroupJoiner, settings: GroupSettings) -> None:
        self._board, self._name, self._joiner, self._settings = board, name, joiner, settings
        self._known_epoch = 0
        self._in_group: int | None = None
        """Epoch of the group that this member is connected in."""
        self._joining: asyncio.Task[None] | None = None

    async def next(self, than_version: int, *, timeout_s: float) -> WeightBlob | GroupUpdate | None:
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            poll = (self._name, self._joiner.group_ranks, than_version, self._known_epoch, left_s)
            found: Notice | GroupPlan | None = await self._board.ask("next_for", *poll, timeout_s=left_s)
            if found is None:
                return None
            if isinstance(found, GroupPlan):
                await self._begin_joining(found)
                continue
            if found.epoch is not None and found.epoch == self._in_group and await self._enter(found):
                return found.update(found.epoch)
            blob = await self._board.fetch(found)
            if blob is not None:
                return blob
            than_version = found.version

    async def report(self, update: GroupUpdate, *, error: WeightSyncError | None) -> None:
        if error is not None:
            self._in_group = None  # the version, and those after it, come from the store until there is a new group
        arguments = (self._name, update.epoch, update.version, "" if error is None else str(error))
        await self._board.ask("report", *arguments, timeout_s=0.0)

    async def close(self) -> None:
        await self._stop_joining()
        try:
            await self._board.ask("leave", self._name, timeout_s=0.0)
        except WeightSyncError as error:
            _log.info("the weight board went first: %s", error)
        await self._joiner.leave_group()

    async def _enter(self, notice: Notice) -> bool:
        limit_s = self._settings.timeout_s
        entered = (self._name, notice.epoch, notice.version, limit_s)
        return bool(await self._board.ask("enter", *entered, timeout_s=limit_s))

    async def _begin_joining(self, plan: GroupPlan) -> None:
        await self._stop_joining()
        self._known_epoch, self._in_group = plan.epoch, None
        self._joining = asyncio.create_task(self._join(plan))

    async def _stop_joining(self) -> None:
        if self._joining is not None:
            self._joining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._joining
            self._joining = None

    async def _join(self, plan: GroupPlan) -> None:
        trouble = ""
        try:
            await self._joiner.join_group(plan, first_rank=plan.offsets[self._name])
            self._in_group = plan.epoch
        except KeelError as error:  # an engine's death too: its owner learns of it elsewhere
            _log.warning("weight group %d was not joined: %s", plan.epoch, error)
            trouble = str(error)
        try:
            await self._board.ask("joined", self._name, plan.epoch, trouble, timeout_s=0.0)
        except KeelError as error:
            _log.warning("the weight board does not know that group %d was joined: %s", plan.epoch, error)
