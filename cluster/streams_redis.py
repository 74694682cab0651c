"""The streams on Redis or Valkey ≥ 7: consumer groups for leases, one Lua script for each step that must happen once.

Consumes: payloads from `publish` and the hops. Produces: leased deliveries. Waits for: `claim`, in blocking reads of
at most 2 s each. Who unblocks it: an XADD to that stream, a lease that runs out (looked for every quarter of a lease),
or `wait_s`. Always holds:
- an entry leaves a stream only in the script that acknowledged it, together with its successor's XADD;
- every script that writes remembers its answer under a token, so a copy that the client re-sent changes nothing;
- one claim at a time for each consumer of one client (others queue): what one claim's lost reply left behind is not
  mistaken for what another is receiving. A consumer's name belongs to one living process.

Commands are those of Redis 7.0: Valkey has no XACKDEL and no XREADGROUP CLAIM.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from cluster.errors import StreamError
from cluster.keys import GROUP, PAYLOAD_FIELD, TOKEN_TTL_S, Keys
from cluster.redis_client import BLOCK_LIMIT_S, Arg, LostReplyError, NoGroupError, RedisClient, Script
from cluster.stores import Clock
from cluster.streams import Delivery, Depth, Hop, StreamName

_Answer = TypeVar("_Answer")
_SWEEPS_PER_LEASE: Final = 4
_PAUSE_S: Final = 0.1
_HOPS_PER_SCRIPT: Final = 128
_TOKEN_TTL_MS: Final = int(TOKEN_TTL_S * 1000)
_STREAM_NUMBER: Final = {name: number for number, name in enumerate(StreamName, start=1)}
"""Place of a stream among those that the script of the hops is given."""

# In every script the first write is one that an out-of-memory server refuses, or one that frees memory: Redis lets the
# writes after it pass, so a script is refused whole or done whole.

_PUBLISH: Final = Script("""
-- KEYS: token, stream. ARGV: token ttl ms, field, payloads…
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('SET', KEYS[1], 1, 'PX', ARGV[1])
for i = 3, #ARGV do redis.call('XADD', KEYS[2], '*', ARGV[2], ARGV[i]) end
return #ARGV - 2
""")

_ADVANCE: Final = Script("""
-- KEYS: token, streams… ARGV: token ttl ms, field, group, hops, a payload for each. A hop is its source and its target,
-- as indices among the streams, and its entry id; in msgpack, as each argument costs the client time. Returns one digit
-- a hop, 1 where the entry was still there.
local answered = redis.call('GET', KEYS[1])
if answered then return answered end
local moved, any = {}, false
for i, hop in ipairs(cmsgpack.unpack(ARGV[4])) do
  local source, target, entry = KEYS[1 + hop[1]], KEYS[1 + hop[2]], hop[3]
  local acknowledged = redis.pcall('XACK', source, ARGV[3], entry)
  if type(acknowledged) == 'table' then
    -- An id that is none is not there either; it must not undo the other hops. Other refusals hit the first hop.
    if not string.find(acknowledged['err'], 'Invalid stream ID', 1, true) then return acknowledged end
    acknowledged = 0
  end
  if acknowledged == 1 then
    redis.call('XADD', target, '*', ARGV[2], ARGV[4 + i])
    redis.call('XDEL', source, entry)
    any = true
  end
  moved[i] = acknowledged
end
if any then redis.call('SET', KEYS[1], table.concat(moved), 'PX', ARGV[1]) end
return table.concat(moved)
""")

_SETTLE: Final = Script("""
-- KEYS: token, stream. ARGV: token ttl ms, group, entry ids…
local answered = redis.call('GET', KEYS[1])
if answered then return tonumber(answered) end
local settled = 0
for i = 3, #ARGV do
  if redis.call('XACK', KEYS[2], ARGV[2], ARGV[i]) == 1 then
    redis.call('XDEL', KEYS[2], ARGV[i])
    settled = settled + 1
  end
end
if settled > 0 then redis.call('SET', KEYS[1], settled, 'PX', ARGV[1]) end
return settled
""")

_RENEW: Final = Script("""
-- KEYS: stream. ARGV: group, consumer, entry ids…
-- XCLAIM alone would take an entry back from whoever took it over, hence the look at its holder first.
local held = 0
for i = 3, #ARGV do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if #pending == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    held = held + 1
  end
