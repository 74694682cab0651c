"""What a run starts besides itself: the queue server, Ray, service discovery. All of it ends with the `with` block.

Consumes: the configuration. Produces: addresses. Waits: for servers to come up, each with a deadline.
Always holds: what was started here is stopped here, on every way out; what was found running is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from cluster.errors import SupervisionError
from cluster.process import node_address
from cluster.redis_server import EmbeddedServer
from cluster.run_redis import RunRedis
from configs.run import RunConfig
from keel.interrupt import InterruptedRun, StopRequest
from keel.ray_environment import join_cluster, torch_environment
from keel.rundir import RunDirectory

log = logging.getLogger(__name__)

GRACE_S = 20.0
FAILED_GRACE_S = 3.0


class Runtime:
    """Started lazily: a run of offline stages needs no queue server."""

    def __init__(self, config: RunConfig, run: RunDirectory, *, stop: StopRequest, refresh: Callable[[], None]) -> None:
        self.config = config
        self.run = run
        self.stop = stop
        self.refresh = refresh
        self.memory = MemoryWatch()
        self._failed = False
        self._stack = ExitStack()
        self._server: EmbeddedServer | None = None

    def __enter__(self) -> Runtime:
        self._stack.enter_context(self.memory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._failed = kind is not None and not issubclass(kind, InterruptedRun)
        self._stack.close()

    @property
    def grace_s(self) -> float:
        """How long a role may take to stop before it is killed. Short after a failure: what the roles stand on may be
        gone, and they need not notice."""
        if self.stop.at_once:
            return 0.0
        return FAILED_GRACE_S if self._failed else GRACE_S

    def on_exit(self, action: Callable[[], None]) -> None:
        """Run `action` before what it stands on is stopped."""
        self._stack.callback(action)

    def tick(self) -> None:
        """One turn of a waiting loop in the driver: redraw, and leave when the user asked to."""
        self.refresh()
        self.stop.check()

    @cached_property
    def redis_url(self) -> str:
        """URL of a checked, writable server: the configured one, or one started on loopback for this run."""
        url = self.config.redis.url
        if url is None:
            self._server = self._stack.enter_context(EmbeddedServer(self.run.path / "redis", host=self._own_address))
            url = self._server.url
        asyncio.run(self._check_redis(url))
        return url

    @property
    def _own_address(self) -> str:
        """Where roles reach this machine: loopback, or on a cluster the address by which Ray knows it."""
        if self.config.ray.address is not None:
            assert self.ray is not None
        return node_address(self.config)

    def check_redis(self) -> None:
        """Raise StreamError now, before the long stages, if the configured server is not to be used."""
        assert self.redis_url

    def check_server(self) -> None:
        """Raise SupervisionError when the server that this run started has ended."""
        if self._server is not None and not self._server.alive:
            raise SupervisionError(
                "the embedded queue server ended by itself",
                got=f"see {self._server.log_file}",
                do="look there (out of memory? killed?), then go on with --resume",
            )

    async def _check_redis(self, url: str) -> None:
        redis = RunRedis(
            url,
            run=self.config.name,
            lease_s=self.config.redis.lease_s,
            command_timeout_s=self.config.redis.command_timeout_s,
        )
        try:
            await redis.check()
        finally:
            await redis.close()

    @cached_property
    def ray(self) -> Any:
        """The ray module, connected."""
        import ray

        # ray.init takes SIGTERM for itself; a run that is asked to stop saves first.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        address = self.config.ray.address
        if address is not None:
            join_cluster(
                address, do="check ray.address and the cluster's token on this machine; leave it out for a local Ray"
            )
        else:
            ray.init(
                address="local",  # whatever other Ray there is on this machine
                num_cpus=self.config.ray.num_cpus or max(os.cpu_count() or 1, _cpus_needed(self.config)),
                include_dashboard=False,
                object_store_memory=self.config.ray.object_store_mib << 20,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self._stack.callback(ray.shutdown)
        return ray

    def call(self, function: Callable[..., Any], *args: Any, threads: int = 1, gpus: float = 0.0) -> Any:
        """Run a stage's function in a Ray task of its own process and wait for it, ticking."""
        ray = self.ray
        have = ray.cluster_resources().get("GPU", 0.0)
        if gpus > have:
            raise SupervisionError(
                f"no node can run {function.__name__.strip('_')}",
                got=f"{gpus:g} GPUs asked for, the cluster has {have:g}",
                do="set learner.gpus_per_rank to what there is, or join a cluster with ray.address",
            )
        environment = torch_environment(threads)
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0, runtime_env={"env_vars": environment})(
            function
        )
        return self.wait(task.remote(*args))

    def wait(self, reference: Any) -> Any:
        """The value of a Ray reference, ticking until it is there. Raises the remote error itself, and SupervisionError
        when the process died."""
        ray = self.ray
        try:
            while not ray.wait([reference], timeout=0.3)[0]:
                self.tick()
        except BaseException:
            ray.cancel(reference)
            raise
        return self.result(reference)

    def result(self, reference: Any) -> Any:
        """The value of a reference that is there, or the error in its place, as `wait` gives them."""
        ray = self.ray
        from cluster.supervise import unwrapped

        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            cause = unwrapped(error)
            if not isinstance(cause, ray.exceptions.RayError):
                raise cause from None
            raise SupervisionError(
                "a process of the run died", got=f"{type(cause).__name__}: {cause}", do="look at logs/ (out of memory?)"
            ) from error


def _cpus_needed(config: RunConfig) -> int:
    scale = config.rollout.autoscale
    actors = config.rollout.actors if scale is None else max(config.rollout.actors, scale.max_actors)
    online = (
        config.learner.cpus
        + actors * config.rollout.cpus_per_actor
        + config.reward.workers * config.reward.cpus_per_worker
        + (0.0 if config.rm.refresh is None else config.rm.refresh.cpus)
    )
    return int(online) + 2


class MemoryWatch:
    """Peak memory of this process and all it started, sampled: the sum of proportional set sizes, which counts a page
    shared by n processes 1/n times in each."""

    def __init__(self, *, period_s: float = 5.0) -> None:
        self.peak_bytes = 0
        self._period_s = period_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._period_s):
            own = psutil.Process()
            total = sum(_pss_bytes(process.pid) for process in [own, *own.children(recursive=True)])
            self.peak_bytes = max(self.peak_bytes, total)


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0  # The process ended meanwhile, or this is no Linux.
    return 0
