"""The driver's side of scaling: requests by `keel scale` and decisions from idleness, applied to the rollout actors.

Consumes: `request` (set by the overseer's thread), the learner's step records, the actors' status. Produces: a pool
that grows or drains, and `report` (read by the overseer's thread). Waits: never; `step` is called from the driver's
watch loop. Who unblocks it: nobody needs to. Always holds: one change at a time, a newer request replaces it; a change
that cannot be carried out is undone and the old number stays.

A run starts, also with --resume, with `rollout.actors` of its configuration. A number given by hand holds until the end
of the run or until autoscaling is handed the number back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster.control import ScaleReport, ScaleRequest
from cluster.files import Json
from configs.run import RunConfig
from keel.online.autoscale import Autoscaler

log = logging.getLogger(__name__)

Note = Callable[[str, str], None]
"""(event, text): what a person should read in the run's record."""


class Scalable(Protocol):
    """What is needed of cluster.supervise.RolePool."""

    withdrawn: list[str]

    @property
    def wanted(self) -> int: ...

    @property
    def up(self) -> int: ...

    @property
    def draining(self) -> int: ...

    @property
    def waiting_for_room(self) -> int: ...

    def grow_to(self, count: int, *, tentative: bool = False) -> None: ...

    def shrink_to(self, count: int) -> None: ...


@dataclass(frozen=True)
class _Change:
    number: str
    """Of the request that waits for it; "" when none does: a decision of autoscaling, or a number handed back."""
    before: int
    target: int


