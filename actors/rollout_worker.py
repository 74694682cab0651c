"""Turns prompts into rollouts: the loop of one actor, whatever the transport and the engine.

Consumes: PromptTasks from the PROMPTS stream, weight blobs from the channel. Produces: Rollouts onto ROLLOUTS, and
DeadLetters onto DEAD for tasks that failed too often.
Waits for: prompts (one claim's wait at most); a free slot (unblocked by a request that ends); a first version, and for
a task issued under a later version than the engine's, that version (unblocked by the sync loop).
Always holds: nothing is claimed before the engine holds a published version and its log-probs of the probe sequence
agree with the learner's; at most `max_concurrent` entries are leased, and each lease is renewed until its entry moves
on or its task is given up to re-delivery; an entry moves on once, by `advance`. The first failing task ends `run`,
which leaves no task behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from actors.engine import Engine, Generation, GenerationRequest
from actors.rollout_meter import RolloutMeter
from cluster.errors import CodecError, DeadlineError, EngineDeadError, KeelError, StreamError, WeightSyncError
from cluster.records import DeadLetter, PromptTask, Rollout, decode, encode, pack_floats, pack_ids
from cluster.streams import Delivery, StreamName, Streams
from cluster.weights import UNSYNCED, WeightBlob, WeightChannel

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


class RolloutWorker:
    """One actor's loop. `run` once, in the engine's event loop; `stop` and `wait_version` from the same loop."""

    def __init__(
        self,
        streams: Streams,
        *,
        engine: Engine,
        weights: WeightChannel,
        settings: WorkerSettings,
        meter: RolloutMeter | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.meter = meter or RolloutMeter()
        self._streams, self._engine, self._weights = streams, engine, weights
        self._settings, self._sleep = settings, sleep
        self._in_flight: dict[str, asyncio.Task[None]] = {}
        self._stopping, self._ended = asyncio.Event(), asyncio.Event()
        self._ended.set()
        self._slot_freed = asyncio.Event()
        self._version_changed = asyncio.Condition()
        self._ready_version = engine.version
        """The engine's version once it has been found right: behind `engine.version` while the probe is compared."""

    @property
    def in_flight(self) -> int:
        """Entries leased now."""
        return len(self._in_flight)

    async def run(self) -> None:
        """Work until `stop`. Raises EngineDeadError, WeightSyncError or StreamError when it cannot go on."""
        self._ended.clear()
        try:
            async with asyncio.TaskGroup() as group:
                services = [group.create_task(self._sync_forever()), group.create_task(self._renew_forever())]
                if await self._or_stopped(self._first_version()):
                    await self._claim_until_stopped(group)
                await self._drain()
                for service in services:
                    service.cancel()
        except BaseExceptionGroup as errors:
            raise first_cause(errors) from errors
        finally:
            self._ended.set()

    def stop(self) -> None:
        """Claim no more, and let `run` end: at once when nothing is in flight, within the grace time otherwise."""
        self._stopping.set()
        self._slot_freed.set()

    async def wait_ended(self) -> None:
        """Return when `run` is not running."""
        await self._ended.wait()

    async def wait_version(self, version: int, *, timeout_s: float) -> int:
        """Wait until the engine holds `version` or a later one, and return it. Needs `run` to be running. Raises
        DeadlineError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._version_changed:
                await self._version_changed.wait_for(lambda: self._ready_version >= version)
        except TimeoutError as error:
            raise DeadlineError(
                f"weights of version {version} did not come",
                got=f"version {self._ready_version} after {timeout_s:g} s",
                do="see whether the learner still publishes",
            ) from error
        return self._ready_version

    # ---------------------------------------------------------------- weights

    async def _first_version(self) -> None:
        """Return when the engine holds what the channel had at this time, or something newer."""
        newest = await self._weights.latest()
        async with self._version_changed:
            wanted = 0 if newest is None else newest.version
            await self._version_changed.wait_for(lambda: self._ready_version >= wanted)

    async def _sync_forever(self) -> None:
        while True:
            blob = await self._weights.wait_newer(self._engine.version, timeout_s=self._settings.weights_poll_s)
            if blob is None:
                await self._engine.check_health()  # an idle engine's death shows in no request
                if not self._in_flight:
                    self.meter.beat()
                continue
            await self.sync(blob)
            del blob  # it pins the version's bytes in shared memory until the next one comes

    async def sync(self, blob: WeightBlob) -> None:
        """Load `blob`, and after the first load compare the probe. For `run`, and in its place while it is not
        running. Raises WeightSyncError."""
        first, started_s = self._ready_version == UNSYNCED, time.perf_counter()
        try:
            timings = await self._engine.load_weights(blob)
            if first:
                await self._compare(blob)
        except WeightSyncError:
            self.meter.sync_failed()
            raise
        self.meter.synced(blob.version, timings=timings, seconds=time.perf_counter() - started_s)
        async with self._version_changed:
            self._ready_version = blob.version
            self._version_changed.notify_all()

    async def _compare(self, blob: WeightBlob) -> None:
        """The engine's log-probs of the probe against the learner's: a wrong load shows here and nowhere else."""
        if blob.probe is None:
            _log.warning("version %d came without a probe: the loaded weights are not checked", blob.version)
            return
        logprobs = await self._engine.probe(blob.probe.token_ids)
        error_nats = float(np.abs(logprobs - blob.probe.logprobs).max())
        if not error_nats <= self._settings.probe_tolerance_nats:  # so written that NaN fails
            raise WeightSyncError(
                f"after loading version {blob.version} the engine's log-probs are not the learner's",
                got=f"{error_nats:.3g} nats apart on the probe, {self._settings.probe_tolerance_nats:g} allowed",
                do="compare rollout.dtype with learner.dtype, or raise rollout.probe_tolerance for half precision",
            )

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
            if not deliveries and not self._in_flight:
                self.meter.beat()
            for delivery in deliveries:
                if delivery.entry_id in self._in_flight:
                    continue  # our own lease ran out, and came back to us while we are still at it
                self.meter.claimed(delivery)
                task = group.create_task(self._answer(delivery))
                self._in_flight[delivery.entry_id] = task
                task.add_done_callback(partial(self._free, delivery.entry_id))
            self.meter.running(len(self._in_flight))

    def _free(self, entry_id: str, _: asyncio.Task[None]) -> None:
        self._in_flight.pop(entry_id, None)
        self._slot_freed.set()
        self.meter.running(len(self._in_flight))

    async def _renew_forever(self) -> None:
        while True:
            await self._sleep(self._settings.lease_s / 3)
            if entry_ids := tuple(self._in_flight):
                consumer = self._settings.consumer
                renew = partial(self._streams.renew, StreamName.PROMPTS, consumer=consumer, entry_ids=entry_ids)
                await self._patiently(renew)

    async def _drain(self) -> None:
        tasks = tuple(self._in_flight.values())
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._settings.stop_grace_s)
        for task in late:
            task.cancel()
        if late:
            _log.info("%d requests did not finish in time and are left to re-delivery", len(late))

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
        if self._ready_version < task.issued_version:
            await self.wait_version(task.issued_version, timeout_s=self._settings.generate_timeout_s)

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
        """Give the task up: to re-delivery, when its lease runs out, or for good."""
        _log.warning("task %s failed on delivery %d: %s", task.task_id, delivery.deliveries, error)
        self.meter.failed()
        if delivery.deliveries < self._settings.max_deliveries:
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
