"""The small shared stores beside the streams: score cache, directory of metrics targets, run lock. Seams and in-memory
versions; the Redis versions are in cluster/run_redis.py.

Consumes and produces: plain values, no waiting on other tasks. Always holds: an entry past its time to live is never
returned. Every method of a networked version may raise StreamError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import RunExistsError

Clock = Callable[[], float]
"""Seconds that only grow."""


class ScoreStore(Protocol):
    """Scores already computed, shared by the reward workers. A miss is None, never a number.

    Keys come from `cluster.keys.score_key`.
    """

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """One answer a key, in the order of `keys`."""
        ...

    async def put_many(self, values: Mapping[str, bytes], *, ttl_s: float) -> None: ...


@dataclass(frozen=True, order=True)
class Member:
    """One process of the run that serves metrics, at `address` ("host:port")."""

    role: str
    instance: str
    address: str


class Directory(Protocol):
    """Who is alive and where their metrics are. An entry that is not announced again disappears after its TTL."""

    async def announce(self, role: str, *, instance: str, address: str, ttl_s: float) -> None: ...

    async def withdraw(self, role: str, *, instance: str) -> None: ...

    async def members(self) -> list[Member]:
        """Living members, sorted."""
        ...


class RunLock(Protocol):
    """At most one living run of a name. Held by renewing it well within its time to live."""

    async def acquire(self) -> None:
        """Take the lock, or keep it if it is already ours. Raises RunExistsError when another owner holds it."""
        ...

    async def renew(self) -> None:
        """Start the time to live anew; take the lock again if the server lost it. Raises RunExistsError when another
        owner has it now: then this run must stop."""
        ...

    async def release(self) -> None:
        """Give the lock up if it is ours; otherwise do nothing."""
        ...


def run_exists(run: str, *, holder: str, ttl_s: float) -> RunExistsError:
    """The error of a lock that another owner holds."""
    return RunExistsError(
        f"another process is running '{run}' on this Redis",
        got=f"lock held by {holder}",
        do=f"choose another `name`, or stop that process; a killed one's lock frees itself within {ttl_s:g} s",
    )


class MemoryScores:
    """ScoreStore for one process."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._values: dict[str, tuple[bytes, float]] = {}

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        now = self._clock()
        found = (self._values.get(key) for key in keys)
        return [entry[0] if entry is not None and entry[1] > now else None for entry in found]

    async def put_many(self, values: Mapping[str, bytes], *, ttl_s: float) -> None:
        now = self._clock()
        self._values = {key: entry for key, entry in self._values.items() if entry[1] > now}
        self._values.update({key: (value, now + ttl_s) for key, value in values.items()})


class MemoryDirectory:
    """Directory for one process."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._members: dict[tuple[str, str], tuple[str, float]] = {}

    async def announce(self, role: str, *, instance: str, address: str, ttl_s: float) -> None:
        self._members[role, instance] = (address, self._clock() + ttl_s)

    async def withdraw(self, role: str, *, instance: str) -> None:
        self._members.pop((role, instance), None)

    async def members(self) -> list[Member]:
        now = self._clock()
        self._members = {key: entry for key, entry in self._members.items() if entry[1] > now}
        return sorted(Member(role, instance, entry[0]) for (role, instance), entry in self._members.items())
