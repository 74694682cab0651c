"""What there is to run on: the nodes of a joined Ray cluster, or this machine. Reads only; no torch, and
Ray only where it is handed in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil

from configs.run import RunConfig

_GIB: Final = 1 << 30
_SMI_TIMEOUT_S: Final = 10.0
_PROBE_TIMEOUT_S: Final = 30.0
ACCELERATOR_GIB: Final[Mapping[str, int]] = {
    "T4": 15, "V100": 16, "L4": 22, "A10G": 22, "L40S": 44, "H100": 79, "H20": 94, "H200": 139, "B200": 178,
}  # fmt: skip
"""Usable GPU memory by Ray's accelerator type, of those made in one size only; of V100 the smaller. An A100 has 40 or
80 GB: not known from its type."""


@dataclass(frozen=True)
class NodeView:
    """One machine. None: not known."""

    name: str
    cpus: float
    """As Ray counts them; on this machine, logical ones (ray.num_cpus)."""
    gpus: float = 0.0
    gpu_bytes: int | None = None
    """Of each GPU."""
    memory_bytes: int | None = None
    """For processes and the object store together."""
    object_store_bytes: int | None = None
    shm_bytes: int | None = None
    has_run_dir: bool | None = None
    driver: bool = False
    """This process is there, and with it what the driver starts beside itself."""


@dataclass(frozen=True)
class ClusterView:
    """The nodes, and the disk that run directories lie on. `joined`: a cluster that runs, not this machine."""

    nodes: tuple[NodeView, ...]
    joined: bool = False
    disk_free_bytes: int | None = None

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @property
    def gpu_bytes(self) -> int | None:
        """Of the smallest GPU."""
        known = [node.gpu_bytes for node in self.nodes if node.gpus and node.gpu_bytes is not None]
        return min(known, default=None)

    @classmethod
    def of_this_machine(cls, config: RunConfig) -> ClusterView:
        """What a local Ray would have. Asks nvidia-smi only where the configuration wants GPUs."""
        gpu_bytes = _gpu_memory() if wants_gpus(config) else []
        node = NodeView(
            name="this machine",
            cpus=config.ray.num_cpus or max(os.cpu_count() or 1, cpus_needed(config)),
            gpus=len(gpu_bytes),
            gpu_bytes=min(gpu_bytes, default=None),
            memory_bytes=_memory_limit(),
            object_store_bytes=config.ray.object_store_mib << 20,
            shm_bytes=_shm_bytes(),
            driver=True,
        )
        return cls(nodes=(node,), disk_free_bytes=disk_free_bytes(config.runs_dir))

    @classmethod
    def from_ray(cls, ray: Any, *, run_dir: Path | None = None) -> ClusterView:
        """The living nodes of the cluster that `ray` is connected to.

        `run_dir`: also have each node look for this directory and measure its GPUs and its /dev/shm, in one small task;
        without it nothing is started, and these are not known.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        own_id = ray.get_runtime_context().get_node_id()
        views = {node["NodeID"]: replace(_node_view(node), driver=node["NodeID"] == own_id) for node in nodes}
        if run_dir is not None:
            views |= _probed(ray, views, run_dir=run_dir.resolve())
        free = None if run_dir is None else disk_free_bytes(run_dir)
        return cls(nodes=tuple(views.values()), joined=True, disk_free_bytes=free)


def wants_gpus(config: RunConfig) -> bool:
    refresh = config.rm.refresh is not None and config.rm.refresh.gpus
    return bool(
        config.learner.gpus_per_rank or config.rollout.gpus_per_actor or config.reward.gpus_per_worker or refresh
    )


def cpus_needed(config: RunConfig) -> float:
    """What the online roles reserve."""
    return (
        config.learner.cpus
        + config.rollout.actors * config.rollout.cpus_per_actor
        + config.reward.workers * config.reward.cpus_per_worker
        + (0.0 if config.rm.refresh is None else config.rm.refresh.cpus)
    )


def disk_free_bytes(path: Path) -> int | None:
    """Free where `path` is or will be made."""
    for parent in (path.absolute(), *path.absolute().parents):
        if parent.is_dir():
            return shutil.disk_usage(parent).free
    return None


def _node_view(node: Mapping[str, Any]) -> NodeView:
    has: Mapping[str, float] = node["Resources"]
    types = [name.removeprefix("accelerator_type:") for name in has if name.startswith("accelerator_type:")]
    gib = ACCELERATOR_GIB.get(types[0]) if len(types) == 1 else None
    store = has.get("object_store_memory")
    memory = has.get("memory")
    return NodeView(
        name=node["NodeManagerAddress"],
        cpus=has.get("CPU", 0.0),
        gpus=has.get("GPU", 0.0),
        gpu_bytes=None if gib is None else gib * _GIB,
        memory_bytes=None if memory is None else int(memory + (store or 0)),
        object_store_bytes=None if store is None else int(store),
    )


def _probed(ray: Any, views: Mapping[str, NodeView], *, run_dir: Path) -> dict[str, NodeView]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    asked = {
        node_id: probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
            str(run_dir), gpus=view.gpus > 0
        )
        for node_id, view in views.items()
        if view.cpus > 0 or view.gpus > 0
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_PROBE_TIMEOUT_S)
    found = {}
    for node_id, answer in asked.items():
        try:
            facts = ray.get(answer, timeout=0)
        except ray.exceptions.RayError:
            ray.cancel(answer)
            continue  # A node that is leaving, or too busy to answer: what is not known is not checked.
        view = views[node_id]
        found[node_id] = replace(
            view,
            gpu_bytes=facts["gpu_bytes"] or view.gpu_bytes,
            memory_bytes=facts["memory_bytes"],
            shm_bytes=facts["shm_bytes"],
            has_run_dir=facts["has_run_dir"],
        )
    return found


def probe_node(run_dir: str, *, gpus: bool) -> dict[str, Any]:
    """What only a process on the node can see. Runs as a Ray task."""
    return {
        "has_run_dir": (Path(run_dir) / "config.yaml").is_file(),
        "gpu_bytes": min(_gpu_memory(), default=None) if gpus else None,
        "memory_bytes": _memory_limit(),
        "shm_bytes": _shm_bytes(),
    }


def _gpu_memory() -> list[int]:
    """Bytes of each GPU that a process started here would see; none without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=_SMI_TIMEOUT_S,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return visible_gpus(answer, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(listing: str, *, visible: str | None) -> list[int]:
    """Bytes of each GPU in nvidia-smi's `index, uuid, MiB` lines that CUDA_VISIBLE_DEVICES lets through."""
    rows = [[field.strip() for field in line.split(",")] for line in listing.splitlines() if line.count(",") == 2]
    chosen = None if visible is None else [name.strip() for name in visible.split(",")]
    return [
        int(mib) << 20
        for index, uuid, mib in rows
        if mib.isdigit() and (chosen is None or index in chosen or any(n and uuid.startswith(n) for n in chosen))
    ]


def _memory_limit() -> int:
    """Of this machine, or of the container that this process is in."""
    total = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def _shm_bytes() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
