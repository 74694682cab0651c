"""Taking over an announced reward model while scoring goes on.

Consumes: announcements, by asking the board every `poll_s`. Produces: a model installed in the scoring, which uses it
from its next batch on. Waits for: the board's answer; the loading, in a thread of its own. Who unblocks it: the board's
deadline; the loader's time limit.
Always holds: the old model scores until the new one is there, whole; one that does not load leaves the old one in its
place, is counted, and is tried again with growing pauses until something newer is announced; nothing here ends the
worker. With a third model announced during a loading, the second is not used.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import KeelError
from reward_service.batch_scoring import BatchScoring
from reward_service.serving import Serving
from reward_service.worker_metrics import WorkerMetrics

if TYPE_CHECKING:
    from cluster.rm_announcement import RewardModelBoard, RmAnnouncement

log = logging.getLogger(__name__)

Load = Callable[[str], Awaitable[Serving]]
"""Version → what serves it. May raise anything."""


@dataclass(frozen=True)
class WatchTimes:
    """poll_s: between two looks. A version that did not load is tried again after first_retry_s, then after twice that,
    and so on up to last_retry_s."""

    poll_s: float = 0.5
    first_retry_s: float = 1.0
    last_retry_s: float = 60.0
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class ModelWatch:
    """`run` until cancelled, or `look` by hand."""

    def __init__(
        self,
        board: RewardModelBoard,
        *,
        load: Load,
        scoring: BatchScoring,
        metrics: WorkerMetrics,
        times: WatchTimes | None = None,
    ) -> None:
        self._board = board
        self._load = load
        self._scoring = scoring
        self._metrics = metrics
        self._times = times or WatchTimes()
        self._heard = -1
        self._board_fails = False
        self._failing: RmAnnouncement | None = None
        self._retry_at_s = 0.0
        self._pause_s = self._times.first_retry_s
        self.counts: Counter[str] = Counter()
        """swap_failures, board_failures: since start."""

    async def run(self) -> None:
        """Look again and again."""
        while True:
            await self.look()
            await self._times.sleep(self._times.poll_s)

    async def look(self) -> None:
        """Deal with the newest announcement, if there is news."""
        news = await self._newest(after=self._heard)
        if news is None or (news == self._failing and self._times.now() < self._retry_at_s):
            return
        if news.version == self._scoring.serving.version:
            self._done(news)
            return
        started_s = self._times.now()
        try:
            serving = await self._load(news.version)
        except Exception as error:  # whatever loading raises: this version is no good here, at least now
            self._failed(news, error)
            return
        overtaken = await self._newest(after=news.number)
        if overtaken is None:
            self._scoring.install(serving)
            log.info(
                "reward model %s scores (%s), %.1f s to load", news.version, news.reason, self._times.now() - started_s
            )
        self._done(news)

    async def _newest(self, *, after: int) -> RmAnnouncement | None:
        try:
            news = await self._board.newest(after=after)
        except (KeelError, OSError) as error:
            self.counts["board_failures"] += 1
            if not self._board_fails:
                log.warning("cannot ask which reward model scores, asking on: %s", error)
            self._board_fails = True
            return None
        self._board_fails = False
        return news

    def _done(self, news: RmAnnouncement) -> None:
        self._heard = news.number
        self._failing = None

    def _failed(self, news: RmAnnouncement, error: Exception) -> None:
        self.counts["swap_failures"] += 1
        self._metrics.count("swap_failures")
        self._pause_s = min(2 * self._pause_s, self._times.last_retry_s) if news == self._failing else (
            self._times.first_retry_s
        )  # fmt: skip
        self._failing = news
        self._retry_at_s = self._times.now() + self._pause_s
        log.error(
            "reward model %s is announced and does not load; %s goes on, next try in %.0f s: %r",
            news.version, self._scoring.serving.version, self._pause_s, error,
        )  # fmt: skip
