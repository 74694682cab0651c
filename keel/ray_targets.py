"""Ray's own exporters as Prometheus targets: one on each living node, with the node's CPU, memory and object store.

Consumes: the cluster's list of nodes. Produces: targets with role "ray". Waits for: the head node, in `ray_targets`;
the caller sets the deadline. Always holds: a node that left, or has no exporter, is not in the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.discovery import TargetGroup, target_group

ROLE = "ray"


def ray_targets(run: str, *, tell_alive: Callable[[float], None]) -> list[TargetGroup]:
    """Targets of the cluster to which this process is connected. `tell_alive` hears how many nodes live."""
    import ray

    nodes = ray.nodes()
    tell_alive(nodes_alive(nodes))
    return node_targets(nodes, run=run)


def nodes_alive(nodes: Sequence[Mapping[str, Any]]) -> int:
    """How many of `ray.nodes()` live."""
    return sum(bool(node["Alive"]) for node in nodes)


def node_targets(nodes: Sequence[Mapping[str, Any]], *, run: str) -> list[TargetGroup]:
    """Targets of `ray.nodes()`, sorted. The instance is the beginning of the node's id: a machine that leaves and joins
    again is another node."""
    living = (node for node in nodes if node["Alive"] and node["MetricsExportPort"] > 0)
    groups = (
        target_group(_address(node), run=run, role=ROLE, instance=f"node-{node['NodeID'][:12]}") for node in living
    )
    return sorted(groups, key=lambda group: group["targets"])


def _address(node: Mapping[str, Any]) -> str:
    host = node["NodeManagerAddress"]
    return f"[{host}]:{node['MetricsExportPort']}" if ":" in host else f"{host}:{node['MetricsExportPort']}"
