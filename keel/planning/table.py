"""A plan as tables for a terminal or an error message, and as plain data."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.footprint import GIB, PARTS, Footprint, learner_tokens
from cluster.footprint_disk import kept_checkpoints
from keel.planning.checks import gib
from keel.planning.plan import DEVICE_BYTES_PER_S, MEMORY_BYTES_PER_S, Plan, RolePlan

_WIDTH: Final = 118


def plan_text(plan: Plan) -> str:
    """Without colours, for an error message."""
    out = io.StringIO()
    Console(file=out, width=_WIDTH, color_system=None, highlight=False).print(render(plan))
    return out.getvalue().rstrip()


def print_plan(plan: Plan) -> None:
    """To the terminal; at a fixed width where the output is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(render(plan))


def render(plan: Plan) -> RenderableType:
    fits = not plan.impossible
    verdict = Text("fits" if fits else "does not fit", style="bold green" if fits else "bold red")
    memory = (_memory_table(plan),) if plan.architecture is not None else ()
    return Group(_roles_table(plan), *memory, *_facts(plan), *_findings(plan), verdict)


def plan_data(plan: Plan) -> dict[str, Any]:
    """JSON-able."""
    return {
        "fits": not plan.impossible,
        "cluster": asdict(plan.cluster),
        "parameters": None if plan.architecture is None else {
            "policy": plan.architecture.policy_parameters,
            "scorer": plan.architecture.scorer_parameters,
            "exact": plan.architecture.exact,
        },
        "roles": [_role_data(role) for role in plan.roles],
        "kv_cache": None if plan.engine is None else {
            "bytes": plan.engine.kv_bytes,
            "bytes_per_token": plan.engine.kv_bytes_per_token,
            "sequences": plan.engine.sequences,
        },
        "sync": None if plan.sync is None else asdict(plan.sync),
        "disk": None if plan.disk is None else asdict(plan.disk),
        "findings": [asdict(finding) for finding in plan.findings],
    }  # fmt: skip


def _role_data(role: RolePlan) -> dict[str, Any]:
    return {
        "name": role.name, "processes": role.processes, "nodes": role.nodes, "cpus": role.cpus, "gpus": role.gpus,
        "online": role.online, "host_bytes": dict(role.footprint.host), "gpu_bytes": dict(role.footprint.gpu),
    }  # fmt: skip


def _roles_table(plan: Plan) -> Table:
    cluster = plan.cluster
    there = f"{len(cluster.nodes)} node(s), {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs"
    if cluster.gpu_bytes is not None:
        there += f" of {gib(cluster.gpu_bytes)}"
    memory = [node.memory_bytes for node in cluster.nodes if node.memory_bytes is not None]
    if memory:
        there += f", {gib(sum(memory))} host memory"
    table = Table(title=f"{plan.config.name} on {'the cluster' if cluster.joined else 'this machine'}: {there}",
                  title_justify="left")  # fmt: skip
    for heading in ("role", "processes", "on nodes", "CPUs each", "GPUs each", "host each", "GPU each", "runs"):
        table.add_column(heading, justify="left" if heading in ("role", "runs") else "right")
    for role in plan.roles:
        gpu = gib(role.footprint.gpu_bytes) if role.footprint.gpu else "–"
        table.add_row(
            role.name, str(role.processes), str(role.nodes), f"{role.cpus:g}", f"{role.gpus:g}",
            gib(role.footprint.host_bytes), gpu, "together" if role.online else "alone",
        )  # fmt: skip
    online = [role for role in plan.roles if role.online]
    if online:
        table.add_section()
        table.add_row(
            "online, in all", str(sum(role.processes for role in online)), "",
            f"{sum(role.processes * role.cpus for role in online):g}",
            f"{sum(role.processes * role.gpus for role in online):g}",
            gib(sum(node.host_bytes for node in plan.assignment.nodes)), "", "",
        )  # fmt: skip
    return table


def _memory_table(plan: Plan) -> Table:
    rows: list[tuple[str, Mapping[str, int]]] = []
    for role in plan.roles:
        rows += [(f"{role.name}: {where}", parts) for where, parts in _places(role.footprint) if parts]
    used = [part for part in PARTS if any(parts.get(part) for _, parts in rows)]
    table = Table(title="memory at the peak, of one process, in GiB (M: MiB)", title_justify="left")
    table.add_column("")
    for part in (*used, "sum"):
        table.add_column(part, justify="right")
    for name, parts in rows:
        table.add_row(name, *(_cell(parts.get(part, 0)) for part in used), _cell(sum(parts.values())))
    return table


def _places(footprint: Footprint) -> tuple[tuple[str, Mapping[str, int]], ...]:
    return ("GPU", footprint.gpu), ("host", footprint.host)


def _cell(size: int) -> str:
    """In GiB, in MiB where that would be 0.0."""
    if not size:
        return "–"
    return f"{size / GIB:.1f}" if size >= GIB / 20 else f"{max(1, size >> 20)}M"


def _facts(plan: Plan) -> list[Text]:
    lines: list[str] = []
    config = plan.config
    if plan.architecture is not None:
        policy, scorer = plan.architecture.policy_parameters, plan.architecture.scorer_parameters
        about = "" if plan.architecture.exact else "about "
        lines.append(f"policy: {about}{policy:,} parameters; reward model: {about}{scorer:,}")
    if plan.learner_activation_bytes is not None:
        without, checkpointed = plan.learner_activation_bytes
        state = "on" if config.learner.gradient_checkpointing else "off"
        lines.append(
            f"learner activations, {learner_tokens(config):,} tokens in a pass: {gib(without)}, with gradient "
            f"checkpointing {gib(checkpointed)} (it is {state})"
        )
    if plan.engine is not None and plan.engine.kv_bytes_per_token:
        lines.append(
            f"KV cache of an engine: {gib(max(0, plan.engine.kv_bytes))}, {plan.engine.kv_bytes_per_token:,} B/token, "
            f"{plan.engine.sequences} sequences of {config.max_sequence_tokens} tokens at once "
            f"(rollout.max_concurrent_requests {config.rollout.max_concurrent_requests})"
        )
    if plan.sync is not None and any(role.name == "learner" for role in plan.roles):
        sync = plan.sync
        lines.append(
            f"weight update: {gib(sync.bytes_per_engine)} ({sync.content}, {config.rollout.dtype}) to each of "
            f"{sync.engines} engines by {sync.transport}: about {sync.seconds:.2g} s, at {MEMORY_BYTES_PER_S / 1e9:g} "
            f"GB/s in host memory, {DEVICE_BYTES_PER_S / 1e9:g} GB/s between GPUs and the given network"
        )
    disk = plan.disk
    if disk is not None:
        free = plan.cluster.disk_free_bytes
        lines.append(
            f"disk: {gib(disk.checkpoint)} a checkpoint, {kept_checkpoints(config)} kept; with all models at most "
            f"{gib(disk.peak)}" + ("" if free is None else f"; {gib(free)} free")
        )
    return [Text(line) for line in lines]


def _findings(plan: Plan) -> list[Text]:
    styles = {"impossible": "red", "tight": "yellow"}
    return [
        Text(f"{one.severity}: {one.area}: {one.what}\n    set: {one.do}", style=styles[one.severity])
        for one in plan.findings
    ]
