"""What goes wrong with a queue server: killed and restarted, flushed, stalled, locked, full, a replica, not there.

Order comes from events (a send was made, a process has ended), not from sleeping.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as aioredis

from cluster.errors import StreamError
from cluster.keys import GROUP, Keys
from cluster.redis_client import RedisClient
from cluster.redis_server import EmbeddedServer
from cluster.run_redis import RunRedis
from cluster.streams import Delivery, Depth, StreamName

PROMPTS, ROLLOUTS = StreamName.PROMPTS, StreamName.ROLLOUTS
KEY = Keys("faults").stream(PROMPTS)
STALL_TIMEOUT_S = 3.0
"""Of a command; a third of it passes before the first re-send."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path) as running:
        yield running


@pytest.fixture
async def admin(server: EmbeddedServer) -> AsyncIterator[Any]:
    client: Any = aioredis.Redis.from_url(server.url, protocol=2)
    # The tests kill the server at once after a write, where everysec may lose a second.
    await client.config_set("appendfsync", "always")
    yield client
    await client.aclose()


@pytest.fixture
async def run(server: EmbeddedServer, admin: Any) -> AsyncIterator[RunRedis]:
    client = RunRedis(server.url, run="faults", command_timeout_s=10.0)
    yield client
    await client.close()


async def claim(run: RunRedis, *, consumer: str = "a", wait_s: float = 0.0, count: int = 10) -> list[Delivery]:
    return await run.streams.claim(PROMPTS, consumer=consumer, max_count=count, wait_s=wait_s)


async def blocked_claim(run: RunRedis, admin: Any) -> asyncio.Task[list[Delivery]]:
    """A claim that the server is holding in a blocking read."""
    waiting = asyncio.create_task(claim(run, wait_s=60.0))
    while (await admin.info("clients"))["blocked_clients"] < 1:
        assert not waiting.done()
    return waiting


async def kill(server: EmbeddedServer) -> None:
    handle = os.pidfd_open(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    assert (await asyncio.to_thread(select.select, [handle], [], [], 10))[0]
    os.close(handle)


class Sends:
    """Counts what a client puts on the wire, and lets a test wait for the n-th."""

    def __init__(self, run: RunRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._changed = asyncio.Condition()
        commands = run._client._commands
        original = commands.execute_command

        async def counted(*args: Any) -> Any:
            async with self._changed:
                self.count += 1
                self._changed.notify_all()
            return await original(*args)

        monkeypatch.setattr(commands, "execute_command", counted)

    async def reached(self, count: int) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: self.count >= count), 20)


# ---------------------------------------------------------------- lost and restarted


async def test_a_killed_server_costs_time_only(run: RunRedis, admin: Any, server: EmbeddedServer) -> None:
    await run.streams.publish(PROMPTS, [b"1"])
    (held,) = await claim(run)
    waiting = await blocked_claim(run, admin)
    await kill(server)
    await asyncio.to_thread(server.start)
    await run.streams.publish(PROMPTS, [b"2"])
    # The entry it already works on is not handed out again.
    assert [(d.payload, d.deliveries) for d in await asyncio.wait_for(waiting, 20)] == [(b"2", 1)]
    assert await run.streams.advance(PROMPTS, held.entry_id, target=ROLLOUTS, payload=b"r")


async def test_a_server_that_stays_away_ends_a_blocked_claim_with_an_error(
    run: RunRedis, admin: Any, server: EmbeddedServer
) -> None:
    impatient = RunRedis(server.url, run="faults", command_timeout_s=0.5)
    waiting = await blocked_claim(impatient, admin)
    await kill(server)
    with pytest.raises(StreamError, match="cannot be reached"):
        await asyncio.wait_for(waiting, 10)
    await impatient.close()


async def test_a_reply_that_was_lost_is_fetched_after_reconnecting(run: RunRedis, admin: Any) -> None:
    waiting = await blocked_claim(run, admin)
    pipeline = admin.pipeline(transaction=True)
    # In one step: the entry goes to the consumer in a reply that it never reads, and its connection drops.
    pipeline.client_kill_filter(_type="normal", skipme=True)
    pipeline.xadd(KEY, {"p": b"1"})
    pipeline.execute_command("XREADGROUP", "GROUP", GROUP, "a", "STREAMS", KEY, ">")
    await pipeline.execute()
    assert [(d.payload, d.deliveries) for d in await asyncio.wait_for(waiting, 20)] == [(b"1", 2)]
    assert (await run.streams.depth(PROMPTS)).in_flight == 1


