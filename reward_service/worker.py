"""The queue worker of the reward service: rollouts in, scored rollouts out. It knows no Redis, no Ray and no torch.

Consumes: stream ROLLOUTS. Produces: stream SCORED; DEAD for what cannot be scored, or is refused as too uncertain. Both
by hops, so a result is published once however often a rollout was handed out.

Five tasks, one `TaskGroup`:
    claim   waits for entries, or for room (at most `2 × batch_size` are held). Unblocked by: publishers; commit.
    score   waits for a due batch, then for its forward pass. Unblocked by: claim, the batch deadline or the end of a
            pause; the forward thread or its time limit. Claims and commits go on meanwhile.
    commit  waits for outcomes, then for the server: one round trip a batch. Unblocked by: score; the server or the end
            of the outage limit.
    renew   waits a third of a lease. Renews the leases of everything held.
    grace   waits for stop(), then for the end of the work, at most `grace_s`.

Always holds: every entry held is in exactly one of batcher, suspects, forward pass, paused, outcomes; one forward pass
at a time; a failure is never a number. A rollout that fails is let go, to be handed out again when its lease ends;
after `max_deliveries` it is dead-lettered with the reason. One whose reward source is away is kept and tried again; it
fails when it has waited for `outage_s`. What was handed out before is scored alone, so that a rollout that takes its
worker down does so without company; and so is what has waited for half of `outage_s`, in case one of it is what takes
the source down. The first task to fail ends run() with its error; none outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from cluster.errors import CodecError, ScoringError, StreamError
from cluster.records import DeadLetter, Rollout, ScoredRollout, decode
from cluster.streams import Delivery, StreamName, Streams
from reward_service.batch_scoring import BatchScoring, CacheUpdate
from reward_service.batcher import Batcher, BatchLimits
from reward_service.forward_thread import StuckError
from reward_service.outcomes import Held, Outcomes, Step, round_trips
from reward_service.rewards.sources import SourceDownError
from reward_service.serving import Outcome
from reward_service.worker_metrics import WorkerMetrics

log = logging.getLogger(__name__)

R = TypeVar("R")

_FAILURES_IN_A_ROW: Final = 16
"""So many single rollouts failing with no success between: the scorer is broken, not the rollouts."""
_BACKOFF_S: Final = (0.1, 5.0)
_IDLE_S: Final = 2.0
_SOURCE_PAUSE_S: Final = 1.0
"""Until rollouts whose reward source is away are tried again; when it is asked again is the source's own affair."""


@dataclass(frozen=True)
class WorkerSettings:
    """consumer: unique among living workers. lease_s: as the streams have it. outage_s: how long one call to the server
    is tried again before run() ends with its error, and how long rollouts wait for a reward source that is away. The
    rest: configs.run.RewardSection."""

    consumer: str
    batch_size: int = 64
    token_budget: int = 8192
    batch_wait_s: float = 0.05
    max_deliveries: int = 3
    lease_s: float = 30.0
    claim_wait_s: float = 1.0
    grace_s: float = 10.0
    outage_s: float = 60.0


