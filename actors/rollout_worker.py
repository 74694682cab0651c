"""Turns prompts into rollouts: the loop of one actor, whatever the transport and the engine.

Consumes: PromptTasks from the PROMPTS stream, weight blobs from the channel. Produces: Rollouts onto ROLLOUTS, and
DeadLetters onto DEAD for tasks that failed too often.
Waits for: prompts (one claim's wait at most); a free slot (unblocked by a request that ends); a first version, and for
a task issued under a later version than the engine's, that version (unblocked by actors/engine_versions.py).
Leaving: `stop` ends `run` within a grace time and leaves the rest to re-delivery; `drain`, for an actor that is no
longer wanted while the run goes on, gives requests their whole time and hands back at once what is left.
Always holds: nothing is claimed before the engine holds a published version and its log-probs of the probe sequence
agree with the learner's; at most `max_concurrent` entries are leased, and each lease is renewed until its entry moves
on or its task is given up to re-delivery; an entry moves on once, by `advance`. The first failing task ends `run`,
which leaves no task behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from actors.engine import Engine, Generation, GenerationRequest
from actors.engine_turns import EngineTurns
from actors.engine_versions import EngineVersions
from actors.rollout_meter import IdleTime, RolloutMeter
from cluster.errors import CodecError, DeadlineError, EngineDeadError, KeelError, StreamError, WeightSyncError
from cluster.records import DeadLetter, PromptTask, Rollout, decode, encode, pack_floats, pack_ids
from cluster.streams import Delivery, StreamName, Streams
from cluster.turns import Turns
from cluster.weights import WeightChannel

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class WorkerSettings:
    """`consumer` names this actor's process in the consumer group; a restarted one takes a name of its own."""

    consumer: str
    max_concurrent: int = 64
    lease_s: float = 30.0
    claim_wait_s: float = 1.0
    generate_timeout_s: float = 120.0
    """For one request; and, apart from it, for the version that a task waits for."""
    max_deliveries: int = 3
    probe_tolerance_nats: float = 1e-4
    weights_poll_s: float = 10.0
    stop_grace_s: float = 10.0
    """How long requests in flight may take to finish after `stop`; the rest is left to re-delivery."""
    outage_limit_s: float = 60.0
    """How long the queue server may stay away before `run` ends with its error."""
    retry_pause_s: float = 0.5
    turn_timeout_s: float = 600.0
    """How long the learner may keep a shared GPU."""