end
return held
""")

_RECOVER: Final = Script("""
-- KEYS: stream. ARGV: group, consumer, max count, ids that the consumer is working on…
-- The consumer's own pending entries that it does not know of: replies that were lost, or a restart under its name.
local known = {}
for i = 4, #ARGV do known[ARGV[i]] = true end
local found, start = {}, '-'
while #found < tonumber(ARGV[3]) do
  local page = redis.call('XPENDING', KEYS[1], ARGV[1], start, '+', 100, ARGV[2])
  for _, pending in ipairs(page) do
    start = '(' .. pending[1]
    if not known[pending[1]] and #found < tonumber(ARGV[3]) then
      local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, pending[1])
      if #claimed == 1 then table.insert(found, {claimed[1][1], claimed[1][2][2], pending[4] + 1}) end
    end
  end
  if #page < 100 then break end
end
return found
""")

_TAKE_OVER: Final = Script("""
-- KEYS: stream. ARGV: group, consumer, min idle ms, max count, cursor
local found, cursor = {}, ARGV[5]
for _ = 1, 16 do
  local room = tonumber(ARGV[4]) - #found
  local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], cursor, 'COUNT', room)
  cursor = reply[1]
  for _, entry in ipairs(reply[2]) do
    local pending = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)
    table.insert(found, {entry[1], entry[2][2], pending[1][4]})
  end
  if cursor == '0-0' or #found >= tonumber(ARGV[4]) then break end
end
return {cursor, found}
""")

_DEPTH: Final = Script("""
-- KEYS: stream. ARGV: group. Returns length, pending, age of the first entry in ms. Entries are deleted when they are
-- acknowledged, so the first entry is the oldest of backlog and in flight.
local length = redis.call('XLEN', KEYS[1])
if length == 0 then return {0, 0, 0} end
local pending, summary = 0, redis.pcall('XPENDING', KEYS[1], ARGV[1])
if not summary['err'] then pending = summary[1] end
local info, age_ms = redis.call('XINFO', 'STREAM', KEYS[1]), 0
for i = 1, #info, 2 do
  if info[i] == 'first-entry' and info[i + 1] then
    local now = redis.call('TIME')
    local published_ms = tonumber(string.match(info[i + 1][1], '^(%d+)'))
    age_ms = now[1] * 1000 + math.floor(now[2] / 1000) - published_ms
  end
end
return {length, pending, age_ms}
""")


@dataclass
class _Consumer:
    """What one client knows of one consumer of one stream."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    must_recover: bool = True
    """Entries may have been handed to this name in a reply that we did not get."""
    sweep_from: str = "0-0"
    sweep_due_s: float = 0.0
    held: dict[str, float] = field(default_factory=dict)
    """Entries that our caller works on → when their lease runs out. After that they are anybody's, ours too."""


@dataclass(frozen=True)
class _Waiting:
    """One `advance` on its way; `done` gets its answer."""

    source: StreamName
    hop: Hop
    done: asyncio.Future[bool]