async def test_flushed_at_rest_and_while_a_claim_waits(run: RunRedis, admin: Any) -> None:
    await run.streams.publish(PROMPTS, [b"1"])
    (lost,) = await claim(run)
    await admin.flushall()
    assert not await run.streams.advance(PROMPTS, lost.entry_id, target=ROLLOUTS, payload=b"r")
    assert await run.streams.settle(PROMPTS, [lost.entry_id]) == 0
    await run.streams.renew(PROMPTS, consumer="a", entry_ids=[lost.entry_id])
    assert await run.streams.depth(PROMPTS) == Depth(0, 0, 0.0)
    waiting = await blocked_claim(run, admin)
    await admin.flushall()
    await run.streams.publish(PROMPTS, [b"2"])
    assert [d.payload for d in await asyncio.wait_for(waiting, 20)] == [b"2"]


async def test_a_group_made_late_still_hands_out_the_backlog(run: RunRedis) -> None:
    await run.streams.publish(PROMPTS, [b"1", b"2"])
    assert (await run.streams.depth(PROMPTS)).backlog == 2
    assert [d.payload for d in await claim(run)] == [b"1", b"2"]


# ---------------------------------------------------------------- stalled: sent again, done once


@pytest.fixture
async def stalling(server: EmbeddedServer, admin: Any) -> AsyncIterator[RunRedis]:
    client = RunRedis(server.url, run="faults", command_timeout_s=STALL_TIMEOUT_S)
    await client.check()
    yield client
    os.kill(server.pid, signal.SIGCONT)
    await client.close()


async def script_calls(admin: Any) -> int:
    stats = (await admin.info("commandstats")).get("cmdstat_evalsha", {})
    return int(stats.get("calls", 0))


async def through_a_stall(server: EmbeddedServer, sends: Sends, call: Any) -> Any:
    """Run `call` on a stopped server until it has been sent twice; then let the server go on."""
    already = sends.count
    os.kill(server.pid, signal.SIGSTOP)
    task = asyncio.create_task(call)
    try:
        await sends.reached(already + 2)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    return await asyncio.wait_for(task, 20)


