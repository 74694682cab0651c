"""The Ray processes of one role: started, watched, replaced, added and drained.

Consumes: the outcomes of each process's `start()` and `run()`. Produces: replacements, or SupervisionError.
Waits: in `poll`, about `timeout_s`. Who unblocks it: Ray, when a process ends; or a deadline: for room, start or drain.
Always holds: a process that ends, even cleanly, is replaced or ends the run with the reason, unless it was asked to
drain; none is left behind by `stop`.

Restarts are counted for each process (for a group that works together, as one). What dies with its host does not count:
Ray notices a process's death before its host's, so a count is taken back when the host turns out to be gone, and a
process on another host that has used up its restarts gets _VERDICT_S before it ends the run. A replacement that finds
no room waits for a node as long as another process of the role runs. An addition that does not come up is withdrawn.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.errors import DeadlineError, KeelError, SupervisionError
from cluster.group import Group, Role, as_keel_error, unwrapped
from cluster.placement import Shortage, least_used_node, living_nodes, refresh

__all__ = ["Role", "RolePool", "unwrapped"]

log = logging.getLogger(__name__)

_INSPECT_EVERY_S = 1.0
_VERDICT_S = 20.0
"""By then Ray knows whether a host is gone; see NODE_ENVIRONMENT in keel/ray_environment.py for what shortens it."""
Note = Callable[[str, str], None]
"""(event, text): what a person should read in the run's record."""


