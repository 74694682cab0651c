"""What every implementation of `cluster.review_queue.ReviewQueue` keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import pytest

from cluster.errors import DataError, StreamError
from cluster.keys import Keys
from cluster.redis_server import EmbeddedServer
from cluster.review_queue import (
    Judgement,
    Kind,
    MemoryReviewQueue,
    Recorded,
    ReviewItem,
    ReviewQueue,
    Verdict,
    standing,
)
from tests.contract.conftest import MakeRedis, ManualClock, RedisWorld

LEASE_S = 600.0


class World(Protocol):
    queue: ReviewQueue

    async def expire_leases(self) -> None: ...


@dataclass
class MemoryReview:
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        self.queue: ReviewQueue = MemoryReviewQueue(clock=self.clock)

    async def expire_leases(self) -> None:
        self.clock.advance(LEASE_S + 1)


@dataclass
class RedisReview:
    redis: RedisWorld

    def __post_init__(self) -> None:
        self.queue: ReviewQueue = self.redis.client().review

    async def expire_leases(self) -> None:
        """As if the server's clock had moved on: each lease ended at 1 ms of the epoch."""
        key = Keys(self.redis.run).review("leases")
        for item_id, leases in (await self.redis.admin.hgetall(key)).items():
            ended = msgspec.json.encode(dict.fromkeys(msgspec.json.decode(leases), 1))
            await self.redis.admin.hset(key, item_id, ended)


@pytest.fixture(params=["memory", "valkey", "valkey-learner-acl", "redis-server"])
async def world(request: pytest.FixtureRequest, make_redis_world: MakeRedis) -> World:
    if request.param == "memory":
        return MemoryReview()
    server: EmbeddedServer = request.getfixturevalue("redis_server" if request.param == "redis-server" else "valkey")
    return RedisReview(await make_redis_world(server, role="learner" if "acl" in request.param else None))


def pair(name: str, **fields: Any) -> ReviewItem:
    return ReviewItem(item_id=name, kind="pair", prompt=f"prompt {name}", answers=("one", "two"), **fields)


def answer(name: str, *, kind: Kind = "flagged") -> ReviewItem:
    return ReviewItem(
        item_id=name, kind=kind, prompt="p", answers=("an answer",), reason="rule hit", policy_versions=(3,)
    )


async def take(queue: ReviewQueue, who: str, **options: Any) -> str | None:
    item = await queue.next(who, **{"lease_s": LEASE_S, **options})
    return None if item is None else item.item_id


async def say(queue: ReviewQueue, who: str, item_id: str, verdict: Verdict = "first", *, votes: int = 1) -> bool:
    return await queue.judge(Judgement(item_id=item_id, annotator=who, verdict=verdict), votes=votes)


def verdicts(log: list[Recorded]) -> list[tuple[str, str, str]]:
    return [(entry.judgement.annotator, entry.item.item_id, entry.judgement.verdict) for entry in log]


async def test_items_come_whole_and_in_order(world: World) -> None:
    first = ReviewItem(
        item_id='x "1" \u202e/é',
        kind="pair",
        prompt=[{"role": "user", "content": "<script>\x00\n"}],
        answers=("", "z" * 100_000),
        policy_versions=(None, 7),
        reason="r",
        created_at="2026-01-01T00:00:00+00:00",
    )
    assert await world.queue.push([first, pair("b")], limit=10) == 2
    assert await world.queue.next("ann", lease_s=LEASE_S) == first
    assert await say(world.queue, "ann", first.item_id, "second")
    assert await take(world.queue, "ann") == "b"
    assert await say(world.queue, "ann", "b", "tie")
    assert await world.queue.next("ann", lease_s=LEASE_S) is None
    log = await world.queue.judgements()
    assert [(entry.position, entry.item.item_id, entry.judgement.verdict) for entry in log] == [
        (1, first.item_id, "second"),
        (2, "b", "tie"),
    ]
    assert log[0].item == first
    assert await world.queue.judgements(after=1) == log[1:]


async def test_pushing_is_idempotent_and_bounded_by_kind(world: World) -> None:
    assert await world.queue.push([], limit=1) == 0
    assert await world.queue.push([pair(str(n)) for n in range(120)], limit=100) == 100
    assert await world.queue.push([pair("0"), pair("120")], limit=100) == 0
    assert await world.queue.push([answer("f"), answer("a", kind="audit")], limit=1) == 2
    assert (await world.queue.progress()).waiting == {"pair": 100, "flagged": 1, "audit": 1}
    await say(world.queue, "ann", "0")
    assert await world.queue.push([pair("0")], limit=100) == 0, "a judged item does not come again"
    assert await world.queue.push([pair("121")], limit=100) == 1