class Scaler:
    """One a run."""

    def __init__(
        self,
        pool: Scalable,
        *,
        config: RunConfig,
        idle_of_actors: Callable[[], Mapping[str, float] | None],
        note: Note,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`idle_of_actors`: name → idle seconds since its start, of every actor; None while they are being asked."""
        section = config.rollout.autoscale
        self.request: ScaleRequest | None = None
        self.decisions = {"add": 0, "remove": 0}
        self._pool = pool
        self._note = note
        self._clock = clock
        self._idle_of_actors = idle_of_actors
        self._autoscaler = None if section is None else Autoscaler(section)
        self._one_gpu = config.placement.colocate
        self._by_hand = False
        self._change: _Change | None = None
        self._seen = ""
        self.report = ScaleReport(number="", state="done", wanted=pool.wanted, running=pool.up)

    def step(self, records: Sequence[Json]) -> None:
        """One turn. `records`: steps of the learner that ended since the last."""
        request = self.request
        if request is not None and request.number != self._seen:
            self._seen = request.number
            self._take(request)
        if self._change is not None:
            self._follow(self._change)
        elif self._autoscaler is not None:
            self._autoscale(self._autoscaler, records)

    def _take(self, request: ScaleRequest) -> None:
        if request.actors is None:
            self._hand_back(request)
            return
        if self._one_gpu and request.actors > 1:
            reason = f"placement.colocate puts one engine on the learner's GPU: 1 actor, not {request.actors}"
            self._refuse(request, f"{reason}; start the run without it to have more")
            return
        self._by_hand = True
        paused = ", autoscaling pauses" if self._autoscaler is not None else ""
        self._note("scale", f"{_actors(request.actors)} asked for (now {self._pool.wanted}){paused}")
        self._begin(request.actors, number=request.number)

    def _hand_back(self, request: ScaleRequest) -> None:
        if self._autoscaler is None:
            self._refuse(request, "this run does not scale by itself: rollout.autoscale is not set")
            return
        self._by_hand = False
        self._autoscaler.changed(now_s=self._clock())
        self._answer_no_more()
        self._note("scale", "autoscaling goes on")
        self._tell(request.number, "done", "autoscaling goes on")

    def _refuse(self, request: ScaleRequest, reason: str) -> None:
        self._answer_no_more()
        self._note("scale", f"refused: {reason}")
        self._tell(request.number, "refused", reason)

    def _answer_no_more(self) -> None:
        """A change in progress goes on; its reports would hide the answer to a newer request."""
        if self._change is not None:
            self._change = replace(self._change, number="")

    def _begin(self, target: int, *, number: str) -> None:
        """Start a change. One that replaces another, unfinished one goes back, if it must, to before both."""
        before = self._pool.wanted if self._change is None else self._change.before
        self._change = _Change(number, before=before, target=target)
        self._pool.withdrawn.clear()
        self._pool.shrink_to(target)
        self._pool.grow_to(target, tentative=True)
        self._tell(number, "working", "")

    def _follow(self, change: _Change) -> None:
        pool = self._pool
        if pool.withdrawn:
            reason = pool.withdrawn[0]
            pool.withdrawn.clear()
            pool.shrink_to(change.before)
            self._end(change, "refused", f"{reason}; back to {_actors(pool.wanted)}")
        elif pool.up >= change.target and not pool.draining:
            self._end(change, "done", f"{_actors(pool.up)} running")
        else:
            self._tell(change.number, "working", self._progress())

    def _end(self, change: _Change, state: str, text: str) -> None:
        self._change = None
        self._note("scale", text)
        self._tell(change.number, state, text)
        if self._autoscaler is not None:
            self._autoscaler.changed(now_s=self._clock())

    def _progress(self) -> str:
        pool = self._pool
        parts = [f"{pool.up} of {pool.wanted} running"]
        parts += [f"{pool.waiting_for_room} waiting for room"] if pool.waiting_for_room else []
        parts += [f"{pool.draining} draining"] if pool.draining else []
        return ", ".join(parts)

    def _autoscale(self, autoscaler: Autoscaler, records: Sequence[Json]) -> None:
        now_s = self._clock()
        for record in records:
            idle_s, step_s = record.get("idle_seconds"), record.get("step_seconds")
            if isinstance(idle_s, float) and isinstance(step_s, float):
                autoscaler.window.add_step(now_s=now_s, idle_s=idle_s, step_s=step_s)
        idle = self._idle_of_actors()
        if idle is not None:
            autoscaler.window.add_actors(idle, now_s=now_s)
        if self._by_hand:
            return
        decision = autoscaler.decide(actors=self._pool.wanted, now_s=now_s)
        if decision.change:
            self.decisions["add" if decision.change > 0 else "remove"] += 1
            target = self._pool.wanted + decision.change
            self._note("autoscale", f"{self._pool.wanted} → {_actors(target)}: {decision.reason}")
            self._begin(target, number="")

    def _tell(self, number: str, state: Any, text: str) -> None:
        if not number:
            return
        self.report = ScaleReport(
            number=number, state=state, wanted=self._pool.wanted, running=self._pool.up, note=text
        )


def _actors(count: int) -> str:
    return f"{count} actor{'s' if count != 1 else ''}"


class ActorIdleness:
    """Asks the actors how long they have been idle, without ever waiting for them."""

    def __init__(self, handles: Callable[[], Sequence[Any]], *, ray: Any, every_s: float = 2.0) -> None:
        self._handles = handles
        self._ray = ray
        self._every_s = every_s
        self._asked: list[Any] = []
        self._asked_s = 0.0

    def __call__(self) -> dict[str, float] | None:
        """Name → idle seconds, when all that answer have answered; None in between."""
        now_s = time.monotonic()
        if not self._asked:
            if now_s - self._asked_s >= self._every_s:
                self._asked, self._asked_s = [handle.status.remote() for handle in self._handles()], now_s
            return None
        ready, late = self._ray.wait(self._asked, num_returns=len(self._asked), timeout=0)
        if late and now_s - self._asked_s < self._every_s:
            return None
        self._asked = []
        idle: dict[str, float] = {}
        for reference in ready:
            try:
                status = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                continue  # A dying actor is the supervisor's business.
            idle[status["name"]] = float(status["idle_s"])
        return idle
