"""What the reward worker does with outcomes that are no score, and how it puts outcomes into the streams."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import msgspec
import pytest

from cluster.errors import ScoringError
from cluster.records import DeadLetter, Rollout
from cluster.reward_models import Calibration
from cluster.streams import Hop, StreamName
from reward_service import worker as worker_module
from reward_service.batch_scoring import CacheUpdate
from reward_service.outcomes import Held, round_trips
from reward_service.rewards.compose import Composed, Composer
from reward_service.rewards.sources import SourceDownError, TextSample
from reward_service.scorer import ScriptedScorer
from reward_service.serving import Outcome, Rewarding
from reward_service.worker import RewardWorker, WorkerTime
from tests.reward_support import LONG_S, ManualClock, World, rollout
from tests.serving_support import batch_scoring


@pytest.fixture(name="world")
async def make_world() -> World:
    return World()


def fail_on(world: World, fates: dict[str, ScoringError | DeadLetter]) -> dict[str, ScoringError | DeadLetter]:
    """The scoring answers for these tasks so, and not with a score, as long as they are in the returned dict."""
    make = world.worker

    def worker() -> RewardWorker:
        made = make()
        score = made._scoring.score

        async def with_fates(batch: Sequence[Rollout]) -> tuple[list[Outcome], CacheUpdate]:
            outcomes, learned = await score(batch)
            ids = [item.task.task_id for item in batch]
            return [fates.get(name, outcome) for name, outcome in zip(ids, outcomes, strict=True)], learned

        made._scoring.score = with_fates  # type: ignore[method-assign]
        return made

    world.worker = worker  # type: ignore[method-assign]
    return fates


def letter_of(item: Rollout, reason: str) -> DeadLetter:
    return DeadLetter(task=item.task, stage="reward", reason=reason, deliveries=1)


async def test_a_sample_that_the_scoring_names_fails_alone_without_another_pass(world: World) -> None:
    fail_on(world, {"bad": ScoringError("no reward")})
    await world.publish(rollout("a"), rollout("bad"), rollout("c"))
    async with world.running() as worker:
        assert [item.rollout.task.task_id for item in await world.scored(2)] == ["a", "c"]
        await world.watch.reached("failures", 1)
        world.clock.now_s = 31.0
        await world.watch.reached("failures", 2)
        world.clock.now_s = 62.0
        (letter,) = await world.dead(1)
    assert (letter.reason, letter.deliveries, letter.rejected) == ("ScoringError: no reward", 3, False)
    assert world.scorer.scored == [["a", "bad", "c"], ["bad"], ["bad"]]
    assert worker.counts == {"scored": 2, "failures": 3, "redelivered": 2, "dead": 1}


async def test_named_failures_alone_end_run_too(world: World) -> None:
    names = [f"t{i}" for i in range(20)]
    fail_on(world, {name: ScoringError("no reward") for name in names})
    await world.publish(*map(rollout, names))
    with pytest.raises(ScoringError, match="fails on every rollout"):
        await asyncio.wait_for(world.worker().run(), LONG_S)


async def test_a_refused_answer_is_published_as_such_with_its_deliveries(world: World) -> None:
    refused = rollout("odd")
    letter = DeadLetter(task=refused.task, stage="reward", reason="members disagree", deliveries=1, rejected=True)
    fail_on(world, {"odd": letter})
    await world.publish(rollout("a"), refused)
    await world.streams.claim(StreamName.ROLLOUTS, consumer="died", max_count=2, wait_s=0.0)
    world.clock.now_s = 31.0
    async with world.running() as worker:
        await world.scored(1)
        (published,) = await world.dead(1)
    assert published == msgspec.structs.replace(letter, deliveries=2)
    assert worker.counts == {"scored": 1, "rejected": 1, "redelivered": 2}
    assert await world.left() == 0


async def test_an_absent_reward_source_costs_time_and_no_deliveries(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SOURCE_PAUSE_S", 0.01)
    back = fail_on(world, {"a": SourceDownError("away"), "b": SourceDownError("away")})
    await world.publish(*(rollout(name) for name in "abc"))
    async with world.running() as worker:
        assert [item.rollout.task.task_id for item in await world.scored(1)] == ["c"]
        await world.watch.reached("paused", 20)  # more than would count as a broken scorer
        assert worker.in_flight == 2
        del back["a"]
        assert [item.rollout.task.task_id for item in await world.scored(1)] == ["a"]
        del back["b"]
        assert [item.rollout.task.task_id for item in await world.scored(1)] == ["b"]
    counts = dict(worker.counts)
    assert counts.pop("paused") >= 20
    assert counts == {"scored": 3}
    assert await world.left() == 0


async def test_while_a_reward_source_is_away_no_more_is_claimed_than_fits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SOURCE_PAUSE_S", 0.01)
    names = [f"t{i}" for i in range(20)]
    back = fail_on(world, {name: SourceDownError("away") for name in names})
    await world.publish(*map(rollout, names))
    async with world.running() as worker:
        await world.watch.reached("paused", 40)
        assert worker.in_flight == 8  # twice the batch
        assert (await world.streams.depth(StreamName.ROLLOUTS)).backlog == 12
        back.clear()
        assert sorted(item.rollout.task.task_id for item in await world.scored(20)) == sorted(names)


async def test_a_reward_source_that_stays_away_fails_its_samples_and_not_the_worker(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SOURCE_PAUSE_S", 0.01)
    ticks = ManualClock()
    world.time = WorkerTime(now=ticks)
    fail_on(world, {"a": SourceDownError("away")})
    await world.publish(rollout("a"))
    async with world.running() as worker:
        await world.watch.reached("paused", 2)
        for tries in (1, 2, 3):
            ticks.now_s = 60.0 * tries  # the outage limit, in each delivery
            await world.watch.reached("failures", tries)
            paused = world.watch.counts["paused"]
            world.clock.now_s = 31.0 * tries
            if tries < 3:
                await world.watch.reached("paused", paused + 1)
        (letter,) = await world.dead(1)
        await world.publish(rollout("b"))
        await world.scored(1)
    assert (letter.reason, letter.deliveries) == ("SourceDownError: away", 3)
    assert worker.counts["dead"] == 1


class Choking:
    """A source that the answer "bad" takes down for the next few calls, with all who were asked beside it."""

    tag = "t"

    def __init__(self) -> None:
        self.down_for = 0

    async def compose(
        self, samples: Sequence[TextSample], *, model_rewards: Sequence[float] | None, calibration: Calibration | None
    ) -> list[Composed | ScoringError]:
        if self.down_for:
            self.down_for -= 1
            return [SourceDownError("away") for _ in samples]
        if any(sample.task_id == "bad" for sample in samples):
            self.down_for = 5
            return [SourceDownError("status 500") for _ in samples]
        return [Composed(1.0, {}, ()) for _ in samples]


async def test_an_answer_that_takes_a_reward_source_down_does_not_take_its_neighbours_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SOURCE_PAUSE_S", 0.001)
    ticks = ManualClock()
    scoring = batch_scoring(ScriptedScorer(), rewarding=Rewarding(composer=cast(Composer, Choking())))
    worker = RewardWorker(
        world.streams, scoring=scoring, metrics=world.watch, settings=world.settings, time=WorkerTime(now=ticks)
    )
    await world.publish(*(rollout(name) for name in ("bad", "a", "b", "c")))
    run = asyncio.create_task(worker.run())
    await world.watch.reached("paused", 20)  # together, and in vain
    assert world.watch.counts["scored"] == 0
    ticks.now_s = 30.0  # half the outage limit
    assert {item.rollout.task.task_id for item in await world.scored(3)} == {"a", "b", "c"}
    ticks.now_s = 60.0
    await world.watch.reached("failures", 1)
    await asyncio.wait_for(asyncio.gather(worker.stop(), run), LONG_S)
    assert await world.left() == 1


async def test_stop_leaves_what_waits_for_a_reward_source_to_its_lease(world: World) -> None:
    fail_on(world, {"a": SourceDownError("away")})
    await world.publish(rollout("a"))
    async with world.running() as worker:
        await world.watch.reached("paused", 1)
    assert worker.in_flight == 0
    assert await world.left() == 1


# ---------------------------------------------------------------- round trips


async def test_a_batch_costs_one_round_trip(world: World) -> None:
    calls: list[int] = []
    advance_many = world.streams.advance_many

    async def counted(source: StreamName, hops: Sequence[Hop]) -> list[bool]:
        calls.append(len(hops))
        return await advance_many(source, hops)

    world.streams.advance_many = counted  # type: ignore[method-assign]
    await world.publish(*(rollout(f"t{i}") for i in range(4)))
    async with world.running():
        await world.scored(4)
    assert calls == [4]


def test_round_trips_are_bounded_and_keep_order() -> None:
    small = [(Held(f"{i}-0", rollout(f"t{i}"), 1), letter_of(rollout(f"t{i}"), "no")) for i in range(300)]
    trips = list(round_trips(small))
    assert [len(trip) for trip in trips] == [128, 128, 44]
    assert [step.held for trip in trips for step in trip] == [held for held, _ in small]
    megabyte = "x" * 2**20
    large = [
        (held, letter_of(held.rollout, megabyte * size))
        for (held, _), size in zip(small, (3, 2, 1, 9, 1), strict=False)
    ]
    assert [len(trip) for trip in round_trips(large)] == [1, 2, 1, 1]
    assert list(round_trips([])) == []
