"""The board: knows the newest version and, where weights are broadcast, who is in the group. One event loop runs it.

Consumes: versions and plans from the publisher, polls and reports from members. Produces: notices, plans, decisions.
Waits: in the methods that take a `timeout_s`, for so long at most. Who unblocks a wait: any later call that changes
what it waits for, or the time-out.
Always holds: versions increase; only the newest payload is kept; an offer is decided once, for all members alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from cluster.errors import WeightSyncError
from cluster.weight_group import Backend, GroupBook, GroupJoiner, GroupPlan, GroupUpdate, Tellings, WeightFeed
from cluster.weights import AdapterInfo, Bytes, Probe, SharedBytes, StoreFeed, TensorEntry, WeightBlob, check_newer

_T = TypeVar("_T")


@dataclass(frozen=True)
class Notice:
    """What the board hands out: all of a blob but its bytes. `payload` holds one reference into the store, wrapped in a
    tuple so that Ray passes the reference on and does not fetch it."""

    version: int
    manifest: tuple[TensorEntry, ...]
    probe: Probe | None
    payload: tuple[Any]
    size_bytes: int
    adapter: AdapterInfo | None = None
    epoch: int | None = None
    """Of the group that this version is also sent through."""
    shared: SharedBytes | None = None
    """Where the bytes are, when they stay with the publisher; the payload is empty then."""

    def blob(self, buffer: Bytes) -> WeightBlob:
        """With the bytes that `payload` stands for."""
        return WeightBlob(self.version, self.manifest, buffer, self.probe, self.adapter, self.shared)

    def update(self, epoch: int) -> GroupUpdate:
        """Without the bytes: they come through the group of `epoch`."""
        return GroupUpdate(epoch, self.version, self.manifest, self.size_bytes, self.probe)


class BoardAccess(Protocol):
    """A way to a board and to the payloads that it hands out, usable from other processes."""

    async def ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a board's method. Raises DeadlineError when no answer came in time, WeightSyncError when the board is
        gone."""
        ...

    def ask_now(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """`ask`, for threads without an event loop."""
        ...

    async def fetch(self, notice: Notice) -> WeightBlob | None:
        """The notice's blob from the store, or None when it was lost with the board."""
        ...


class OverBoard:
    """The part of a WeightChannel that is the same over any board. Subclasses are a BoardAccess."""

    fetch_timeout_s: float
    """For a payload's way to or from the board."""

    async def ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        raise NotImplementedError

    def ask_now(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        raise NotImplementedError

    async def fetch(self, notice: Notice) -> WeightBlob | None:
        raise NotImplementedError

    def publish(self, blob: WeightBlob) -> None:
        self.publish_to(blob, epoch=None)

    def publish_to(self, blob: WeightBlob, *, epoch: int | None) -> bool:
        """`publish`, and whether the group of `epoch` is offered the version."""
        if blob.version < 0:
            raise WeightSyncError("a policy version cannot be negative", got=str(blob.version))
        arguments = (blob.version, blob.manifest, blob.probe, blob.buffer, blob.adapter, epoch, blob.shared)
        obstacle, offered = self.ask_now("publish", *arguments, timeout_s=self.fetch_timeout_s)
        check_newer(blob.version, than_version=obstacle)
        return bool(offered)

    async def latest(self) -> WeightBlob | None:
        notice = await self.ask("latest", timeout_s=0.0)
        return None if notice is None else await self.fetch(notice)

    async def newest_version(self) -> int | None:
        version: int | None = await self.ask("newest_version", timeout_s=0.0)
        return version

    async def wait_newer(self, than_version: int, *, timeout_s: float) -> WeightBlob | None:
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            notice = await self.ask("wait_newer", than_version, left_s, timeout_s=left_s)
            if notice is None:
                return None
            blob = await self.fetch(notice)
            if blob is not None:
                return blob
            than_version = notice.version

    def feed(self, name: str, joiner: GroupJoiner) -> WeightFeed:
        del name, joiner
        return StoreFeed(self)

    def close_publisher(self) -> None:
        """Nothing was started."""


class WeightBoard:
    """A plain class: an actor over Ray (cluster/weights_ray.py), or an object of this process."""

    def __init__(self) -> None:
        self._newest: Notice | None = None
        self._lost_version: int | None = None
        """Of shared bytes whose publisher is gone."""
        self._book = GroupBook()
        self._changed = asyncio.Event()

    def keep(self, buffer: Bytes) -> Any:
        """Put the payload in the store; returns what notices refer to it by."""
        return buffer

    async def publish(
        self,
        version: int,
        manifest: tuple[TensorEntry, ...],
        probe: Probe | None,
        buffer: Bytes,
        adapter: AdapterInfo | None = None,
        epoch: int | None = None,
        shared: SharedBytes | None = None,
    ) -> tuple[int | None, bool]:
        """(None when taken, otherwise the version that stands in its way; whether the group of `epoch` is offered it).
        `buffer` arrives as a view of the caller's object; the copy kept here outlives the caller."""
        if self._newest is not None and version <= self._newest.version:
            return self._newest.version, False
        # Not in a thread: no later `publish` may overtake this one. Long polls can wait out a memory copy.
        payload = (self.keep(buffer),)
        offered = self._book.begin_offer(epoch, version)
        self._newest = Notice(
            version=version,
            manifest=manifest,
            probe=probe,
            payload=payload,
            size_bytes=len(buffer),
            adapter=adapter,
            epoch=epoch if offered else None,
            shared=shared,
        )
        self._notify()
        return None, offered

    async def latest(self) -> Notice | None:
        return self._newest

    async def newest_version(self) -> int | None:
        return None if self._newest is None else self._newest.version

    async def lose_shared(self) -> None:
        """The publisher is gone, and what it shared with it: consumers wait for the next version."""
        if self._newest is not None and self._newest.shared is not None:
            self._lost_version = self._newest.version

    async def wait_newer(self, than_version: int, timeout_s: float) -> Notice | None:
        return await self._until(lambda: self._newer(than_version), timeout_s=timeout_s)

    # ---------------------------------------------------------------- members

    async def next_for(
        self, member: str, ranks: int, than_version: int, known_epoch: int, timeout_s: float
    ) -> Notice | GroupPlan | None:
        """The next thing for a member to do: take a version, or a place in a group. Makes it a member."""
        if self._book.register(member, ranks=ranks):
            self._notify()  # not at every poll: each would wake all the others
        return await self._until(
            lambda: self._newer(than_version) or self._book.plan_for(member, known_epoch=known_epoch),
            timeout_s=timeout_s,
        )

    async def joined(self, member: str, epoch: int, error: str) -> None:
        self._book.joined(member, epoch=epoch, error=error)
        self._notify()

    async def enter(self, member: str, epoch: int, version: int, timeout_s: float) -> bool:
        """Be ready for a version, and wait for the others. False: read it from the store."""
        if self._book.enter(member, epoch=epoch, version=version):
            self._notify()
        go = await self._until(lambda: _boxed(self._book.decision(epoch, version)), timeout_s=timeout_s)
        if go is None:
            self._book.call_off()
            self._notify()
        return go == (True,)

    async def report(self, member: str, epoch: int, version: int, error: str) -> None:
        self._book.report(member, epoch=epoch, version=version, error=error)
        self._notify()

    async def leave(self, member: str) -> None:
        self._book.remove(member)
        self._notify()

    # ---------------------------------------------------------------- the publisher

    async def members(self) -> Mapping[str, int]:
        return dict(self._book.members)

    async def propose(
        self, roster: Mapping[str, int], backend: Backend, address: str, port: int, bucket_bytes: int, timeout_s: float
    ) -> GroupPlan:
        plan = self._book.propose(
            roster, backend=backend, address=address, port=port, bucket_bytes=bucket_bytes, timeout_s=timeout_s
        )
        self._notify()
        return plan

    async def plan_epoch(self) -> int | None:
        """Of the plan in force."""
        return None if self._book.plan is None else self._book.plan.epoch

    async def wait_joined(self, epoch: int, timeout_s: float) -> Tellings | None:
        """Who joined, as soon as all have spoken or one has failed. None: the plan is no longer in force."""
        return await self._tellings(lambda: self._book.joining(epoch), timeout_s=timeout_s)

    async def wait_go(self, epoch: int, version: int, timeout_s: float) -> tuple[bool, tuple[str, ...]]:
        """(whether to broadcast, who was not ready)."""
        go = await self._until(lambda: _boxed(self._book.decision(epoch, version)), timeout_s=timeout_s)
        late = self._book.call_off() if go is None else ()
        self._notify()
        return go == (True,), late

    async def wait_reports(self, epoch: int, version: int, timeout_s: float) -> Tellings | None:
        """How it went, as soon as all members have spoken. None: the plan is no longer in force."""
        return await self._tellings(lambda: self._book.taking(epoch, version), timeout_s=timeout_s, patient=True)

    async def end_plan(self, epoch: int, gone: tuple[str, ...]) -> None:
        """Use this group no more. Members in `gone` are out until they ask again."""
        self._book.end_plan(epoch)
        for member in gone:
            self._book.remove(member)
        self._notify()

    # ---------------------------------------------------------------- waiting

    def _newer(self, than_version: int) -> Notice | None:
        newest = self._newest
        if newest is None or newest.version <= than_version or newest.version == self._lost_version:
            return None
        return newest

    async def _tellings(
        self, look: Callable[[], Tellings | None], *, timeout_s: float, patient: bool = False
    ) -> Tellings | None:
        def settled() -> tuple[Tellings | None] | None:
            said = look()
            return (said,) if said is None or not said.missing or (said.failed and not patient) else None

        found = await self._until(settled, timeout_s=timeout_s)
        return look() if found is None else found[0]

    async def _until(self, condition: Callable[[], _T | None], *, timeout_s: float) -> _T | None:
        try:
            async with asyncio.timeout(timeout_s):
                while (found := condition()) is None:
                    await self._changed.wait()
        except TimeoutError:
            return None
        return found

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _boxed(decision: bool | None) -> tuple[bool] | None:
    """None stays None, so that `_until` waits on; a decision counts, also a negative one."""
    return None if decision is None else (decision,)
