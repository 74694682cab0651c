"""Ray processes of one role, started, watched and replaced.

Consumes: the outcomes of each process's `start()` and `run()`. Produces: replacements, or SupervisionError.
Waits: in `poll`, at most `timeout_s`. Who unblocks it: Ray, when a process ends; or the start deadline.
Always holds: a process that ends, even cleanly, is replaced (up to `max_restarts` of the role in all) or ends the run
with the reason; none is left behind by `stop`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.errors import DeadlineError, KeelError, SupervisionError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Role:
    """How to make one process of a role. The class has coroutines start() → info, run(), stop()."""

    name: str
    process: type
    spec: Callable[[int, int], Any]
    """(index, incarnation) → the constructor's argument."""
    cpus: float = 1.0
    gpus: float = 0.0
    env: dict[str, str] = field(default_factory=dict)
    max_restarts: int = 0
    start_timeout_s: float = 180.0
    finite: bool = False
    """run() is expected to end; what it returns is the slot's result."""


@dataclass
class _Slot:
    index: int
    incarnation: int
    handle: ActorHandle
    pending: Any
    """The reference of start() while booting, then of run()."""
    started_s: float
    info: dict[str, Any] | None = None
    result: Any = None
    ended: bool = False


class RolePool:
    """All processes of one role."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.restarts = 0
        self._slots: dict[int, _Slot] = {}
        self._running = False

    def grow_to(self, count: int) -> None:
        """Start processes until there are `count`. Returns at once; `poll` or `wait_ready` see them through."""
        for index in range(len(self._slots), count):
            self._slots[index] = self._boot(index, incarnation=0)

    def wait_ready(self, tick: Callable[[], None]) -> list[dict[str, Any]]:
        """Wait until every process has started, calling `tick` a few times a second. Returns what start() returned."""
        while any(slot.info is None for slot in self._slots.values()):
            self.poll(timeout_s=0.2)
            tick()
        return [slot.info or {} for slot in self._slots.values()]

    def run(self) -> None:
        """Let every process, and each later replacement, run()."""
        self._running = True
        for slot in self._slots.values():
            if slot.info is not None and slot.pending is None:
                slot.pending = slot.handle.run.remote()

    def poll(self, *, timeout_s: float) -> None:
        """See to every process that came up or ended. Raises SupervisionError or the process's own error when the
        restarts are used up, DeadlineError when a start took too long."""
        waiting = {slot.pending: slot for slot in self._slots.values() if slot.pending is not None}
        if not waiting:
            time.sleep(timeout_s)
            return
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
        for reference in ready:
            self._finished(waiting[reference], reference)
        for slot in self._slots.values():
            if slot.info is None and time.monotonic() - slot.started_s > self.role.start_timeout_s:
                raise DeadlineError(
                    f"{self.role.name} {slot.index} did not start",
                    got=f"nothing for {self.role.start_timeout_s:.0f} s; cluster has {ray.cluster_resources()}",
                    do=f"look at logs/{self.role.name}*.log; check that the cluster has "
                    f"{self.role.cpus} CPUs and {self.role.gpus} GPUs free for each",
                )

    @property
    def finished(self) -> bool:
        """Of a finite role: every process has returned from run()."""
        return all(slot.ended for slot in self._slots.values())

    @property
    def results(self) -> list[Any]:
        """What run() returned, of the processes that ended."""
        return [slot.result for slot in self._slots.values() if slot.ended]

    @property
    def handles(self) -> list[ActorHandle]:
        """Handles of the processes that have started."""
        return [slot.handle for slot in self._slots.values() if slot.info is not None]

    @property
    def states(self) -> dict[str, int]:
        """Workers by state, for the metric of that name."""
        slots = list(self._slots.values())
        up = sum(slot.info is not None for slot in slots)
        restarting = sum(slot.info is None and slot.incarnation > 0 for slot in slots)
        return {"running": up, "restarting": restarting, "starting": len(slots) - up - restarting}

    def stop(self, *, grace_s: float) -> None:
        """Ask every process to stop, wait up to `grace_s`, then kill what is left."""
        slots, self._slots = list(self._slots.values()), {}
        asked = [slot.handle.stop.remote() for slot in slots if slot.info is not None]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=grace_s)
        for slot in slots:
            ray.kill(slot.handle)

    def _boot(self, index: int, *, incarnation: int) -> _Slot:
        options: dict[str, Any] = {
            "num_cpus": self.role.cpus,
            "num_gpus": self.role.gpus,
            "max_concurrency": 1000,
            "runtime_env": {"env_vars": self.role.env},
        }
        handle = ray.remote(self.role.process).options(**options).remote(self.role.spec(index, incarnation))
        return _Slot(index, incarnation, handle, handle.start.remote(), time.monotonic())

    def _finished(self, slot: _Slot, reference: Any) -> None:
        try:
            result = ray.get(reference)
        except (ray.exceptions.RayError, KeelError) as error:
            self._replace(slot, error)
            return
        if slot.info is None:
            slot.info = result
            slot.pending = slot.handle.run.remote() if self._running else None
        elif self.role.finite:
            slot.result, slot.ended, slot.pending = result, True, None
        else:
            self._replace(slot, SupervisionError(f"{self.role.name} {slot.index} ended by itself"))

    def _replace(self, slot: _Slot, error: Exception) -> None:
        cause = unwrapped(error)
        never_started = slot.info is None and slot.incarnation == 0
        if never_started or self.restarts >= self.role.max_restarts:
            if isinstance(cause, KeelError):
                raise cause
            raise SupervisionError(
                f"{self.role.name} {slot.index} died",
                got=f"{cause} (restarts used: {self.restarts} of {self.role.max_restarts})",
                do=f"look at logs/{self.role.name}*.log",
            ) from error
        self.restarts += 1
        log.warning("%s %d died and is replaced (%d of %d restarts): %s",
                    self.role.name, slot.index, self.restarts, self.role.max_restarts, cause)  # fmt: skip
        ray.kill(slot.handle)
        self._slots[slot.index] = self._boot(slot.index, incarnation=slot.incarnation + 1)


def unwrapped(error: BaseException) -> BaseException:
    """The error that a remote task raised, out of Ray's wrapping and of exception groups."""
    while True:
        if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
            error = error.cause
        elif isinstance(error, BaseExceptionGroup):
            error = next(_leaves(error))
        else:
            return error


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Leaves of an exception group, Keel's own first."""
    leaves = [leaf for part in group.exceptions for leaf in
              (_leaves(part) if isinstance(part, BaseExceptionGroup) else [part])]  # fmt: skip
    yield from sorted(leaves, key=lambda leaf: not isinstance(leaf, KeelError))
