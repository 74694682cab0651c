"""What every implementation of `cluster.streams.Streams` keeps, and the small stores beside it."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import RunExistsError, StreamError
from cluster.keys import score_key
from cluster.redis_client import acl_rules
from cluster.redis_server import EmbeddedServer
from cluster.stores import Directory, Member, MemoryDirectory, MemoryScores, ScoreStore
from cluster.streams import Delivery, Depth, StreamName, Streams
from tests.contract.conftest import MakeRedis, ManualClock, World

PROMPTS, ROLLOUTS, SCORED = StreamName.PROMPTS, StreamName.ROLLOUTS, StreamName.SCORED


async def take(
    streams: Streams, *, consumer: str = "a", stream: StreamName = PROMPTS, count: int = 10
) -> list[Delivery]:
    return await streams.claim(stream, consumer=consumer, max_count=count, wait_s=0.0)


def payloads(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.payload for delivery in deliveries]


async def test_entries_come_in_order_once_and_byte_for_byte(world: World) -> None:
    sent = [bytes(range(256)), b"", b"\r\n$3\r\n", b"x" * 100_000]
    await world.streams.publish(PROMPTS, sent)
    got = await take(world.streams)
    assert payloads(got) == sent
    assert [delivery.deliveries for delivery in got] == [1, 1, 1, 1]
    assert await take(world.streams) == []
    assert await take(world.streams, consumer="b") == []


async def test_max_count_bounds_a_claim(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2", b"3"])
    assert payloads(await take(world.streams, count=2)) == [b"1", b"2"]
    assert await take(world.streams, count=0) == []
    assert payloads(await take(world.streams, consumer="b", count=2)) == [b"3"]


async def test_publishing_nothing_is_nothing(world: World) -> None:
    await world.streams.publish(PROMPTS, [])
    assert await world.streams.depth(PROMPTS) == Depth(0, 0, 0.0)


async def test_identical_payloads_are_separate_entries(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"same"])
    await world.streams.publish(PROMPTS, [b"same", b"same"])
    assert payloads(await take(world.streams)) == [b"same"] * 3


async def test_claim_wakes_on_publish(world: World) -> None:
    waiting = asyncio.create_task(world.streams.claim(PROMPTS, consumer="a", max_count=1, wait_s=30.0))
    await world.streams.publish(PROMPTS, [b"late"])
    assert payloads(await asyncio.wait_for(waiting, 10)) == [b"late"]


async def test_claim_wakes_on_advance(world: World) -> None:
    waiting = asyncio.create_task(world.streams.claim(ROLLOUTS, consumer="a", max_count=1, wait_s=30.0))
    await world.streams.publish(PROMPTS, [b"prompt"])
    (taken,) = await take(world.streams)
    assert await world.streams.advance(PROMPTS, taken.entry_id, target=ROLLOUTS, payload=b"rollout")
    assert payloads(await asyncio.wait_for(waiting, 10)) == [b"rollout"]


async def test_claim_gives_up_after_its_wait(world: World) -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    assert await world.streams.claim(PROMPTS, consumer="a", max_count=1, wait_s=0.2) == []
    assert 0.15 < loop.time() - start_s < 5.0


async def test_advance_moves_an_entry_once(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"prompt"])
    (taken,) = await take(world.streams)
    assert await world.streams.advance(PROMPTS, taken.entry_id, target=ROLLOUTS, payload=b"first")
    assert not await world.streams.advance(PROMPTS, taken.entry_id, target=ROLLOUTS, payload=b"second")
    assert payloads(await take(world.streams, stream=ROLLOUTS)) == [b"first"]
    assert (await world.streams.depth(PROMPTS)).in_flight == 0


async def test_advances_at_the_same_time_each_get_their_own_answer(world: World) -> None:
    sent = [f"{number}".encode() for number in range(300)]
    await world.streams.publish(PROMPTS, sent)
    taken = await take(world.streams, count=300)
    await world.streams.settle(PROMPTS, [delivery.entry_id for delivery in taken[::3]])
    ids = [delivery.entry_id for delivery in taken]
    hops = (world.streams.advance(PROMPTS, id_, target=ROLLOUTS, payload=id_.encode()) for id_ in ["no id", *ids])
    assert await asyncio.gather(*hops) == [False] + [number % 3 != 0 for number in range(300)]
    moved = payloads(await take(world.streams, stream=ROLLOUTS, count=300))
    assert moved == [id_.encode() for number, id_ in enumerate(ids) if number % 3]


async def test_a_cancelled_advance_takes_no_other_with_it(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2"])
    one, two = await take(world.streams)
    hops = [
        asyncio.create_task(world.streams.advance(PROMPTS, d.entry_id, target=ROLLOUTS, payload=d.payload))
        for d in (one, two)
    ]
    await asyncio.sleep(0)
    hops[0].cancel()
    assert await hops[1]
    moved = payloads(await take(world.streams, stream=ROLLOUTS))
    assert b"2" in moved


async def test_an_entry_that_nobody_claimed_cannot_be_advanced_or_settled(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2"])
    (taken,) = await take(world.streams, count=1)
    milliseconds, sequence = taken.entry_id.split("-")
    for unclaimed in (f"{milliseconds}-{int(sequence) + 1}", f"{int(milliseconds) + 1}-{sequence}"):
        assert not await world.streams.advance(PROMPTS, unclaimed, target=ROLLOUTS, payload=b"no")
        assert await world.streams.settle(PROMPTS, [unclaimed]) == 0
    assert payloads(await take(world.streams)) == [b"2"]


async def test_settle_counts_what_was_still_there(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2", b"3"])
    ids = [delivery.entry_id for delivery in await take(world.streams)]
    assert await world.streams.settle(PROMPTS, ids[:2]) == 2
    assert await world.streams.settle(PROMPTS, ids) == 1
    assert await world.streams.settle(PROMPTS, ids) == 0
    assert await world.streams.settle(PROMPTS, []) == 0
    assert await world.streams.depth(PROMPTS) == Depth(0, 0, 0.0)


async def test_a_lease_that_ran_out_goes_to_another_and_is_counted(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2"])
    first = await take(world.streams)
    assert await take(world.streams, consumer="b") == []
    await world.expire_leases(PROMPTS)
    second = await take(world.streams, consumer="b")
    assert [(d.entry_id, d.payload, d.deliveries) for d in second] == [(d.entry_id, d.payload, 2) for d in first]
    await world.expire_leases(PROMPTS)
    assert [d.deliveries for d in await take(world.streams, consumer="a")] == [3, 3]


async def test_expired_leases_come_before_new_entries(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"old"])
    await take(world.streams)
    await world.expire_leases(PROMPTS)
    await world.streams.publish(PROMPTS, [b"new"])
    got = await take(world.streams, consumer="b")
    assert [(d.payload, d.deliveries) for d in got] == [(b"old", 2), (b"new", 1)]


async def test_many_expired_leases_are_all_found(world: World) -> None:
    sent = [f"{number}".encode() for number in range(400)]
    await world.streams.publish(PROMPTS, sent)
    await take(world.streams, count=400)
    await world.expire_leases(PROMPTS)
    found: list[bytes] = []
    while batch := await take(world.streams, consumer="b", count=7):
        found += payloads(batch)
    assert found == sent


async def test_the_late_holder_of_a_lost_lease_can_finish_first_and_then_the_other_cannot(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1"])
    (slow,) = await take(world.streams)
    await world.expire_leases(PROMPTS)
    (quick,) = await take(world.streams, consumer="b")
    assert await world.streams.advance(PROMPTS, slow.entry_id, target=ROLLOUTS, payload=b"slow")
    assert not await world.streams.advance(PROMPTS, quick.entry_id, target=ROLLOUTS, payload=b"quick")
    assert payloads(await take(world.streams, stream=ROLLOUTS)) == [b"slow"]


async def test_renewed_leases_stay(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2"])
    kept, lost = await take(world.streams)
    await world.expire_leases(PROMPTS)
    await world.streams.renew(PROMPTS, consumer="a", entry_ids=[kept.entry_id])
    assert [d.entry_id for d in await take(world.streams, consumer="b")] == [lost.entry_id]


async def test_renewing_does_not_steal_back_nor_count_a_delivery(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1"])
    (first,) = await take(world.streams)
    await world.expire_leases(PROMPTS)
    (second,) = await take(world.streams, consumer="b")
    await world.streams.renew(PROMPTS, consumer="b", entry_ids=[second.entry_id])
    await world.streams.renew(PROMPTS, consumer="a", entry_ids=[first.entry_id])
    restarted = await world.reconnected()
    assert await take(restarted, consumer="a") == []
    (again,) = await take(restarted, consumer="b")
    assert (again.entry_id, again.deliveries) == (first.entry_id, 3)


async def test_renewing_what_is_gone_is_nothing(world: World) -> None:
    await world.streams.renew(PROMPTS, consumer="a", entry_ids=["1-0"])
    await world.streams.renew(PROMPTS, consumer="a", entry_ids=[])


async def test_a_restarted_consumer_gets_its_own_entries_first_without_waiting_for_the_lease(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2", b"3"])
    await take(world.streams, count=1)
    await take(world.streams, consumer="b", count=1)
    restarted = await world.reconnected()
    got = await take(restarted)
    assert [(d.payload, d.deliveries) for d in got] == [(b"1", 2), (b"3", 1)]
    assert await take(restarted) == []


async def test_recovery_goes_on_over_small_claims(world: World) -> None:
    sent = [f"{number}".encode() for number in range(250)]
    await world.streams.publish(PROMPTS, sent)
    await take(world.streams, count=250)
    await world.streams.publish(PROMPTS, [b"new"])
    restarted = await world.reconnected()
    found: list[tuple[bytes, int]] = []
    while batch := await take(restarted, count=60):
        found += [(d.payload, d.deliveries) for d in batch]
    assert found == [(payload, 2) for payload in sent] + [(b"new", 1)]


async def test_a_consumer_is_not_handed_what_it_works_on(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1"])
    await take(world.streams)
    await world.streams.publish(PROMPTS, [b"2"])
    assert payloads(await take(world.streams)) == [b"2"]


async def test_a_cancelled_claim_loses_nothing(world: World) -> None:
    waiting = asyncio.create_task(world.streams.claim(PROMPTS, consumer="a", max_count=5, wait_s=30.0))
    await world.streams.depth(PROMPTS)  # Lets the claim get under way.
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await world.streams.publish(PROMPTS, [b"1", b"2"])
    got = payloads(await take(world.streams))
    got += payloads(await take(world.streams))
    assert got == [b"1", b"2"]


async def test_depth_counts_backlog_in_flight_and_age(world: World) -> None:
    await world.streams.publish(PROMPTS, [b"1", b"2", b"3"])
    (taken,) = await take(world.streams, count=1)
    depth = await world.streams.depth(PROMPTS)
    assert (depth.backlog, depth.in_flight) == (2, 1)
    assert 0.0 <= depth.oldest_age_s < 60.0
    await world.streams.advance(PROMPTS, taken.entry_id, target=ROLLOUTS, payload=b"r")
    depth = await world.streams.depth(PROMPTS)
    assert (depth.backlog, depth.in_flight) == (2, 0)
    assert (await world.streams.depth(ROLLOUTS)).backlog == 1


async def test_concurrent_consumers_share_without_overlap(world: World) -> None:
    sent = [f"{number}".encode() for number in range(200)]

    async def work(name: str) -> list[bytes]:
        done: list[bytes] = []
        while batch := await take(world.streams, consumer=name, count=3):
            for delivery in batch:
                assert await world.streams.advance(PROMPTS, delivery.entry_id, target=SCORED, payload=delivery.payload)
                done.append(delivery.payload)
        return done

    await world.streams.publish(PROMPTS, sent)
    shares = await asyncio.gather(*(work(f"w{number}") for number in range(4)))
    assert sorted(payload for share in shares for payload in share) == sorted(sent)
    assert sorted(payloads(await take(world.streams, stream=SCORED, count=500))) == sorted(sent)


async def test_claims_of_one_consumer_at_the_same_time_do_not_overlap(world: World) -> None:
    await world.streams.publish(PROMPTS, [f"{number}".encode() for number in range(40)])
    batches = await asyncio.gather(*(take(world.streams, count=10) for _ in range(4)))
    assert len({payload for batch in batches for payload in payloads(batch)}) == 40
    assert all(delivery.deliveries == 1 for batch in batches for delivery in batch)


# ---------------------------------------------------------------- stores


@pytest.fixture(params=["memory", "valkey"])
async def stores(request: pytest.FixtureRequest, make_redis_world: MakeRedis) -> tuple[ScoreStore, Directory]:
    if request.param == "memory":
        return MemoryScores(), MemoryDirectory()
    client = (await make_redis_world(request.getfixturevalue("valkey"), role="worker")).client()
    return client.scores, client.directory


async def test_scores_come_back_and_misses_are_none(stores: tuple[ScoreStore, Directory]) -> None:
    scores, _ = stores
    one, two = score_key("rm1", "aa"), score_key("rm2", "aa")
    await scores.put_many({one: b"\x00\xff"}, ttl_s=60)
    await scores.put_many({}, ttl_s=60)
    assert await scores.get_many([two, one, one]) == [None, b"\x00\xff", b"\x00\xff"]
    assert await scores.get_many([]) == []


async def test_directory_lists_living_members(stores: tuple[ScoreStore, Directory]) -> None:
    _, directory = stores
    await directory.announce("rollout", instance="r 1", address="10.0.0.1:1", ttl_s=60)
    await directory.announce("learner", instance="l", address="[::1]:2", ttl_s=60)
    await directory.announce("rollout", instance="r 1", address="10.0.0.1:3", ttl_s=60)
    await directory.announce("reward", instance="w", address="h:4", ttl_s=60)
    await directory.withdraw("reward", instance="w")
    assert await directory.members() == [Member("learner", "l", "[::1]:2"), Member("rollout", "r 1", "10.0.0.1:3")]


async def test_memory_stores_forget_after_their_ttl() -> None:
    clock = ManualClock()
    scores, directory = MemoryScores(clock=clock), MemoryDirectory(clock=clock)
    await scores.put_many({"k": b"v"}, ttl_s=10)
    await directory.announce("r", instance="i", address="h:1", ttl_s=10)
    clock.advance(10)
    assert await scores.get_many(["k"]) == [None]
    assert await directory.members() == []


async def test_redis_stores_forget_after_their_ttl(valkey: EmbeddedServer, make_redis_world: MakeRedis) -> None:
    world = await make_redis_world(valkey)
    client = world.client()
    await client.scores.put_many({"rm:k": b"v"}, ttl_s=30)
    await client.directory.announce("r", instance="gone", address="h:1", ttl_s=0.001)
    await client.directory.announce("r", instance="here", address="h:2", ttl_s=30)
    assert 0 < await world.admin.pttl(f"keel:{{{world.run}}}:score:rm:k") <= 30_000
    members = await client.directory.members()
    while len(members) > 1:  # One millisecond of the server's clock.
        members = await client.directory.members()
    assert members == [Member("r", "here", "h:2")]
    assert await world.admin.hlen(f"keel:{{{world.run}}}:targets") == 1


async def test_only_one_run_of_a_name(valkey: EmbeddedServer, make_redis_world: MakeRedis) -> None:
    world = await make_redis_world(valkey)
    first, second = world.client().lock, world.client().lock
    await first.acquire()
    await first.acquire()
    with pytest.raises(RunExistsError, match=world.run) as caught:
        await second.acquire()
    assert "pid" in str(caught.value)
    await second.release()
    await first.renew()
    with pytest.raises(RunExistsError):
        await second.acquire()
    await first.release()
    await second.acquire()
    with pytest.raises(RunExistsError):
        await first.renew()


async def test_a_lost_lock_is_taken_again(valkey: EmbeddedServer, make_redis_world: MakeRedis) -> None:
    world = await make_redis_world(valkey)
    lock = world.client().lock
    await lock.acquire()
    await world.admin.delete(f"keel:{{{world.run}}}:lock")
    await lock.renew()
    assert 0 < await world.admin.pttl(f"keel:{{{world.run}}}:lock") <= 60_000


async def test_roles_can_do_their_work_and_no_more(valkey: EmbeddedServer, make_redis_world: MakeRedis) -> None:
    learner = (await make_redis_world(valkey, role="learner")).client()
    worker_world = await make_redis_world(valkey, role="worker")
    worker = worker_world.client()
    for client in (learner, worker):
        await client.check()
        await client.scores.put_many({"rm:k": b"v"}, ttl_s=30)
        await client.directory.announce("r", instance="i", address="h:1", ttl_s=30)
    await learner.lock.acquire()
    await learner.lock.release()
    with pytest.raises(StreamError, match="access control"):
        await worker.lock.acquire()
    assert all("~" not in rule or worker_world.run in rule for rule in acl_rules("worker", run=worker_world.run))


async def test_every_key_of_a_run_but_streams_expires(valkey: EmbeddedServer, make_redis_world: MakeRedis) -> None:
    world = await make_redis_world(valkey)
    client = world.client()
    await client.check()
    await client.lock.acquire()
    await client.scores.put_many({"rm:k": b"v"}, ttl_s=30)
    await client.directory.announce("r", instance="i", address="h:1", ttl_s=30)
    await client.streams.publish(PROMPTS, [b"1", b"2"])
    taken = await take(client.streams)
    await client.streams.advance(PROMPTS, taken[0].entry_id, target=ROLLOUTS, payload=b"r")
    await client.streams.settle(PROMPTS, [taken[1].entry_id])
    lasting = [key async for key in world.admin.scan_iter(f"keel:{{{world.run}}}:*") if await world.admin.pttl(key) < 0]
    assert sorted(key.decode().rsplit(":", 1)[1] for key in lasting) == ["prompts", "rollouts"]
