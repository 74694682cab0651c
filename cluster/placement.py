"""Where the processes of a role go: Ray placement groups, and what to say when there is no room.

Consumes: what each process asks for. Produces: reservations, and the node of each. Waits: never; a reservation is made
in the background and looked at with `Placement.refresh`. Who unblocks it: a node that joins, or resources set free.
Always holds: all processes of one reservation get their room together or not at all; `release` gives it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import SupervisionError

Resources = Mapping[str, float]


@dataclass(eq=False)
class Placement:
    """The room of one group of processes: one bundle each."""

    group: PlacementGroup
    target: str | None = None
    """The node asked for, in hexadecimal; a wish only."""
    nodes: tuple[str, ...] = ()
    """The node of each bundle, once placed."""
    shared: SharedRoom | None = None
    """Whose room it is, when not this group's alone."""

    @classmethod
    def ask(cls, bundle: Resources, *, count: int, target: str | None = None) -> Placement:
        """Ask for room for `count` processes: a single one on the node `target` if it fits there, several on as few
        nodes as possible. Returns at once."""
        bundles = [dict(bundle) for _ in range(count)]
        strategy = "STRICT_PACK" if count == 1 else "PACK"
        return cls(placement_group(bundles, strategy=strategy, _soft_target_node_id=target), target=target)

    @property
    def placed(self) -> bool:
        return bool(self.nodes)

    def scheduling(self, position: int) -> PlacementGroupSchedulingStrategy:
        """For the options of the process at `position`."""
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=position)

    def release(self) -> None:
        """Give the room back. Processes that still use it are killed; shared room stays until all have left."""
        if self.shared is None:
            remove_placement_group(self.group)
        else:
            self.shared.leave(self)


class SharedRoom:
    """One bundle for one process of each of several roles: their shares of a GPU are of the same GPU, since a bundle
    with one GPU at most holds a part of one alone."""

    def __init__(self, bundle: Resources) -> None:
        """`bundle`: what all of them take together. Raises SupervisionError for more than one GPU."""
        if bundle.get("GPU", 0.0) > 1.0:
            raise SupervisionError(
                "processes that share a GPU ask for more than one", got=f"{bundle['GPU']:g}", do="give each a share"
            )
        self.bundle = bundle
        self._group: PlacementGroup | None = None
        self._placements: list[Placement] = []

    def enter(self) -> Placement:
        """Ask for the room, or for a place in it. Returns at once."""
        if self._group is None:
            self._group = placement_group([dict(self.bundle)], strategy="STRICT_PACK")
        placement = Placement(self._group, shared=self)
        self._placements.append(placement)
        return placement

    def leave(self, placement: Placement) -> None:
        """The last one to leave gives the room back."""
        self._placements.remove(placement)
        if not self._placements and self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def refresh(placements: Iterable[Placement]) -> None:
    """Note which of them have been placed since, and where. One call to Ray's control service for all."""
    waiting = [placement for placement in placements if not placement.placed]
    if not waiting:
        return
    table = placement_group_table()
    for placement in waiting:
        entry: dict[str, Any] = table.get(placement.group.id.hex(), {})
        if entry.get("state") == "CREATED":
            nodes = entry["bundles_to_node_id"]
            placement.nodes = tuple(nodes[position] for position in sorted(nodes))


def living_nodes() -> dict[str, dict[str, float]]:
    """Node → all its resources, of the nodes that Ray believes alive."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def least_used_node(bundle: Resources, *, used: Iterable[str]) -> str | None:
    """The living node that is big enough for `bundle` and comes up least often in `used`; None when none is."""
    counts = Counter(used)
    fit = [node for node, has in sorted(living_nodes().items()) if _fits(bundle, has)]
    return min(fit, key=lambda node: counts[node], default=None)


def bundle_of(*, cpus: float, gpus: float) -> dict[str, float]:
    """Ray's names for what one process takes."""
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}


@dataclass(frozen=True)
class Shortage:
    """Why a group of processes has no room."""

    bundle: Resources
    count: int
    total: Resources
    free: Resources
    nodes: Sequence[Resources] = field(default_factory=list)

    @classmethod
    def now(cls, bundle: Resources, *, count: int) -> Shortage:
        return cls(bundle, count, ray.cluster_resources(), ray.available_resources(), list(living_nodes().values()))

    def __str__(self) -> str:
        each = f"{self.count} × {_text(self.bundle)}" if self.count > 1 else _text(self.bundle)
        nodes = f"{len(self.nodes)} node{'s' if len(self.nodes) != 1 else ''}"
        text = f"{each} asked for; the cluster has {_text(self.total)} on {nodes}, of which {_text(self.free)} free"
        if not any(_fits(self.bundle, node) for node in self.nodes):
            text += "; no single node is big enough for one process"
        return text


def _fits(bundle: Resources, has: Resources) -> bool:
    return all(has.get(name, 0.0) >= amount for name, amount in bundle.items())


def _text(resources: Resources) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU")
                     if name == "CPU" or resources.get(name)) or "nothing"  # fmt: skip
