"""Which version of the reward model scores from now on, for every reward worker of a run to hear.

Consumes and produces: one announcement, the newest. Waits for: the server's answer. Who unblocks it: the client's
deadline. Always holds: each announcement has a higher number than all before it, so a return to an older version is
news like any other. The number is the server's clock where that is ahead: a server that lost its data goes on above
what workers have heard.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from cluster.errors import CodecError
from cluster.keys import Keys
from cluster.redis_client import RedisClient, Script


class RmAnnouncement(msgspec.Struct, frozen=True, kw_only=True):
    """`version`: in the registry (cluster/reward_models.py). `number`: of the announcement. `reason`: for people."""

    version: str
    number: int
    reason: str = ""
    token: str = ""
    """Of the call that made it: one that is sent again announces nothing new."""


class RewardModelBoard(Protocol):
    """The newest announcement. Each method of a networked version may raise StreamError, and CodecError for what cannot
    be read."""

    async def announce(self, version: str, *, reason: str) -> RmAnnouncement:
        """From now on `version` scores. It must be in the registry already."""
        ...

    async def newest(self, *, after: int = -1) -> RmAnnouncement | None:
        """None when nothing was announced with a number over `after`."""
        ...


_ANNOUNCE: Final = Script("""
-- KEYS: string. ARGV: version, reason, token. Returns the newest announcement: ours, or ours of an earlier try.
local old, number = redis.call('GET', KEYS[1]), 0
if old then
  local readable, was = pcall(cjson.decode, old)
  if readable and type(was) == 'table' then
    if was.token == ARGV[3] then return old end
    number = (tonumber(was.number) or 0) + 1
  end
end
local now = redis.call('TIME')
number = math.max(number, now[1] * 1000 + math.floor(now[2] / 1000))
local text = cjson.encode({version = ARGV[1], number = number, reason = ARGV[2], token = ARGV[3]})
redis.call('SET', KEYS[1], text)
return text
""")


class RedisRewardModelBoard:
    """RewardModelBoard on Redis: one string of JSON."""

    def __init__(self, client: RedisClient, *, keys: Keys) -> None:
        self._client = client
        self._key = keys.reward_model

    async def announce(self, version: str, *, reason: str) -> RmAnnouncement:
        token = secrets.token_hex(16)
        text: bytes = await self._client.script(_ANNOUNCE, keys=[self._key], args=[version, reason, token])
        return _decode(text)

    async def newest(self, *, after: int = -1) -> RmAnnouncement | None:
        text: bytes | None = await self._client.command("GET", self._key)
        found = None if text is None else _decode(text)
        return found if found is not None and found.number > after else None


class MemoryRewardModelBoard:
    """RewardModelBoard for one process."""

    def __init__(self, *, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._newest: RmAnnouncement | None = None

    async def announce(self, version: str, *, reason: str) -> RmAnnouncement:
        above = 0 if self._newest is None else self._newest.number + 1
        number = max(above, int(self._now_s() * 1000))
        self._newest = RmAnnouncement(version=version, number=number, reason=reason, token=secrets.token_hex(16))
        return self._newest

    async def newest(self, *, after: int = -1) -> RmAnnouncement | None:
        found = self._newest
        return found if found is not None and found.number > after else None


def _decode(text: bytes) -> RmAnnouncement:
    try:
        return msgspec.json.decode(text, type=RmAnnouncement)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        do = "run one Keel version on every node, and let nothing else write to this run's keys"
        raise CodecError("no announcement of a reward model", got=repr(text[:80]), do=do) from error
