"""A rollout worker with everything around it: memory streams, a scripted engine, and a clock that tests move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import torch

from actors.engine import ScriptedEngine
from actors.rollout_worker import RolloutWorker, WorkerSettings
from cluster.records import PromptTask, Rollout, decode, encode, pack_ids
from cluster.streams import Delivery, StreamName
from cluster.streams_memory import MemoryStreams
from cluster.turns import Turns
from cluster.weights import MemoryWeightChannel, Probe, WeightBlob, pack

EOS = 0
ANSWER = [7, 8, EOS]
SETTINGS = WorkerSettings(consumer="actor-0", max_concurrent=2, claim_wait_s=0.02, lease_s=30.0, max_deliveries=2)


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sleepers: list[tuple[float, asyncio.Event]] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self.sleepers.append((self.now_s + seconds, event))
        await event.wait()

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for due_s, event in self.sleepers:
            if due_s <= self.now_s:
                event.set()
        self.sleepers = [sleeper for sleeper in self.sleepers if not sleeper[1].is_set()]


class Scene:
    """A worker with everything around it."""

    def __init__(
        self,
        settings: WorkerSettings = SETTINGS,
        *,
        manual: bool = False,
        streams: MemoryStreams | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.clock = Clock()
        self.streams = streams or MemoryStreams(lease_s=settings.lease_s, clock=self.clock)
        self.weights = MemoryWeightChannel()
        self.engine = ScriptedEngine(eos_id=EOS, answers=lambda request: ANSWER, manual=manual)
        self.worker = RolloutWorker(
            self.streams,
            engine=self.engine,
            weights=self.weights,
            settings=settings,
            turns=turns,
            sleep=self.clock.sleep,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        run = asyncio.create_task(self.worker.run())
        try:
            yield run
        finally:
            self.worker.stop()
            self.engine.die("the test is over")
            await asyncio.gather(run, return_exceptions=True)  # its error is the test's own doing, if there is one
            await self.engine.shutdown()
            assert len(asyncio.all_tasks()) == 1, "the worker left tasks behind"

    async def issue(self, *names: str, version: int = 0) -> None:
        await self.streams.publish(StreamName.PROMPTS, [encode(prompt(name, version=version)) for name in names])

    async def take(self, stream: StreamName, count: int = 1) -> list[Delivery]:
        taken: list[Delivery] = []
        async with asyncio.timeout(20):
            while len(taken) < count:
                taken += await self.streams.claim(stream, consumer="test", max_count=count, wait_s=5)
        return taken

    async def rollouts(self, count: int = 1) -> list[Rollout]:
        return [decode(delivery.payload, Rollout) for delivery in await self.take(StreamName.ROLLOUTS, count)]


def prompt(name: str, *, version: int = 0) -> PromptTask:
    return PromptTask(
        task_id=name,
        prompt_id=f"p-{name}",
        group_id="g",
        prompt_ids_i32=pack_ids([3, 4]),
        max_new_tokens=5,
        temperature=1.0,
        issued_version=version,
    )


def blob(version: int, *, logprob: float | None = None) -> WeightBlob:
    """With a probe, when told what the learner says about it."""
    if logprob is None:
        return pack(version, [("w", torch.zeros(1))])
    probe = Probe(token_ids=np.array([5, 6], dtype=np.int32), logprobs=np.array([logprob], dtype=np.float32))
    return pack(version, [("w", torch.zeros(1))], probe=probe)


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what it looks at has no event
            await asyncio.sleep(0.001)