class RolePool:
    """All processes of one role. Used from one thread; the counts may be read from others."""

    def __init__(self, role: Role, *, note: Note = lambda event, text: None) -> None:
        self.role = role
        self.restarts = 0
        self.withdrawn: list[str] = []
        """Why additions were given up. Cleared by whoever asked for them."""
        self._note = note
        self._groups: dict[int, Group] = {}
        """By the index of a group's first process."""
        self._incarnations: Counter[int] = Counter()
        """The next one, by index: an index that is used again counts on."""
        self._running = False
        self._inspected_s = self._served_s = time.monotonic()

    # ------------------------------------------------------------ size

    def grow_to(self, count: int, *, tentative: bool = False) -> None:
        """Start processes until there are `count`. Returns at once; `poll` or `wait_ready` see them through."""
        while self.wanted < count:
            size = count if self.role.together else 1
            first = next(index for index in range(len(self._groups) + 1) if index not in self._groups)
            self._groups[first] = self._boot(first, size=size)
            self._groups[first].tentative = tentative

    def shrink_to(self, count: int) -> None:
        """Drain the newest processes until `count` are to stay, additions that may still fail before all others. Those
        that have not started are killed at once."""
        staying = sorted(
            (group for group in self._groups.values() if not group.draining), key=lambda g: (g.tentative, g.asked_s)
        )
        for group in staying[count:]:
            if group.up and group.running:
                group.drain()
                log.info("%s %d drains", self.role.name, group.first)
            else:
                self._remove(group)

    @property
    def wanted(self) -> int:
        """Processes that are there or on their way, without those that drain."""
        return sum(len(group.handles) for group in self._all if not group.draining)

    @property
    def up(self) -> int:
        """Processes that have started, without those that drain."""
        return sum(len(group.handles) for group in self._all if group.up and not group.draining)

    @property
    def waiting_for_room(self) -> int:
        """Processes that have asked and not been placed for more than a moment."""
        return self.states["pending"]

    @property
    def draining(self) -> int:
        return sum(len(group.handles) for group in self._all if group.draining)

    @property
    def states(self) -> dict[str, int]:
        """Processes by state, for the metric of that name."""
        counts = Counter({"running": 0, "restarting": 0, "starting": 0, "pending": 0, "draining": 0})
        for group in self._all:
            counts[_state(group)] += len(group.handles)
        return dict(counts)

    # ------------------------------------------------------------ life

    def wait_placed(self, tick: Callable[[], None]) -> None:
        """Wait until every process has room. Raises SupervisionError after the role's placement_wait_s."""
        while not all(group.placed_s is not None for group in self._groups.values()):
            self._refresh()
            self.poll(timeout_s=0.1)
            tick()

    def wait_ready(self, tick: Callable[[], None]) -> list[dict[str, Any]]:
        """Wait until every process has started, calling `tick` a few times a second. Returns what start() returned."""
        while not all(group.up for group in self._groups.values()):
            self.poll(timeout_s=0.2)
            tick()
        return [group.infos[position] for group in self._all for position in sorted(group.infos)]

    def run(self) -> None:
        """Let every process, and each later replacement, run()."""
        self._running = True
        for group in self._groups.values():
            group.run()

    def poll(self, *, timeout_s: float) -> None:
        """See to every process that came up or ended. Raises SupervisionError or the process's own error when the
        restarts are used up or would not help, DeadlineError when a start took too long."""
        waiting = {reference: group for group in self._groups.values() for reference in group.pending}
        if waiting:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
            for reference in ready:
                self._finished(waiting[reference], reference)
        else:
            time.sleep(timeout_s)
        if time.monotonic() - self._inspected_s >= _INSPECT_EVERY_S:
            self._inspect()

    def lost(self, handle: ActorHandle, error: BaseException) -> None:
        """A caller found that the process behind `handle` is gone or of no more use: replace it."""
        for group in self._groups.values():
            if handle in group.handles:
                self._failed(group, error)
                return

    @property
    def finished(self) -> bool:
        """Of a finite role: every process has returned from run()."""
        return all(group.ended for group in self._groups.values())

    @property
    def results(self) -> list[Any]:
        """What run() returned, of the processes that ended, in the order of their indices."""
        return [group.results[position] for group in self._all for position in sorted(group.results)]

    @property
    def handles(self) -> list[ActorHandle]:
        """Handles of the processes that have started and do not drain."""
        return [handle for group in self._all if group.up and not group.draining for handle in group.handles]

    def stop(self, *, grace_s: float) -> None:
        """Ask every process to stop, wait up to `grace_s`, then kill what is left."""
        groups, self._groups = list(self._groups.values()), {}
        asked = [handle.stop.remote() for group in groups if group.up for handle in group.handles]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=grace_s)
        for group in groups:
            group.kill()

    # ------------------------------------------------------------ inside

    @property
    def _all(self) -> list[Group]:
        return sorted(self._groups.values(), key=lambda group: group.first)

    def _boot(self, first: int, *, size: int) -> Group:
        used = [node for group in self._groups.values() for node in self._nodes_of(group)]
        target = least_used_node(self.role.bundle, used=used) if self.role.spread and size == 1 else None
        incarnation = self._incarnations[first]
        self._incarnations[first] += 1
        return Group.boot(self.role, first=first, count=size, incarnation=incarnation, target=target)

    @staticmethod
    def _nodes_of(group: Group) -> Iterable[str]:
        return group.placement.nodes or ([group.placement.target] if group.placement.target else [])

    def _finished(self, group: Group, reference: Any) -> None:
        if self._groups.get(group.first) is not group or reference not in group.pending:
            return  # Of a group that was replaced in this same round.
        try:
            group.take(reference)
        except (ray.exceptions.RayError, KeelError) as error:
            self._failed(group, error)
            return
        if group.draining:
            self._drained(group)
        elif group.results and not self.role.finite:
            self._failed(group, SupervisionError(f"{self.role.name} {group.first} ended by itself"))
        elif group.up and not group.running:
            group.tentative = False
            if self._running:
                group.run()

    def _drained(self, group: Group) -> None:
        if group.leaving and not group.pending:
            self._remove(group)
        elif group.ended and not group.leaving:
            group.leave()

    def _failed(self, group: Group, error: BaseException) -> None:
        cause = group.cause_of(error) if len(group.handles) > 1 else unwrapped(error)
        name = f"{self.role.name} {group.first}" if not self.role.together else self.role.name
        if group.draining:
            log.warning("%s failed while it drained, its leases return: %s", name, cause)
            self._remove(group)
            return
        if group.tentative:
            self._withdraw(group, f"{name} did not come up: {cause}")
            return
        self._refresh()
        never_started = not group.up and group.incarnation == 0
        used_up = never_started or group.restarts >= self.role.max_restarts
        final = isinstance(cause, self.role.final_errors)
        if not final and (group.host_lost or not used_up):
            self._replace(group, name=name, cause=cause)
            return
        restarts = f"restarts used: {group.restarts} of {self.role.max_restarts}"
        keel_error = as_keel_error(cause, what=f"{name} died ({restarts})", do=f"look at logs/{self.role.name}*.log")
        if final or not (isinstance(cause, ray.exceptions.RayActorError) and group.on_other_hosts):
            raise keel_error from error
        group.put_in_doubt(keel_error)

    def _replace(self, group: Group, *, name: str, cause: BaseException) -> None:
        lost = group.host_lost
        restarts = group.restarts + (0 if lost else 1)
        self.restarts += 1
        why = "its host is gone" if lost else str(cause)
        text = f"{name} died and is replaced ({restarts} of {self.role.max_restarts} restarts): {why}"
        log.warning("%s", text)
        self._note("restart", text.splitlines()[0])
        group.kill()
        del self._groups[group.first]
        self.role.replaced()
        successor = self._boot(group.first, size=len(group.handles))
        successor.restarts = restarts
        successor.charged_hosts = frozenset() if lost else frozenset(group.placement.nodes)
        self._groups[group.first] = successor

    def _withdraw(self, group: Group, reason: str) -> None:
        log.warning("%s", reason)
        self.withdrawn.append(reason)
        self._remove(group)

    def _remove(self, group: Group) -> None:
        group.kill()
        del self._groups[group.first]

    def _refresh(self) -> None:
        now_s = time.monotonic()
        refresh(group.placement for group in self._all)
        for group in self._all:
            if group.placed_s is None and group.placement.placed:
                group.placed_s = now_s

    def _inspect(self) -> None:
        """Look at the deadlines (room, start, drain) and at hosts that may be gone."""
        self._inspected_s = now_s = time.monotonic()
        self._refresh()
        if self.up:
            self._served_s = now_s
        for group in self._all:
            if group.charged_hosts:
                self._take_back(group, now_s)
            if group.doubt is not None:
                self._inspect_doubt(group, group.doubt, now_s)
            elif group.draining_since_s is not None:
                if now_s - group.draining_since_s > self.role.drain_timeout_s:
                    log.warning("%s %d did not drain in time and is killed", self.role.name, group.first)
                    self._remove(group)
            elif group.pending_placement:
                self._inspect_room(group, now_s)
            elif not group.up and now_s - (group.placed_s or now_s) > self.role.start_timeout_s:
                self._failed(group, self._late_start(group))

    @staticmethod
    def _take_back(group: Group, now_s: float) -> None:
        """The predecessor's death does not count if its host is found to be gone soon after."""
        if group.charged_hosts - set(living_nodes()):
            group.restarts -= 1
            group.charged_hosts = frozenset()
        elif now_s - group.asked_s > _VERDICT_S:
            group.charged_hosts = frozenset()

    def _inspect_doubt(self, group: Group, error: KeelError, now_s: float) -> None:
        if group.host_lost:
            name = f"{self.role.name} {group.first}" if not self.role.together else self.role.name
            self._replace(group, name=name, cause=error)
        elif now_s - group.doubt_since_s > _VERDICT_S:
            raise error

    def _inspect_room(self, group: Group, now_s: float) -> None:
        """A replacement waits for a node as long as the role is served by others."""
        replacement = group.incarnation > 0 and not group.tentative
        if now_s - group.asked_s <= self.role.placement_wait_s or (group.tentative and self.draining):
            return  # What drains still holds the room that an addition waits for.
        if replacement and now_s - self._served_s <= self.role.placement_wait_s:
            self._tell_of_waiting(group)
            return
        error = self._no_room(group)
        if group.tentative:
            self._withdraw(group, str(error))
        else:
            raise error

    def _tell_of_waiting(self, group: Group) -> None:
        if not group.told_of_waiting:
            group.told_of_waiting = True
            shortage = Shortage.now(self.role.room_bundle, count=len(group.handles))
            text = f"{self.role.name} {group.first} has no room and waits for a node: {shortage}"
            log.warning("%s", text)
            self._note("pending", text)

    def _no_room(self, group: Group) -> SupervisionError:
        return SupervisionError(
            f"there is no room for {self.role.name} after {self.role.placement_wait_s:g} s",
            got=f"{Shortage.now(self.role.room_bundle, count=len(group.handles))}; {self.up} of {self.wanted} are up",
            do="\n".join(filter(None, (self.role.advice, self.role.explain()))),
        )

    def _late_start(self, group: Group) -> DeadlineError:
        return DeadlineError(
            f"{self.role.name} {group.first} did not start",
            got=f"nothing for {self.role.start_timeout_s:.0f} s after it was placed",
            do=f"look at logs/{self.role.name}*.log",
        )


def _state(group: Group) -> str:
    if group.draining:
        return "draining"
    if group.up:
        return "running"
    if group.pending_placement and time.monotonic() - group.asked_s > _INSPECT_EVERY_S:
        return "pending"
    return "restarting" if group.restarts else "starting"
