"""What a run would put where, what it costs, and what of it is impossible. Starts nothing.

`keel plan` prints it; `train` refuses an impossible one before anything runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final, Literal

from cluster.architecture import Architecture, architecture_of
from cluster.errors import ConfigError, ModelError
from cluster.footprint import (
    EngineFootprint,
    Footprint,
    activation_bytes,
    engine,
    learner_precision,
    learner_rank,
    learner_tokens,
    offline_stage,
    payload_bytes,
    reward_worker,
)
from cluster.footprint_disk import DiskUse, disk_use
from cluster.footprint_refresh import refresh_trainer, refreshes
from configs.run import RunConfig
from keel.planning import checks as plan_checks
from keel.planning.checks import Finding
from keel.planning.placement import Assignment, Process, assign
from keel.planning.view import ClusterView

NETWORK_GBIT_PER_S: Final = 25.0
MEMORY_BYTES_PER_S: Final = 2e9
"""Assumed for a copy through the object store within a node, packing included."""
DEVICE_BYTES_PER_S: Final = 20e9
"""Assumed for a broadcast between GPUs of a node."""
_POLL_S: Final = 1.0


@dataclass(frozen=True)
class RolePlan:
    """One kind of process. `online`: runs together with the other online roles; the rest run alone, before or after."""

    name: str
    processes: int
    cpus: float
    gpus: float
    """Of one process."""
    footprint: Footprint
    online: bool
    nodes: int = 0
    """It would be on so many."""
    rest: Footprint | None = None
    """Of all but the first process, where that one holds more."""


@dataclass(frozen=True)
class SyncPlan:
    """One weight update. seconds: of the slowest engine, at the bandwidths named in the text."""

    transport: str
    content: str
    bytes_per_engine: int
    engines: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything that `keel plan` shows. architecture is None where the model could not be read."""

    config: RunConfig
    cluster: ClusterView
    architecture: Architecture | None
    roles: tuple[RolePlan, ...]
    engine: EngineFootprint | None
    sync: SyncPlan | None
    disk: DiskUse | None
    learner_activation_bytes: tuple[int, int] | None
    """For one forward pass of a rank: without and with gradient checkpointing."""
    assignment: Assignment
    findings: tuple[Finding, ...]

    @property
    def impossible(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "impossible")


def make_plan(
    config: RunConfig, *, cluster: ClusterView, network_gbit_per_s: float = NETWORK_GBIT_PER_S, used_bytes: int = 0
) -> Plan:
    """`used_bytes`: of the run directory, when it is there already. A model that cannot be read is a finding."""
    try:
        architecture: Architecture | None = architecture_of(config.model)
        unread: list[Finding] = []
    except ModelError as error:
        architecture, unread = None, [Finding("impossible", "model", f"{error.what}: {error.got}", error.do)]
    roles = tuple(_roles(architecture, config, cluster))
    online = [
        Process(role.name, role.cpus, role.gpus, held.host_bytes, held.gpu_bytes)
        for role in roles
        if role.online
        for held in (role.footprint, *[role.rest or role.footprint] * (role.processes - 1))
    ]
    assignment = assign(online, cluster=cluster)
    findings = chain(
        unread,
        plan_checks.place_findings(assignment, config=config, cluster=cluster),
        plan_checks.directory_findings(config, cluster=cluster),
        _stage_place_findings(roles, cluster),
        () if architecture is None else _size_findings(architecture, config, cluster, roles, assignment, used_bytes),
    )
    placed = tuple(replace(role, nodes=assignment.nodes_of(role.name) if role.online else 1) for role in roles)
    return Plan(
        config=config,
        cluster=cluster,
        architecture=architecture,
        roles=placed,
        engine=None if architecture is None else engine(architecture, config, gpu_bytes=_engine_gpu(config, cluster)),
        sync=None if architecture is None else _sync(architecture, config, assignment, network_gbit_per_s),
        disk=None if architecture is None else disk_use(architecture, config),
        learner_activation_bytes=None if architecture is None else _activations(architecture, config),
        assignment=assignment,
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
    )


