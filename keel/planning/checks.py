"""What in a plan is impossible or tight, each with the settings that would mend it. Pure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from cluster.architecture import Architecture
from cluster.footprint import (
    GIB,
    MIB,
    EngineFootprint,
    Footprint,
    engine,
    learner_rank,
    offline_stage,
    payload_bytes,
    reward_worker,
)
from cluster.footprint_disk import disk_use
from cluster.footprint_refresh import refresh_trainer
from configs.run import LoraSection, RefreshSection, RunConfig
from keel.planning.placement import Assignment, NodeLoad, Process
from keel.planning.view import ClusterView

TIGHT: Final = 0.92
"""Share of a memory above which a plan is tight: the estimates are good to about a tenth, fragmentation included."""
_MOST_RANKS: Final = 1025
_RAY_REFUSES_SLOW_STORE_BYTES: Final = 10**10
"""Above this size Ray does not start where /dev/shm is too small; below, it uses the disk."""


_TRAINED_ELSEWHERE: Final = {
    "sft": "sft.epochs=0, with a model.path that has had its fine-tuning elsewhere",
    "rm": "rm.models=[DIRECTORY] of a reward model trained elsewhere",
}


@dataclass(frozen=True)
class Finding:
    """Something that does not fit, or just fits. `do`: settings that mend it."""

    severity: Literal["impossible", "tight"]
    area: str
    what: str
    do: str


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    """A copy with `section__key=value` settings; not validated, for what-if arithmetic only."""
    for path, value in settings.items():
        section, key = path.split("__")
        inner = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: inner})
    return config


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / MIB:.0f} MiB"


# ---------------------------------------------------------------- places


def place_findings(assignment: Assignment, *, config: RunConfig, cluster: ClusterView) -> Iterator[Finding]:
    """Processes without a place: GPUs and CPUs asked for and there."""
    for role in dict.fromkeys(process.role for process in assignment.left):
        missing = [process for process in assignment.left if process.role == role]
        yield Finding("impossible", role, _no_place(missing, cluster), _fewer(role, assignment, config, cluster))


def _no_place(missing: list[Process], cluster: ClusterView) -> str:
    one = missing[0]
    wants = f"{one.gpus:g} GPU and {one.cpus:g} CPU" if one.gpus else f"{one.cpus:g} CPU"
    biggest = max((node.gpus for node in cluster.nodes), default=0.0)
    there = f"{cluster.gpus:g} GPUs and {cluster.cpus:g} CPUs on {len(cluster.nodes)} node(s)"
    text = f"{len(missing)} process(es) of {wants} have no place; there are {there}"
    if one.gpus > biggest:
        text += f", at most {biggest:g} GPUs on one node"
    return text


def _fewer(role: str, assignment: Assignment, config: RunConfig, cluster: ClusterView) -> str:
    placed = assignment.count(role)
    key = {"rollout": "rollout.actors", "reward": "reward.workers", "learner": "learner.ranks"}.get(role)
    refresh = config.rm.refresh or RefreshSection()
    gpus_key, asked, cpus_key = {
        "rollout": ("rollout.gpus_per_actor", config.rollout.gpus_per_actor, "rollout.cpus_per_actor"),
        "reward": ("reward.gpus_per_worker", config.reward.gpus_per_worker, "reward.cpus_per_worker"),
        "refresh": ("rm.refresh.gpus", refresh.gpus, "rm.refresh.cpus"),
    }.get(role, ("learner.gpus_per_rank", config.learner.gpus_per_rank, "learner.cpus_per_rank"))
    if asked and not cluster.gpus:
        return f"{gpus_key}=0, or nodes with GPUs (ray.address names a cluster)"
    fixes = [f"{key}={placed}"] if key and placed else []
    if role == "rollout" and asked > 1 and asked > max(node.gpus for node in cluster.nodes):
        most = max(int(node.gpus) for node in cluster.nodes)
        fixes.append(f"rollout.tensor_parallel_size={most} rollout.gpus_per_actor={most}")
    fixes += [f"less {cpus_key}", "or add nodes"]
    return ", ".join(fixes)


# ---------------------------------------------------------------- memory of GPUs


def _over(needed: int, have: int | None) -> Literal["impossible", "tight"] | None:
    if have is None:
        return None
    return "impossible" if needed > have else "tight" if needed > TIGHT * have else None


def learner_findings(architecture: Architecture, config: RunConfig, *, cluster: ClusterView) -> Iterator[Finding]:
    needed = learner_rank(architecture, config).gpu_bytes
    have = cluster.gpu_bytes
    severity = _over(needed, have) if config.learner.on_gpu else None
    if severity is None or have is None:
        return
    what = f"a rank needs {gib(needed)} of GPU memory, there are {gib(have)}"
    yield Finding(severity, "learner", what, _learner_fixes(architecture, config, have, gpus=cluster.gpus))


def _learner_fixes(architecture: Architecture, config: RunConfig, have: int, *, gpus: float) -> str:
    """Every single change that is enough on the GPUs there are; failing that, several together; and how many more ranks
    would do."""

    def fits(**settings: Any) -> bool:
        return learner_rank(architecture, changed(config, **settings)).gpu_bytes <= limit

    learner, rollout, reward = config.learner, config.rollout, config.reward
    # What does not fit is helped by anything that fits; what is tight, by what is no longer tight.
    limit = have if learner_rank(architecture, config).gpu_bytes > have else TIGHT * have
    others = rollout.actors * rollout.gpus_per_actor + reward.workers * reward.gpus_per_worker
    enough, more_gpus = [], ""
    ranks = next((n for n in range(learner.ranks + 1, _MOST_RANKS) if fits(learner__ranks=n)), None)
    if ranks is not None and ranks + others <= gpus:
        enough.append(f"learner.ranks={ranks}")
    elif ranks is not None:
        more_gpus = f" or learner.ranks={ranks} ({ranks + others:g} GPUs in all)"
    budget = _largest(
        config.max_sequence_tokens, learner.token_budget, fits=lambda tokens: fits(learner__token_budget=tokens)
    )
    if budget is not None:
        enough.append(f"learner.token_budget={budget}")
    options = list(_learner_options(config))
    enough += [text for text, settings in options if fits(**settings)]
    if enough:
        return " or ".join(enough) + more_gpus
    together: dict[str, Any] = {"learner__token_budget": config.max_sequence_tokens}
    names = [f"learner.token_budget={config.max_sequence_tokens}"]
    for text, settings in options:
        together |= settings
        names.append(text)
        if fits(**together):
            return "together " + " ".join(names) + more_gpus
    return "a smaller model, or GPUs with more memory" + more_gpus


def _learner_options(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """What can be switched to need less memory: as the user sets it, and for `changed`; what costs least first."""
    learner = config.learner
    if not learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing=true", {"learner__gradient_checkpointing": True}
    if learner.dtype == "float32":
        yield "learner.dtype=bfloat16", {"learner__dtype": "bfloat16"}
    if not learner.optimizer_offload:
        yield "learner.optimizer_offload=true", {"learner__optimizer_offload": True}
    if learner.lora is None:
        yield "learner.lora={rank: 16}", {"learner__lora": LoraSection()}
    if learner.advantages == "gae":
        text = "learner.advantages=group_relative learner.samples_per_prompt=8 (no critic)"
        yield text, {"learner__advantages": "group_relative"}


def _largest(low: int, high: int, *, fits: Callable[[int], bool]) -> int | None:
    """The largest of high/2, high/4, … that fits, not under `low`."""
    value = high // 2
    while value >= low:
        if fits(value):
            return value
        value //= 2
    return None


def engine_findings(architecture: Architecture, config: RunConfig, *, cluster: ClusterView) -> Iterator[Finding]:
    rollout = config.rollout
    if rollout.engine == "scripted":
        return
    size = rollout.tensor_parallel_size
    if not _divides(architecture, size):
        able = [n for n in (1, 2, 4, 8, 16) if _divides(architecture, n)]
        yield Finding(
            "impossible", "rollout",
            f"tensor_parallel_size {size} does not divide {architecture.heads} attention heads, "
            f"{architecture.kv_heads} key-value heads and {architecture.inner} inner features",
            f"rollout.tensor_parallel_size={max(n for n in able if n <= max(size, 1))} (possible: {able})",
        )  # fmt: skip
        return
    have = cluster.gpu_bytes if rollout.gpus_per_actor else None
    if rollout.gpus_per_actor and have is None:
        return
    made = engine(architecture, config, gpu_bytes=have)
    if made.sequences < 1:
        yield Finding(
            "impossible", "rollout", _cache_text(made, config, have), _engine_fixes(architecture, config, have)
        )
    elif made.sequences < min(rollout.max_concurrent_requests, 4):
        yield Finding(
            "tight", "rollout", f"the KV cache holds only {made.sequences} sequences of the greatest length at once",
            _engine_fixes(architecture, config, have),
        )  # fmt: skip


def _divides(architecture: Architecture, size: int) -> bool:
    """vLLM splits heads and the feed-forward block evenly; key-value heads are split, or copied if fewer."""
    kv = architecture.kv_heads
    return architecture.heads % size == 0 and (kv % size == 0 or size % kv == 0) and architecture.inner % size == 0


def _cache_text(made: EngineFootprint, config: RunConfig, have: int | None) -> str:
    longest = made.kv_bytes_per_token * config.max_sequence_tokens
    if have is None:
        return f"one sequence needs {gib(longest)} of KV cache, rollout.kv_cache_gib is {config.rollout.kv_cache_gib:g}"
    rest = sum(size for part, size in made.footprint.gpu.items() if part != "KV cache")
    return (
        f"of a GPU's {gib(have)}, {config.rollout.gpu_memory_utilization:g} are the engine's; "
        f"weights and work take {gib(rest)}, one sequence of KV cache {gib(longest)}"
    )


def _engine_fixes(architecture: Architecture, config: RunConfig, have: int | None) -> str:
    rollout = config.rollout
    if have is None:
        per_sequence = engine(architecture, config, gpu_bytes=None).kv_bytes_per_token * config.max_sequence_tokens
        return f"rollout.kv_cache_gib={-(-4 * per_sequence * 1000 // GIB) / 1000:g} (four sequences)"
    fixes = []
    for size in (2, 4, 8, 16):
        if size <= rollout.tensor_parallel_size or not _divides(architecture, size):
            continue
        other = changed(config, rollout__tensor_parallel_size=size, rollout__gpus_per_actor=float(size))
        if engine(architecture, other, gpu_bytes=have).sequences >= 4:
            fixes.append(f"rollout.tensor_parallel_size={size} rollout.gpus_per_actor={size}")
            break
    if rollout.dtype == "float32":
        fixes.append("rollout.dtype=bfloat16")
    if rollout.gpu_memory_utilization < 0.9:
        fixes.append("rollout.gpu_memory_utilization=0.9")
    return " or ".join(fixes) or "shorter sequences, or GPUs with more memory"


def reward_findings(architecture: Architecture, config: RunConfig, *, cluster: ClusterView) -> Iterator[Finding]:
    have = cluster.gpu_bytes
    needed = reward_worker(architecture, config).gpu_bytes
    severity = _over(needed, have) if config.reward.gpus_per_worker else None
    if severity is None or have is None:
        return

    def fits(**settings: Any) -> bool:
        return reward_worker(architecture, changed(config, **settings)).gpu_bytes <= TIGHT * have

    fixes = []
    budget = _largest(
        config.max_sequence_tokens, config.reward.token_budget, fits=lambda tokens: fits(reward__token_budget=tokens)
    )
    if budget is not None:
        fixes.append(f"reward.token_budget={budget}")
    if config.reward.dtype == "float32" and fits(reward__dtype="bfloat16"):
        fixes.append("reward.dtype=bfloat16")
    members = config.rm.ensemble
    if members > 1:
        fixes.append("one of rm.models" if config.rm.models else "rm.members=1")
    models = f"{members} reward model(s) and the reference in {config.reward.dtype}"
    what = f"{models} need {gib(needed)}, a GPU has {gib(have)}"
    yield Finding(severity, "reward", what, " or ".join(fixes) or "a smaller model, or GPUs with more memory")


def refresh_findings(architecture: Architecture, config: RunConfig, *, cluster: ClusterView) -> Iterator[Finding]:
    """The process that refreshes reward models, on one GPU."""
    have = cluster.gpu_bytes
    if config.rm.refresh is not None and config.rm.refresh.gpus and not config.learner.on_gpu:
        what = "its GPU stays idle: reward models are trained on a GPU only where the learner is on one"
        yield Finding("tight", "refresh", what, "rm.refresh.gpus=0")
    needed = refresh_trainer(architecture, config).gpu_bytes
    severity = _over(needed, have)
    if severity is None or have is None:
        return

    def fits(batch_size: int) -> bool:
        return refresh_trainer(architecture, changed(config, rm__batch_size=batch_size)).gpu_bytes <= TIGHT * have

    size = _largest(1, config.rm.batch_size, fits=fits)
    what = f"training a reward model, or measuring two versions, needs {gib(needed)}, its GPU has {gib(have)}"
    yield Finding(severity, "refresh", what, f"rm.batch_size={size}" if size else "rm.refresh.gpus=0")


def stage_findings(architecture: Architecture, config: RunConfig, *, cluster: ClusterView) -> Iterator[Finding]:
    """The offline stages, one process on one GPU each."""
    have = cluster.gpu_bytes
    if have is None or not config.learner.on_gpu:
        return
    stages: tuple[Literal["sft", "rm"], ...] = ("sft", "rm")
    for stage in stages:
        needed = offline_stage(architecture, config, stage=stage).gpu_bytes
        severity = _over(needed, have)
        if stage not in config.stages or severity is None:
            continue
        if stage == "rm" and config.rm.models:
            what = f"measuring a reward model in {config.reward.dtype} needs {gib(needed)}, its one GPU has {gib(have)}"
            fix = "reward.dtype=bfloat16" if config.reward.dtype == "float32" else "a smaller reward model"
            yield Finding(severity, stage, what, fix)
            continue
        batch_size = config.sft.batch_size if stage == "sft" else config.rm.batch_size
        size = _largest(1, batch_size, fits=functools.partial(_stage_fits, architecture, config, stage, have))
        what = f"one process with float32 AdamW needs {gib(needed)} for the longest batch, its one GPU has {gib(have)}"
        yield Finding(severity, stage, what, f"{stage}.batch_size={size}" if size else _TRAINED_ELSEWHERE[stage])


def _stage_fits(
    architecture: Architecture, config: RunConfig, stage: Literal["sft", "rm"], have: int, batch_size: int
) -> bool:
    smaller = changed(config, **{f"{stage}__batch_size": batch_size})
    return offline_stage(architecture, smaller, stage=stage).gpu_bytes <= TIGHT * have


# ---------------------------------------------------------------- memory of hosts, disk


def sharing_findings(assignment: Assignment, *, config: RunConfig) -> Iterator[Finding]:
    """Roles with shares of one GPU: Ray does not watch its memory."""
    if config.placement.colocate:
        return
    for node in assignment.nodes:
        have = node.view.gpu_bytes
        shared = any(share % 1 > 0 for share in _shares(config))
        if have is not None and shared and node.gpu_bytes > have:
            yield Finding(
                "impossible", "GPU shares",
                f"processes that share a GPU of {node.view.name} need {gib(node.gpu_bytes)} of its {gib(have)}",
                "larger gpus_per_rank, gpus_per_actor or gpus_per_worker, or rollout.gpu_memory_utilization lower",
            )  # fmt: skip


def _shares(config: RunConfig) -> Iterable[float]:
    refresh = 0.0 if config.rm.refresh is None else config.rm.refresh.gpus
    return config.learner.gpus_per_rank, config.rollout.gpus_per_actor, config.reward.gpus_per_worker, refresh


def colocation_findings(architecture: Architecture, config: RunConfig, *, cluster: ClusterView) -> Iterator[Finding]:
    """Learner and engine in turns: the learner's weights and moments stay while the engine has its share."""
    have = cluster.gpu_bytes
    if not config.placement.colocate or have is None:
        return
    resting = sum(learner_rank(architecture, config).gpu.get(part, 0) for part in ("weights", "optimiser", "base"))
    share = int(config.rollout.gpu_memory_utilization * have)
    if resting + share > have:
        most = max(0.0, (have - resting) / have)
        yield Finding(
            "impossible", "colocation",
            f"the learner keeps {gib(resting)} while the engine has {gib(share)}; the GPU has {gib(have)}",
            f"rollout.gpu_memory_utilization={int(most * 100) / 100:g}"
            if most > 0.05 else "learner.lora={rank: 16}, or a GPU for each",
        )  # fmt: skip


