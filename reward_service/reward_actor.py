"""One reward worker as a process: models, queue, cache, announcements, people and metrics put together. Made into a Ray
actor by the composition root, or run by `serve` outside Ray.

Consumes and produces: see worker.py, hot_swap.py, review_feed.py; and rewards on request, outside the streams, by
`score`. Waits: in `run`, until `stop` or the first error. Who unblocks it: see worker.py.
Always holds: one forward pass at a time in this process, whoever asked for it; its consumer name is its own; what runs
beside the worker ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import CodecError, ScoringError
from cluster.records import PromptTask, Rollout, VersionRun, pack_floats, pack_ids
from configs.run import RunConfig
from reward_service.batch_scoring import BatchScoring
from reward_service.cache import CacheSettings, ScoreCache
from reward_service.forward_thread import ForwardThread
from reward_service.hot_swap import ModelWatch
from reward_service.model_loading import ModelLoader
from reward_service.review.feed import FeedSettings, ReviewFeed
from reward_service.serving import Rewarding, Serving
from reward_service.worker import RewardWorker, WorkerSettings, first_leaf
from reward_service.worker_metrics import ExportedMetrics

if TYPE_CHECKING:
    from cluster.process import Process
    from cluster.rm_announcement import RewardModelBoard, RmAnnouncement

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardSpec:
    """What the composition root gives a worker. `run_dir` has rm/ and sft/model/. `incarnation` counts the restarts of
    worker `index`."""

    config: RunConfig
    redis_url: str
    run_dir: str
    index: int
    incarnation: int

    @property
    def name(self) -> str:
        """Of this process, in metrics and logs."""
        return f"reward-{self.index}.{self.incarnation}"

    @property
    def rm_dir(self) -> Path:
        return Path(self.run_dir) / "rm"

    @property
    def reference_dir(self) -> Path:
        return Path(self.run_dir) / "sft" / "model"


@dataclass(frozen=True)
class _Parts:
    cache: ScoreCache
    scoring: BatchScoring
    worker: RewardWorker
    watch: ModelWatch
    feed: ReviewFeed | None


class RewardActor:
    """`start`, then any of the others, on one event loop."""

    def __init__(self, spec: RewardSpec) -> None:
        self._spec = spec
        self._stack = AsyncExitStack()
        self._parts: _Parts | None = None
        self._thread = ForwardThread()
        self._loader = ModelLoader(spec.config.reward, rm_dir=spec.rm_dir, reference_dir=spec.reference_dir)
        self._on_request: Serving | None = None
        """Another version than the one that scores, for `score`; the last that was asked for."""
        self._running = False
        self._stop_asked = False

    async def start(self) -> dict[str, Any]:
        """Load the models and connect. Returns name, pid, boot_s, rm_version, members. Raises ModelError for the
        models, ConfigError for other sources and rules, StreamError for the server."""
        from cluster.process import start_process

        spec, started_s = self._spec, time.monotonic()
        try:
            process = await self._stack.enter_async_context(
                start_process(
                    spec.config,
                    role="reward",
                    instance=spec.name,
                    redis_url=spec.redis_url,
                    log_dir=Path(spec.run_dir) / "logs",
                )
            )
            rewarding = _rewarding(spec)
            self._stack.push_async_callback(rewarding.aclose)
            serving = await self._loader.start(await _announced(process.redis.reward_model))
        except BaseException:
            await self._close()
            raise
        self._parts = self._assemble(process, serving, rewarding)
        return {
            "name": spec.name,
            "pid": os.getpid(),
            "boot_s": round(time.monotonic() - started_s, 2),
            "rm_version": serving.version,
            "members": serving.members,
        }

    async def run(self) -> None:
        """Score what the streams bring until `stop`. Raises what ended it otherwise."""
        if self._stop_asked:
            return
        parts = self._started()
        self._running = True
        try:
            await self._run(parts)
        except Exception:
            log.exception("reward worker %s failed", self._spec.name)
            raise
        finally:
            self._running = False

    async def stop(self) -> None:
        """End `run` within its grace period and close everything. May be called again, and before `run`."""
        self._stop_asked = True
        if self._running:
            await self._started().worker.stop()
        await self._close()

    async def status(self) -> dict[str, Any]:
        """Totals since start, and what is held now."""
        parts = self._started()
        return {
            "name": self._spec.name,
            "running": self._running,
            "rm_version": parts.scoring.serving.version,
            "in_flight": parts.worker.in_flight,
            **parts.worker.counts,
            **parts.scoring.counts,
            **parts.watch.counts,
            "cache": dict(parts.cache.counts),
            "rewards": dict(parts.scoring.reward_counts),
        }

    async def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], version: str | None = None
    ) -> list[float]:
        """The reward model's score of each (prompt ids, response ids): the members' aggregate, before other sources and
        rules. `version`: default the one that scores now. For evaluation; the cache is not used. Any failure fails the
        call: with ScoringError, or ModelError for a version that is not there."""
        scoring, reward = self._started().scoring, self._spec.config.reward
        serving = await self._serving(version)
        eos_id = serving.scorer.eos_id
        rollouts = [
            _offline_rollout(f"pair {number}", prompt, response, eos_id=eos_id)
            for number, (prompt, response) in enumerate(pairs)
        ]
        rewards: list[float] = []
        for start in range(0, len(rollouts), reward.batch_size):  # piecewise, so that the queue gets its turns
            rewards += await scoring.model_rewards(rollouts[start : start + reward.batch_size], serving=serving)
        return rewards

    async def _serving(self, version: str | None) -> Serving:
        now = self._started().scoring.serving
        if not self._spec.config.reward.needs_model:
            raise ScoringError("no reward model is asked in this run", do="set reward.sources")
        if version is None or version == now.version:
            self._on_request = None
            return now
        if self._on_request is None or self._on_request.version != version:
            self._on_request = None  # let go of before another takes its memory
            self._on_request = await self._loader.version(version)
        return self._on_request

    def _assemble(self, process: Process, serving: Serving, rewarding: Rewarding) -> _Parts:
        from cluster.metrics import RewardMetrics

        reward, review = self._spec.config.reward, self._spec.config.review
        metrics = ExportedMetrics(RewardMetrics(process.registry), beat=process.heartbeat.beat)
        cache = ScoreCache(CacheSettings(reward.cache_entries, reward.cache_ttl_s), store=process.redis.scores)
        feed = None
        if review.enabled:
            settings = FeedSettings(audit_fraction=review.audit_fraction, queue_limit=review.queue_limit)
            feed = ReviewFeed(process.redis.review, settings=settings, metrics=metrics)
        scoring = BatchScoring(
            serving.scorer,
            thread=self._thread,
            cache=cache,
            metrics=metrics,
            timeout_s=reward.score_timeout_s,
            rewarding=rewarding,
            feed=feed,
        )
        scoring.install(serving)
        worker = RewardWorker(
            process.redis.streams, scoring=scoring, metrics=metrics, settings=_worker_settings(self._spec)
        )
        watch = ModelWatch(process.redis.reward_model, load=self._loader.version, scoring=scoring, metrics=metrics)
        return _Parts(cache, scoring, worker, watch, feed)

    async def _run(self, parts: _Parts) -> None:
        """The worker, and beside it what ends with it. None of that ends by itself; if it does, so does the worker."""
        beside: list[asyncio.Task[None]] = []
        try:
            async with asyncio.TaskGroup() as group:
                if self._spec.config.reward.needs_model:
                    beside.append(group.create_task(parts.watch.run(), name="model watch"))
                if parts.feed is not None:
                    beside.append(group.create_task(parts.feed.run(), name="review feed"))
                await parts.worker.run()
                for task in beside:
                    task.cancel()
        except BaseExceptionGroup as failures:
            first = first_leaf(failures)
            raise first from first.__cause__
        finally:
            if parts.feed is not None:
                await parts.feed.flush()

    async def _close(self) -> None:
        self._thread.close()
        self._loader.close()
        await self._stack.aclose()

    def _started(self) -> _Parts:
        if self._parts is None:
            raise ScoringError("the reward worker has not started", do="await start() first")
        return self._parts


def serve(spec: RewardSpec) -> int:
    """Be a reward worker until SIGTERM or SIGINT; a second signal ends the process at once. Returns 0, the exit code of
    a clean stop; raises what made it end otherwise."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(spec))
    return 0