class RolloutWorker:
    """One actor's loop. `run` once, in the engine's event loop; the rest from the same loop."""

    def __init__(
        self,
        streams: Streams,
        *,
        engine: Engine,
        weights: WeightChannel,
        settings: WorkerSettings,
        meter: RolloutMeter | None = None,
        turns: Turns | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`turns`: of a GPU that the engine shares with the learner."""
        self.meter = meter or RolloutMeter()
        self._streams, self._engine = streams, engine
        self._settings, self._sleep = settings, sleep
        self._turns: EngineTurns | None = None
        if turns is not None:
            limit_s = settings.generate_timeout_s
            self._turns = EngineTurns(
                engine, turns, settled=self._settled, turn_timeout_s=settings.turn_timeout_s, settle_timeout_s=limit_s
            )
        self._in_flight: dict[str, tuple[Delivery, asyncio.Task[None]]] = {}
        self._idle, self._draining = IdleTime(), False
        self._leftover: list[Delivery] = []
        """Entries that a draining worker puts back once it claims no more: earlier, it might get them itself."""
        self._stopping, self._ended = asyncio.Event(), asyncio.Event()
        self._ended.set()
        self._slot_freed = asyncio.Event()
        self.versions = EngineVersions(
            engine,
            weights=weights,
            meter=self.meter,
            probe_tolerance_nats=settings.probe_tolerance_nats,
            awake=contextlib.nullcontext if self._turns is None else self._turns.awake,
        )

    @property
    def in_flight(self) -> int:
        """Entries leased now."""
        return len(self._in_flight)

    @property
    def idle_s(self) -> float:
        """Seconds that `run` has had nothing in flight, in all."""
        return self._idle.seconds

    async def run(self) -> None:
        """Work until `stop`. Raises EngineDeadError, WeightSyncError or StreamError when it cannot go on."""
        self._ended.clear()
        self._idle.begin()
        feed = self.versions.feed(self._settings.consumer)
        try:
            async with asyncio.TaskGroup() as group:
                follow = self.versions.follow(feed, poll_s=self._settings.weights_poll_s, unchanged=self._nothing_new)
                services = [group.create_task(follow), group.create_task(self._renew_forever())]
                if self._turns is not None:
                    services.append(group.create_task(self._turns.run()))
                if await self._or_stopped(self.versions.first()):
                    await self._claim_until_stopped(group)
                await self._finish()
                for service in services:
                    service.cancel()
        except BaseExceptionGroup as errors:
            raise first_cause(errors) from errors
        finally:
            self._idle.end()
            try:
                await feed.close()
            except KeelError as error:
                _log.warning("the weight group was not told that this actor leaves: %s", error)
            finally:
                self._ended.set()

    def stop(self) -> None:
        """Claim no more, and let `run` end: at once when nothing is in flight, within the grace time otherwise."""
        self._stopping.set()
        self._slot_freed.set()

    def drain(self) -> None:
        """Claim no more, and let `run` end when what is in flight is answered, or after `generate_timeout_s`: then the
        rest is put back for others to claim."""
        self._draining = True
        self.stop()

    async def wait_ended(self) -> None:
        """Return when `run` is not running."""
        await self._ended.wait()

    def _nothing_new(self) -> None:
        if not self._in_flight:
            self.meter.beat()

    # ---------------------------------------------------------------- claiming and leases

    async def _claim_until_stopped(self, group: asyncio.TaskGroup) -> None:
        settings = self._settings
        while not self._stopping.is_set():
            free = settings.max_concurrent - len(self._in_flight)
            if free == 0:
                self._slot_freed.clear()
                await self._slot_freed.wait()
                continue
            claim = partial(
                self._streams.claim,
                StreamName.PROMPTS,
                consumer=settings.consumer,
                max_count=free,
                wait_s=settings.claim_wait_s,
            )
            deliveries = await self._patiently(claim)
            if self._draining:
                self._leftover += [delivery for delivery in deliveries if delivery.entry_id not in self._in_flight]
                return
            if not deliveries and not self._in_flight:
                self.meter.beat()
            for delivery in deliveries:
                if delivery.entry_id in self._in_flight:
                    continue  # our own lease ran out, and came back to us while we are still at it
                self.meter.claimed(delivery)
                task = group.create_task(self._answer(delivery))
                self._in_flight[delivery.entry_id] = (delivery, task)
                task.add_done_callback(partial(self._free, delivery.entry_id))
            self._count_in_flight()

    def _free(self, entry_id: str, _: asyncio.Task[None]) -> None:
        self._in_flight.pop(entry_id, None)
        self._slot_freed.set()
        self._count_in_flight()

    def _count_in_flight(self) -> None:
        self.meter.running(len(self._in_flight))
        self._idle.now(bool(self._in_flight))

    async def _renew_forever(self) -> None:
        while True:
            await self._sleep(self._settings.lease_s / 3)
            if entry_ids := tuple(self._in_flight):
                consumer = self._settings.consumer
                renew = partial(self._streams.renew, StreamName.PROMPTS, consumer=consumer, entry_ids=entry_ids)
                await self._patiently(renew)

    async def _settled(self) -> None:
        """Return when nothing is in flight."""
        while tasks := [task for _, task in self._in_flight.values()]:
            await asyncio.wait(tasks)

    async def _finish(self) -> None:
        """Let what is in flight end, for the time that there is; give up or hand back the rest."""
        if self._draining:
            await self._hand_back_leftover()  # nobody renews their leases
        running = dict(self._in_flight)
        limit_s = self._settings.generate_timeout_s if self._draining else self._settings.stop_grace_s
        late: set[asyncio.Task[None]] = set()
        if running:
            _, late = await asyncio.wait([task for _, task in running.values()], timeout=limit_s)
        for task in late:
            task.cancel()
        if self._draining:
            if late:
                await asyncio.wait(late)
            self._leftover += [delivery for delivery, task in running.values() if task in late]
            await self._hand_back_leftover()
        elif late:
            _log.info("%d requests did not finish in time and are left to re-delivery", len(late))

    async def _hand_back_leftover(self) -> None:
        """Put entries at the end of the stream that they came from, where others find them now and not when the lease
        runs out. One that was answered at the last moment stays answered."""
        while self._leftover:
            delivery = self._leftover.pop()
            if await self._advance(delivery, target=StreamName.PROMPTS, payload=delivery.payload):
                self.meter.handed_back()

    # ---------------------------------------------------------------- one task

    async def _answer(self, delivery: Delivery) -> None:
        try:
            task = decode(delivery.payload, PromptTask)
        except CodecError as error:
            _log.error("dropped an entry that is no prompt: %s", error)
            self.meter.poisoned()
            await self._patiently(lambda: self._streams.settle(StreamName.PROMPTS, [delivery.entry_id]))
            return
        started_s = time.perf_counter()
        try:
            await self._await_version(task)
            generation = await self._generate(task, delivery)
        except (EngineDeadError, WeightSyncError):
            raise
        except KeelError as error:
            await self._fail(task, delivery=delivery, error=error)
            return
        rollout = _rollout(task, generation, actor=self._settings.consumer, seconds=time.perf_counter() - started_s)
        if await self._advance(delivery, target=StreamName.ROLLOUTS, payload=encode(rollout)):
            self.meter.answered(rollout)
        else:
            self.meter.lost_lease()

    async def _await_version(self, task: PromptTask) -> None:
        """A task never meets older weights than the gate counted on when it issued the task."""
        if self.versions.ready < task.issued_version:
            await self.versions.wait(task.issued_version, timeout_s=self._settings.generate_timeout_s)

    async def _generate(self, task: PromptTask, delivery: Delivery) -> Generation:
        request = GenerationRequest(
            request_id=f"{task.task_id}/{task.attempt}/{delivery.entry_id}/{delivery.deliveries}",
            prompt_ids=task.prompt_ids,
            max_new_tokens=task.max_new_tokens,
            temperature=task.temperature,
        )
        try:
            async with asyncio.timeout(self._settings.generate_timeout_s):
                return await self._engine.generate(request)
        except TimeoutError as error:
            raise DeadlineError(
                "a generation took too long",
                got=f"more than {self._settings.generate_timeout_s:g} s",
                do="raise rollout.generate_timeout_s or lower the concurrency",
            ) from error

    async def _fail(self, task: PromptTask, *, delivery: Delivery, error: KeelError) -> None:
        """Give the task up: to re-delivery, when its lease runs out (at once when draining), or for good."""
        _log.warning("task %s failed on delivery %d: %s", task.task_id, delivery.deliveries, error)
        self.meter.failed()
        if delivery.deliveries < self._settings.max_deliveries:
            if self._draining:
                self._leftover.append(delivery)
            return
        letter = DeadLetter(task=task, stage="rollout", reason=str(error), deliveries=delivery.deliveries)
        if await self._advance(delivery, target=StreamName.DEAD, payload=encode(letter)):
            self.meter.dead_lettered()

    async def _advance(self, delivery: Delivery, *, target: StreamName, payload: bytes) -> bool:
        return await self._patiently(
            lambda: self._streams.advance(StreamName.PROMPTS, delivery.entry_id, target=target, payload=payload)
        )

    # ---------------------------------------------------------------- waiting

    async def _patiently(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """A stream call, made again while the server is away, for `outage_limit_s` at most. Stream calls may be
        repeated: they take effect once."""
        give_up_s = time.monotonic() + self._settings.outage_limit_s
        while True:
            try:
                return await call()
            except StreamError as error:
                if time.monotonic() >= give_up_s:
                    raise
                _log.warning("the queue server is away, trying again: %s", error)
                self.meter.stream_failed()
                await self._sleep(self._settings.retry_pause_s)

    async def _or_stopped(self, call: Awaitable[None]) -> bool:
        """Await `call`, or `stop`. True when the call ended first."""
        work, stopped = asyncio.ensure_future(call), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return False
            await work
            return True
        finally:
            for task in (work, stopped):
                task.cancel()
            await asyncio.gather(work, stopped, return_exceptions=True)


def _rollout(task: PromptTask, generation: Generation, *, actor: str, seconds: float) -> Rollout:
    return Rollout(
        task=task,
        response_ids_i32=pack_ids(generation.response_ids),
        behaviour_logprobs_f32=pack_floats(generation.logprobs),
        version_runs=generation.version_runs,
        finish_reason=generation.finish_reason,
        actor=actor,
        generate_s=seconds,
    )


def first_cause(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to report: a failed update before the dead engine that it leaves, that before anything else."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [errors]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    for kind in (WeightSyncError, EngineDeadError, KeelError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]