def impossible_anywhere(config: RunConfig) -> tuple[Finding, ...]:
    """What no cluster can run: of an engine, as far as settings and a model that can be read from here tell."""
    try:
        architecture = architecture_of(config.model)
    except ModelError:
        return ()
    nowhere = ClusterView(nodes=())
    if all(role.name != "rollout" for role in _roles(architecture, config, nowhere)):
        return ()
    findings = plan_checks.engine_findings(architecture, config, cluster=nowhere)
    return tuple(finding for finding in findings if finding.severity == "impossible")


def unplaceable(config: RunConfig, *, cluster: ClusterView, used_bytes: int = 0) -> str | None:
    """Why the configured stages cannot run there, with the whole table; None when they can. A model that cannot be read
    is left to the stage that reads it, whose error says more."""
    from keel.planning.table import plan_text

    plan = make_plan(config, cluster=cluster, used_bytes=used_bytes)
    if all(finding.area == "model" for finding in plan.impossible):
        return None
    return plan_text(plan)


def require_placeable(config: RunConfig, *, cluster: ClusterView, used_bytes: int = 0) -> None:
    """Raises ConfigError that carries the table."""
    text = unplaceable(config, cluster=cluster, used_bytes=used_bytes)
    if text is not None:
        raise _refusal(text)


