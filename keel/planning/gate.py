"""The plan as a gate before a run: what cannot fit ends with the table, within seconds, before anything is started.

Consumes: the configuration, and what a cluster says of itself. Waits: for a cluster to grow, placement.wait_s at most.
Who unblocks it: nodes that join, a stop request, or the deadline.
"""

from __future__ import annotations

from pathlib import Path

from configs.run import RunConfig
from keel.planning.plan import request_from_ray, require_placeable, wait_until_placeable
from keel.planning.view import ClusterView
from keel.rundir import RunDirectory
from keel.runtime import Runtime


def check_this_machine(config: RunConfig, *, resume: bool) -> None:
    """For a local Ray. Call before the run directory is made, so that a refused run leaves none. Raises ConfigError."""
    if config.ray.address is not None:
        return
    ahead = _ahead(config, resume=resume)
    used = _tree_bytes(config.run_dir) if resume else 0
    require_placeable(ahead, cluster=ClusterView.of_this_machine(ahead), used_bytes=used)


def check_cluster(runtime: Runtime) -> None:
    """For a cluster: joins it and looks at its nodes, also from within. Raises ConfigError."""
    config = runtime.config
    if config.ray.address is None:
        return
    ahead = _ahead(config, resume=True)
    if set(ahead.stages) <= {"report"}:
        return
    waiting = False

    def tick() -> None:
        nonlocal waiting
        if not waiting:
            waiting = True
            runtime.run.emit(
                stage=ahead.stages[0], event="progress",
                note=f"waiting up to {config.placement.wait_s:g} s for the cluster to have what the plan asks for",
            )  # fmt: skip
        runtime.tick()

    wait_until_placeable(
        ahead,
        view=lambda: ClusterView.from_ray(runtime.ray, run_dir=runtime.run.path),
        request=request_from_ray,
        tick=tick,
    )


def _ahead(config: RunConfig, *, resume: bool) -> RunConfig:
    """With the stages alone that are still to run."""
    if not resume:
        return config
    run = RunDirectory(config.run_dir)
    return config.model_copy(update={"stages": tuple(stage for stage in config.stages if not run.done(stage))})


def _tree_bytes(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue  # Gone meanwhile.
    return total