def host_findings(assignment: Assignment, *, offline: Iterable[tuple[str, Footprint]]) -> Iterator[Finding]:
    """Host memory of each node: its processes and its object store; then each offline stage alone."""
    for node in assignment.nodes:
        have, store = node.view.memory_bytes, node.view.object_store_bytes or 0
        if have is None:
            continue
        severity = _over(node.host_bytes + store, have)
        if severity is not None:
            what = (
                f"processes on {node.view.name} need {gib(node.host_bytes)} and the object store {gib(store)} of "
                f"{gib(have)} host memory"
            )
            yield Finding(severity, "host memory", what, "fewer processes a node, smaller token budgets, or more nodes")
    largest = max((node.view.memory_bytes or 0 for node in assignment.nodes), default=0)
    for stage, footprint in offline:
        severity = _over(footprint.host_bytes, largest) if largest else None
        if severity is not None:
            what = f"its process needs {gib(footprint.host_bytes)} of host memory, a node has {gib(largest)}"
            fix = f"lower {stage}.batch_size where it trains, or a node with more memory"
            yield Finding(severity, stage, what, fix)


def _versions_stored(node: NodeLoad) -> tuple[int, int]:
    """(At least, with ease) how many policy versions a node's object store must hold. On the driver's node the board
    has the newest and, while readers hold it, the one before; during an update also what the learner sent. Elsewhere
    lies what the learner sends, or what an engine reads and, for a while, the one after."""
    if node.view.driver:
        return 2, 3
    return (1, 2) if {"learner", "rollout"} & set(node.roles) else (0, 0)


