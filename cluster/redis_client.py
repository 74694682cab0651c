"""The connection to Redis or Valkey: time-outs, retries, Lua, and errors in plain words.

Consumes: commands. Produces: replies. Waits for: the server, at most `command_timeout_s` a command in all its tries (a
blocking read: its own wait and that again). Who unblocks it: the server, or the deadline. Always holds: a command may
reach the server more than once, so callers send only what can be repeated (reads, or scripts that remember their
answer); the password is in no message and no repr.

Retries are here and not in redis-py, which would re-send a blocking read for ever and knows no deadline over tries.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

import redis.asyncio as aioredis
from redis import exceptions as refused
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cluster.errors import StreamError
from cluster.keys import Keys

MIN_SERVER_VERSION: Final = 7
BLOCK_LIMIT_S: Final = 2.0
"""Longest wait inside one blocking read; longer waits are several reads."""

_TRIES: Final = 3
_POOL_SIZE: Final = 32
_BACKOFF_S: Final = (0.02, 0.05, 0.1, 0.25, 0.5)
_Answer = TypeVar("_Answer")
Arg = str | bytes | int | float

Role = Literal["learner", "worker"]

_CONNECTION_RULES: Final = ["+ping", "+hello", "+auth", "+info"]
_SCRIPT_RULES: Final = ["+eval", "+evalsha", "+time", "+exists", "+pttl", "+pexpire"]
_VALUE_RULES: Final = ["+get", "+mget", "+set", "+hset", "+hdel", "+hgetall"]
_PRODUCER_RULES: Final = ["+xadd", "+xlen", "+xinfo|stream", "+xgroup|create"]
_CONSUMER_RULES: Final = ["+xreadgroup", "+xack", "+xdel", "+xpending", "+xclaim", "+xautoclaim"]
_PUSH_REVIEW_RULES: Final = ["+hsetnx", "+hlen", "+zadd", "+zcard"]
_REVIEW_RULES: Final = ["+hget", "+hexists", "+zrem", "+zrange", "+zscore", "+rpush", "+rpop", "+lindex", "+lrange"]
_BASE_RULES: Final = [*_CONNECTION_RULES, *_SCRIPT_RULES, *_VALUE_RULES, *_PRODUCER_RULES, *_CONSUMER_RULES]


def acl_rules(role: Role, *, run: str) -> list[str]:
    """Redis ACL rules that suffice for a role, to follow `ACL SETUSER <name> on ><password>`.

    `learner`: the driver, the learner and `keel review`; every key of the run. `worker`: rollout actors and reward
    workers; streams, scores, call tokens and the targets directory, but not the run lock. A worker reads which reward
    model scores, and may queue items for people, not read what they said.
    """
    prefix = Keys(run).prefix
    if role == "learner":
        return ["resetkeys", f"~{prefix}*", "-@all", *_BASE_RULES, "+del", *_PUSH_REVIEW_RULES, *_REVIEW_RULES]
    parts = ("stream:*", "token:*", "score:*", "targets", "review:items", "review:waiting:*")
    patterns = [*(f"~{prefix}{part}" for part in parts), f"%R~{prefix}rm"]
    return ["resetkeys", *patterns, "-@all", *_BASE_RULES, *_PUSH_REVIEW_RULES]


def address_of(url: str) -> str:
    """ "host:port" (or the socket's path) of a Redis URL, without user and password."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return parts.path
        return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:
        return "an address that cannot be read"


async def _cancellable(call: Awaitable[_Answer]) -> _Answer:
    """`call`, cancelled when it is told to be. Before Python 3.12 `asyncio.wait_for`, through which redis-py writes,
    loses a cancellation that arrives as its inner task ends; the task still counts it."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await call
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


class Script:
    """A Lua script with its digest."""

    def __init__(self, source: str) -> None:
        self.source: Final = source
        self.sha: Final = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class NoGroupError(Exception):
    """The consumer group is gone: the server restarted without its data, or was flushed. Never leaves this package."""


class LostReplyError(Exception):
    """A read's connection broke: the server may or may not have done it. Never leaves this package."""


class RedisClient:
    """One server, two connection pools: one for commands, one for blocking reads, so that no read starves a command.

    `command_timeout_s` bounds a command with its retries; every method raises StreamError after it.
    """

    def __init__(self, url: str, *, command_timeout_s: float = 10.0) -> None:
        self.address: Final = address_of(url)
        self._timeout_s = command_timeout_s
        self._try_s = command_timeout_s / _TRIES
        self._commands: Any = self._connect(url, timeout_s=self._try_s)
        self._blocking: Any = self._connect(url, timeout_s=BLOCK_LIMIT_S + max(3.0, self._try_s))

    def __repr__(self) -> str:
        return f"RedisClient({self.address})"

    def _connect(self, url: str, *, timeout_s: float) -> aioredis.Redis:
        try:
            pool = aioredis.BlockingConnectionPool.from_url(
                url,
                max_connections=_POOL_SIZE,
                timeout=self._timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=self._try_s,
                socket_keepalive=True,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                driver_info=None,
            )
        except (ValueError, TypeError):
            # Neither the URL nor the cause is quoted: they can hold the password, or a part of it.
            known = url.split(":", 1)[0] in ("redis", "rediss", "unix")
            raise StreamError(
                "the Redis URL cannot be read",
                got="a bad host, port or database" if known else "none of redis://, rediss://, unix://",
                do="write redis://[user:password@]host:port/0 or rediss://…, with special characters percent-encoded",
            ) from None
        return aioredis.Redis.from_pool(pool)

    async def close(self) -> None:
        await self._commands.aclose()
        await self._blocking.aclose()

    async def command(self, *args: Arg) -> Any:
        """One command that may safely be sent twice."""
        return await self._with_retries(lambda: self._commands.execute_command(*args), what=str(args[0]))

    async def script(self, script: Script, *, keys: Sequence[str], args: Sequence[Arg] = ()) -> Any:
        """A script that may safely be sent twice. Atomic. Raises NoGroupError where it meets a missing group."""

        async def run() -> Any:
            try:
                return await self._commands.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
            except refused.NoScriptError:
                return await self._commands.execute_command("EVAL", script.source, len(keys), *keys, *args)

        return await self._with_retries(run, what="script")

    async def read_once(self, *args: Arg) -> Any:
        """A read that may block up to BLOCK_LIMIT_S, sent once: its reply may be lost with the connection, so the
        caller must look for what it was given before it tries again. Raises LostReplyError then, else as elsewhere."""
        what = str(args[0])
        try:
            return await _cancellable(self._blocking.execute_command(*args))
        except refused.ResponseError as error:
            raise self._refusal(error, what=what) from error
        except (refused.RedisError, OSError) as error:
            if self._is_transient(error):
                raise LostReplyError(str(error)) from error
            raise self._explain(error, what=what) from error

    def _is_transient(self, error: Exception) -> bool:
        """Lost connections and a server that is loading: worth another try. A refused password is not."""
        if isinstance(error, refused.AuthenticationError | refused.AuthorizationError):
            return False
        return isinstance(error, refused.ConnectionError | refused.TimeoutError | OSError)

    def _explain(self, error: Exception, *, what: str) -> StreamError:
        """The StreamError for whatever redis-py raised."""
        text = str(error)
        at = f"{self.address} ({what})"
        if isinstance(error, refused.AuthenticationError | refused.AuthorizationError):
            return StreamError(
                "Redis refused the user name or password",
                got=f"{at}: {text}",
                do="check the user and password in redis.url; percent-encode special characters",
            )
        if isinstance(error, refused.BusyLoadingError):
            return StreamError(
                "Redis is still loading its data", got=at, do="wait for it, or raise redis.command_timeout_s"
            )
        if isinstance(error, refused.TimeoutError | TimeoutError):
            return StreamError(
                "Redis did not answer in time",
                got=f"{at}, {self._timeout_s:g} s",
                do="check that the server runs and is not stalled; raise redis.command_timeout_s for a slow network",
            )
        if self._is_transient(error):
            return StreamError(
                "Redis cannot be reached",
                got=f"{at}: {text}",
                do="check that the server runs, and that host, port and TLS (rediss://) in redis.url are right",
            )
        return self._explain_reply(text, at=at)

    def _explain_reply(self, text: str, *, at: str) -> StreamError:
        if "permission" in text or "can't run this command" in text or "can't access" in text:
            return StreamError(
                "Redis's access control forbids what Keel needs",
                got=f"{at}: {text}",
                do="grant this user the rules of cluster.redis_client.acl_rules for its role and this run",
            )
        if "read only replica" in text:
            return StreamError(
                "this Redis is a read-only replica", got=f"{at}: {text}", do="point redis.url at the primary"
            )
        if "maxmemory" in text:
            return StreamError(
                "Redis is out of memory and refuses writes",
                got=f"{at}: {text}",
                do="raise the server's maxmemory, or lower learner.batch_size or learner.max_staleness",
            )
        if "MISCONF" in text:
            return StreamError(
                "Redis refuses writes because it cannot persist", got=f"{at}: {text}", do="check the server's disk"
            )
        return StreamError("Redis refused a command", got=f"{at}: {text}", do="check the server's version and log")

    def _refusal(self, error: refused.ResponseError, *, what: str) -> Exception:
        # A read that was blocked when the stream was deleted says UNBLOCKED in Redis 7.0, NOGROUP later.
        if str(error).startswith(("NOGROUP", "UNBLOCKED")):
            return NoGroupError(str(error))
        return self._explain(error, what=what)

    async def _with_retries(self, send: Callable[[], Awaitable[_Answer]], *, what: str) -> _Answer:
        """`send`, again after lost connections until the deadline: a restarting server costs time, not the run."""
        deadline_s = time.monotonic() + self._timeout_s
        failures = 0
        while True:
            remaining_s = deadline_s - time.monotonic()
            try:
                async with asyncio.timeout(remaining_s):
                    return await _cancellable(send())
            except refused.ResponseError as error:
                raise self._refusal(error, what=what) from error
            except (refused.RedisError, OSError, TimeoutError) as error:
                pause_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                if not self._is_transient(error) or time.monotonic() + pause_s >= deadline_s:
                    raise self._explain(error, what=what) from error
                await asyncio.sleep(pause_s)

    async def check(self, keys: Keys) -> None:
        """Is this a server that a run can use? Raises StreamError: unreachable, refused, older than 7, a replica, full,
        without Lua."""
        info = await self.command("INFO")
        version = str(info.get("valkey_version") or info.get("redis_version") or "0")
        if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < MIN_SERVER_VERSION:
            raise StreamError(
                "the Redis server is too old",
                got=f"{self.address} runs version {version}",
                do=f"use Redis or Valkey {MIN_SERVER_VERSION} or newer",
            )
        if info.get("role") != "master":
            raise StreamError(
                "this Redis is a read-only replica",
                got=f"{self.address}, role {info.get('role')}",
                do="point redis.url at the primary",
            )
        answer = await self.script(_WRITE_CHECK, keys=[keys.token("check")], args=[1000])
        if answer != b"written":
            raise StreamError("Redis did not keep what was written", got=f"{self.address}: {answer!r}")


_WRITE_CHECK: Final = Script("""
redis.call('SET', KEYS[1], 'written', 'PX', ARGV[1])
return redis.call('GET', KEYS[1])
""")
