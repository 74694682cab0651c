"""Turns on a shared GPU, by order of events, with the scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.engine import GenerationRequest, ScriptedEngine
from actors.engine_turns import EngineTurns
from cluster.errors import DeadlineError, SupervisionError
from cluster.turns import LocalTurns, turn
from tests.rollout_scene import SETTINGS, Scene, blob, until

REQUEST = GenerationRequest("a", np.array([3], dtype=np.int32), max_new_tokens=4, temperature=1.0)


class Logged(ScriptedEngine):
    def __init__(self, log: list[str]) -> None:
        super().__init__(manual=True)
        self._log = log

    async def sleep(self) -> None:
        await super().sleep()
        self._log.append("engine sleeps")

    async def wake(self) -> None:
        self._log.append("engine wakes")
        await super().wake()


async def at_once() -> None:
    """Nothing is in flight."""


@asynccontextmanager
async def engine_side(log: list[str], turns: LocalTurns, **more: Any) -> AsyncIterator[EngineTurns]:
    engine = Logged(log)
    settings = {"settled": at_once, "turn_timeout_s": 5.0, "settle_timeout_s": 5.0, **more}
    side = EngineTurns(engine, turns, **settings)
    running = asyncio.create_task(side.run())
    yield side
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await engine.shutdown()


async def test_the_learner_trains_only_while_the_engine_sleeps() -> None:
    log: list[str] = []
    turns = LocalTurns()
    async with engine_side(log, turns) as side:
        for step in range(3):
            async with turn(turns, "learner", timeout_s=5.0):
                log.append(f"step {step}")
                await asyncio.sleep(0)
                log.append(f"step {step} done")
            await until(lambda step=step: side.rounds > step)  # type: ignore[misc]
    expected = []
    for step in range(3):
        expected += ["engine sleeps", f"step {step}", f"step {step} done", "engine wakes"]
    assert log == expected


async def test_the_engine_settles_before_it_sleeps() -> None:
    log: list[str] = []
    idle = asyncio.Event()

    async def settled() -> None:
        await idle.wait()
        log.append("nothing in flight")

    turns = LocalTurns()
    async with engine_side(log, turns, settled=settled):
        learner = asyncio.create_task(turns.take("learner", 5.0))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not learner.done()
        idle.set()
        await learner
        assert log == ["nothing in flight", "engine sleeps"]
        await turns.give("learner")


async def test_weights_are_not_loaded_while_asleep() -> None:
    log: list[str] = []
    turns = LocalTurns()
    async with engine_side(log, turns) as side:
        await turns.take("learner", 5.0)
        assert side.awake().locked()
        await turns.give("learner")
        async with asyncio.timeout(5), side.awake():
            assert log == ["engine sleeps", "engine wakes"]


async def test_every_wait_has_a_deadline() -> None:
    turns = LocalTurns()
    with pytest.raises(DeadlineError, match="the learner did not get its turn"):
        await turns.take("learner", 0.01)
    assert not await turns.wanted("engine", 0.01), "who gave up waits no longer"
    engine = ScriptedEngine()
    side = EngineTurns(engine, turns, settled=at_once, turn_timeout_s=0.05, settle_timeout_s=1.0)
    running = asyncio.create_task(side.run())
    await turns.take("learner", 5.0)
    with pytest.raises(DeadlineError, match="the engine did not get its turn"):
        await running
    assert engine.asleep, "it never wakes on a device that the learner holds"
    await engine.shutdown()


async def test_a_dead_holder_is_forgotten() -> None:
    turns = LocalTurns()
    await turns.forget("engine")
    await turns.take("learner", 1.0)
    await turns.forget("learner")
    await turns.take("engine", 1.0)
    with pytest.raises(SupervisionError, match="did not have"):
        await turns.give("learner")


async def test_a_dead_waiter_s_turn_is_its_successor_s() -> None:
    turns = LocalTurns()
    of_the_dead = asyncio.create_task(turns.take("learner", 5.0))
    await asyncio.sleep(0)
    await turns.forget("learner")
    with pytest.raises(SupervisionError, match="has been replaced"):
        await of_the_dead
    assert not await turns.wanted("engine", 0.01)
    successor = asyncio.create_task(turns.take("learner", 5.0))
    assert await turns.wanted("engine", 5.0)
    await turns.give("engine")
    await successor
    await turns.give("learner")


async def test_only_one_side_holds_it_however_they_interleave() -> None:
    turns, holders, most = LocalTurns(), 0, 0
    await turns.give("engine")

    async def work(side: Any) -> None:
        nonlocal holders, most
        for _ in range(50):
            async with turn(turns, side, timeout_s=5.0):
                holders += 1
                most = max(most, holders)
                await asyncio.sleep(0)
                holders -= 1

    await asyncio.gather(work("learner"), work("engine"))
    assert most == 1


async def test_a_sleeping_engine_generates_nothing() -> None:
    engine = ScriptedEngine(manual=True, answers=lambda request: [7, 0])
    answer = asyncio.create_task(engine.generate(REQUEST))
    await asyncio.sleep(0)
    await engine.sleep()
    for _ in range(5):
        engine.tick()
    assert not answer.done()
    await engine.wake()
    for _ in range(2):
        engine.tick()
    assert (await answer).response_ids.tolist() == [7, 0]
    await engine.shutdown()


async def test_a_worker_and_a_learner_on_one_gpu() -> None:
    """The whole round: answers while the engine is awake, training while it sleeps, the new version after it wakes."""
    turns = LocalTurns()
    scene = Scene(turns=turns)
    scene.weights.publish(blob(0))
    async with scene.running():
        for version in range(3):
            await scene.issue(f"t{version}", version=version)
            (rollout,) = await scene.rollouts()
            assert rollout.oldest_version == version
            async with turn(turns, "learner", timeout_s=5.0):
                assert scene.engine.asleep
                assert scene.worker.in_flight == 0
                scene.weights.publish(blob(version + 1))
                for _ in range(20):
                    await asyncio.sleep(0)
                assert scene.engine.version == version, "nothing is loaded into a sleeping engine"
            await until(lambda version=version: scene.engine.version == version + 1)  # type: ignore[misc]
            assert not scene.engine.asleep


async def test_a_learner_that_keeps_the_gpu_ends_the_worker() -> None:
    turns = LocalTurns()
    scene = Scene(replace(SETTINGS, turn_timeout_s=0.05), turns=turns)
    scene.weights.publish(blob(0))
    async with scene.running() as run:
        await turns.take("learner", 5.0)
        with pytest.raises(DeadlineError, match="the engine did not get its turn"):
            await run
