"""Everything that a run keeps in Redis, behind one connection: streams, score cache, targets directory, run lock,
control, the learner's meeting point, the reward model's announcement, the review queue.

Consumes and produces: what the seams in cluster/streams.py and cluster/stores.py say. Waits for: the server, bounded by
the client's deadline. Always holds: every call may reach the server twice and takes effect once.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from cluster.control import RedisControl
from cluster.keys import Keys
from cluster.redis_client import Arg, RedisClient, Script
from cluster.rendezvous import RedisRendezvous
from cluster.review_queue_redis import RedisReviewQueue
from cluster.rm_announcement import RedisRewardModelBoard
from cluster.stores import Clock, Member, run_exists
from cluster.streams_redis import RedisStreams

LOCK_TTL_S: Final = 60.0

_PUT_SCORES: Final = Script("""
-- KEYS: score keys. ARGV: ttl ms, values in the order of the keys
for i = 1, #KEYS do redis.call('SET', KEYS[i], ARGV[i + 1], 'PX', ARGV[1]) end
return #KEYS
""")

_ANNOUNCE: Final = Script("""
-- KEYS: hash. ARGV: member, address, ttl ms. The server's clock is the only one.
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %s', now_ms + ARGV[3], ARGV[2]))
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return 1
""")

_MEMBERS: Final = Script("""
-- KEYS: hash. Returns member, address, member, address…; forgets those that ran out.
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local all, living = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #all, 2 do
  local expires_ms, address = string.match(all[i + 1], '^(%d+) (.*)$')
  if tonumber(expires_ms) > now_ms then
    table.insert(living, all[i])
    table.insert(living, address)
  else
    redis.call('HDEL', KEYS[1], all[i])
  end
end
return living
""")

_ACQUIRE: Final = Script("""
-- KEYS: lock. ARGV: our value, ttl ms. Returns the other owner's value, or '' when the lock is ours.
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return owner end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ''
""")

_RELEASE: Final = Script("""
-- KEYS: lock. ARGV: our value
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""")


class RedisScores:
    """ScoreStore on Redis; entries expire on the server."""

    def __init__(self, client: RedisClient, *, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        if not keys:
            return []
        reply: list[bytes | None] = await self._client.command("MGET", *(self._keys.score(key) for key in keys))
        return reply

    async def put_many(self, values: Mapping[str, bytes], *, ttl_s: float) -> None:
        if values:
            keys = [self._keys.score(key) for key in values]
            await self._client.script(_PUT_SCORES, keys=keys, args=[max(1, int(ttl_s * 1000)), *values.values()])


class RedisDirectory:
    """Directory on Redis: one hash, each member with its own expiry by the server's clock."""

    def __init__(self, client: RedisClient, *, keys: Keys) -> None:
        self._client = client
        self._key = keys.targets

    async def announce(self, role: str, *, instance: str, address: str, ttl_s: float) -> None:
        args: list[Arg] = [json.dumps([role, instance]), address, max(1, int(ttl_s * 1000))]
        await self._client.script(_ANNOUNCE, keys=[self._key], args=args)

    async def withdraw(self, role: str, *, instance: str) -> None:
        await self._client.command("HDEL", self._key, json.dumps([role, instance]))

    async def members(self) -> list[Member]:
        reply: list[bytes] = await self._client.script(_MEMBERS, keys=[self._key])
        pairs = zip(reply[::2], reply[1::2], strict=True)
        found = ((json.loads(name), address.decode()) for name, address in pairs)
        return sorted(Member(role, instance, address) for (role, instance), address in found)


class RedisRunLock:
    """RunLock on Redis. The value names the owner for people and holds a random token for the comparison."""

    def __init__(self, client: RedisClient, *, keys: Keys, ttl_s: float = LOCK_TTL_S) -> None:
        self._client = client
        self._keys = keys
        self._ttl_s = ttl_s
        owner = f"{socket.gethostname()} pid {os.getpid()}"
        self._value: Final = json.dumps({"owner": owner, "token": secrets.token_hex(16)})

    async def acquire(self) -> None:
        args: list[Arg] = [self._value, max(1, int(self._ttl_s * 1000))]
        reply: bytes = await self._client.script(_ACQUIRE, keys=[self._keys.lock], args=args)
        if reply:
            raise run_exists(self._keys.run, holder=_owner_in(reply), ttl_s=self._ttl_s)

    async def renew(self) -> None:
        await self.acquire()

    async def holder(self) -> str | None:
        """Who holds the lock, for people; None when nobody does: no driver of this run is online."""
        value: bytes | None = await self._client.command("GET", self._keys.lock)
        return None if value is None else _owner_in(value)

    async def release(self) -> None:
        await self._client.script(_RELEASE, keys=[self._keys.lock], args=[self._value])


def _owner_in(value: bytes) -> str:
    try:
        return str(json.loads(value)["owner"])
    except (ValueError, KeyError, TypeError):
        return "something that is not Keel"


class RunRedis:
    """One run's Redis. `check` before use; `close` after. One event loop."""

    def __init__(
        self,
        url: str,
        *,
        run: str,
        lease_s: float = 30.0,
        command_timeout_s: float = 10.0,
        lock_ttl_s: float = LOCK_TTL_S,
        clock: Clock = time.monotonic,
    ) -> None:
        self._client = RedisClient(url, command_timeout_s=command_timeout_s)
        self._keys = Keys(run)
        self.streams: Final = RedisStreams(self._client, keys=self._keys, lease_s=lease_s, clock=clock)
        self.scores: Final = RedisScores(self._client, keys=self._keys)
        self.directory: Final = RedisDirectory(self._client, keys=self._keys)
        self.lock: Final = RedisRunLock(self._client, keys=self._keys, ttl_s=lock_ttl_s)
        self.rendezvous: Final = RedisRendezvous(self._client, keys=self._keys)
        self.control: Final = RedisControl(self._client, keys=self._keys)
        self.reward_model: Final = RedisRewardModelBoard(self._client, keys=self._keys)
        self.review: Final = RedisReviewQueue(self._client, keys=self._keys)

    def __repr__(self) -> str:
        return f"RunRedis({self._client.address}, run={self._keys.run!r})"

    @property
    def address(self) -> str:
        """host:port, without credentials."""
        return self._client.address

    async def check(self) -> None:
        """Raises StreamError unless this is a reachable, writable Redis or Valkey ≥ 7 with Lua."""
        await self._client.check(self._keys)

    async def close(self) -> None:
        await self.streams.close()
        await self._client.close()

    async def __aenter__(self) -> Self:
        await self.check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
