"""A reward worker around a given scoring, for tests of what the scoring does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from cluster.stores import MemoryScores
from reward_service.batch_scoring import BatchScoring
from reward_service.cache import CacheSettings, ScoreCache
from reward_service.forward_thread import ForwardThread
from reward_service.review.feed import ReviewFeed
from reward_service.scorer import Scorer
from reward_service.serving import Rewarding
from reward_service.worker import RewardWorker
from reward_service.worker_metrics import NoMetrics, WorkerMetrics
from tests.reward_support import LONG_S, World


def batch_scoring(
    scorer: Scorer,
    *,
    rewarding: Rewarding | None = None,
    metrics: WorkerMetrics | None = None,
    store: MemoryScores | None = None,
    feed: ReviewFeed | None = None,
) -> BatchScoring:
    """With a cache in the process and `store` behind it."""
    return BatchScoring(
        scorer,
        thread=ForwardThread(),
        cache=ScoreCache(CacheSettings(entries=64, ttl_s=60.0), store=store),
        metrics=metrics or NoMetrics(),
        timeout_s=LONG_S,
        rewarding=rewarding,
        feed=feed,
    )


@contextlib.asynccontextmanager
async def running(world: World, scoring: BatchScoring) -> AsyncIterator[RewardWorker]:
    """A worker on the world's streams, stopped at the end."""
    worker = RewardWorker(world.streams, scoring=scoring, metrics=world.watch, settings=world.settings)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
        await asyncio.wait_for(worker.stop(), LONG_S)
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
