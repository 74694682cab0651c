"""The driver's own business with the queue server while a run is online, on a thread with an event loop of its own:
the lock on the run's name, service discovery for Prometheus, the driver's metrics (queues, workers by state), and the
control key, through which `keel scale` talks to the scaler; and the reward model's announcement.

Consumes: the server. Produces: the discovery address. Waits: at the start, for the lock of a driver that was killed;
otherwise for nobody: the driver reads `error`, the scaler `request`. Who unblocks it: the lock's time to live, the
client's deadlines.
Always holds: one living run a name and server; when the lock is lost, `error` says so and the run must end. What was
asked of an earlier driver of the run is forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from cluster.discovery import Discovery
from cluster.errors import CodecError, KeelError, RunExistsError, StreamError, SupervisionError
from cluster.files import JsonlTail
from cluster.guard_metrics import WatchMetrics
from cluster.metrics import RunMetrics
from cluster.process import node_address, start_process
from cluster.run_redis import LOCK_TTL_S, RunRedis
from cluster.streams import StreamName
from cluster.supervise import RolePool
from configs.run import RunConfig
from keel.online.scaler import Scaler
from keel.ray_targets import ray_targets
from keel.rundir import append_progress

log = logging.getLogger(__name__)

_METRICS_PERIOD_S = 2.0
_LOCK_RENEWAL_S = LOCK_TTL_S / 4
_CONTROL_PERIOD_S = 0.5
_LOCK_WAIT_S = LOCK_TTL_S + 5.0
_LOCK_POLL_S = 1.0
Pools = Callable[[], Sequence[RolePool]]


class Overseer:
    """Starts with the `with` block; entering raises what stands in the way, such as a living run of the same name."""

    def __init__(self, config: RunConfig, *, run_dir: Path, redis_url: str, pools: Pools, scaler: Scaler) -> None:
        self.error: KeelError | None = None
        self.discovery_url = ""
        self._config = config
        self._run_dir = run_dir
        self._redis_url = redis_url
        self._pools = pools
        self.scaler = scaler
        self.refreshes: Mapping[str, int] = {}
        """accepted, refused, failed, pairs_judged: since the start of this driver."""
        self.measurements: Mapping[str, int] = {}
        """failed: since the start of this driver."""
        self.posts: Mapping[str, int] = {}
        """sent, failed: to guard.webhook, since the start of this driver."""
        self._announcement: tuple[str, str] | None = None
        self._ready = threading.Event()
        self._ended = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="overseer", daemon=True)

    def announce(self, rm_version: str, reason: str) -> None:
        """Tell the reward workers, soon, which version of the reward model scores. From any thread."""
        self._announcement = rm_version, reason

    def __enter__(self) -> Overseer:
        self._thread.start()
        self._ready.wait()
        if self.error is not None:
            raise self.error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed when the overseer has ended by itself.
            self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._oversee())
        except KeelError as error:
            self.error = error
        except Exception as error:
            log.exception("the overseer failed")
            self.error = SupervisionError("the driver's overseer failed", got=repr(error), do="see logs/driver-0.log")
        finally:
            self._ready.set()
            self._loop.close()

    async def _oversee(self) -> None:
        config = self._config
        async with start_process(
            config, role="driver", instance="0", redis_url=self._redis_url, log_dir=self._run_dir / "logs"
        ) as process:
            redis = process.redis
            await self._take_lock(redis)
            await redis.control.clear()
            metrics, watched = RunMetrics(process.registry), WatchMetrics(process.registry)
            with Discovery(
                redis.directory,
                run=config.name,
                host=node_address(config),
                port=config.metrics.discovery_port,
                file_sd=self._run_dir / "prometheus_targets.json",
                extra_targets=lambda: ray_targets(config.name, tell_alive=metrics.nodes_alive.set),
            ) as discovery:
                self.discovery_url = discovery.url
                self._ready.set()
                tasks = [
                    asyncio.create_task(self._keep_lock(redis)),
                    asyncio.create_task(discovery.run_forever()),
                    asyncio.create_task(self._control(redis)),
                    asyncio.create_task(self._measure(redis, metrics, process.heartbeat.beat)),
                    asyncio.create_task(self._tell_measured(watched)),
                ]
                ending = asyncio.create_task(self._ended.wait())
                done, _ = await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
                for task in [*tasks, ending]:
                    task.cancel()
                await asyncio.gather(*tasks, ending, return_exceptions=True)
                with contextlib.suppress(StreamError):
                    await redis.lock.release()
                for task in done - {ending}:
                    task.result()

    async def _take_lock(self, redis: RunRedis) -> None:
        """A driver that was killed leaves its lock behind, which runs out; a living one renews it. Raises
        RunExistsError when it has not run out in its time to live."""
        give_up_s, told = time.monotonic() + _LOCK_WAIT_S, False
        while True:
            try:
                await redis.lock.acquire()
                return
            except RunExistsError as error:
                if time.monotonic() > give_up_s:
                    raise
                if not told:
                    told = True
                    note = f"waiting up to {_LOCK_WAIT_S:.0f} s for the run's lock on the queue server"
                    append_progress(self._run_dir, {"stage": "ppo", "event": "progress", "note": note})
                    log.warning("%s: %s", note, error)
            await asyncio.sleep(_LOCK_POLL_S)

    async def _keep_lock(self, redis: RunRedis) -> None:
        """Renew the lock for ever. A server that is away is waited for, as the learner and the workers do, which end
        the run if it stays away; another owner of the lock ends it at once."""
        while True:
            await asyncio.sleep(_LOCK_RENEWAL_S)
            try:
                await redis.lock.renew()
            except StreamError as error:
                log.warning("run lock not renewed, trying again: %s", error)

    async def _measure(self, redis: RunRedis, metrics: RunMetrics, beat: Callable[[], None]) -> None:
        decisions = dict.fromkeys(self.scaler.decisions, 0)
        while True:
            try:
                for stream in StreamName:
                    metrics.set_depth(stream, depth=await redis.streams.depth(stream))
                beat()
            except StreamError as error:
                metrics.stream_errors.inc()
                log.warning("queue depths not read: %s", error)
            for pool in self._pools():
                name = pool.role.name
                metrics.set_workers(name, counts=pool.states)
                metrics.set_restarts(name, total=pool.restarts)
                metrics.workers_wanted.labels(name).set(pool.wanted)
            metrics.set_refreshes(self.refreshes)
            for decision, total in self.scaler.decisions.items():
                metrics.autoscale_decisions[decision].inc(total - decisions[decision])
                decisions[decision] = total
            await asyncio.sleep(_METRICS_PERIOD_S)

    async def _tell_measured(self, metrics: WatchMetrics) -> None:
        """The newest evaluation, be it an earlier driver's, and what went wrong beside training; for ever."""
        evaluations = JsonlTail(self._run_dir / "evaluations.jsonl")
        while True:
            for record in evaluations.read()[-1:]:
                metrics.set_measurement(record)
            metrics.set_failed(self.measurements.get("failed", 0))
            metrics.set_posts(sent=self.posts.get("sent", 0), failed=self.posts.get("failed", 0))
            await asyncio.sleep(_METRICS_PERIOD_S)

    async def _control(self, redis: RunRedis) -> None:
        """Carry requests to the scaler, its reports back, and announcements to the reward workers, for ever."""
        told, announced = None, None
        while True:
            try:
                if (announcement := self._announcement) is not None and announcement != announced:
                    await redis.reward_model.announce(announcement[0], reason=announcement[1])
                    announced = announcement
                self.scaler.request = await redis.control.asked()
                if (report := self.scaler.report) != told:
                    await redis.control.tell(report)
                    told = report
            except (StreamError, CodecError) as error:
                log.warning("control key not read, trying again: %s", error)
            await asyncio.sleep(_CONTROL_PERIOD_S)