class RedisStreams:
    """The streams of one run. `lease_s` must lie well over the longest piece of work, or be renewed in time; `clock`
    (seconds) paces the search for leases that ran out, whose age the server measures."""

    def __init__(
        self, client: RedisClient, *, keys: Keys, lease_s: float = 30.0, clock: Clock = time.monotonic
    ) -> None:
        self._client = client
        self._keys = keys
        self._lease_s = lease_s
        self._clock = clock
        self._consumers: dict[tuple[StreamName, str], _Consumer] = {}
        self._waiting: list[_Waiting] = []
        self._hopping: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"RedisStreams({self._client.address}, run={self._keys.run!r})"

    async def publish(self, stream: StreamName, payloads: Sequence[bytes]) -> None:
        """As the seam says. After a StreamError "did not answer in time" the payloads may or may not be there."""
        if not payloads:
            return
        keys = [self._new_token(), self._keys.stream(stream)]
        await self._client.script(_PUBLISH, keys=keys, args=[_TOKEN_TTL_MS, PAYLOAD_FIELD, *payloads])

    async def advance(self, source: StreamName, entry_id: str, *, target: StreamName, payload: bytes) -> bool:
        """As the seam says. Calls made at the same time travel in one script."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(source, Hop(entry_id, target, payload), done))
        if self._hopping is None or self._hopping.done():
            self._hopping = asyncio.create_task(self._send_hops(), name="redis-hops")
        advanced = await done
        self._forget(source, [entry_id])
        return advanced

    async def advance_many(self, source: StreamName, hops: Sequence[Hop]) -> list[bool]:
        """As the seam says, in one script: the server does nothing else meanwhile, so callers bound its size."""
        if not hops:
            return []
        moved = await self._move([(source, hop) for hop in hops])
        self._forget(source, [hop.entry_id for hop in hops])
        return moved

    async def settle(self, stream: StreamName, entry_ids: Sequence[str]) -> int:
        if not entry_ids:
            return 0
        keys = [self._new_token(), self._keys.stream(stream)]
        settled = await self._client.script(_SETTLE, keys=keys, args=[_TOKEN_TTL_MS, GROUP, *entry_ids])
        self._forget(stream, entry_ids)
        return int(settled)

    async def renew(self, stream: StreamName, *, consumer: str, entry_ids: Sequence[str]) -> None:
        if not entry_ids:
            return
        key = self._keys.stream(stream)
        await self._in_group(
            stream, lambda: self._client.script(_RENEW, keys=[key], args=[GROUP, consumer, *entry_ids])
        )
        held = self._consumer(stream, consumer).held
        held.update({entry_id: self._clock() + self._lease_s for entry_id in entry_ids if entry_id in held})

    async def depth(self, stream: StreamName) -> Depth:
        reply = await self._client.script(_DEPTH, keys=[self._keys.stream(stream)], args=[GROUP])
        length, pending, age_ms = (int(value) for value in reply)
        return Depth(max(0, length - pending), pending, max(0, age_ms) / 1000)

    async def claim(self, stream: StreamName, *, consumer: str, max_count: int, wait_s: float) -> list[Delivery]:
        if max_count < 1:
            return []
        state = self._consumer(stream, consumer)
        deadline_s = time.monotonic() + wait_s
        async with state.lock:
            found: list[Delivery] = []
            try:
                while not found:
                    found += await self._in_group(stream, lambda: self._take_over(state, stream, consumer, max_count))
                    wait_left_s = 0.0 if found else max(0.0, deadline_s - time.monotonic())
                    if len(found) < max_count:
                        found += await self._read_new(state, stream, consumer, max_count - len(found), wait_left_s)
                    if wait_left_s <= 0:
                        break
            except BaseException:
                # Whatever was found so far goes unseen; the next claim gets it back.
                state.must_recover = True
                raise
            until_s = self._clock() + self._lease_s
            state.held.update({delivery.entry_id: until_s for delivery in found})
            return found

    async def close(self) -> None:
        """Ends the hops under way. The client belongs to whoever made it."""
        if self._hopping is not None:
            self._hopping.cancel()
            await asyncio.wait([self._hopping])

    async def _send_hops(self) -> None:
        """Lives as long as there are hops. Whatever ends it ends every hop that waits: a server that failed one batch
        for a whole deadline will not do better for the next."""
        batch: list[_Waiting] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_HOPS_PER_SCRIPT], self._waiting[_HOPS_PER_SCRIPT:]
                answers = await self._move([(waiting.source, waiting.hop) for waiting in batch])
                for waiting, moved in zip(batch, answers, strict=True):
                    if not waiting.done.done():
                        waiting.done.set_result(moved)
        except StreamError as error:
            for waiting in self._unanswered(batch):
                waiting.done.set_exception(error)
        finally:
            for waiting in self._unanswered(batch):
                waiting.done.cancel()

    def _unanswered(self, batch: list[_Waiting]) -> list[_Waiting]:
        """The hops of `batch` and of the queue that still wait for an answer; empties the queue."""
        waiting, self._waiting = [*batch, *self._waiting], []
        return [one for one in waiting if not one.done.done()]

    async def _move(self, hops: Sequence[tuple[StreamName, Hop]]) -> list[bool]:
        """One script. A copy that the client re-sent gives the answer of the first."""
        routes = [(_STREAM_NUMBER[source], _STREAM_NUMBER[hop.target], hop.entry_id) for source, hop in hops]
        args: list[Arg] = [_TOKEN_TTL_MS, PAYLOAD_FIELD, GROUP, msgspec.msgpack.encode(routes)]
        args += [hop.payload for _, hop in hops]
        keys = [self._new_token(), *(self._keys.stream(name) for name in StreamName)]
        moved: bytes = await self._client.script(_ADVANCE, keys=keys, args=args)
        return [digit == ord("1") for digit in moved]

    async def _take_over(self, state: _Consumer, stream: StreamName, consumer: str, max_count: int) -> list[Delivery]:
        """Own entries after a lost reply, then those whose lease ran out."""
        now_s = self._clock()
        state.held = {entry_id: until_s for entry_id, until_s in state.held.items() if until_s > now_s}
        key, found = self._keys.stream(stream), list[Delivery]()
        if state.must_recover:
            args: list[Arg] = [GROUP, consumer, max_count, *state.held]
            reply = await self._client.script(_RECOVER, keys=[key], args=args)
            found += _deliveries(reply)
            state.must_recover = len(found) == max_count
        while len(found) < max_count and now_s >= state.sweep_due_s:
            args = [GROUP, consumer, int(self._lease_s * 1000), max_count - len(found), state.sweep_from]
            was_recovering, state.must_recover = state.must_recover, True
            cursor, taken = await self._client.script(_TAKE_OVER, keys=[key], args=args)
            state.must_recover = was_recovering
            found += _deliveries(taken)
            state.sweep_from = cursor.decode()
            if state.sweep_from == "0-0":
                state.sweep_due_s = now_s + self._lease_s / _SWEEPS_PER_LEASE
        return found

    async def _read_new(
        self, state: _Consumer, stream: StreamName, consumer: str, max_count: int, wait_s: float
    ) -> list[Delivery]:
        """New entries; blocks at most to the next sweep. Sent once: a reply that is lost is looked for afterwards."""
        until_sweep_s = max(0.0, state.sweep_due_s - self._clock())
        block_ms = int(1000 * min(wait_s, until_sweep_s, BLOCK_LIMIT_S))
        block: list[Arg] = ["BLOCK", max(1, block_ms)] if wait_s > 0 else []
        key = self._keys.stream(stream)
        read: list[Arg] = ["XREADGROUP", "GROUP", GROUP, consumer, "COUNT", max_count, *block, "STREAMS", key, ">"]
        state.must_recover = True
        reply = await self._in_group(stream, lambda: self._read_or_recover(read))
        if reply is None:
            return []
        state.must_recover = False
        entries = [entry for _, entries in reply for entry in entries] if reply else []
        return _deliveries([(entry_id, next(iter(fields.values()), b""), 1) for entry_id, fields in entries])

    async def _read_or_recover(self, read: Sequence[Arg]) -> Any:
        """The reply, or None where the connection was lost: then the next round asks for what it brought. The PING
        runs under the command deadline, so a server that stays away is reported."""
        try:
            return await self._client.read_once(*read) or ()
        except LostReplyError:
            await asyncio.sleep(_PAUSE_S)
            await self._client.command("PING")
            return None

    async def _in_group(self, stream: StreamName, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """`call`; where the group is missing (first use, a restart without data, FLUSHALL), make it and call again."""
        for _ in range(3):
            try:
                return await call()
            except NoGroupError:
                await self._create_group(stream)
        raise StreamError(
            "the consumer group disappears as soon as it is made",
            got=f"stream {self._keys.stream(stream)} at {self._client.address}",
            do="look for something else that flushes or deletes keys on this server",
        )

    async def _create_group(self, stream: StreamName) -> None:
        try:
            await self._client.command("XGROUP", "CREATE", self._keys.stream(stream), GROUP, "0", "MKSTREAM")
        except StreamError as error:
            if "BUSYGROUP" not in error.got:
                raise

    def _forget(self, stream: StreamName, entry_ids: Sequence[str]) -> None:
        for (name, _), state in self._consumers.items():
            if name == stream:
                for entry_id in entry_ids:
                    state.held.pop(entry_id, None)

    def _consumer(self, stream: StreamName, consumer: str) -> _Consumer:
        return self._consumers.setdefault((stream, consumer), _Consumer())

    def _new_token(self) -> str:
        return self._keys.token(secrets.token_hex(12))


def _deliveries(entries: Sequence[Any]) -> list[Delivery]:
    """(id, payload, deliveries) as the scripts return them."""
    return [Delivery(entry_id.decode(), payload, int(count)) for entry_id, payload, count in entries]
