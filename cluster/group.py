"""One group of Ray processes that live and die together: a single engine, or all ranks of the learner.

Consumes: the outcomes of each process's `start()` and `run()`. Produces: what they returned. Waits: never, except
`cause_of`, shortly. Who unblocks it: Ray. Always holds: a group runs when all of its processes have started, and has
ended when all have returned; `kill` leaves none behind and gives its room back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    KeelError,
    ModelError,
    NonFiniteError,
    SupervisionError,
)
from cluster.placement import Placement, Resources, SharedRoom, bundle_of, living_nodes

INPUT_ERRORS: tuple[type[KeelError], ...] = (ConfigError, DataError, CheckpointError, NonFiniteError, ModelError)
"""Errors that a new process would meet again."""

_ECHO_S = 3.0
"""The other processes of a group may take so long to show why they all failed."""


@dataclass(frozen=True)
class Role:
    """How to make the processes of a role. The class has coroutines start() → info, run(), stop(), and drain() where
    the role is made smaller while it runs."""

    name: str
    process: type
    spec: Callable[[int, int], Any]
    """(index, incarnation) → the constructor's argument."""
    cpus: float = 1.0
    gpus: float = 0.0
    env: dict[str, str] = field(default_factory=dict)
    max_restarts: int = 0
    """Of each process; of all of them as one where they are together."""
    start_timeout_s: float = 180.0
    """From having room to having started."""
    drain_timeout_s: float = 150.0
    placement_wait_s: float = 60.0
    """How long a process may wait for room."""
    room: SharedRoom | None = None
    """Shared with other roles; a role of one process then. Otherwise each process has its own."""
    replaced: Callable[[], None] = lambda: None
    """Called when a process is gone, before another takes its place."""
    finite: bool = False
    """run() is expected to end; what it returns is the process's result."""
    together: bool = False
    """The processes work as one: when one dies, all are replaced."""
    spread: bool = False
    """Over the nodes evenly; otherwise nodes are filled one after another."""
    final_errors: tuple[type[KeelError], ...] = INPUT_ERRORS
    """Errors that end the run at once, whatever restarts are left."""
    advice: str = "lower what the role asks for, or add a node"
    """What to do when there is no room."""
    explain: Callable[[], str] = lambda: ""
    """More about that, for the end of the message, such as a table of the whole run."""

    @property
    def bundle(self) -> dict[str, float]:
        """What each process takes."""
        return bundle_of(cpus=self.cpus, gpus=self.gpus)

    @property
    def room_bundle(self) -> Resources:
        """What has to fit on one node for a process to start."""
        return self.bundle if self.room is None else self.room.bundle


@dataclass
class Group:
    """`first` is the index of its first process. `tentative`: an addition to a running role; when it does not come up
    it is withdrawn, and the run goes on without it."""

    first: int
    incarnation: int
    placement: Placement
    handles: list[ActorHandle]
    pending: dict[Any, int]
    """References of start(), then of run(), → position in the group."""
    restarts: int = 0
    tentative: bool = False
    asked_s: float = field(default_factory=time.monotonic)
    placed_s: float | None = None
    draining_since_s: float | None = None
    leaving: bool = False
    """It has drained and closes what it holds."""
    infos: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What start() returned, by position."""
    results: dict[int, Any] = field(default_factory=dict)
    """What run() returned, by position."""
    running: bool = False
    told_of_waiting: bool = False
    doubt: KeelError | None = None
    """Why it is gone, while it is not clear whether its host is gone too."""
    doubt_since_s: float = 0.0
    charged_hosts: frozenset[str] = frozenset()
    """Nodes of its predecessor, whose death was counted as a restart."""

    @classmethod
    def boot(cls, role: Role, *, first: int, count: int, incarnation: int, target: str | None) -> Group:
        """Ask for room, and start as soon as there is. Returns at once."""
        shared = role.room
        placement = shared.enter() if shared else Placement.ask(role.bundle, count=count, target=target)
        handles = []
        for position in range(count):
            options: dict[str, Any] = {
                "num_cpus": role.cpus,
                "num_gpus": role.gpus,
                "max_concurrency": 1000,
                "runtime_env": {"env_vars": role.env},
                "scheduling_strategy": placement.scheduling(position),
            }
            spec = role.spec(first + position, incarnation)
            handles.append(ray.remote(role.process).options(**options).remote(spec))
        pending = {handle.start.remote(): position for position, handle in enumerate(handles)}
        return cls(first=first, incarnation=incarnation, placement=placement, handles=handles, pending=pending)

    @property
    def up(self) -> bool:
        return len(self.infos) == len(self.handles)

    @property
    def ended(self) -> bool:
        return len(self.results) == len(self.handles)

    @property
    def draining(self) -> bool:
        return self.draining_since_s is not None

    @property
    def pending_placement(self) -> bool:
        return not self.up and self.placed_s is None

    def run(self) -> None:
        """Let all processes run(), once all have started."""
        if self.up and not self.running:
            self.running = True
            self.pending = {handle.run.remote(): position for position, handle in enumerate(self.handles)}

    def drain(self) -> None:
        """Ask the processes to finish what they have and to end run()."""
        self.draining_since_s = time.monotonic()
        for handle in self.handles:
            handle.drain.remote()

    def leave(self) -> None:
        """Let the processes close their engines and connections before they are killed."""
        self.leaving = True
        self.pending = {handle.stop.remote(): position for position, handle in enumerate(self.handles)}

    def take(self, reference: Any) -> None:
        """Note the outcome behind a finished reference of `pending`. Raises what it raised."""
        position = self.pending.pop(reference)
        result = ray.get(reference)
        if self.running:
            self.results[position] = result
        else:
            self.infos[position] = result

    def cause_of(self, error: BaseException) -> BaseException:
        """Why the group failed: one process's error is often only the echo of another's death or bad input, so the
        others get a moment to show theirs."""
        errors = [unwrapped(error)]
        deadline_s = time.monotonic() + _ECHO_S
        while self.pending and not _telling(errors):
            ready, _ = ray.wait(list(self.pending), timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                break
            try:
                self.take(ready[0])
            except (ray.exceptions.RayError, KeelError) as other:
                errors.append(unwrapped(other))
        return min(errors, key=_rank)

    @property
    def host_lost(self) -> bool:
        """Whether Ray already knows that a node under the group is gone."""
        return bool(set(self.placement.nodes) - set(living_nodes()))

    @property
    def on_other_hosts(self) -> bool:
        """Whether a host may be gone while this process lives on."""
        return bool(set(self.placement.nodes) - {ray.get_runtime_context().get_node_id()})

    def put_in_doubt(self, error: KeelError) -> None:
        """The processes are gone; nothing more is expected of them."""
        self.doubt, self.doubt_since_s = error, time.monotonic()
        self.pending.clear()
        self.infos.clear()

    def kill(self) -> None:
        for handle in self.handles:
            ray.kill(handle)
        self.placement.release()


def _rank(error: BaseException) -> int:
    if isinstance(error, INPUT_ERRORS):
        return 0
    return 1 if isinstance(error, ray.exceptions.RayActorError) else 2


def _telling(errors: Sequence[BaseException]) -> bool:
    return any(_rank(error) < 2 for error in errors)


def as_keel_error(error: BaseException, *, what: str, do: str) -> KeelError:
    """`error` itself where it is one of Keel's, otherwise a SupervisionError that quotes it."""
    if isinstance(error, KeelError):
        return error
    return SupervisionError(what, got=f"{type(error).__name__}: {error}", do=do)


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
