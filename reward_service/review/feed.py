"""Answers for people: those that a rule hit, and a random share of all, on their way to the review queue.

Consumes: outcomes of scored batches, by `offer`. Produces: review items in the queue. Waits for: something to push,
then for the queue. Who unblocks it: `offer`; the queue's own deadline. Always holds: `offer` neither waits nor fails,
so people never cost a sample; what finds no room is counted and left out; an answer is one item however often it is
offered, and which answers are audited follows from their tasks alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.errors import KeelError, ScoringError
from cluster.records import Rollout, RuleVerdict, ScoredRollout
from cluster.review_queue import Kind, ReviewItem, ReviewQueue, now_iso
from reward_service.serving import Measured, Outcome
from reward_service.worker_metrics import WorkerMetrics

log = logging.getLogger(__name__)

_BATCH: Final = 64
_BACKOFF_S: Final = (0.5, 30.0)


@dataclass(frozen=True)
class FeedSettings:
    """audit_fraction: of all answers. queue_limit: most items of a kind that wait for people. buffer: most items that
    wait here for the queue."""

    audit_fraction: float
    queue_limit: int
    buffer: int = 512
    last_push_s: float = 2.0


class ReviewFeed:
    """`offer` at any time; `run` until cancelled; then `flush`. One event loop."""

    def __init__(
        self,
        queue: ReviewQueue,
        *,
        settings: FeedSettings,
        metrics: WorkerMetrics,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._queue = queue
        self._settings = settings
        self._metrics = metrics
        self._sleep = sleep
        self._waiting: deque[ReviewItem] = deque()
        self._arrived = asyncio.Event()

    def offer(self, batch: Sequence[Measured], outcomes: Sequence[Outcome]) -> None:
        """What became of each of `batch`, whose text must be there."""
        for measured, outcome in zip(batch, outcomes, strict=True):
            for item in _items(measured, outcome, audit_fraction=self._settings.audit_fraction):
                if len(self._waiting) < self._settings.buffer:
                    self._waiting.append(item)
                    self._arrived.set()
                else:
                    self._metrics.count("review_left_out")

    async def run(self) -> None:
        """Push what was offered. A queue that errs is tried again; the buffer bounds what waits for it."""
        pause_s, longest_s = _BACKOFF_S
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            try:
                await self._push()
                pause_s = _BACKOFF_S[0]
            except (KeelError, OSError, TimeoutError) as error:
                log.warning("the review queue does not answer, trying again in %.1f s: %r", pause_s, error)
                await self._sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)

    async def flush(self) -> None:
        """One last try for what still waits, within `last_push_s`."""
        with contextlib.suppress(KeelError, OSError, TimeoutError):
            async with asyncio.timeout(self._settings.last_push_s):
                while self._waiting:
                    await self._push()

    async def _push(self) -> None:
        items = [self._waiting[index] for index in range(min(_BATCH, len(self._waiting)))]
        taken = await self._queue.push(items, limit=self._settings.queue_limit)
        for _ in items:
            self._waiting.popleft()  # only now: a push that failed is tried again, and an item is taken once
        for count, what in ((taken, "review_taken"), (len(items) - taken, "review_left_out")):
            for _ in range(count):
                self._metrics.count(what)


def is_audited(task_id: str, *, fraction: float) -> bool:
    """The same for every worker and every attempt."""
    digest = hashlib.sha256(f"audit {task_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def _items(measured: Measured, outcome: Outcome, *, audit_fraction: float) -> Iterator[ReviewItem]:
    if isinstance(outcome, ScoringError):
        return  # it comes again, and only then is known whether a rule hits it
    verdicts = outcome.verdicts if isinstance(outcome, ScoredRollout) else ()
    if verdicts:
        yield _item(measured, "flagged", reason="; ".join(map(_told, verdicts)))
    elif is_audited(measured.rollout.task.task_id, fraction=audit_fraction):
        yield _item(measured, "audit", reason="drawn at random")


def _told(verdict: RuleVerdict) -> str:
    return f"{verdict.rule} ({verdict.action})" + (f": {verdict.detail}" if verdict.detail else "")


def _item(measured: Measured, kind: Kind, *, reason: str) -> ReviewItem:
    assert measured.text is not None
    prompt, answer = measured.text
    content = hashlib.sha256("\0".join((kind, measured.rollout.task.task_id, prompt, answer)).encode()).hexdigest()
    return ReviewItem(
        item_id=content[:24],
        kind=kind,
        prompt=prompt,
        answers=(answer,),
        policy_versions=(_newest_version(measured.rollout),),
        reason=reason,
        created_at=now_iso(),
    )


def _newest_version(rollout: Rollout) -> int:
    return max(run.version for run in rollout.version_runs)