@dataclass(frozen=True)
class WorkerTime:
    """Time as the worker sees it when the server or a reward source is away; tests replace it."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class _GraceOver(Exception):
    """stop() has waited long enough."""


class RewardWorker:
    """One worker. `run` until `stop`; not reusable. `scoring` owns the models and the cache."""

    def __init__(
        self,
        streams: Streams,
        *,
        scoring: BatchScoring,
        metrics: WorkerMetrics,
        settings: WorkerSettings,
        time: WorkerTime | None = None,
    ) -> None:
        self._streams = streams
        self._scoring = scoring
        self._metrics = metrics
        self._settings = settings
        self._time = time or WorkerTime()
        self._held: dict[str, Held] = {}
        limits = BatchLimits(settings.batch_size, settings.token_budget, settings.batch_wait_s)
        self._batcher: Batcher[Held] = Batcher(limits)
        self._suspects: deque[Held] = deque()
        self._outcomes: asyncio.Queue[Outcomes | None] = asyncio.Queue(maxsize=2)
        self._failures_in_a_row = 0
        self._paused: dict[str, Held] = {}
        self._resuming = False
        self._away_since_s: dict[str, float] = {}
        """Entry → when its reward source was first found away."""
        self._claiming = True
        self._arrived = asyncio.Event()
        self._freed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._drained = asyncio.Event()
        self._ended = asyncio.Event()
        self.counts: Counter[str] = Counter()
        """scored, dead, rejected, duplicates, failures, paused, redelivered, poison, stream_errors: since start."""

    @property
    def in_flight(self) -> int:
        """Entries held."""
        return len(self._held)

    async def run(self) -> None:
        """Work until `stop`. Raises the first task's error: StreamError when the server stays away, StuckError or
        ScoringError when the scorer is no good any more."""
        try:
            async with asyncio.TaskGroup() as group:
                for work in (self._claim, self._score, self._commit, self._renew, self._grace):
                    group.create_task(work(), name=f"{self._settings.consumer}{work.__name__}")
        except BaseExceptionGroup as failures:
            first = first_leaf(failures)
            if not isinstance(first, _GraceOver):
                raise first from first.__cause__
            log.warning("stopped with %d rollouts unfinished; their leases run out", len(self._held))
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """Claim nothing more, finish what is held within `grace_s`, leave the rest to its leases. Returns when run()
        has ended; so call it only on a worker that runs."""
        self._stopping.set()
        self._freed.set()
        await self._ended.wait()

    # ---------------------------------------------------------------- the five tasks

    async def _claim(self) -> None:
        settings = self._settings
        while not self._stopping.is_set():
            self._freed.clear()
            room = 2 * settings.batch_size - len(self._held)
            if room < 1:
                await self._freed.wait()
                continue
            claim = functools.partial(
                self._streams.claim,
                StreamName.ROLLOUTS,
                consumer=settings.consumer,
                max_count=min(room, settings.batch_size),
                wait_s=settings.claim_wait_s,
            )
            deliveries = await self._persistently(claim)
            await self._take_in(deliveries)
        self._claiming = False
        self._arrived.set()

    async def _score(self) -> None:
        while True:
            self._metrics.progress()
            self._arrived.clear()
            last_round = not self._claiming
            batch = self._batcher.take(flush=last_round)
            suspect = [self._suspects.popleft()] if self._suspects else []
            if batch:
                await self._score_batch(batch)
            if suspect:
                await self._score_batch(suspect)
            if batch or suspect:
                continue
            if last_round:
                break
            due_s = self._batcher.due_in_s()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), _IDLE_S if due_s is None else min(due_s, _IDLE_S))
        while self._paused:
            self._let_go(self._paused.popitem()[1])
        await self._outcomes.put(None)

    async def _commit(self) -> None:
        while (outcomes := await self._outcomes.get()) is not None:
            for steps in round_trips(outcomes.records):
                await self._publish(steps)
            await self._scoring.remember(outcomes.learned)
        self._drained.set()

    async def _renew(self) -> None:
        while not self._drained.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), self._settings.lease_s / 3)
            if self._held:
                await self._persistently(
                    lambda: self._streams.renew(
                        StreamName.ROLLOUTS, consumer=self._settings.consumer, entry_ids=list(self._held)
                    )
                )

    async def _grace(self) -> None:
        await self._stopping.wait()
        try:
            async with asyncio.timeout(self._settings.grace_s):
                await self._drained.wait()
        except TimeoutError as error:
            raise _GraceOver from error

    # ---------------------------------------------------------------- steps

    async def _take_in(self, deliveries: Sequence[Delivery]) -> None:
        """Hold deliveries and queue them for scoring, but for those that are damaged or were handed out too often."""
        poison: list[str] = []
        worn: list[Held] = []
        for delivery in deliveries:
            if delivery.entry_id in self._held:
                continue  # our own lease ran out before we renewed it; the work goes on
            if delivery.deliveries > 1:
                self._count("redelivered")
            try:
                rollout = decode(delivery.payload, Rollout)
            except CodecError as error:
                log.error("entry %s of the rollouts stream is discarded: %s", delivery.entry_id, error)
                self._count("poison")
                poison.append(delivery.entry_id)
                continue
            held = Held(delivery.entry_id, rollout, delivery.deliveries)
            self._held[held.entry_id] = held
            if held.deliveries > self._settings.max_deliveries:
                worn.append(held)
            else:
                self._queue(held)
        self._arrived.set()
        if poison:
            await self._persistently(lambda: self._streams.settle(StreamName.ROLLOUTS, poison))
        for held in worn:
            await self._bury(held, "no worker that was handed it came back with a result")

    def _queue(self, held: Held) -> None:
        if held.deliveries > 1 or self._waited_s(held) >= self._settings.outage_s / 2:
            self._suspects.append(held)
        else:
            self._batcher.add(held, tokens=held.tokens)

    async def _score_batch(self, batch: Sequence[Held]) -> None:
        """Outcomes for a batch; where it fails, rollout by rollout, so that one does not take the others with it. The
        scoring may also name the rollouts that failed; then the others need no second pass."""
        self._metrics.progress()
        try:
            results, learned = await self._scoring.score([held.rollout for held in batch])
        except StuckError:
            raise
        except Exception as error:
            if len(batch) == 1:
                await self._fail(batch[0], error)
                return
            log.warning("a batch of %d failed, scoring its rollouts one by one: %r", len(batch), error)
            for held in batch:
                await self._score_batch([held])
            return
        await self._sort_out(list(zip(batch, results, strict=True)), learned)

    async def _sort_out(self, results: Sequence[tuple[Held, Outcome]], learned: CacheUpdate) -> None:
        """Commit what is settled, keep what waits for a reward source, fail the rest."""
        away = [(held, result) for held, result in results if isinstance(result, SourceDownError)]
        settled = [(held, result) for held, result in results if not isinstance(result, ScoringError)]
        await self._outcomes.put(Outcomes(settled, learned))
        some_scored = any(isinstance(record, ScoredRollout) for _, record in settled)
        if some_scored:
            self._failures_in_a_row = 0
        if away:
            await self._keep(away)
        for held, result in results:
            if isinstance(result, ScoringError) and not isinstance(result, SourceDownError):
                # Beside others that are scored, or failing again: of the sources this says nothing new.
                await self._fail(held, result, telling=not some_scored and held.deliveries == 1)

    async def _keep(self, away: Sequence[tuple[Held, SourceDownError]]) -> None:
        """Try rollouts again after a pause, because it is not their fault that a source is away; meanwhile they take up
        room, so that not much is claimed. One that has waited for `outage_s` fails."""
        for held, error in away:
            self._away_since_s.setdefault(held.entry_id, self._time.now())
            if self._waited_s(held) >= self._settings.outage_s:
                self._count("failures")
                await self._give_up(held, error)
            else:
                self._count("paused")
                self._paused[held.entry_id] = held
        if self._paused and not self._resuming:
            self._resuming = True
            log.warning("%d rollouts wait for a reward source: %s", len(self._away_since_s), away[0][1])
            asyncio.get_running_loop().call_later(_SOURCE_PAUSE_S, self._resume)

    def _resume(self) -> None:
        due = list(self._paused.values())
        self._paused.clear()
        self._resuming = False
        # A source that is away is asked once in a while: not always for the same one, on which it may choke.
        random.shuffle(due)
        for held in due:
            self._queue(held)
        self._arrived.set()

    def _waited_s(self, held: Held) -> float:
        since_s = self._away_since_s.get(held.entry_id)
        return 0.0 if since_s is None else self._time.now() - since_s

    async def _fail(self, held: Held, error: Exception, *, telling: bool = True) -> None:
        """One rollout could not be scored: let it go, or bury it at its last delivery. `telling`: the scorer may be
        what is broken."""
        self._count("failures")
        task_id = held.rollout.task.task_id
        log.warning("task %s, delivery %d, not scored: %r", task_id, held.deliveries, error)
        self._failures_in_a_row += telling
        if self._failures_in_a_row >= _FAILURES_IN_A_ROW:
            raise ScoringError(
                "the scorer fails on every rollout",
                got=f"{self._failures_in_a_row} failures in a row, the last on task {task_id}: {error!r}",
                do="check the reward model, the reference model and other reward sources against the rollouts",
            ) from error
        await self._give_up(held, error)

    async def _give_up(self, held: Held, error: Exception) -> None:
        """Until its next delivery, or for good."""
        if held.deliveries >= self._settings.max_deliveries:
            await self._bury(held, f"{type(error).__name__}: {error}")
        else:
            self._let_go(held)

    async def _bury(self, held: Held, reason: str) -> None:
        letter = DeadLetter(task=held.rollout.task, stage="reward", reason=reason, deliveries=held.deliveries)
        await self._outcomes.put(Outcomes([(held, letter)]))

    async def _publish(self, steps: Sequence[Step]) -> None:
        hops = [step.hop for step in steps]
        moved = await self._persistently(lambda: self._streams.advance_many(StreamName.ROLLOUTS, hops))
        for step, ours in zip(steps, moved, strict=True):
            self._let_go(step.held)
            self._count(step.counts_as if ours else "duplicates")

    def _let_go(self, held: Held) -> None:
        del self._held[held.entry_id]
        self._away_since_s.pop(held.entry_id, None)
        self._freed.set()

    def _count(self, what: str) -> None:
        self.counts[what] += 1
        self._metrics.count(what)

    async def _persistently(self, call: Callable[[], Awaitable[R]]) -> R:
        """`call()`, again and again while the server errs, for at most `outage_s`; then its StreamError."""
        failing_since_s: float | None = None
        pause_s, longest_s = _BACKOFF_S
        while True:
            try:
                return await call()
            except StreamError as error:
                now_s = self._time.now()
                failing_since_s = now_s if failing_since_s is None else failing_since_s
                if now_s - failing_since_s >= self._settings.outage_s:
                    raise
                self._count("stream_errors")
                log.warning("trying again in %.1f s: %s", pause_s, error)
                await self._time.sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)


def first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a task group's failures, however deep."""
    first = group.exceptions[0]
    return first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
