"""The review queue on Redis or Valkey: each step one Lua script over the keys `review:…` of the run.

Consumes and produces: see cluster/review_queue.py. Waits for: the server's answer. Who unblocks it: the client's
deadline. Always holds: a script that the client sent twice takes effect once (judgements are known by their id, a lease
is taken again by who has it, the others remember their answer under a token); leases run by the server's clock.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

from cluster.errors import CodecError
from cluster.keys import TOKEN_TTL_S, Keys
from cluster.redis_client import Arg, RedisClient, Script
from cluster.review_queue import (
    KINDS,
    Judgement,
    Kind,
    Progress,
    Recorded,
    ReviewItem,
    Tally,
    check_verdict,
    unknown_item,
)

_TOKEN_TTL_MS: Final = int(TOKEN_TTL_S * 1000)
_PUSH_AT_ONCE: Final = 50
_READ_AT_ONCE: Final = 200
_T = TypeVar("_T", bound=msgspec.Struct)

# As in cluster/streams_redis.py: in every script the first write is one that an out-of-memory server refuses.

_PUSH: Final = Script("""
-- KEYS: token, items, waiting of each kind. ARGV: token ttl ms, limit, then for each item: place of its kind, id, JSON.
-- Returns how many were taken.
local answered = redis.call('GET', KEYS[1])
if answered then return tonumber(answered) end
local taken = 0
for i = 3, #ARGV, 3 do
  local waiting = KEYS[2 + ARGV[i]]
  if redis.call('ZCARD', waiting) < tonumber(ARGV[2])
      and redis.call('HSETNX', KEYS[2], ARGV[i + 1], ARGV[i + 2]) == 1 then
    redis.call('ZADD', waiting, redis.call('HLEN', KEYS[2]), ARGV[i + 1])
    taken = taken + 1
  end
end
redis.call('SET', KEYS[1], taken, 'PX', ARGV[1])
return taken
""")

_COMMON: Final = """
local function table_at(key, id)
  local text = redis.call('HGET', key, id)
  return text and cjson.decode(text) or {}
end
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function size(of)
  local count = 0
  for _ in pairs(of) do count = count + 1 end
  return count
end
local function put(key, id, of)
  if next(of) == nil then redis.call('HDEL', key, id) else redis.call('HSET', key, id, cjson.encode(of)) end
end
"""

_NEXT: Final = Script(
    _COMMON
    + """
-- KEYS: items, votes, leases, held, waiting of each kind asked for.
-- ARGV: annotator, lease ms, votes wanted, the kinds asked for. Returns an item's JSON, or false.
local who, at = ARGV[1], now()
local function is_free(id, votes)
  if votes[who] then return false end
  local taken = size(votes)
  for other, until_ms in pairs(table_at(KEYS[3], id)) do
    if other ~= who and until_ms > at then taken = taken + 1 end
  end
  return taken < tonumber(ARGV[3])
end
local function lease(kind, id)
  local leases = table_at(KEYS[3], id)
  for other, until_ms in pairs(leases) do
    if until_ms <= at then leases[other] = nil end
  end
  leases[who] = at + ARGV[2]
  redis.call('HSET', KEYS[3], id, cjson.encode(leases))
  redis.call('HSET', KEYS[4], who, kind .. ' ' .. id)
  return redis.call('HGET', KEYS[1], id)
end
local held = redis.call('HGET', KEYS[4], who)
if held then
  local kind, id = string.match(held, '^(%S+) (.*)$')
  local votes, leases = table_at(KEYS[2], id), table_at(KEYS[3], id)
  for i = 4, #ARGV do
    if ARGV[i] == kind and not votes[who] then
      if (leases[who] or 0) > at or (redis.call('ZSCORE', KEYS[i + 1], id) and is_free(id, votes)) then
        return lease(kind, id)
      end
    end
  end
  leases[who] = nil
  put(KEYS[3], id, leases)
  redis.call('HDEL', KEYS[4], who)
