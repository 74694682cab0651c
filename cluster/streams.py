"""The seam between stages: streams of opaque payloads with leases and an exactly-once hop.

Consumes: payloads from `publish` and `advance`. Produces: leased `Delivery`s. Waits: only in `claim`, at most `wait_s`.
Who unblocks it: any `publish`/`advance` to that stream, or a lease that runs out.
Always holds: an entry is in one stream; `advance`, `advance_many`, `settle` take effect once for each entry, however
often they are called, and only while the caller's entry is still there to acknowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class StreamName(StrEnum):
    PROMPTS = "prompts"
    ROLLOUTS = "rollouts"
    SCORED = "scored"
    DEAD = "dead"


@dataclass(frozen=True)
class Delivery:
    """One leased entry. `deliveries` counts how often it was handed out, this time included."""

    entry_id: str
    payload: bytes
    deliveries: int


@dataclass(frozen=True)
class Depth:
    """backlog: not handed out. in_flight: handed out, not acknowledged. oldest_age_s: age of the oldest of both."""

    backlog: int
    in_flight: int
    oldest_age_s: float


@dataclass(frozen=True)
class Hop:
    """What takes the place of an entry, and in which stream."""

    entry_id: str
    target: StreamName
    payload: bytes


class Streams(Protocol):
    """All streams of one run. One consumer group a stream; a consumer is named by the caller.

    Every method raises StreamError when the server cannot be reached within its deadline or refuses.
    """

    async def publish(self, stream: StreamName, payloads: Sequence[bytes]) -> None:
        """Append payloads in order, atomically: all of them, once, or none (a re-sent call does not append twice)."""
        ...

    async def claim(self, stream: StreamName, *, consumer: str, max_count: int, wait_s: float) -> list[Delivery]:
        """Up to `max_count` entries, leased to `consumer`: first its own unacknowledged ones after a reconnect, then
        those whose lease ran out, then new ones; waits up to `wait_s` when there are none. May return []."""
        ...

    async def renew(self, stream: StreamName, *, consumer: str, entry_ids: Sequence[str]) -> None:
        """Start the leases of entries still held by `consumer` anew. Entries that were taken over stay taken."""
        ...

    async def advance(self, source: StreamName, entry_id: str, *, target: StreamName, payload: bytes) -> bool:
        """Acknowledge the source entry and, only if that was ours to do, append `payload` to `target`. Atomic.
        False: the entry was already settled by someone; nothing was appended."""
        ...

    async def advance_many(self, source: StreamName, hops: Sequence[Hop]) -> list[bool]:
        """`advance` for each of `hops`, in their order and in one round trip, with each one's answer. An entry that is
        not there any more keeps no other from moving. After a StreamError any of them may or may not have moved."""
        ...

    async def settle(self, stream: StreamName, entry_ids: Sequence[str]) -> int:
        """Acknowledge and delete entries with no successor. Returns how many were still there."""
        ...

    async def depth(self, stream: StreamName) -> Depth: ...

    async def close(self) -> None: ...
