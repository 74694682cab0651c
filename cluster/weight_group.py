"""The group that weights are broadcast in: what its parts say to each other, and the board's book of who is in it.

A *member* is an engine that takes weights. A *plan* gives every member its place in one group of processes; a new plan,
under a higher epoch, replaces it whenever members come, leave or fail. An *offer* is a version that the group in force
is about to be sent; a member outside of it, or one whose broadcast failed, reads the version from the store.

`GroupBook` is the board's state, without any waiting: the board calls it from one event loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cluster.errors import WeightSyncError
from cluster.weights import Probe, TensorEntry, WeightBlob

Backend = Literal["gloo", "nccl"]


class GroupBrokenError(WeightSyncError):
    """A group did not form, or a broadcast did not come through. What would have taken the weights is as it was."""


@dataclass(frozen=True)
class GroupSettings:
    """`timeout_s` bounds each phase: forming a group, one bucket, loading. `address`: where the leader listens; absent,
    the node's own address in Ray's cluster."""

    backend: Backend = "gloo"
    bucket_bytes: int = 256 << 20
    timeout_s: float = 120.0
    ready_timeout_s: float = 15.0
    """How long the leader waits for all members to be ready for a version before it leaves the version to the store."""
    address: str | None = None
    check_period_s: float = 1.0
    """How often the leader looks for members that came or left."""


@dataclass(frozen=True)
class GroupPlan:
    """How to form the group of `epoch`. `offsets`: member → its first rank; its workers take the ranks from there, and
    no two members share one. The leader is rank 0."""

    epoch: int
    backend: Backend
    address: str
    port: int
    world_size: int
    offsets: Mapping[str, int]
    bucket_bytes: int
    timeout_s: float


@dataclass(frozen=True, eq=False)
class GroupUpdate:
    """A version that comes through the group: a blob without its bytes."""

    epoch: int
    version: int
    manifest: tuple[TensorEntry, ...]
    size_bytes: int
    probe: Probe | None = None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape."""
        return {entry.name: entry.shape for entry in self.manifest}


class GroupJoiner(Protocol):
    """What a feed asks of an engine."""

    @property
    def group_ranks(self) -> int:
        """How many processes of the engine take weights: its tensor-parallel size."""
        ...

    async def join_group(self, plan: GroupPlan, *, first_rank: int) -> None:
        """Take ranks first_rank, … in a new group, leaving any earlier one; generation goes on. Raises
        GroupBrokenError."""
        ...

    async def leave_group(self) -> None:
        """Close the group's connections, if there are any."""
        ...


class WeightFeed(Protocol):
    """One consumer's updates, in whatever way they come."""

    async def next(self, than_version: int, *, timeout_s: float) -> WeightBlob | GroupUpdate | None:
        """The newest version as soon as it is above `than_version`; None when none came within `timeout_s`. A
        GroupUpdate must be received by the engine at once, and reported."""
        ...

    async def report(self, update: GroupUpdate, *, error: WeightSyncError | None) -> None:
        """Say how taking `update` went."""
        ...

    async def close(self) -> None:
        """Take no more. The others' group is built anew without this member."""
        ...


@dataclass
class _Offer:
    """A version on its way through the group. `go` is None until all members are ready, or it is called off."""

    epoch: int
    version: int
    ready: set[str] = field(default_factory=set)
    go: bool | None = None
    reports: dict[str, str] = field(default_factory=dict)
    """Member → "" or what went wrong."""


@dataclass(frozen=True)
class Tellings:
    """What members said: `missing` said nothing yet."""

    missing: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_well(self) -> bool:
        return not self.missing and not self.failed