def wait_until_placeable(
    config: RunConfig,
    *,
    view: Callable[[], ClusterView],
    request: Callable[[list[dict[str, float]]], None],
    tick: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Look at a cluster until everything fits, for placement.wait_s at most; then raise ConfigError with the table.

    request: asks an autoscaling cluster for room for these bundles; called once, when the first look says no, and with
    an empty list in the end. tick: one turn of the driver's waiting loop.
    """
    cluster = view()
    text = unplaceable(config, cluster=cluster)
    if text is None:
        return
    request(_bundles(config, cluster))
    deadline = clock() + config.placement.wait_s
    try:
        while clock() < deadline:
            tick()
            sleep(_POLL_S)
            text = unplaceable(config, cluster=view())
            if text is None:
                return
    finally:
        request([])
    raise _refusal(text or "", waited_s=config.placement.wait_s)


def request_from_ray(bundles: list[dict[str, float]]) -> None:
    """Ask Ray's autoscaler, where there is one, for room; an empty list withdraws the wish."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def _bundles(config: RunConfig, cluster: ClusterView) -> list[dict[str, float]]:
    plan = make_plan(config, cluster=cluster)
    return [
        {name: amount for name, amount in (("CPU", role.cpus), ("GPU", role.gpus)) if amount}
        for role in plan.roles
        for _ in range(role.processes)
        if role.online
    ]


def _refusal(text: str, *, waited_s: float | None = None) -> ConfigError:
    waited = "" if waited_s is None else f", also after {waited_s:g} s (placement.wait_s)"
    return ConfigError(
        f"the run does not fit what there is{waited}",
        got="\n" + text,
        do="set what the last lines of the table name; `keel plan CONFIG` shows the table again and starts nothing",
    )


# ---------------------------------------------------------------- parts of a plan


def _engine_gpu(config: RunConfig, cluster: ClusterView) -> int | None:
    return cluster.gpu_bytes if config.rollout.gpus_per_actor else None


def _roles(architecture: Architecture | None, config: RunConfig, cluster: ClusterView) -> Iterator[RolePlan]:
    """Of the configured stages. Without an architecture, sizes are 0."""
    nothing = Footprint(host={})
    stages, learner, rollout, reward = config.stages, config.learner, config.rollout, config.reward
    offline: tuple[Literal["sft", "rm"], ...] = ("sft", "rm")
    for stage in offline:
        if stage in stages:
            size = nothing if architecture is None else offline_stage(architecture, config, stage=stage)
            copies = stage == "sft" and config.sft.epochs == 0
            yield RolePlan(stage, 1, 1.0, 0.0 if copies else learner.gpus_per_rank, size, online=False)
    if "ppo" in stages:
        size = nothing if architecture is None else learner_rank(architecture, config)
        rest = nothing if architecture is None else learner_rank(architecture, config, first=False)
        yield RolePlan(
            "learner", learner.ranks, learner.cpus_per_rank, learner.gpus_per_rank, size, online=True, rest=rest
        )
    collects = "collect" in stages and config.data.preferences is None
    if collects or "ppo" in stages or "evaluate" in stages:
        made = None if architecture is None else engine(architecture, config, gpu_bytes=_engine_gpu(config, cluster))
        size = nothing if made is None else made.footprint
        yield RolePlan("rollout", rollout.actors, rollout.cpus_per_actor, rollout.gpus_per_actor, size, online=True)
    if "ppo" in stages or "evaluate" in stages:
        size = nothing if architecture is None else reward_worker(architecture, config)
        yield RolePlan("reward", reward.workers, reward.cpus_per_worker, reward.gpus_per_worker, size, online=True)
    refresh = config.rm.refresh
    if "ppo" in stages and refresh is not None and refreshes(config):
        size = nothing if architecture is None else refresh_trainer(architecture, config)
        yield RolePlan("refresh", 1, refresh.cpus, refresh.gpus, size, online=True)


def _stage_place_findings(roles: tuple[RolePlan, ...], cluster: ClusterView) -> Iterator[Finding]:
    for role in roles:
        if not role.online and role.gpus > cluster.gpus:
            what = f"one process of {role.gpus:g} GPU has no place; there are {cluster.gpus:g} GPUs"
            yield Finding("impossible", role.name, what, "learner.gpus_per_rank=0, or nodes with GPUs")


def _size_findings(
    architecture: Architecture,
    config: RunConfig,
    cluster: ClusterView,
    roles: tuple[RolePlan, ...],
    assignment: Assignment,
    used_bytes: int,
) -> Iterator[Finding]:
    names = {role.name for role in roles}
    if not architecture.exact:
        what = f"a model of type {architecture.family} is counted as a Llama of its sizes"
        yield Finding("tight", "model", what, "leave some room")
    if cluster.gpus and cluster.gpu_bytes is None and any(role.gpus for role in roles):
        what = "how much memory the GPUs have is not known from here, so it was not checked"
        yield Finding("tight", "GPU memory", what, "`train` measures it on the nodes")
    by_role = {
        "learner": plan_checks.learner_findings,
        "rollout": plan_checks.engine_findings,
        "reward": plan_checks.reward_findings,
        "refresh": plan_checks.refresh_findings,
    }
    for name, check in by_role.items():
        if name in names:
            yield from check(architecture, config, cluster=cluster)
    yield from plan_checks.stage_findings(architecture, config, cluster=cluster)
    offline = [(role.name, role.footprint) for role in roles if not role.online]
    yield from plan_checks.host_findings(assignment, offline=offline)
    if "learner" in names:
        yield from plan_checks.sharing_findings(assignment, config=config)
        yield from plan_checks.colocation_findings(architecture, config, cluster=cluster)
        yield from plan_checks.store_findings(architecture, config, assignment=assignment, cluster=cluster)
        yield from plan_checks.disk_findings(architecture, config, cluster=cluster, used=used_bytes)


def _activations(architecture: Architecture, config: RunConfig) -> tuple[int, int]:
    tokens, precision = learner_tokens(config), learner_precision(config)
    plain, checkpointed = (
        activation_bytes(architecture, tokens=tokens, precision=precision, checkpointing=on) for on in (False, True)
    )
    return plain, checkpointed


def _sync(architecture: Architecture, config: RunConfig, assignment: Assignment, network_gbit_per_s: float) -> SyncPlan:
    """Within a node through memory or between devices; to other nodes over the network as well, one after another."""
    learner, rollout = config.learner, config.rollout
    adapter = learner.lora is not None and learner.lora.broadcast == "adapter"
    own_gpus = learner.gpus_per_rank >= 1 and rollout.gpus_per_actor >= 1
    transport = config.weights.transport
    if transport == "auto":
        transport = "collective" if own_gpus and not adapter else "object_store"
    size = payload_bytes(architecture, config)
    home = next((node.view.name for node in assignment.nodes if "learner" in node.roles), None)
    away = sum("rollout" in node.roles and node.view.name != home for node in assignment.nodes)
    network_s = size / (network_gbit_per_s * 1e9 / 8)
    if transport == "collective":
        rate = DEVICE_BYTES_PER_S if own_gpus else MEMORY_BYTES_PER_S
        seconds = max(size / rate, network_s if away else 0.0)
    else:
        seconds = 2 * size / MEMORY_BYTES_PER_S + away * network_s
    content = "adapter" if adapter else "merged weights" if learner.lora is not None else "weights"
    name = "CUDA IPC" if config.placement.colocate else transport
    return SyncPlan(name, content, size, engines=rollout.actors, seconds=seconds)
