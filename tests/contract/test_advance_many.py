"""Many hops in one call, on every implementation of the streams; and a call whose reply is lost, on a server."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from cluster.redis_server import EmbeddedServer
from cluster.streams import Depth, Hop, StreamName
from tests.contract.conftest import MakeRedis, World
from tests.contract.test_streams import payloads, take

PROMPTS, ROLLOUTS, SCORED = StreamName.PROMPTS, StreamName.ROLLOUTS, StreamName.SCORED


async def test_advance_many_moves_each_entry_to_its_own_target_in_order(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2", b"3"])
    one, two, three = (delivery.entry_id for delivery in await take(world.streams))
    hops = [Hop(one, ROLLOUTS, b"r1"), Hop(two, SCORED, b"s2"), Hop(three, ROLLOUTS, bytes(range(256)))]
    assert await world.streams.advance_many(PROMPTS, hops) == [True, True, True]
    assert payloads(await take(world.streams, stream=ROLLOUTS)) == [b"r1", bytes(range(256))]
    assert payloads(await take(world.streams, stream=SCORED)) == [b"s2"]
    assert await world.streams.depth(PROMPTS) == Depth(0, 0, 0.0)
    assert await world.streams.advance_many(PROMPTS, []) == []


async def test_advance_many_leaves_out_what_is_gone_and_moves_the_rest(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2", b"3", b"4"])
    settled, moved, kept = (delivery.entry_id for delivery in await take(world.streams, count=3))
    await world.streams.settle(PROMPTS, [settled])
    assert await world.streams.advance(PROMPTS, moved, target=ROLLOUTS, payload=b"before")
    unclaimed = f"{int(kept.split('-')[0]) + 60_000}-0"
    hops = [Hop(entry_id, ROLLOUTS, b"many") for entry_id in ("no id", settled, unclaimed, moved, kept, kept)]
    assert await world.streams.advance_many(PROMPTS, hops) == [False, False, False, False, True, False]
    assert await world.streams.advance_many(PROMPTS, hops) == [False] * 6
    assert payloads(await take(world.streams, stream=ROLLOUTS)) == [b"before", b"many"]
    assert payloads(await take(world.streams)) == [b"4"]


async def test_of_two_holders_one_advances_whichever_way_it_calls(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2"])
    slow = [delivery.entry_id for delivery in await take(world.streams)]
    await world.expire_leases(PROMPTS)
    quick = [delivery.entry_id for delivery in await take(world.streams, consumer="b")]
    assert quick == slow
    first, second, third, fourth = await asyncio.gather(
        world.streams.advance_many(PROMPTS, [Hop(entry_id, ROLLOUTS, b"slow") for entry_id in slow]),
        world.streams.advance_many(PROMPTS, [Hop(entry_id, ROLLOUTS, b"quick") for entry_id in reversed(quick)]),
        world.streams.advance(PROMPTS, quick[0], target=ROLLOUTS, payload=b"single"),
        world.streams.advance(PROMPTS, quick[1], target=ROLLOUTS, payload=b"single"),
    )
    assert [*first, *second, third, fourth].count(True) == 2
    assert len(await take(world.streams, stream=ROLLOUTS)) == 2


async def test_advance_many_takes_large_batches(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"x"] * 2000)
    taken = await take(world.streams, count=2000)
    hops = [Hop(delivery.entry_id, ROLLOUTS, f"{number}".encode()) for number, delivery in enumerate(taken)]
    assert await world.streams.advance_many(PROMPTS, hops) == [True] * 2000
    moved = await take(world.streams, stream=ROLLOUTS, count=2000)
    assert payloads(moved) == [f"{number}".encode() for number in range(2000)]


async def test_claim_wakes_on_advance_many(world: World) -> None:
    waiting = asyncio.create_task(world.streams.claim(ROLLOUTS, consumer="a", max_count=2, wait_s=30.0))
    await world.streams.publish(PROMPTS, [b"1", b"2"])
    hops = [Hop(delivery.entry_id, ROLLOUTS, delivery.payload) for delivery in await take(world.streams)]
    assert await world.streams.advance_many(PROMPTS, hops) == [True, True]
    assert payloads(await asyncio.wait_for(waiting, 10)) == [b"1", b"2"]


@pytest.mark.parametrize("lost", [1, 2])
async def test_a_hop_that_is_sent_again_moves_once_and_gives_the_first_answer(
    valkey: EmbeddedServer, make_redis_world: MakeRedis, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """The reply is lost after the server has done the work, so the client sends the very same call again."""
    world = await make_redis_world(valkey, role="worker")
    client = world.client()
    await client.streams.publish(PROMPTS, [b"1", b"2", b"3"])
    one, two, three = (delivery.entry_id for delivery in await take(client.streams))
    await client.streams.advance_many(PROMPTS, [Hop(one, ROLLOUTS, b"r1")])  # the server knows the script from here on
    commands = client._client._commands
    send, left = commands.execute_command, lost
    sent: list[tuple[object, ...]] = []

    async def send_and_lose_the_reply(*args: object) -> object:
        nonlocal left
        sent.append(args)
        reply = await send(*args)
        if left:
            left -= 1
            raise RedisConnectionError("the connection broke")
        return reply

    monkeypatch.setattr(commands, "execute_command", send_and_lose_the_reply)
    hops = [Hop(one, ROLLOUTS, b"late"), Hop(two, ROLLOUTS, b"r2"), Hop(three, SCORED, b"s3")]
    assert await client.streams.advance_many(PROMPTS, hops) == [False, True, True]
    monkeypatch.undo()
    assert sent == [sent[0]] * (1 + lost)
    assert payloads(await take(client.streams, stream=ROLLOUTS)) == [b"r1", b"r2"]
    assert payloads(await take(client.streams, stream=SCORED)) == [b"s3"]
    assert (await client.streams.depth(PROMPTS)) == Depth(0, 0, 0.0)