async def test_an_item_stays_with_who_has_it(world: World) -> None:
    await world.queue.push([pair("a"), pair("b")], limit=10)
    assert await take(world.queue, "ann") == "a"
    assert await take(world.queue, "bob") == "b"
    assert await take(world.queue, "ann") == "a"
    assert await take(world.queue, "cy") is None
    await world.expire_leases()
    assert await take(world.queue, "cy") == "a"
    assert await take(world.queue, "ann") == "b", "the lease ran out and somebody else took it"


async def test_a_lease_that_ran_out_unnoticed_is_taken_up_again(world: World) -> None:
    await world.queue.push([pair("a"), pair("b")], limit=10)
    assert await take(world.queue, "ann") == "a"
    await world.expire_leases()
    assert await take(world.queue, "ann") == "a"
    assert await take(world.queue, "bob") == "b"


async def test_several_votes_come_from_several_people(world: World) -> None:
    await world.queue.push([pair("a"), pair("b")], limit=10)
    assert await take(world.queue, "ann", votes=2) == "a"
    assert await take(world.queue, "bob", votes=2) == "a"
    assert await take(world.queue, "cy", votes=2) == "b", "two have it already"
    assert await say(world.queue, "ann", "a", votes=2)
    assert await take(world.queue, "ann", votes=2) == "b"
    assert (await world.queue.progress()).waiting["pair"] == 2
    assert await say(world.queue, "bob", "a", "second", votes=2)
    assert (await world.queue.progress()).waiting["pair"] == 1


async def test_kinds_are_asked_for_in_order_and_let_go_of(world: World) -> None:
    await world.queue.push([answer("f"), pair("p"), answer("x", kind="audit")], limit=10)
    assert await take(world.queue, "ann") == "p"
    assert await take(world.queue, "ann", kinds=["audit", "flagged"]) == "x"
    assert await take(world.queue, "bob") == "p", "who asks for other kinds lets the item go"
    assert await take(world.queue, "bob", kinds=["flagged"]) == "f"
    assert await take(world.queue, "cy", kinds=["flagged"]) is None
    assert await take(world.queue, "bob", kinds=[]) is None
    assert await take(world.queue, "cy", kinds=["flagged"]) == "f"


async def test_two_people_never_get_the_same_item_at_once(world: World) -> None:
    await world.queue.push([pair(str(n)) for n in range(20)], limit=100)
    taken = await asyncio.gather(*(take(world.queue, f"person {n}") for n in range(25)))
    assert sorted(item for item in taken if item is not None) == sorted(str(n) for n in range(20))


async def test_a_judgement_sent_twice_counts_once(world: World) -> None:
    await world.queue.push([pair("a")], limit=10)
    judgement = Judgement(item_id="a", annotator="ann", verdict="first", note="clear")
    assert await asyncio.gather(*(world.queue.judge(judgement) for _ in range(5))) == [True] * 5
    assert [entry.judgement for entry in await world.queue.judgements()] == [judgement]
    assert not await say(world.queue, "ann", "a", "second"), "the first stands until it is taken back"
    await world.queue.undo("ann", lease_s=LEASE_S)
    assert await world.queue.judge(judgement), "a copy that comes late"
    assert standing(await world.queue.judgements()) == []


async def test_a_late_judgement_is_kept(world: World) -> None:
    await world.queue.push([pair("a")], limit=10)
    assert await take(world.queue, "ann") == "a"
    await world.expire_leases()
    assert await take(world.queue, "bob") == "a"
    assert await say(world.queue, "bob", "a")
    assert await say(world.queue, "ann", "a", "second")
    assert len(standing(await world.queue.judgements())) == 2
    assert await take(world.queue, "ann") is None


async def test_what_cannot_be_judged_is_refused(world: World) -> None:
    await world.queue.push([pair("a"), answer("f")], limit=10)
    refused: list[tuple[str, Verdict]] = [("a", "bad"), ("f", "first"), ("a", "undone")]
    for item_id, verdict in refused:
        with pytest.raises(DataError, match="no verdict"):
            await say(world.queue, "ann", item_id, verdict)
    with pytest.raises(DataError, match="not in the review queue"):
        await say(world.queue, "ann", "nothing")
    assert await world.queue.judgements() == []


async def test_undo_goes_back_one_at_a_time(world: World) -> None:
    await world.queue.push([pair("a"), pair("b"), pair("c")], limit=10)
    for name in ("a", "b"):
        assert await take(world.queue, "ann") == name
        await say(world.queue, "ann", name)
    assert await take(world.queue, "ann") == "c"
    assert await world.queue.undo("bob", lease_s=LEASE_S) is None
    undone = await world.queue.undo("ann", lease_s=LEASE_S)
    assert undone is not None
    assert (undone.item_id, undone.verdict) == ("b", "first")
    assert await take(world.queue, "ann") == "b"
    assert await take(world.queue, "bob") == "c", "what ann had before her was let go of"
    undone = await world.queue.undo("ann", lease_s=LEASE_S)
    assert undone is not None
    assert undone.item_id == "a"
    assert await take(world.queue, "ann") == "a"
    await say(world.queue, "ann", "a", "second")
    assert await take(world.queue, "ann") == "b"
    log = await world.queue.judgements()
    assert [verdict for *_, verdict in verdicts(log)] == ["first", "first", "undone", "undone", "second"]
    assert [entry.position for entry in log] == [1, 2, 3, 4, 5]
    assert verdicts(standing(log)) == [("ann", "a", "second")]