async def test_publish_through_a_stall_appends_once(
    stalling: RunRedis, admin: Any, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stalling.streams.publish(PROMPTS, [b"0"])
    before = await script_calls(admin)
    sends = Sends(stalling, monkeypatch)
    await through_a_stall(server, sends, stalling.streams.publish(PROMPTS, [b"1", b"2"]))
    assert await script_calls(admin) >= before + 2, "the stalled copy should have run as well"
    assert [entry[1][b"p"] for entry in await admin.xrange(KEY)] == [b"0", b"1", b"2"]


async def test_advance_and_settle_through_a_stall_count_once_and_say_so(
    stalling: RunRedis, admin: Any, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One of each beforehand, so that the scripts are known to the server.
    await stalling.streams.publish(PROMPTS, [b"1", b"2", b"3", b"4"])
    one, two, three, four = await claim(stalling)
    assert await stalling.streams.advance(PROMPTS, one.entry_id, target=ROLLOUTS, payload=b"r1")
    assert await stalling.streams.settle(PROMPTS, [two.entry_id]) == 1
    sends = Sends(stalling, monkeypatch)
    advance = stalling.streams.advance(PROMPTS, three.entry_id, target=ROLLOUTS, payload=b"r3")
    assert await through_a_stall(server, sends, advance) is True
    assert await through_a_stall(server, sends, stalling.streams.settle(PROMPTS, [four.entry_id])) == 1
    entries = await admin.xrange(Keys("faults").stream(ROLLOUTS))
    assert [entry[1][b"p"] for entry in entries] == [b"r1", b"r3"]
    assert await admin.xlen(KEY) == 0


async def test_a_stall_beyond_the_deadline_is_an_error(stalling: RunRedis, server: EmbeddedServer) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(StreamError, match="did not answer in time") as caught:
        await stalling.streams.depth(PROMPTS)
    assert server.address in str(caught.value)


async def test_every_advance_that_waits_learns_that_the_server_is_gone(
    run: RunRedis, admin: Any, server: EmbeddedServer
) -> None:
    impatient = RunRedis(server.url, run="faults", command_timeout_s=0.5)
    await run.streams.publish(PROMPTS, [b"1"] * 200)
    taken = await claim(run, count=200)
    await kill(server)
    hops = (impatient.streams.advance(PROMPTS, d.entry_id, target=ROLLOUTS, payload=b"r") for d in taken)
    results = await asyncio.wait_for(asyncio.gather(*hops, return_exceptions=True), 10)
    assert [type(result) for result in results] == [StreamError] * 200
    await asyncio.to_thread(server.start)
    assert await impatient.streams.advance(PROMPTS, taken[0].entry_id, target=ROLLOUTS, payload=b"r")
    await impatient.close()


# ---------------------------------------------------------------- refusals, in words


async def refused(url: str) -> StreamError:
    client = RunRedis(url, run="faults", command_timeout_s=1.0)
    with pytest.raises(StreamError) as caught:
        await client.check()
    await client.close()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    return caught.value


async def test_a_wrong_password_is_named_and_not_shown(server: EmbeddedServer) -> None:
    error = await refused(f"redis://:hunter2@{server.address}/0")
    assert "refused the user name or password" in error.what
    assert server.address in error.got
    assert "hunter2" not in str(error)
    assert "hunter2" not in repr(error)


async def test_a_missing_password_is_named(server: EmbeddedServer) -> None:
    assert "refused the user name or password" in (await refused(f"redis://{server.address}/0")).what


async def test_nothing_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound and not listening: refuses connections, and nobody else gets it.
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error = await refused(f"redis://:hunter2@{address}/0")
    assert "cannot be reached" in error.what
    assert address in error.got
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("url", ["redis://:a/hunter2@host:1", "http://:hunter2@host", "hunter2", "redis://h:hunter2"])
def test_an_unreadable_url_is_not_quoted(url: str) -> None:
    with pytest.raises(StreamError, match="URL") as caught:
        RedisClient(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_representations_have_no_password() -> None:
    run = RunRedis("redis://user:hunter2@host:1234/0", run="r")
    assert "host:1234" in repr(run)
    assert all("hunter2" not in repr(part) for part in (run, run.streams, run._client))


async def test_a_replica_is_refused_at_start_and_later(run: RunRedis, admin: Any, server: EmbeddedServer) -> None:
    await run.check()
    await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    assert "read-only replica" in (await refused(server.url)).what
    with pytest.raises(StreamError, match="read-only replica"):
        await run.streams.publish(PROMPTS, [b"1"])


async def test_a_full_server_refuses_new_work_whole_and_still_lets_work_finish(run: RunRedis, admin: Any) -> None:
    await run.streams.publish(PROMPTS, [b"1", b"2", b"3"])
    one, two = await claim(run, count=2)
    await admin.config_set("maxmemory", "1")
    with pytest.raises(StreamError, match="out of memory"):
        await run.streams.publish(PROMPTS, [b"4", b"5"])
    with pytest.raises(StreamError, match="out of memory"):
        await run.check()
    assert await run.streams.settle(PROMPTS, [one.entry_id]) == 1
    assert await run.streams.advance(PROMPTS, two.entry_id, target=ROLLOUTS, payload=b"r")
    await admin.config_set("maxmemory", "0")
    assert [d.payload for d in await claim(run)] == [b"3"]
    assert (await run.streams.depth(ROLLOUTS)).backlog == 1


async def test_a_user_without_rights_is_told_so(server: EmbeddedServer, admin: Any) -> None:
    await admin.execute_command("ACL", "SETUSER", "guest", "on", ">hunter2", "~*", "+@all", "-xadd")
    client = RunRedis(f"redis://guest:hunter2@{server.address}/0", run="faults", command_timeout_s=1.0)
    with pytest.raises(StreamError, match="access control") as caught:
        await client.streams.publish(PROMPTS, [b"1"])
    assert "hunter2" not in str(caught.value)
    await client.close()


@pytest.mark.parametrize(
    ("info", "complaint"),
    [
        ({"redis_version": "6.2.14", "role": "master"}, "too old"),
        ({"redis_version": "7.2.4", "valkey_version": "6.9", "role": "master"}, "too old"),
        ({"role": "master"}, "too old"),
        ({"redis_version": "7.4.0", "role": "slave"}, "read-only replica"),
    ],
)
async def test_unfit_servers_are_refused(
    info: dict[str, str], complaint: str, run: RunRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(*args: Any) -> dict[str, str]:
        return info

    monkeypatch.setattr(run._client, "command", answer)
    with pytest.raises(StreamError, match=complaint):
        await run.check()
