"""The publishing side of a broadcast: a thread beside the training loop that leads the group.

Consumes: versions that the board has offered to the group (`broadcast`). Produces: their bytes in every member.
Waits: for members to join, to be ready, to take each bucket and to report, each with a deadline. Who unblocks it: the
members, by way of the board; or the deadline.
Always holds: one broadcast at a time; a version published meanwhile goes by the store alone, so the caller never waits;
after a failure no further version is offered to the old group, and whoever did not answer is left out of the next one
until it asks for weights again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from cluster.errors import DeadlineError, KeelError
from cluster.weight_board import BoardAccess
from cluster.weight_group import GroupBrokenError, GroupPlan, GroupSettings, Tellings
from cluster.weights import WeightBlob

_log = logging.getLogger(__name__)
_LONGEST_PAUSE_S: Final = 60.0
"""Between two tries to form a group."""


class GroupLeader(Protocol):
    """Rank 0 of one group."""

    @property
    def port(self) -> int: ...

    def form(self, world_size: int) -> None:
        """Raises GroupBrokenError."""
        ...

    def broadcast(self, blob: WeightBlob, *, bucket_bytes: int) -> Iterator[int]:
        """Yields the size of each bucket that has gone. Raises GroupBrokenError."""
        ...

    def close(self) -> None: ...


LeaderFactory = Callable[[str, float], GroupLeader]
"""(address, timeout_s) → a leader that listens there."""


@dataclass(frozen=True)
class BroadcastStats:
    """Totals since the publisher's start. `broadcast_s` is the time of the successful ones, from the first bucket to
    the last member's report."""

    broadcasts: int = 0
    bytes: int = 0
    broadcast_s: float = 0.0
    failures: int = 0
    """Broadcasts that did not reach every member, and groups that did not form."""
    groups: int = 0
    """Groups formed."""
    by_store: int = 0
    """Versions that no group was there for."""


