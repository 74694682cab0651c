"""The rollout worker over memory streams and a scripted engine: by order of events, without clocks that run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from actors.engine import GenerationRequest, ScriptedEngine
from actors.rollout_meter import IdleTime
from cluster.errors import DeadlineError, EngineDeadError, KeelError, StreamError, WeightSyncError
from cluster.records import DeadLetter, PromptTask, decode
from cluster.streams import Delivery, StreamName
from cluster.streams_memory import MemoryStreams
from cluster.weights import StoreFeed
from tests.rollout_scene import ANSWER, SETTINGS, Clock, Scene, blob, prompt, until


async def test_a_prompt_becomes_a_rollout() -> None:
    scene = Scene()
    scene.weights.publish(blob(3))
    await scene.issue("t1", version=3)
    async with scene.running():
        (rollout,) = await scene.rollouts()
        assert rollout.task == prompt("t1", version=3)
        assert rollout.response_ids.tolist() == ANSWER
        assert rollout.behaviour_logprobs.tolist() == pytest.approx([-np.log(32)] * 3)
        assert [(run.start, run.version) for run in rollout.version_runs] == [(0, 3)]
        assert rollout.finish_reason == "stop"
        assert rollout.actor == "actor-0"
        await until(lambda: scene.worker.in_flight == 0)
    assert (await scene.streams.depth(StreamName.PROMPTS)).in_flight == 0
    assert scene.worker.meter.tally.samples == 1
    assert scene.worker.meter.tally.tokens == 3


async def test_nothing_is_claimed_before_the_first_version() -> None:
    scene = Scene()
    await scene.issue("t1")
    async with scene.running() as run:
        for _ in range(20):
            await asyncio.sleep(0)
        assert (await scene.streams.depth(StreamName.PROMPTS)).in_flight == 0
        assert not run.done()
        scene.weights.publish(blob(0))
        assert len(await scene.rollouts()) == 1


async def test_nothing_is_claimed_while_the_first_version_loads() -> None:
    scene = Scene()
    scene.engine.before_load = asyncio.Event()
    scene.weights.publish(blob(5))
    await scene.issue("t1", version=5)
    async with scene.running():
        for _ in range(20):
            await asyncio.sleep(0)
        assert (await scene.streams.depth(StreamName.PROMPTS)).in_flight == 0
        scene.engine.before_load.set()
        assert (await scene.rollouts())[0].oldest_version == 5


async def test_only_free_slots_are_claimed() -> None:
    scene = Scene(manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1", "t2", "t3")
    async with scene.running():
        await until(lambda: len(scene.engine.in_flight) == 2)
        depth = await scene.streams.depth(StreamName.PROMPTS)
        assert (depth.backlog, depth.in_flight) == (1, 2)
        for _ in ANSWER:
            scene.engine.tick()
        await until(lambda: len(scene.engine.in_flight) == 1)
        for _ in ANSWER:
            scene.engine.tick()
        assert len(await scene.rollouts(3)) == 3


async def test_a_sync_in_mid_answer_shows_in_the_version_runs() -> None:
    scene = Scene(manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1")
    async with scene.running():
        await until(lambda: len(scene.engine.in_flight) == 1)
        scene.engine.tick()
        scene.weights.publish(blob(1))
        await until(lambda: scene.engine.version == 1)
        scene.engine.tick()
        scene.engine.tick()
        (rollout,) = await scene.rollouts()
        assert [(run.start, run.version) for run in rollout.version_runs] == [(0, 0), (1, 1)]
        assert rollout.oldest_version == 0


async def test_a_task_of_a_later_version_waits_for_that_version() -> None:
    scene = Scene()
    scene.weights.publish(blob(0))
    await scene.issue("later", version=1)
    async with scene.running():
        await until(lambda: scene.worker.in_flight == 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert scene.engine.in_flight == ()
        scene.weights.publish(blob(1))
        (rollout,) = await scene.rollouts()
        assert rollout.oldest_version == 1


async def test_a_probe_that_agrees_lets_the_worker_start() -> None:
    scene = Scene()
    scene.weights.publish(blob(0, logprob=-1.5))
    await scene.issue("t1")
    async with scene.running():
        assert len(await scene.rollouts()) == 1


@pytest.mark.parametrize("error_nats", [0.1, float("nan")])
async def test_a_probe_that_disagrees_ends_the_run_before_any_claim(error_nats: float) -> None:
    scene = Scene()
    scene.engine.probe_error_nats = error_nats
    scene.weights.publish(blob(0, logprob=-1.5))
    await scene.issue("t1")
    async with scene.running() as run:
        with pytest.raises(WeightSyncError, match="log-probs are not the learner's"):
            await run
    assert (await scene.streams.depth(StreamName.PROMPTS)).backlog == 1
    assert scene.worker.meter.tally.sync_failures == 1


async def test_a_failed_update_ends_the_run_with_its_own_error() -> None:
    scene = Scene(manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1")
    async with scene.running() as run:
        await until(lambda: len(scene.engine.in_flight) == 1)
        scene.engine.expected_names = {"w", "another"}
        scene.weights.publish(blob(1))
        with pytest.raises(WeightSyncError, match="another"):
            await run
    assert (await scene.streams.depth(StreamName.PROMPTS)).in_flight == 1, "the entry is left to its lease"


async def test_a_dead_engine_ends_the_run_and_leaves_its_entries_leased() -> None:
    scene = Scene(manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1", "t2")
    async with scene.running() as run:
        await until(lambda: len(scene.engine.in_flight) == 2)
        scene.engine.die()
        with pytest.raises(EngineDeadError):
            await run
    assert (await scene.streams.depth(StreamName.PROMPTS)).in_flight == 2


async def test_an_idle_engine_that_dies_is_noticed() -> None:
    scene = Scene(replace(SETTINGS, weights_poll_s=0.01))
    scene.weights.publish(blob(0))
    async with scene.running() as run:
        await until(lambda: scene.engine.version == 0)
        scene.engine.die()
        with pytest.raises(EngineDeadError):
            await run


async def test_a_failed_request_comes_again_when_its_lease_runs_out() -> None:
    scene = Scene()
    scene.weights.publish(blob(0))
    scene.engine.fail_next(KeelError("out of luck"))
    await scene.issue("t1")
    async with scene.running():
        await until(lambda: scene.worker.meter.tally.failures == 1)
        assert (await scene.streams.depth(StreamName.ROLLOUTS)).backlog == 0
        scene.clock.advance(31)
        assert len(await scene.rollouts()) == 1
    assert scene.worker.meter.tally.redelivered == 1


async def test_the_last_failure_makes_a_dead_letter() -> None:
    scene = Scene()
    scene.weights.publish(blob(0))
    for _ in range(2):
        scene.engine.fail_next(KeelError("out of luck"))
    await scene.issue("t1")
    async with scene.running():
        await until(lambda: scene.worker.meter.tally.failures == 1)
        scene.clock.advance(31)
        (delivery,) = await scene.take(StreamName.DEAD)
    letter = decode(delivery.payload, DeadLetter)
    assert (letter.task.task_id, letter.stage, letter.deliveries) == ("t1", "rollout", 2)
    assert "out of luck" in letter.reason
    depth = await scene.streams.depth(StreamName.PROMPTS)
    assert (depth.backlog, depth.in_flight) == (0, 0)


async def test_a_generation_that_never_ends_is_a_failure() -> None:
    scene = Scene(replace(SETTINGS, generate_timeout_s=0.02, max_deliveries=1), manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1")
    async with scene.running():
        (delivery,) = await scene.take(StreamName.DEAD)
        assert "took too long" in decode(delivery.payload, DeadLetter).reason
        assert scene.engine.in_flight == ()


async def test_poison_is_dropped_and_the_next_entry_answered() -> None:
    scene = Scene()
    scene.weights.publish(blob(0))
    await scene.streams.publish(StreamName.PROMPTS, [b"not a record"])
    await scene.issue("t1")
    async with scene.running():
        assert len(await scene.rollouts()) == 1
        await until(lambda: scene.worker.in_flight == 0)
    depth = await scene.streams.depth(StreamName.PROMPTS)
    assert (depth.backlog, depth.in_flight) == (0, 0)
    assert scene.worker.meter.tally.poison == 1


async def test_leases_of_requests_in_flight_are_renewed() -> None:
    scene = Scene(manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1")
    async with scene.running():
        await until(lambda: len(scene.engine.in_flight) == 1)
        for _ in range(6):
            await until(lambda: bool(scene.clock.sleepers))
            scene.clock.advance(10)
        await until(lambda: bool(scene.clock.sleepers))
        taken = await scene.streams.claim(StreamName.PROMPTS, consumer="thief", max_count=1, wait_s=0)
        assert taken == []


async def test_an_answer_whose_lease_was_lost_is_not_published_twice() -> None:
    scene = Scene(manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1")
    async with scene.running():
        await until(lambda: len(scene.engine.in_flight) == 1)
        scene.clock.now_s += 31
        (stolen,) = await scene.streams.claim(StreamName.PROMPTS, consumer="thief", max_count=1, wait_s=0)
        await scene.streams.settle(StreamName.PROMPTS, [stolen.entry_id])
        for _ in ANSWER:
            scene.engine.tick()
        await until(lambda: scene.worker.meter.tally.lost_leases == 1)
    assert (await scene.streams.depth(StreamName.ROLLOUTS)).backlog == 0


async def test_stop_finishes_what_is_in_flight_and_claims_no_more() -> None:
    scene = Scene(manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1", "t2")
    async with scene.running() as run:
        await until(lambda: len(scene.engine.in_flight) == 2)
        scene.worker.stop()
        await scene.issue("t3")
        for _ in ANSWER:
            scene.engine.tick()
        await run
    assert (await scene.streams.depth(StreamName.ROLLOUTS)).backlog == 2
    depth = await scene.streams.depth(StreamName.PROMPTS)
    assert (depth.backlog, depth.in_flight) == (1, 0)


async def test_stop_leaves_late_requests_to_their_leases() -> None:
    scene = Scene(replace(SETTINGS, stop_grace_s=0.01), manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1")
    async with scene.running() as run:
        await until(lambda: len(scene.engine.in_flight) == 1)
        scene.worker.stop()
        await run
        assert scene.engine.in_flight == ()
    assert (await scene.streams.depth(StreamName.PROMPTS)).in_flight == 1


async def test_drain_gives_requests_their_whole_time() -> None:
    scene = Scene(replace(SETTINGS, stop_grace_s=0.0, generate_timeout_s=20.0), manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1", "t2")
    async with scene.running() as run:
        await until(lambda: len(scene.engine.in_flight) == 2)
        scene.worker.drain()
        await scene.issue("t3")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not run.done()
        for _ in ANSWER:
            scene.engine.tick()
        await run
    assert (await scene.streams.depth(StreamName.ROLLOUTS)).backlog == 2
    depth = await scene.streams.depth(StreamName.PROMPTS)
    assert (depth.backlog, depth.in_flight) == (1, 0), "t3 was left to others"
    assert scene.worker.meter.tally.handed_back == 0


async def test_drain_hands_back_what_is_not_answered_in_time() -> None:
    scene = Scene(replace(SETTINGS, generate_timeout_s=0.05), manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("later", version=1)  # waits for a version that does not come
    async with scene.running() as run:
        await until(lambda: scene.worker.in_flight == 1)
        scene.worker.drain()
        await run
    if scene.worker.meter.tally.handed_back == 0:
        pytest.fail("the entry was left to its lease")
    depth = await scene.streams.depth(StreamName.PROMPTS)
    assert (depth.backlog, depth.in_flight) == (1, 0), "claimable at once"
    (again,) = await scene.take(StreamName.PROMPTS)
    assert decode(again.payload, PromptTask) == prompt("later", version=1)


async def test_what_a_draining_worker_claimed_last_goes_back_at_once() -> None:
    """Nobody renews its lease while requests in flight have their time."""
    scene = Scene(replace(SETTINGS, generate_timeout_s=20.0), manual=True)
    scene.weights.publish(blob(0))
    await scene.issue("t1")
    async with scene.running() as run:
        await until(lambda: len(scene.engine.in_flight) == 1)
        scene.worker.drain()  # in the middle of a claim
        await scene.issue("t2")
        await until(lambda: scene.worker.meter.tally.handed_back == 1)
        assert not run.done()
        (again,) = await scene.take(StreamName.PROMPTS)
        assert decode(again.payload, PromptTask) == prompt("t2")
        for _ in ANSWER:
            scene.engine.tick()
        await run


async def test_drain_leaves_the_group() -> None:
    scene = Scene()
    scene.weights.publish(blob(0))
    closed: list[str] = []

    class Feed(StoreFeed):
        async def close(self) -> None:
            closed.append("closed")

    scene.weights.feed = lambda name, joiner: Feed(scene.weights)  # type: ignore[method-assign]
    async with scene.running() as run:
        await until(lambda: scene.engine.version == 0)
        scene.worker.drain()
        await run
    assert closed == ["closed"]


async def test_idle_time_counts_when_nothing_is_in_flight() -> None:
    now = Clock()
    idle = IdleTime(now)
    now.advance(5)
    assert idle.seconds == 0, "not running yet"
    idle.begin()
    now.advance(3)
    assert idle.seconds == 3
    idle.now(True)
    now.advance(10)
    idle.now(True)
    assert idle.seconds == 3
    idle.now(False)
    now.advance(2)
    idle.end()
    now.advance(100)
    assert idle.seconds == 5


async def test_a_worker_s_idle_time_stops_while_it_answers() -> None:
    scene = Scene(manual=True)
    scene.weights.publish(blob(0))
    async with scene.running():
        await until(lambda: scene.worker.idle_s > 0)
        await scene.issue("t1")
        await until(lambda: len(scene.engine.in_flight) == 1)
        idle_s = scene.worker.idle_s
        await asyncio.sleep(0.01)
        assert scene.worker.idle_s == idle_s


async def test_stop_before_the_first_version_returns() -> None:
    scene = Scene()
    async with scene.running() as run:
        await asyncio.sleep(0)
        scene.worker.stop()
        await run


async def test_wait_version_has_a_deadline() -> None:
    scene = Scene()
    with pytest.raises(DeadlineError, match="version 7"):
        await scene.worker.versions.wait(7, timeout_s=0.01)


class FlakyStreams(MemoryStreams):
    """Away for the first `failures` calls of each kind."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.left = {"claim": failures, "advance": failures}

    def _maybe_fail(self, call: str) -> None:
        if self.left[call] > 0:
            self.left[call] -= 1
            raise StreamError("away", got=call)

    async def claim(self, stream: StreamName, *, consumer: str, max_count: int, wait_s: float) -> list[Delivery]:
        if consumer != "test":
            self._maybe_fail("claim")
        return await super().claim(stream, consumer=consumer, max_count=max_count, wait_s=wait_s)

    async def advance(self, source: StreamName, entry_id: str, *, target: StreamName, payload: bytes) -> bool:
        self._maybe_fail("advance")
        return await super().advance(source, entry_id, target=target, payload=payload)


async def test_a_short_outage_is_waited_out() -> None:
    scene = Scene(streams=FlakyStreams(2))
    scene.weights.publish(blob(0))
    await scene.issue("t1")
    async with scene.running():
        for total in range(1, 5):
            await until(lambda total=total: scene.worker.meter.tally.stream_errors == total)  # type: ignore[misc]
            scene.clock.advance(0.5)
        assert len(await scene.rollouts()) == 1


async def test_a_long_outage_ends_the_run() -> None:
    scene = Scene(replace(SETTINGS, outage_limit_s=0.0), streams=FlakyStreams(1))
    scene.weights.publish(blob(0))
    async with scene.running() as run:
        with pytest.raises(StreamError, match="away"):
            await run


async def test_scripts_choose_the_answer_by_prompt() -> None:
    def echo(request: GenerationRequest) -> Sequence[int]:
        return [int(token) for token in request.prompt_ids]

    engine = ScriptedEngine(answers=echo)
    request = GenerationRequest("a", np.array([9, 4], dtype=np.int32), max_new_tokens=5, temperature=1.0)
    answer = await engine.generate(request)
    assert (answer.response_ids.tolist(), answer.finish_reason) == ([9, 4], "length")
    await engine.shutdown()
