"""The reward worker by order of events: MemoryStreams, a scripted scorer that blocks and fails on command."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.errors import ScoringError, StreamError
from cluster.records import Rollout, encode
from cluster.stores import MemoryScores
from cluster.streams import StreamName
from reward_service.cache import CacheSettings, ScoreCache
from reward_service.forward_thread import StuckError
from reward_service.scorer import Scores, ScriptedScorer
from reward_service.worker import WorkerSettings, WorkerTime
from tests.reward_support import LONG_S, Gate, ManualClock, Watch, World, rollout


@pytest.fixture(name="world")
async def make_world() -> World:
    return World()


# ---------------------------------------------------------------- the ordinary path


async def test_a_rollout_becomes_a_scored_rollout(world: World) -> None:
    world.scorer.members = lambda _: (1.0, 2.0, 6.0)
    await world.publish(rollout("a"))
    async with world.running() as worker:
        (scored,) = await world.scored(1)
    assert scored.rollout == rollout("a")
    assert scored.member_scores == (1.0, 2.0, 6.0)
    assert scored.reward == 3.0
    assert scored.uncertainty == pytest.approx((14 / 3) ** 0.5)  # deviations -2, -1, 3
    assert scored.ref_logprobs.tolist() == [-1.0, -1.0, -1.0]
    assert scored.rm_version == "rm-scripted"
    assert worker.counts == {"scored": 1}
    assert worker.in_flight == 0
    assert await world.left() == 0


async def test_waiting_rollouts_share_a_batch_up_to_the_limit(world: World) -> None:
    await world.publish(*(rollout(f"t{i}") for i in range(6)))
    async with world.running():
        scored = await world.scored(6)
    assert [item.rollout.task.task_id for item in scored] == [f"t{i}" for i in range(6)]
    assert world.scorer.scored == [["t0", "t1", "t2", "t3"], ["t4", "t5"]]


async def test_claims_go_on_during_a_forward_and_stop_at_twice_the_batch(world: World) -> None:
    gate = Gate()
    world.scorer.before = gate
    await world.publish(*(rollout(f"t{i}") for i in range(20)))
    async with world.running() as worker:
        await gate.wait_entered()
        await world.streams.wait_claimed(8)
        assert worker.in_flight == 8
        assert (await world.streams.depth(StreamName.ROLLOUTS)).backlog == 12
        assert len(world.scorer.scored) == 1
        gate.opened.set()
        assert len(await world.scored(20)) == 20
    assert max(map(len, world.scorer.scored)) == 4


async def test_leases_are_renewed_while_scoring(world: World) -> None:
    gate = Gate()
    world.scorer.before = gate
    world.settings = WorkerSettings(consumer="w", batch_wait_s=0.0, claim_wait_s=0.02, lease_s=0.03)
    await world.publish(rollout("a"))
    async with world.running():
        await gate.wait_entered()
        world.clock.now_s = 29.0
        world.streams.renewed.clear()
        await asyncio.wait_for(world.streams.renewed.wait(), LONG_S)
        world.clock.now_s = 58.0
        taken = await world.streams.claim(StreamName.ROLLOUTS, consumer="other", max_count=1, wait_s=0.0)
        assert taken == []
        gate.opened.set()
        await world.scored(1)


async def test_a_result_that_comes_after_the_lease_was_lost_is_counted_and_dropped(world: World) -> None:
    gate = Gate()
    world.scorer.before = gate
    await world.publish(rollout("a"))
    async with world.running() as worker:
        await gate.wait_entered()
        (entry,) = list(world.streams._data.streams[StreamName.ROLLOUTS].entries)
        await world.streams.settle(StreamName.ROLLOUTS, [entry])
        gate.opened.set()
        await world.watch.reached("duplicates", 1)
    assert worker.counts == {"duplicates": 1}
    assert await world.streams.claim(StreamName.SCORED, consumer="test", max_count=1, wait_s=0.0) == []


# ---------------------------------------------------------------- the cache


async def test_the_same_answer_is_scored_once(world: World) -> None:
    world.cache = ScoreCache(CacheSettings(entries=8, ttl_s=60.0), store=MemoryScores())
    async with world.running():
        await world.publish(rollout("a"))
        (first,) = await world.scored(1)
        await world.publish(rollout("b"))
        (second,) = await world.scored(1)
    assert world.scorer.scored == [["a"]]
    assert world.scorer.referenced == []
    assert second.rollout.task.task_id == "b"
    assert (second.reward, second.ref_logprobs_f32) == (first.reward, first.ref_logprobs_f32)
    assert second.score_s == 0.0 < first.score_s


async def test_the_same_text_in_other_tokens_runs_the_reference_model_alone(world: World) -> None:
    class OneText(ScriptedScorer):
        def texts(self, batch: Sequence[Rollout]) -> list[tuple[str, str]]:
            return [("prompt", "answer")] * len(batch)

    world.scorer = OneText()
    world.cache = ScoreCache(CacheSettings(entries=8, ttl_s=60.0))
    async with world.running():
        await world.publish(rollout("a", response=[7, 8, 2]))
        await world.scored(1)
        await world.publish(rollout("b", response=[7, 2]))
        (second,) = await world.scored(1)
    assert world.scorer.scored == [["a"]]
    assert world.scorer.referenced == [["b"]]
    assert second.reward == 3.0  # the score of a's text
    assert len(second.ref_logprobs) == 2


async def test_a_dead_score_store_fails_no_sample(world: World) -> None:
    class DeadStore(MemoryScores):
        async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
            raise StreamError("unreachable")

    world.cache = ScoreCache(CacheSettings(entries=8, ttl_s=60.0), store=DeadStore())
    await world.publish(rollout("a"))
    async with world.running() as worker:
        await world.scored(1)
    assert world.cache.counts["store_failures"] == 1
    assert worker.counts == {"scored": 1}


# ---------------------------------------------------------------- samples that fail


async def test_one_poison_sample_spares_its_neighbours_and_is_buried_at_its_last_delivery(world: World) -> None:
    world.scorer.poison = {"bad"}
    await world.publish(rollout("a"), rollout("bad"), rollout("c"))
    async with world.running() as worker:
        assert [item.rollout.task.task_id for item in await world.scored(2)] == ["a", "c"]
        assert worker.counts["failures"] == 1
        world.clock.now_s = 31.0  # the lease ends: second delivery, alone
        await world.watch.reached("failures", 2)
        world.clock.now_s = 62.0  # third and last
        (letter,) = await world.dead(1)
    assert letter.task == rollout("bad").task
    assert (letter.stage, letter.deliveries) == ("reward", 3)
    assert "ScoringError: cannot score task bad" in letter.reason
    assert world.scorer.scored == [["a", "bad", "c"], ["a"], ["bad"], ["c"], ["bad"], ["bad"]]
    assert worker.counts == {"scored": 2, "failures": 3, "redelivered": 2, "dead": 1}
    assert await world.left() == 0


async def test_a_batch_that_is_scored_one_by_one_gives_a_sign_of_life_for_each(world: World) -> None:
    class Beats(Watch):
        def progress(self) -> None:
            calls.append("beat")

    calls: list[str] = []
    world.watch = Beats()
    world.scorer.before = lambda batch: calls.append("pass")
    world.scorer.poison = {"bad"}
    await world.publish(rollout("a"), rollout("bad"), rollout("c"))
    async with world.running():
        await world.scored(2)
    passes = [place for place, call in enumerate(calls) if call == "pass"]
    assert len(passes) == 4
    assert all(calls[place - 1] == "beat" for place in passes)


@pytest.mark.parametrize(
    "broken",
    [
        Scores((float("nan"),), np.full(3, -1.0, dtype=np.float32)),
        Scores((), np.full(3, -1.0, dtype=np.float32)),
        Scores((1.0,), np.full(2, -1.0, dtype=np.float32)),
        Scores((1.0,), np.full(3, np.nan, dtype=np.float32)),
    ],
)
async def test_no_unusable_score_leaves_the_service(world: World, broken: Scores) -> None:
    class Broken(ScriptedScorer):
        def score(self, batch: Sequence[Rollout]) -> list[Scores]:
            return [broken] * len(batch)

    world.scorer = Broken()
    world.settings = WorkerSettings(consumer="w", batch_wait_s=0.0, claim_wait_s=0.02, max_deliveries=1)
    await world.publish(rollout("a"))
    async with world.running():
        (letter,) = await world.dead(1)
    assert letter.reason.startswith("ScoringError: task a has no usable score")


async def test_what_was_handed_out_before_is_scored_alone(world: World) -> None:
    await world.publish(*(rollout(f"t{i}") for i in range(3)))
    await world.streams.claim(StreamName.ROLLOUTS, consumer="died", max_count=3, wait_s=0.0)
    world.clock.now_s = 31.0
    async with world.running() as worker:
        await world.scored(3)
    assert world.scorer.scored == [["t0"], ["t1"], ["t2"]]
    assert worker.counts["redelivered"] == 3


async def test_what_killed_every_worker_that_held_it_is_buried_unscored(world: World) -> None:
    await world.publish(rollout("killer"))
    for _ in range(3):
        await world.streams.claim(StreamName.ROLLOUTS, consumer="died", max_count=1, wait_s=0.0)
        world.clock.now_s += 31.0
    async with world.running():
        (letter,) = await world.dead(1)
    assert letter.deliveries == 4
    assert "no worker that was handed it came back" in letter.reason
    assert world.scorer.scored == []


async def test_bytes_that_are_no_rollout_are_settled_and_counted(world: World) -> None:
    await world.streams.publish(StreamName.ROLLOUTS, [b"garbage", encode(rollout("a").task), encode(rollout("b"))])
    async with world.running() as worker:
        (scored,) = await world.scored(1)
    assert scored.rollout.task.task_id == "b"
    assert worker.counts == {"poison": 2, "scored": 1}
    assert await world.left() == 0


async def test_a_stuck_forward_is_given_up_and_its_neighbours_are_scored(world: World) -> None:
    release = threading.Event()

    def hang_on_slow(batch: Sequence[Rollout]) -> None:
        if any(item.task.task_id == "slow" for item in batch):
            release.wait(LONG_S)

    world.scorer.before = hang_on_slow
    world.score_timeout_s = 0.2
    world.settings = WorkerSettings(consumer="w", batch_wait_s=0.0, claim_wait_s=0.02, max_deliveries=1)
    await world.publish(rollout("a"), rollout("slow"))
    async with world.running():
        (letter,) = await world.dead(1)
        (scored,) = await world.scored(1)
    release.set()
    assert "took too long" in letter.reason
    assert scored.rollout.task.task_id == "a"


async def test_every_rollout_is_scored_once_though_workers_die_and_forwards_fail(world: World) -> None:
    names = {f"t{i}" for i in range(60)}
    failed: set[str] = set()

    def fail_once(batch: Sequence[Rollout]) -> None:
        new = {item.task.task_id for item in batch if int(item.task.task_id[1:]) % 7 == 3} - failed
        if new and len(batch) == 1:
            failed.update(new)
        if new:
            raise RuntimeError("a passing fault")

    world.scorer.before = fail_once
    await world.publish(*(rollout(name) for name in sorted(names)))
    workers = []
    for number in range(3):
        world.settings = WorkerSettings(consumer=f"w{number}", batch_size=4, batch_wait_s=0.0, claim_wait_s=0.02)
        workers.append(world.worker())
    runs = [asyncio.create_task(worker.run()) for worker in workers]
    scored = [item.rollout.task.task_id for item in await world.scored(5)]
    runs[0].cancel()  # dies with what it holds
    scored += [item.rollout.task.task_id for item in await world.scored(20)]
    runs[1].cancel()
    await asyncio.gather(*runs[:2], return_exceptions=True)
    while world.watch.counts["scored"] < 60:
        if workers[2].in_flight == 0:  # it renews in real time, so its own leases must not run out
            world.clock.now_s += 31.0
        await world.watch.changed()
    scored += [item.rollout.task.task_id for item in await world.scored(35)]
    runs[2].cancel()
    await asyncio.gather(*runs, return_exceptions=True)
    assert sorted(scored) == sorted(names)
    assert len(failed) == 9  # 3, 10, 17, … 59: each failed alone once, and was scored at a later delivery
    assert await world.left() == 0
    assert await world.streams.claim(StreamName.DEAD, consumer="test", max_count=1, wait_s=0.0) == []


# ---------------------------------------------------------------- ends


async def test_a_scorer_that_is_stuck_for_good_ends_run(world: World) -> None:
    release = threading.Event()

    def hang(batch: Sequence[Rollout]) -> None:
        release.wait(LONG_S)

    world.scorer.before = hang
    world.score_timeout_s = 0.05
    await world.publish(*(rollout(f"t{i}") for i in range(4)))
    with pytest.raises(StuckError, match="scoring is stuck"):
        await asyncio.wait_for(world.worker().run(), LONG_S)
    release.set()
    assert await world.left() == 4


async def test_a_scorer_that_fails_on_everything_ends_run(world: World) -> None:
    names = [f"t{i}" for i in range(20)]
    world.scorer.poison = set(names)
    await world.publish(*map(rollout, names))
    with pytest.raises(ScoringError, match="fails on every rollout"):
        await asyncio.wait_for(world.worker().run(), LONG_S)
    assert await world.left() == 20  # nothing was lost, nothing was scored


async def test_a_short_outage_of_the_server_is_survived(world: World) -> None:
    pauses: list[float] = []
    ticks = ManualClock()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        ticks.now_s += seconds

    world.time = WorkerTime(now=ticks, sleep=sleep)
    world.streams.failures = {"claim": 3, "advance": 2}
    await world.publish(rollout("a"))
    async with world.running() as worker:
        await world.scored(1)
    assert worker.counts == {"stream_errors": 5, "scored": 1}
    assert pauses == [0.1, 0.2, 0.4, 0.1, 0.2]


@pytest.mark.parametrize("method", ["claim", "advance"])
async def test_a_long_outage_ends_run_with_the_servers_error(world: World, method: str) -> None:
    ticks = ManualClock()

    async def sleep(seconds: float) -> None:
        ticks.now_s += seconds

    world.time = WorkerTime(now=ticks, sleep=sleep)
    world.streams.failures = {method: 10_000}
    await world.publish(rollout("a"))
    before = asyncio.all_tasks()
    with pytest.raises(StreamError, match="unreachable"):
        await asyncio.wait_for(world.worker().run(), LONG_S)
    assert 60.0 <= ticks.now_s < 66.0
    assert asyncio.all_tasks() == before  # no orphans
    assert await world.left() == 1


async def test_stop_finishes_what_is_held_and_claims_nothing_more(world: World) -> None:
    gate = Gate()
    world.scorer.before = gate
    world.settings = WorkerSettings(consumer="w", batch_size=1, batch_wait_s=0.0, claim_wait_s=0.02)
    await world.publish(rollout("a"), rollout("b"), rollout("late"))
    worker = world.worker()
    run = asyncio.create_task(worker.run())
    await gate.wait_entered()
    await world.streams.wait_claimed(2)  # full: it waits for room
    stop = asyncio.create_task(worker.stop())
    await asyncio.sleep(0)
    assert not stop.done()
    gate.opened.set()
    await asyncio.wait_for(asyncio.gather(run, stop), LONG_S)
    assert [item.rollout.task.task_id for item in await world.scored(2)] == ["a", "b"]
    assert (await world.streams.depth(StreamName.ROLLOUTS)).backlog == 1


async def test_stop_leaves_a_stuck_forward_to_its_lease_after_the_grace_period(world: World) -> None:
    gate = Gate()
    world.scorer.before = gate
    world.settings = WorkerSettings(consumer="w", batch_wait_s=0.0, claim_wait_s=0.02, grace_s=0.05)
    await world.publish(rollout("a"))
    worker = world.worker()
    run = asyncio.create_task(worker.run())
    await gate.wait_entered()
    await asyncio.wait_for(worker.stop(), LONG_S)
    await run  # ends without an error
    gate.opened.set()
    assert await world.left() == 1
    world.clock.now_s = 31.0
    (again,) = await world.streams.claim(StreamName.ROLLOUTS, consumer="other", max_count=1, wait_s=0.0)
    assert again.deliveries == 2


async def test_stop_before_run_ends_run_at_once(world: World) -> None:
    worker = world.worker()
    stop = asyncio.create_task(worker.stop())
    await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(worker.run(), stop), LONG_S)


async def test_cancelling_run_leaves_no_task_behind(world: World) -> None:
    before = asyncio.all_tasks()
    run = asyncio.create_task(world.worker().run())
    await asyncio.wait_for(world.streams.empty_claims.wait(), LONG_S)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert asyncio.all_tasks() == before