end
for i = 4, #ARGV do
  for _, id in ipairs(redis.call('ZRANGE', KEYS[i + 1], 0, -1)) do
    if is_free(id, table_at(KEYS[2], id)) then return lease(ARGV[i], id) end
  end
end
return false
"""
)

_JUDGE: Final = Script(
    _COMMON
    + """
-- KEYS: seen, log, votes, leases, done, waiting of the item's kind.
-- ARGV: judgement's JSON, its id, annotator, kind, item id, votes wanted. Returns 1: stored, now or before; 0: not.
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 1 then return 1 end
local votes, leases = table_at(KEYS[3], ARGV[5]), table_at(KEYS[4], ARGV[5])
if votes[ARGV[3]] then return 0 end
local position = redis.call('RPUSH', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[2], position)
votes[ARGV[3]] = position
redis.call('HSET', KEYS[3], ARGV[5], cjson.encode(votes))
redis.call('RPUSH', KEYS[5], ARGV[4] .. ' ' .. ARGV[5])
leases[ARGV[3]] = nil
put(KEYS[4], ARGV[5], leases)
if size(votes) >= tonumber(ARGV[6]) then redis.call('ZREM', KEYS[6], ARGV[5]) end
return 1
"""
)

_UNDO: Final = Script(
    _COMMON
    + """
-- KEYS: token, log, votes, leases, held, done, then for each kind: waiting. ARGV: token ttl ms, annotator, lease ms,
-- votes wanted, the log's new entry without its item, then the kinds. Returns the judgement taken back, or ''.
local answered = redis.call('GET', KEYS[1])
if answered then return answered end
local newest = redis.call('LINDEX', KEYS[6], -1)
if not newest then return '' end
local kind, id = string.match(newest, '^(%S+) (.*)$')
local votes = table_at(KEYS[3], id)
local judgement = redis.call('LINDEX', KEYS[2], votes[ARGV[2]] - 1)
local entry = cjson.decode(ARGV[5])
entry.item_id = id
redis.call('RPUSH', KEYS[2], cjson.encode(entry))
redis.call('RPOP', KEYS[6])
votes[ARGV[2]] = nil
put(KEYS[3], id, votes)
for i = 6, #ARGV do
  if ARGV[i] == kind and size(votes) < tonumber(ARGV[4]) and not redis.call('ZSCORE', KEYS[i + 1], id) then
    redis.call('ZADD', KEYS[i + 1], 0, id)
  end
end
local held = redis.call('HGET', KEYS[5], ARGV[2])
if held then
  local _, before = string.match(held, '^(%S+) (.*)$')
  local leases = table_at(KEYS[4], before)
  leases[ARGV[2]] = nil
  put(KEYS[4], before, leases)
end
local leases = table_at(KEYS[4], id)
leases[ARGV[2]] = now() + ARGV[3]
redis.call('HSET', KEYS[4], id, cjson.encode(leases))
redis.call('HSET', KEYS[5], ARGV[2], newest)
redis.call('SET', KEYS[1], judgement, 'PX', ARGV[1])
return judgement
"""
)

_READ: Final = Script("""
-- KEYS: log, items. ARGV: first, last. Returns judgement, item, judgement, item…
local read = {}
for _, judgement in ipairs(redis.call('LRANGE', KEYS[1], ARGV[1], ARGV[2])) do
  table.insert(read, judgement)
  table.insert(read, redis.call('HGET', KEYS[2], cjson.decode(judgement).item_id) or '')
