"""Which node each process would go to: first fit, the greediest first. Pure. Ray decides for itself at the start; what
finds no room here finds none there, but for fragments that other jobs leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from keel.planning.view import ClusterView, NodeView

_EPSILON = 1e-6


@dataclass(frozen=True)
class Process:
    """What one process of a role takes. `gpus` above 1: whole GPUs of one node (tensor parallelism)."""

    role: str
    cpus: float
    gpus: float
    host_bytes: int
    gpu_bytes: int
    """Of each of its GPUs."""


@dataclass
class _Node:
    view: NodeView
    cpus: float
    gpus: list[float]
    """Free share of each GPU."""
    gpu_bytes: list[int]
    """Taken of each GPU."""
    host_bytes: int = 0
    roles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NodeLoad:
    """A node with what was put on it. gpu_bytes: of the fullest GPU."""

    view: NodeView
    roles: tuple[str, ...]
    host_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Assignment:
    """nodes: those that took something or nothing. left: processes without a place, in the order they were tried."""

    nodes: tuple[NodeLoad, ...]
    left: tuple[Process, ...]

    def nodes_of(self, role: str) -> int:
        return sum(role in node.roles for node in self.nodes)

    def count(self, role: str) -> int:
        """Processes of the role that have a place."""
        return sum(node.roles.count(role) for node in self.nodes)


def assign(processes: Iterable[Process], *, cluster: ClusterView) -> Assignment:
    """Put every process on the first node with room for its CPUs and GPUs; those with most GPUs, then CPUs, first."""
    nodes = [
        _Node(view, view.cpus, [1.0] * int(view.gpus), [0] * int(view.gpus))
        for view in sorted(cluster.nodes, key=lambda view: (-view.gpus, -view.cpus))
    ]
    left = []
    for process in sorted(processes, key=lambda process: (-process.gpus, -process.cpus)):
        # A process without a GPU leaves nodes that have some to the others, as Ray does.
        order = nodes if process.gpus else sorted(nodes, key=lambda node: len(node.gpus))
        if not any(_put(process, node) for node in order):
            left.append(process)
    return Assignment(nodes=tuple(map(_load, nodes)), left=tuple(left))


def _put(process: Process, node: _Node) -> bool:
    slots = _slots(process.gpus, node.gpus)
    if slots is None or node.cpus + _EPSILON < process.cpus:
        return False
    node.cpus -= process.cpus
    for slot in slots:
        node.gpus[slot] -= min(1.0, process.gpus)
        node.gpu_bytes[slot] += process.gpu_bytes
    node.host_bytes += process.host_bytes
    node.roles.append(process.role)
    return True


def _slots(gpus: float, free: Sequence[float]) -> list[int] | None:
    """The GPUs that would be taken; None when there are not enough."""
    if gpus == 0:
        return []
    share, count = (gpus, 1) if gpus < 1 else (1.0, round(gpus))
    # A share of a GPU goes to the fullest one with room, so that whole ones stay whole.
    able = sorted((slot for slot in range(len(free)) if free[slot] + _EPSILON >= share), key=lambda slot: free[slot])
    return able[:count] if len(able) >= count else None


def _load(node: _Node) -> NodeLoad:
    return NodeLoad(node.view, tuple(node.roles), node.host_bytes, max(node.gpu_bytes, default=0))