class GroupBook:
    """Members, the plan in force, and the offer in progress."""

    def __init__(self) -> None:
        self.members: dict[str, int] = {}
        """Name → how many ranks it takes."""
        self.plan: GroupPlan | None = None
        self.offer: _Offer | None = None
        self._joined: dict[str, str] = {}
        self._epochs = time.time_ns() // 1_000
        """Of the newest plan. Counts on from the clock, so that a board which starts again, with members that have
        seen its earlier plans, does not give an epoch twice."""

    def register(self, member: str, *, ranks: int) -> bool:
        """A member that asks for weights is a member. A process named "x.2" takes the place of "x.1", and keeps it
        when a late question of "x.1" comes. Returns whether anything changed."""
        if member in self.members:
            return False
        slot, dot, _ = member.rpartition(".")
        others = [name for name in self.members if dot and name.rpartition(".")[0] == slot]
        if any(_incarnation(other) > _incarnation(member) for other in others):
            return False
        for other in others:
            self.remove(other)
        self.members[member] = ranks
        return True

    def remove(self, member: str) -> None:
        """The plan that counted on the member ends with its membership."""
        self.members.pop(member, None)
        if self.plan is not None and member in self.plan.offsets:
            self.end_plan(self.plan.epoch)

    def propose(self, roster: Mapping[str, int], *, backend: Backend, address: str, port: int, bucket_bytes: int,
                timeout_s: float) -> GroupPlan:  # fmt: skip
        """Put a plan for `roster` in force. Ranks follow the members' names."""
        self.end_plan(self._epochs)
        self._epochs += 1
        offsets, rank = {}, 1
        for member in sorted(roster):
            offsets[member] = rank
            rank += roster[member]
        self.plan = GroupPlan(
            epoch=self._epochs,
            backend=backend,
            address=address,
            port=port,
            world_size=rank,
            offsets=offsets,
            bucket_bytes=bucket_bytes,
            timeout_s=timeout_s,
        )
        self._joined = {}
        return self.plan

    def end_plan(self, epoch: int) -> None:
        """Nothing more goes through this group."""
        if self.plan is not None and self.plan.epoch == epoch:
            self.plan = None
            self.call_off()

    def plan_for(self, member: str, *, known_epoch: int) -> GroupPlan | None:
        """The plan in force, if it has a place for the member that the member does not know of."""
        plan = self.plan
        return plan if plan is not None and member in plan.offsets and plan.epoch > known_epoch else None

    def joined(self, member: str, *, epoch: int, error: str) -> None:
        if self.plan is not None and self.plan.epoch == epoch:
            self._joined[member] = error

    def joining(self, epoch: int) -> Tellings | None:
        """Who has joined; None once the plan is no longer in force."""
        plan = self.plan
        return None if plan is None or plan.epoch != epoch else _tellings(plan.offsets, self._joined)

    def begin_offer(self, epoch: int | None, version: int) -> bool:
        """Offer the version to the group of `epoch`, if that is in force. An undecided earlier offer is called off."""
        self.call_off()
        if self.plan is None or self.plan.epoch != epoch:
            return False
        self.offer = _Offer(epoch, version)
        return True

    def enter(self, member: str, *, epoch: int, version: int) -> bool:
        """The member is ready to receive. Returns whether it was the last one, which decides the offer."""
        offer, plan = self._current(epoch, version), self.plan
        if offer is None or plan is None or offer.go is not None:
            return False
        offer.ready.add(member)
        if not offer.ready >= set(plan.offsets):
            return False
        offer.go = True
        return True

    def decision(self, epoch: int, version: int) -> bool | None:
        """Whether the version goes through the group; None while that is open."""
        offer = self._current(epoch, version)
        return False if offer is None else offer.go

    def call_off(self) -> tuple[str, ...]:
        """Leave an undecided offer to the store. Returns who was not ready."""
        if self.offer is None or self.offer.go is not None:
            return ()
        self.offer.go = False
        return tuple(sorted(set(self.plan.offsets if self.plan else ()) - self.offer.ready))

    def report(self, member: str, *, epoch: int, version: int, error: str) -> None:
        offer = self._current(epoch, version)
        if offer is not None:
            offer.reports[member] = error

    def taking(self, epoch: int, version: int) -> Tellings | None:
        """Who has taken the version; None once the plan is no longer in force."""
        offer, plan = self._current(epoch, version), self.plan
        return None if offer is None or plan is None else _tellings(plan.offsets, offer.reports)

    def _current(self, epoch: int, version: int) -> _Offer | None:
        offer, plan = self.offer, self.plan
        here = offer is not None and (offer.epoch, offer.version) == (epoch, version)
        return offer if here and plan is not None and plan.epoch == epoch else None


def _incarnation(member: str) -> int:
    """Of "x.2": 2."""
    number = member.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def _tellings(members: Mapping[str, int], said: Mapping[str, str]) -> Tellings:
    missing = tuple(sorted(set(members) - set(said)))
    return Tellings(missing=missing, failed={name: error for name, error in said.items() if error})