class GroupPublisher:
    """Leads the groups of one run. Made in the learner's process; `close` ends its thread."""

    def __init__(self, board: BoardAccess, *, settings: GroupSettings, address: str, lead: LeaderFactory) -> None:
        self._board, self._settings, self._address, self._lead = board, settings, address, lead
        self._jobs: queue.SimpleQueue[WeightBlob | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._busy = False
        self._leader: GroupLeader | None = None
        self._plan: GroupPlan | None = None
        self._seen: Mapping[str, int] = {}
        self._failed_in_a_row, self._retry_at_s = 0, 0.0
        self._look_at_s = 0.0
        """When to look at the members again, versions or not."""
        self._stats = BroadcastStats()
        self._thread = threading.Thread(target=self._run, name="weight-publisher", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> BroadcastStats:
        return self._stats

    def reserve(self) -> int | None:
        """The epoch that a version can be offered to now, or None. Followed by `broadcast` or `release`."""
        with self._lock:
            if self._busy or self._plan is None:
                self._count(by_store=1)
                return None
            self._busy = True
            return self._plan.epoch

    def release(self) -> None:
        """The board did not offer the version to the group."""
        with self._lock:
            self._busy = False
            self._count(by_store=1)

    def broadcast(self, blob: WeightBlob) -> None:
        """Send an offered version, in the thread."""
        self._jobs.put(blob)

    def close(self) -> None:
        """End the thread and the group. Waits for a broadcast in progress, for a phase's deadline at most."""
        self._jobs.put(None)
        self._thread.join(self._settings.timeout_s)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while True:
                try:
                    if not self._turn():
                        return
                except DeadlineError as error:
                    _log.warning("the weight board is slow, the group is built anew: %s", error)
                    self._drop_group()
        except KeelError as error:
            # The board is gone, and with it the run; publish() tells the learner.
            _log.error("weights are no longer broadcast: %s", error)
        finally:
            self._drop_group()

    def _turn(self) -> bool:
        """One version, or a look at the members. False: the end."""
        try:
            blob = self._jobs.get(timeout=max(0.0, self._look_at_s - time.monotonic()))
        except queue.Empty:
            self._look_after_group()
            return True
        if blob is not None:
            self._send(blob)
        return blob is not None

    def _look_after_group(self) -> None:
        """Form a group when the members are not those of the plan, once they have been the same for a period."""
        self._look_at_s = time.monotonic() + self._settings.check_period_s
        members = self._board.ask_now("members", timeout_s=0.0)
        settled, self._seen = members == self._seen, members
        with self._lock:
            if self._busy:
                return
            plan = self._plan
            if plan is not None and (set(plan.offsets) != set(members) or not self._in_force(plan)):
                self._plan = None
            wanted = self._plan is None and bool(members) and settled and time.monotonic() >= self._retry_at_s
        if self._plan is None and self._leader is not None:
            self._drop_group()
        if wanted:
            self._form(members)

    def _form(self, members: Mapping[str, int]) -> None:
        settings = self._settings
        try:
            leader = self._lead(self._address, settings.timeout_s)
        except GroupBrokenError as error:
            self._wait_longer()
            _log.warning("no weight group: %s", error)
            return
        plan: GroupPlan = self._board.ask_now(
            "propose", members, settings.backend, self._address, leader.port, settings.bucket_bytes, settings.timeout_s,
            timeout_s=0.0,
        )  # fmt: skip
        gone: tuple[str, ...] = ()
        try:
            _by_deadline(lambda: leader.form(plan.world_size), timeout_s=settings.timeout_s, what="forming a group")
            said: Tellings | None = self._board.ask_now(
                "wait_joined", plan.epoch, settings.timeout_s, timeout_s=settings.timeout_s
            )
            if said is None or not said.all_well:
                gone = () if said is None else (*said.missing, *said.failed)
                raise GroupBrokenError("some members did not join", got=", ".join(gone) or "the plan was withdrawn")
        except GroupBrokenError as error:
            said = self._board.ask_now("wait_joined", plan.epoch, 0.0, timeout_s=0.0)
            gone = gone or (said.missing if said is not None else ())
            leader.close()
            self._failed(f"weight group {plan.epoch} did not form", plan=plan, gone=gone, error=error)
            return
        except DeadlineError:
            leader.close()
            raise
        _log.info("weight group %d formed: %d members", plan.epoch, len(plan.offsets))
        self._leader, self._failed_in_a_row = leader, 0
        with self._lock:
            self._plan = plan
            self._count(groups=1)

    def _send(self, blob: WeightBlob) -> None:
        plan, leader = self._plan, self._leader
        try:
            if plan is None or leader is None:  # dropped after the version was offered: let no member wait for it
                epoch = self._board.ask_now("plan_epoch", timeout_s=0.0)
                self._board.ask_now("end_plan", epoch, (), timeout_s=0.0)
            else:
                self._send_through(blob, plan=plan, leader=leader)
        finally:
            with self._lock:
                self._busy = False
            if self._plan is None:
                self._drop_group()

    def _send_through(self, blob: WeightBlob, *, plan: GroupPlan, leader: GroupLeader) -> None:
        try:
            self._broadcast(blob, plan=plan, leader=leader)
        except _UnansweredError as error:
            self._failed(f"broadcasting version {blob.version} failed", plan=plan, gone=error.members, error=error)
        except GroupBrokenError as error:
            # The members say who is well; the rest is out.
            said = self._reports(plan, blob.version)
            gone = () if said is None else said.missing
            self._failed(f"broadcasting version {blob.version} failed", plan=plan, gone=gone, error=error)

    def _broadcast(self, blob: WeightBlob, *, plan: GroupPlan, leader: GroupLeader) -> None:
        settings, version = self._settings, blob.version
        ready_s = min(settings.ready_timeout_s, settings.timeout_s)
        go, late = self._board.ask_now("wait_go", plan.epoch, version, ready_s, timeout_s=ready_s)
        if not go:
            if late or not self._in_force(plan):
                raise _UnansweredError("not all members were ready", members=late)
            return  # a later version overtook it
        started_s = time.monotonic()
        _with_progress(leader.broadcast(blob, bucket_bytes=plan.bucket_bytes), timeout_s=settings.timeout_s)
        said = self._reports(plan, version)
        if said is None or not said.all_well:
            members = () if said is None else said.missing
            failed = {} if said is None else said.failed
            raise _UnansweredError(f"not all members took it: {failed}", members=members)
        self._count(broadcasts=1, bytes=len(blob.buffer), broadcast_s=time.monotonic() - started_s)

    def _reports(self, plan: GroupPlan, version: int) -> Tellings | None:
        limit_s = self._settings.timeout_s
        said: Tellings | None = self._board.ask_now("wait_reports", plan.epoch, version, limit_s, timeout_s=limit_s)
        return said

    def _failed(self, what: str, *, plan: GroupPlan, gone: tuple[str, ...], error: Exception) -> None:
        _log.warning("%s (left out: %s): %s", what, ", ".join(gone) or "nobody", error)
        self._board.ask_now("end_plan", plan.epoch, gone, timeout_s=0.0)
        self._wait_longer()
        with self._lock:
            self._plan = None

    def _wait_longer(self) -> None:
        self._failed_in_a_row += 1
        pause_s = min(_LONGEST_PAUSE_S, self._settings.check_period_s * 2 ** (self._failed_in_a_row - 1))
        self._retry_at_s = time.monotonic() + pause_s
        with self._lock:
            self._count(failures=1)

    def _in_force(self, plan: GroupPlan) -> bool:
        return bool(self._board.ask_now("plan_epoch", timeout_s=0.0) == plan.epoch)

    def _drop_group(self) -> None:
        leader, self._leader = self._leader, None
        with self._lock:
            self._plan = None
        if leader is not None:
            leader.close()

    def _count(self, **more: float) -> None:
        now: dict[str, Any] = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = replace(self._stats, **now)


class _UnansweredError(GroupBrokenError):
    """Some members were silent, or said that they failed."""

    def __init__(self, what: str, *, members: tuple[str, ...]) -> None:
        super().__init__(what, got=f"silent: {', '.join(members) or 'nobody'}")
        self.members = members


def _by_deadline(work: Callable[[], None], *, timeout_s: float, what: str) -> None:
    """Run `work`, which may never return, and give it up after the deadline."""

    def once() -> Iterator[int]:
        work()
        yield 0

    _with_progress(once(), timeout_s=timeout_s, what=what)


def _with_progress(steps: Iterator[int], *, timeout_s: float, what: str = "a bucket") -> None:
    """Run the steps in a thread of their own; raise GroupBrokenError as soon as one takes longer than `timeout_s`. Gloo
    keeps its deadlines itself, NCCL does not; a thread given up ends with the group's abort."""
    done: queue.SimpleQueue[BaseException | int | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            for size in steps:
                done.put(size)
            done.put(None)
        except BaseException as error:
            done.put(error)

    threading.Thread(target=run, name="weight-broadcast", daemon=True).start()
    while True:
        try:
            # A little longer than the group's own deadline, whose error says more.
            step = done.get(timeout=timeout_s * 1.1)
        except queue.Empty as error:
            raise GroupBrokenError(f"{what} took too long", got=f"more than {timeout_s:g} s") from error
        if step is None:
            return
        if isinstance(step, BaseException):
            raise step if isinstance(step, GroupBrokenError) else GroupBrokenError(f"{what} failed", got=repr(step))
