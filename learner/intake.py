"""The learner's end of the streams: issues prompts through the gate, takes batches of scored rollouts.

Consumes: SCORED and DEAD. Produces: PROMPTS. Waits: in `take_batch`, for scored rollouts.
Who unblocks it: the reward service; or the task deadline, after which a task is issued again; or the stall time-out,
which raises StallError. While `hold_from` says so it waits for the driver, no longer than the stall time-out. Always
holds: the ledger's identity (learner/ledger.py), and no more tasks issued than the
gate allows. A server that is away is waited for, up to the stall time-out: the ledger makes good what it lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import CodecError, StallError, StreamError
from cluster.records import DeadLetter, PromptTask, ScoredRollout, decode, encode
from cluster.streams import Delivery, StreamName, Streams
from learner.deck import PromptDeck, TaskTemplate, deal_tasks
from learner.ledger import Gate, Ledger

log = logging.getLogger(__name__)

CONSUMER = "learner"
_CLAIM_WAIT_S = 0.5
_RETRY_PAUSE_S = 0.5


@dataclass(frozen=True)
class IntakeSettings:
    batch_size: int
    max_staleness: int
    stall_timeout_s: float


class Intake:
    """One a run. `clock` is monotonic seconds."""

    def __init__(
        self,
        streams: Streams,
        *,
        deck: PromptDeck,
        ledger: Ledger,
        gate: Gate,
        template: TaskTemplate,
        settings: IntakeSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = ledger
        self.hold_from: int | None = None
        """No batch is handed out at this policy version or a later one, until this is None again."""
        self._streams = streams
        self._deck = deck
        self._gate = gate
        self._template = template
        self._settings = settings
        self._clock = clock
        self._unsent: list[PromptTask] = ledger.retry_all(now_s=clock())

    async def issue(self, *, step: int, version: int) -> int:
        """Issue what the gate allows at this step. Returns how many new tasks that is."""
        counts = self.ledger.counts
        room = self._gate.allowance(step=step, dropped=counts.dropped) - counts.issued
        groups = max(0, room) // self._template.samples_per_prompt
        tasks = deal_tasks(self._deck, groups, first=counts.issued, version=version, template=self._template)
        self.ledger.issue(tasks, now_s=self._clock())
        self._unsent += tasks
        try:
            await self._flush()
        except StreamError as error:
            log.warning("queue server: %s; the tasks are sent when it is back", error)
        return len(tasks)

    def abandon(self) -> int:
        """Give up all tasks that have no outcome, for new ones in their place. Returns how many."""
        self._unsent = []
        return self.ledger.abandon()

    async def take_batch(self, *, step: int, version: int, stop: asyncio.Event) -> list[ScoredRollout] | None:
        """`batch_size` scored rollouts, none over age, oldest task first; None when `stop` was set meanwhile.

        Raises StallError when nothing was scored for `stall_timeout_s`.
        """
        begun_s = last_progress_s = self._clock()
        while not stop.is_set():
            if self._held(version, waited_s=self._clock() - begun_s):
                await self._receive()
                last_progress_s = self._clock()
                continue
            self.ledger.drop_stale(version=version, max_staleness=self._settings.max_staleness)
            batch = self.ledger.take(self._settings.batch_size)
            if batch is not None:
                return batch
            await self.issue(step=step, version=version)  # In place of what was dropped, whenever that was.
            if await self._receive():
                last_progress_s = self._clock()
            elif self._clock() - last_progress_s > self._settings.stall_timeout_s:
                raise self._stalled()
        return None

    def _held(self, version: int, *, waited_s: float) -> bool:
        if self.hold_from is None or version < self.hold_from:
            return False
        if waited_s > self._settings.stall_timeout_s:
            log.warning("held at version %d for %.0f s; going on", version, waited_s)
            self.hold_from = None
        return self.hold_from is not None

    async def _receive(self) -> bool:
        """One round of reading. True when a result came in: dead letters and rejected answers alone, for as long as the
        stall time-out, are no progress, though each is replaced by another task."""
        try:
            await self._flush()
            scored = await self._streams.claim(
                StreamName.SCORED, consumer=CONSUMER, max_count=self._settings.batch_size, wait_s=_CLAIM_WAIT_S
            )
            for delivery in scored:
                self._accept(delivery)
            dead = await self._streams.claim(StreamName.DEAD, consumer=CONSUMER, max_count=64, wait_s=0.0)
            for delivery in dead:
                self._bury(delivery)
            await self._settle(StreamName.SCORED, scored)
            await self._settle(StreamName.DEAD, dead)
        except StreamError as error:
            log.warning("queue server: %s; trying again", error)
            await asyncio.sleep(_RETRY_PAUSE_S)
            return False
        self._unsent += self.ledger.overdue(now_s=self._clock())
        return bool(scored)

    def _accept(self, delivery: Delivery) -> None:
        try:
            self.ledger.accept(decode(delivery.payload, ScoredRollout))
        except CodecError as error:
            # The task behind it stays outstanding and is issued again at its deadline.
            log.error("dropped an unreadable scored rollout: %s", error)

    def _bury(self, delivery: Delivery) -> None:
        try:
            letter = decode(delivery.payload, DeadLetter)
        except CodecError as error:
            log.error("dropped an unreadable dead letter: %s", error)
            return
        buried = self.ledger.bury(letter.task.task_id, rejected=letter.rejected)
        if buried and not letter.rejected:
            log.warning("task %s is dead after %d tries in %s: %s",
                        letter.task.task_id, letter.deliveries, letter.stage, letter.reason)  # fmt: skip

    async def _settle(self, stream: StreamName, deliveries: list[Delivery]) -> None:
        if deliveries:
            await self._streams.settle(stream, [delivery.entry_id for delivery in deliveries])

    async def _flush(self) -> None:
        """Publish what was entered in the ledger and not sent yet; kept for the next call when the server is away."""
        if self._unsent:
            await self._streams.publish(StreamName.PROMPTS, [encode(task) for task in self._unsent])
            self._unsent = []

    def _stalled(self) -> StallError:
        ledger = self.ledger
        return StallError(
            f"no rollout was scored for {self._settings.stall_timeout_s:.0f} s",
            got=f"{ledger.outstanding} tasks outstanding, {ledger.held} scored and waiting for a full batch; since the "
            f"start {ledger.counts.dead} dead, {ledger.counts.rejected} rejected as uncertain",
            do="look at logs/ for the rollout and reward roles, and at the depths in metrics.jsonl",
        )