async def _serve(spec: RewardSpec) -> None:
    loop = asyncio.get_running_loop()
    stop_asked = asyncio.Event()

    def on_signal() -> None:
        stop_asked.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    actor = RewardActor(spec)
    asked = asyncio.create_task(stop_asked.wait())
    try:
        info = await actor.start()
        log.info("%s is ready, reward model %s", info["name"], info["rm_version"])
        run = asyncio.create_task(actor.run())
        await asyncio.wait({run, asked}, return_when=asyncio.FIRST_COMPLETED)
        await actor.stop()
        await run
    finally:
        asked.cancel()
        await actor.stop()


def _rewarding(spec: RewardSpec) -> Rewarding:
    from reward_service.rewards.compose import make_composer
    from reward_service.rewards.constitution_file import CONSTITUTION_FILE

    reward = spec.config.reward
    if reward.constitution is not None:  # the run's own copy, which every node sees
        reward = reward.model_copy(update={"constitution": Path(spec.run_dir) / CONSTITUTION_FILE})
    return Rewarding(reward, composer=make_composer(reward))


async def _announced(board: RewardModelBoard) -> RmAnnouncement | None:
    try:
        return await board.newest()
    except CodecError as error:
        log.error("the announcement of a reward model cannot be read: %s", error)
        return None


def _worker_settings(spec: RewardSpec) -> WorkerSettings:
    reward = spec.config.reward
    return WorkerSettings(
        # Two workers of one name would each take the other's leases for their own.
        consumer=f"{spec.name}-{secrets.token_hex(4)}",
        batch_size=reward.batch_size,
        token_budget=reward.token_budget,
        batch_wait_s=reward.batch_wait_s,
        max_deliveries=reward.max_deliveries,
        lease_s=spec.config.redis.lease_s,
    )


def _offline_rollout(name: str, prompt: Sequence[int], response: Sequence[int], *, eos_id: int) -> Rollout:
    """A rollout as far as a reward model looks at it."""
    task = PromptTask(
        task_id=name,
        prompt_id=name,
        group_id=name,
        prompt_ids_i32=pack_ids(prompt),
        max_new_tokens=max(1, len(response)),
        temperature=1.0,
    )
    return Rollout(
        task=task,
        response_ids_i32=pack_ids(response),
        behaviour_logprobs_f32=pack_floats([0.0] * len(response)),
        version_runs=(VersionRun(0, 0),),
        finish_reason="stop" if len(response) and response[-1] == eos_id else "length",
        actor="offline",
        generate_s=0.0,
    )
