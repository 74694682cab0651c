"""Streams within one process: for tests and for trying a loop without a server. Same contract as the Redis ones.

Consumes: payloads from `publish` and the hops. Produces: leased deliveries. Waits for: only `claim`, on the stream's
condition. Who unblocks it: `publish`, a hop, or the first lease to run out (on the clock given). Always holds:
entries leave only by a hop or `settle`; one event loop uses the object, so no call interleaves with another except
where `claim` waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.stores import Clock
from cluster.streams import Delivery, Depth, Hop, StreamName


@dataclass
class _Lease:
    consumer: str
    expires_s: float
    deliveries: int


@dataclass
class _Entry:
    payload: bytes
    published_s: float
    lease: _Lease | None = None


@dataclass
class _Stream:
    entries: dict[str, _Entry] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Data:
    streams: dict[StreamName, _Stream]
    next_id: int = 1


class MemoryStreams:
    """`clock` in seconds drives leases and ages; waiting in `claim` is on the event loop's time."""

    def __init__(self, *, lease_s: float = 30.0, clock: Clock = time.monotonic, _data: _Data | None = None) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._data = _data or _Data({name: _Stream() for name in StreamName})
        self._to_recover: dict[tuple[StreamName, str], list[str]] = {}
        """What each consumer still has to get back since this client's first claim for it."""

    def reconnected(self) -> MemoryStreams:
        """Another client of the same data, as a restarted process would hold: its consumers get their own
        unacknowledged entries first."""
        return MemoryStreams(lease_s=self._lease_s, clock=self._clock, _data=self._data)

    async def publish(self, stream: StreamName, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            self._append(stream, payload)

    async def claim(self, stream: StreamName, *, consumer: str, max_count: int, wait_s: float) -> list[Delivery]:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + wait_s
        data = self._data.streams[stream]
        while True:
            data.changed.clear()
            if taken := self._take(stream, consumer, max_count):
                return taken
            remaining_s = deadline_s - loop.time()
            if remaining_s <= 0 or max_count < 1:
                return []
            expiries = [entry.lease.expires_s for entry in data.entries.values() if entry.lease]
            until_expiry_s = min(expiries) - self._clock() if expiries else remaining_s
            try:
                # The floor keeps a clock that stands still at an expiry from spinning.
                await asyncio.wait_for(data.changed.wait(), max(1e-3, min(remaining_s, until_expiry_s)))
            except TimeoutError:
                continue

    async def renew(self, stream: StreamName, *, consumer: str, entry_ids: Sequence[str]) -> None:
        entries = self._data.streams[stream].entries
        for entry_id in entry_ids:
            entry = entries.get(entry_id)
            if entry is not None and entry.lease is not None and entry.lease.consumer == consumer:
                entry.lease.expires_s = self._clock() + self._lease_s

    async def advance(self, source: StreamName, entry_id: str, *, target: StreamName, payload: bytes) -> bool:
        if not self._acknowledge(source, entry_id):
            return False
        self._append(target, payload)
        return True

    async def advance_many(self, source: StreamName, hops: Sequence[Hop]) -> list[bool]:
        return [await self.advance(source, hop.entry_id, target=hop.target, payload=hop.payload) for hop in hops]

    async def settle(self, stream: StreamName, entry_ids: Sequence[str]) -> int:
        return sum(self._acknowledge(stream, entry_id) for entry_id in entry_ids)

    async def depth(self, stream: StreamName) -> Depth:
        entries = self._data.streams[stream].entries.values()
        in_flight = sum(entry.lease is not None for entry in entries)
        oldest_s = min((entry.published_s for entry in entries), default=self._clock())
        return Depth(len(entries) - in_flight, in_flight, max(0.0, self._clock() - oldest_s))

    async def close(self) -> None:
        """Nothing to close; the data stays with the other clients."""

    def _append(self, stream: StreamName, payload: bytes) -> None:
        data = self._data.streams[stream]
        data.entries[f"{self._data.next_id}-0"] = _Entry(bytes(payload), self._clock())
        self._data.next_id += 1
        data.changed.set()

    def _acknowledge(self, stream: StreamName, entry_id: str) -> bool:
        """As XACK and XDEL: only an entry that was handed out can be acknowledged."""
        entries = self._data.streams[stream].entries
        entry = entries.get(entry_id)
        if entry is None or entry.lease is None:
            return False
        del entries[entry_id]
        return True

    def _take(self, stream: StreamName, consumer: str, max_count: int) -> list[Delivery]:
        now_s = self._clock()
        entries = self._data.streams[stream].entries
        held = [entry_id for entry_id, entry in entries.items() if entry.lease and entry.lease.consumer == consumer]
        own = [entry_id for entry_id in self._to_recover.setdefault((stream, consumer), held) if entry_id in held]
        expired = [entry_id for entry_id, entry in entries.items() if entry.lease and entry.lease.expires_s <= now_s]
        fresh = [entry_id for entry_id, entry in entries.items() if entry.lease is None]
        taken = list(dict.fromkeys(own + expired + fresh))[: max(0, max_count)]
        self._to_recover[stream, consumer] = [entry_id for entry_id in own if entry_id not in taken]
        return [self._lease(entries[entry_id], entry_id, consumer) for entry_id in taken]

    def _lease(self, entry: _Entry, entry_id: str, consumer: str) -> Delivery:
        before = entry.lease.deliveries if entry.lease else 0
        entry.lease = _Lease(consumer, self._clock() + self._lease_s, before + 1)
        return Delivery(entry_id, entry.payload, before + 1)