def store_findings(
    architecture: Architecture, config: RunConfig, *, assignment: Assignment, cluster: ClusterView
) -> Iterator[Finding]:
    """The object stores against the versions that lie in them, and against the memory that they lie in."""
    payload = payload_bytes(architecture, config)
    short = []
    for load in assignment.nodes:
        least, easy = _versions_stored(load)
        have = load.view.object_store_bytes
        if have and have < easy * payload:
            short.append((have >= least * payload, have, load.view.name, easy))
    if short:
        enough, have, name, easy = min(short)
        mib = -(-easy * payload // MIB) * 11 // 10
        there = f"ray start --object-store-memory={mib * MIB} on that node"
        where = there if cluster.joined else f"ray.object_store_mib={mib}"
        adapter = "" if config.learner.lora is None else " or learner.lora.broadcast=adapter"
        versions = f"policy versions of {gib(payload)} ({config.rollout.dtype})"
        what = f"{gib(have)} on {name} for {versions}: up to {easy} lie there during an update"
        yield Finding("tight" if enough else "impossible", "object store", what, where + adapter)
    for node in cluster.nodes:
        store, shm = node.object_store_bytes, node.shm_bytes
        if store and shm is not None and shm < store and not cluster.joined:  # a store that runs has its room
            refused = store > _RAY_REFUSES_SLOW_STORE_BYTES
            yield Finding(
                "impossible" if refused else "tight", "object store",
                f"/dev/shm of {node.name} has {gib(shm)} free, the object store is {gib(store)}",
                f"ray.object_store_mib={shm // MIB * 9 // 10}, or a larger /dev/shm (docker run --shm-size)",
            )  # fmt: skip


def directory_findings(config: RunConfig, *, cluster: ClusterView) -> Iterator[Finding]:
    blind = [node.name for node in cluster.nodes if node.has_run_dir is False]
    if blind:
        yield Finding(
            "impossible", "run directory", f"{config.run_dir.absolute()} is not there on {', '.join(blind)}",
            "runs_dir=A_PATH on storage that every node mounts",
        )  # fmt: skip


def disk_findings(
    architecture: Architecture, config: RunConfig, *, cluster: ClusterView, used: int
) -> Iterator[Finding]:
    """`used`: what the run directory holds already, and so need not find room for."""
    free = cluster.disk_free_bytes
    peak = disk_use(architecture, config).peak
    if free is not None and peak > free + used:
        yield Finding(
            "impossible", "disk", f"models and checkpoints take up to {gib(peak)}, {gib(free)} are free",
            "checkpoint.keep_last lower, or runs_dir=A_PATH on a larger disk",
        )  # fmt: skip