async def test_an_undone_item_comes_back_to_who_undid_it_though_others_closed_it(world: World) -> None:
    await world.queue.push([pair("a")], limit=10)
    assert await take(world.queue, "ann") == "a"
    await world.expire_leases()
    assert await take(world.queue, "bob") == "a"
    await say(world.queue, "bob", "a")
    await say(world.queue, "ann", "a")
    await world.queue.undo("ann", lease_s=LEASE_S)
    assert (await world.queue.progress()).waiting["pair"] == 0
    assert await take(world.queue, "ann") == "a"
    assert await take(world.queue, "cy") is None


async def test_progress_counts_people_and_how_they_agree(world: World) -> None:
    await world.queue.push([*(pair(name) for name in "abc"), answer("f")], limit=10)
    said: list[tuple[str, str, Verdict]] = [
        ("ann", "a", "first"), ("bob", "a", "first"), ("ann", "b", "first"), ("bob", "b", "second"),
        ("ann", "c", "skip"), ("bob", "c", "first"), ("bob", "f", "bad"),
    ]  # fmt: skip
    before = await world.queue.progress()
    assert (before.agreement, before.by_annotator) == (None, {})
    for who, item_id, verdict in said:
        await say(world.queue, who, item_id, verdict, votes=2)
    progress = await world.queue.progress()
    assert progress.waiting == {"pair": 0, "flagged": 1, "audit": 0}
    assert progress.judged == {"pair": 6, "flagged": 1, "audit": 0}
    assert progress.by_annotator == {"ann": 3, "bob": 4}
    assert (progress.agreeing, progress.compared, progress.agreement) == (1, 2, 0.5)
    for _ in range(3):
        await world.queue.undo("bob", lease_s=LEASE_S, votes=2)
    progress = await world.queue.progress()
    assert progress.by_annotator == {"ann": 3, "bob": 1}
    assert (progress.agreement, progress.judged["flagged"]) == (1.0, 0)


def test_an_item_has_the_answers_of_its_kind() -> None:
    with pytest.raises(ValueError, match="2 answers"):
        ReviewItem(item_id="a", kind="pair", prompt="p", answers=("one",))
    with pytest.raises(ValueError, match="policy versions"):
        ReviewItem(item_id="a", kind="audit", prompt="p", answers=("one",), policy_versions=(1, 2))


# ---------------------------------------------------------------- on a server


async def test_another_process_sees_the_same_queue(valkey: EmbeddedServer, make_redis_world: MakeRedis) -> None:
    redis = await make_redis_world(valkey)
    one, other = redis.client().review, redis.client().review
    await one.push([pair(str(n)) for n in range(450)], limit=1000)
    for n in range(450):
        await say(one, "ann", str(n))
    assert len(await other.judgements()) == 450
    assert (await other.progress()).by_annotator == {"ann": 450}
    await other.undo("ann", lease_s=LEASE_S)
    assert await take(one, "ann") == "449"
    assert (await one.progress()).by_annotator == {"ann": 449}


async def test_a_script_that_the_client_sends_twice_takes_effect_once(
    valkey: EmbeddedServer, make_redis_world: MakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = await make_redis_world(valkey)
    client = redis.client()
    once: Callable[..., Awaitable[Any]] = client._client.script

    async def twice(*args: Any, **kwargs: Any) -> Any:
        await once(*args, **kwargs)
        return await once(*args, **kwargs)

    monkeypatch.setattr(client._client, "script", twice)
    queue = client.review
    assert await queue.push([pair("a"), pair("b")], limit=10) == 2
    for name in ("a", "b"):
        assert await take(queue, "ann") == name
        assert await say(queue, "ann", name)
    undone = await queue.undo("ann", lease_s=LEASE_S)
    assert undone is not None
    assert undone.item_id == "b"
    assert verdicts(standing(await queue.judgements())) == [("ann", "a", "first")]
    assert len(await queue.judgements()) == 3


async def test_a_worker_may_queue_items_and_see_no_judgements(
    valkey: EmbeddedServer, make_redis_world: MakeRedis
) -> None:
    worker = (await make_redis_world(valkey, role="worker")).client().review
    assert await worker.push([answer("f")], limit=10) == 1
    with pytest.raises(StreamError, match="access control"):
        await worker.judgements()
    with pytest.raises(StreamError, match="access control"):
        await say(worker, "ann", "f", "fine")
