"""Where the first rank of a learner's group can be reached, for the others to find.

Consumes and produces: one address a group. Waits for: the server's answer. Who unblocks it: the client's deadline.
Always holds: an address that was not withdrawn is forgotten after its time to live. It may be that of a first rank that
has died since: who finds it must try it, and look again when it does not answer.
"""

from __future__ import annotations

from typing import Protocol

from cluster.keys import Keys
from cluster.redis_client import RedisClient


class Rendezvous(Protocol):
    """Group (the learner's incarnation) → address. A networked version may raise StreamError."""

    async def announce(self, group: int, *, address: str, ttl_s: float) -> None: ...

    async def find(self, group: int) -> str | None: ...

    async def withdraw(self, group: int) -> None: ...


class RedisRendezvous:
    """Rendezvous on Redis: one string a group."""

    def __init__(self, client: RedisClient, *, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    async def announce(self, group: int, *, address: str, ttl_s: float) -> None:
        await self._client.command("SET", self._keys.learner(group), address, "PX", max(1, int(ttl_s * 1000)))

    async def find(self, group: int) -> str | None:
        value: bytes | None = await self._client.command("GET", self._keys.learner(group))
        return None if value is None else value.decode()

    async def withdraw(self, group: int) -> None:
        await self._client.command("DEL", self._keys.learner(group))


class MemoryRendezvous:
    """Rendezvous for one process; nothing in it ages."""

    def __init__(self) -> None:
        self._addresses: dict[int, str] = {}

    async def announce(self, group: int, *, address: str, ttl_s: float) -> None:
        del ttl_s
        self._addresses[group] = address

    async def find(self, group: int) -> str | None:
        return self._addresses.get(group)

    async def withdraw(self, group: int) -> None:
        self._addresses.pop(group, None)