end
return read
""")

_WAITING: Final = Script("""
-- KEYS: waiting of each kind. Returns their lengths.
local counts = {}
for i = 1, #KEYS do counts[i] = redis.call('ZCARD', KEYS[i]) end
return counts
""")


class RedisReviewQueue:
    """ReviewQueue on Redis."""

    def __init__(self, client: RedisClient, *, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._tally = Tally()

    async def push(self, items: Sequence[ReviewItem], *, limit: int) -> int:
        taken = 0
        for start in range(0, len(items), _PUSH_AT_ONCE):
            args: list[Arg] = [_TOKEN_TTL_MS, limit]
            for item in items[start : start + _PUSH_AT_ONCE]:
                args += [1 + KINDS.index(item.kind), item.item_id, msgspec.json.encode(item)]
            keys = [self._new_token(), self._keys.review("items"), *self._waiting(KINDS)]
            taken += int(await self._client.script(_PUSH, keys=keys, args=args))
        return taken

    async def next(
        self, annotator: str, *, lease_s: float, votes: int = 1, kinds: Sequence[Kind] = KINDS
    ) -> ReviewItem | None:
        keys = [*self._parts("items", "votes", "leases", "held"), *self._waiting(kinds)]
        args: list[Arg] = [annotator, _milliseconds(lease_s), votes, *kinds]
        text: bytes | None = await self._client.script(_NEXT, keys=keys, args=args)
        return None if text is None else _decode(text, ReviewItem)

    async def judge(self, judgement: Judgement, *, votes: int = 1) -> bool:
        text: bytes | None = await self._client.command("HGET", self._keys.review("items"), judgement.item_id)
        if text is None:
            raise unknown_item(judgement.item_id)
        item = _decode(text, ReviewItem)
        check_verdict(item, judgement)
        keys = [
            *self._parts("seen", "log", "votes", "leases", f"done:{judgement.annotator}"),
            *self._waiting([item.kind]),
        ]
        who, what = judgement.annotator, msgspec.json.encode(judgement)
        args: list[Arg] = [what, judgement.judgement_id, who, item.kind, item.item_id, votes]
        return bool(await self._client.script(_JUDGE, keys=keys, args=args))

    async def undo(self, annotator: str, *, lease_s: float, votes: int = 1) -> Judgement | None:
        entry = Judgement(item_id="", annotator=annotator, verdict="undone")
        parts = self._parts("log", "votes", "leases", "held", f"done:{annotator}")
        keys = [self._new_token(), *parts, *self._waiting(KINDS)]
        args: list[Arg] = [_TOKEN_TTL_MS, annotator, _milliseconds(lease_s), votes, msgspec.json.encode(entry), *KINDS]
        text: bytes = await self._client.script(_UNDO, keys=keys, args=args)
        return _decode(text, Judgement) if text else None

    async def progress(self) -> Progress:
        counts: list[int] = await self._client.script(_WAITING, keys=self._waiting(KINDS))
        fresh = await self.judgements(after=self._tally.position)
        # Another caller may have taken some of these meanwhile.
        self._tally.take(entry for entry in fresh if entry.position > self._tally.position)
        return self._tally.progress(dict(zip(KINDS, counts, strict=True)))

    async def judgements(self, *, after: int = 0) -> list[Recorded]:
        log: list[Recorded] = []
        while True:
            first = after + len(log)
            args: list[Arg] = [first, first + _READ_AT_ONCE - 1]
            reply: list[bytes] = await self._client.script(_READ, keys=self._parts("log", "items"), args=args)
            pairs = zip(reply[::2], reply[1::2], strict=True)
            log += [
                Recorded(
                    position=first + index, judgement=_decode(judgement, Judgement), item=_decode(item, ReviewItem)
                )
                for index, (judgement, item) in enumerate(pairs, start=1)
            ]
            if len(reply) < 2 * _READ_AT_ONCE:
                return log

    def _parts(self, *parts: str) -> list[str]:
        return [self._keys.review(part) for part in parts]

    def _waiting(self, kinds: Sequence[Kind]) -> list[str]:
        return self._parts(*(f"waiting:{kind}" for kind in kinds))

    def _new_token(self) -> str:
        return self._keys.token(secrets.token_hex(12))


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _decode(text: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        do = "use the version of Keel that the run uses"
        raise CodecError(f"no {kind.__name__} in the review queue", got=repr(text[:80]), do=do) from error
