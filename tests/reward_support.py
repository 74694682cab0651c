"""A reward worker's surroundings for tests: streams that fail on command, a scorer that blocks, metrics to wait on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from cluster.errors import StreamError
from cluster.records import (
    DeadLetter,
    PromptTask,
    Rollout,
    ScoredRollout,
    VersionRun,
    decode,
    encode,
    pack_floats,
    pack_ids,
)
from cluster.streams import Delivery, StreamName
from cluster.streams_memory import MemoryStreams
from reward_service.batch_scoring import BatchScoring
from reward_service.cache import ScoreCache
from reward_service.forward_thread import ForwardThread
from reward_service.scorer import ScriptedScorer
from reward_service.worker import RewardWorker, WorkerSettings, WorkerTime
from reward_service.worker_metrics import NoMetrics

LONG_S = 20.0
"""Only ever waited for when a test fails."""


class ManualClock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def rollout(name: str, *, response: Sequence[int] = (7, 8, 2), prompt: Sequence[int] = (4, 5)) -> Rollout:
    task = PromptTask(
        task_id=name,
        prompt_id="p",
        group_id=name,
        prompt_ids_i32=pack_ids(prompt),
        max_new_tokens=8,
        temperature=1.0,
    )
    return Rollout(
        task=task,
        response_ids_i32=pack_ids(response),
        behaviour_logprobs_f32=pack_floats([-1.0] * len(response)),
        version_runs=(VersionRun(0, 0),),
        finish_reason="stop",
        actor="a",
        generate_s=0.0,
    )


class Watch(NoMetrics):
    """Metrics that a test can wait on."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def count(self, what: str) -> None:
        self.counts[what] += 1
        self._changed.set()

    async def changed(self) -> None:
        """Something is counted."""
        self._changed.clear()
        async with asyncio.timeout(LONG_S):
            await self._changed.wait()

    async def reached(self, what: str, count: int) -> None:
        while self.counts[what] < count:
            await self.changed()


class World:
    """Streams, a scorer, and workers on them."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.streams = WatchedStreams(lease_s=30.0, clock=self.clock)
        self.scorer = ScriptedScorer()
        self.cache: ScoreCache | None = None
        self.settings = WorkerSettings(consumer="w", batch_size=4, batch_wait_s=0.0, claim_wait_s=0.02)
        self.score_timeout_s = LONG_S
        self.time = WorkerTime()
        self.watch = Watch()

    def worker(self) -> RewardWorker:
        scoring = BatchScoring(
            self.scorer,
            thread=ForwardThread(max_stuck=2),
            cache=self.cache,
            metrics=NoMetrics(),
            timeout_s=self.score_timeout_s,
        )
        return RewardWorker(self.streams, scoring=scoring, metrics=self.watch, settings=self.settings, time=self.time)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RewardWorker]:
        """A worker that runs, and is stopped at the end."""
        worker = self.worker()
        task = asyncio.create_task(worker.run())
        try:
            yield worker
            await asyncio.wait_for(worker.stop(), LONG_S)
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def publish(self, *rollouts: Rollout) -> None:
        await self.streams.publish(StreamName.ROLLOUTS, [encode(item) for item in rollouts])

    async def scored(self, count: int) -> list[ScoredRollout]:
        return [decode(entry.payload, ScoredRollout) for entry in await self._read(StreamName.SCORED, count)]

    async def dead(self, count: int) -> list[DeadLetter]:
        return [decode(entry.payload, DeadLetter) for entry in await self._read(StreamName.DEAD, count)]

    async def left(self) -> int:
        """Rollouts neither scored nor dead."""
        depth = await self.streams.depth(StreamName.ROLLOUTS)
        return depth.backlog + depth.in_flight

    async def _read(self, stream: StreamName, count: int) -> list[Delivery]:
        entries: list[Delivery] = []
        async with asyncio.timeout(LONG_S):
            while len(entries) < count:
                more = await self.streams.claim(stream, consumer="test", max_count=count - len(entries), wait_s=1.0)
                # Settled at once: a test that lets leases run out must not read them again.
                await self.streams.settle(stream, [entry.entry_id for entry in more])
                entries += more
        return entries


class WatchedStreams(MemoryStreams):
    """MemoryStreams whose calls can be made to fail, and whose events can be waited for."""

    def __init__(self, *, lease_s: float, clock: Callable[[], float]) -> None:
        super().__init__(lease_s=lease_s, clock=clock)
        self.failures: dict[str, int] = {}
        """Method → how many of its next calls raise StreamError."""
        self.renewed = asyncio.Event()
        self.claimed = 0
        """Rollouts handed out."""
        self._claimed_more = asyncio.Event()
        self.empty_claims = asyncio.Event()

    async def claim(self, stream: StreamName, *, consumer: str, max_count: int, wait_s: float) -> list[Delivery]:
        if stream is not StreamName.ROLLOUTS:
            return await super().claim(stream, consumer=consumer, max_count=max_count, wait_s=wait_s)
        self._maybe_fail("claim")
        taken = await super().claim(stream, consumer=consumer, max_count=max_count, wait_s=wait_s)
        if taken:
            self.claimed += len(taken)
            self._claimed_more.set()
        else:
            self.empty_claims.set()
        return taken

    async def renew(self, stream: StreamName, *, consumer: str, entry_ids: Sequence[str]) -> None:
        self._maybe_fail("renew")
        await super().renew(stream, consumer=consumer, entry_ids=entry_ids)
        self.renewed.set()

    async def advance(self, source: StreamName, entry_id: str, *, target: StreamName, payload: bytes) -> bool:
        self._maybe_fail("advance")
        return await super().advance(source, entry_id, target=target, payload=payload)

    async def wait_claimed(self, count: int) -> None:
        async with asyncio.timeout(LONG_S):
            while self.claimed < count:
                self._claimed_more.clear()
                await self._claimed_more.wait()

    def _maybe_fail(self, method: str) -> None:
        if self.failures.get(method, 0) > 0:
            self.failures[method] -= 1
            raise StreamError("unreachable", got="connection refused")


class Gate:
    """Stops the scorer's thread until the test opens it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, batch: Sequence[Rollout]) -> None:
        self.entered.set()
        self.opened.wait(LONG_S)

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, LONG_S)
