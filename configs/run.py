"""What a user may set, as frozen pydantic models. Units are in the names; `keel train --help` and the YAML presets
beside this file show them in use. No torch and no ray here: a configuration loads in milliseconds, anywhere.

The learner's sections are in configs/learner.py. Loading, `--set` and the checks across sections: configs/load.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from configs.guard import GuardSection, Thresholds, WatchSection
from configs.learner import (
    AdaptiveKl,
    ConstrainedKl,
    FixedKl,
    KlBudget,
    KlSection,
    LearnerSection,
    LoraSection,
    OptimizerSection,
)
from configs.reward import (
    CollectSection,
    FunctionReward,
    HttpReward,
    ModelReward,
    RefreshSection,
    ReviewSection,
    RewardSection,
    RewardSource,
    RmSection,
)
from configs.section import Fraction, Section

__all__ = [
    "AdaptiveKl", "AutoscaleSection", "CheckpointSection", "CollectSection", "ConstrainedKl", "DEFAULT_STAGES",
    "DataSection", "DpoSection", "EvaluationSection", "FileSource", "FixedKl", "Fraction", "FunctionReward",
    "GuardSection", "HttpReward", "HubSource", "KlBudget", "KlSection", "LearnerSection", "LoraSection",
    "MetricsSection", "ModelReward", "ModelSection", "NewModel", "OptimizerSection", "PlacementSection",
    "PretrainedModel", "RaySection", "RedisSection", "RefreshSection", "ReviewSection", "RewardSection",
    "RewardSource", "RmSection", "RolloutSection", "RunConfig", "STAGES", "Section", "SftSection", "Stage",
    "TableSource", "Thresholds", "WatchSection", "WeightsSection", "WorldSource",
]  # fmt: skip

Stage = Literal["data", "sft", "collect", "rm", "ppo", "dpo", "evaluate", "report"]
STAGES: tuple[Stage, ...] = ("data", "sft", "collect", "rm", "ppo", "dpo", "evaluate", "report")
DEFAULT_STAGES = tuple(stage for stage in STAGES if stage != "dpo")


# ---------------------------------------------------------------- model


class NewModel(Section):
    """A small transformer made here from a configuration, with its own tokenizer trained on the run's text."""

    kind: Literal["new"] = "new"
    architecture: Literal["llama", "qwen2"] = "llama"
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    max_position_embeddings: PositiveInt = 256
    tie_word_embeddings: bool = True
    tokenizer: Literal["word", "byte_bpe"] = "word"
    """word: one token a word, for closed vocabularies; byte_bpe: bytes and merges, for any text."""
    vocab_size: PositiveInt = 512


class PretrainedModel(Section):
    """A Hugging Face model directory or name, with its tokenizer."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    tokenizer: str | None = None
    """Another tokenizer than the model's own."""


ModelSection = Annotated[NewModel | PretrainedModel, Field(discriminator="kind")]


# ---------------------------------------------------------------- data


class WorldSource(Section):
    """A Python function `make(directory, *, seed, sizes…)` that writes sft.jsonl, prompts.jsonl, eval_prompts.jsonl."""

    kind: Literal["world"] = "world"
    factory: str
    """"package.module:function"."""
    sft_examples: PositiveInt = 6000
    prompts: PositiveInt = 4096
    eval_prompts: PositiveInt = 512


class FileSource(Section):
    """Local JSON Lines (also .gz) or Parquet."""

    kind: Literal["file"] = "file"
    path: Path
    columns: dict[str, str] = Field(default_factory=dict)
    """Keel's field → the file's column: prompt, answer (SFT); prompt (prompts). Preferences come as pairs (prompt,
    chosen, rejected; without `prompt`, whole dialogues), comparisons (prompt, answer_a, answer_b, preferred,
    annotator), rankings (prompt, answers, ranking) or ratings (prompt, answer, rating, annotator)."""
    limit: PositiveInt | None = None


class HubSource(Section):
    """A Hugging Face dataset by name."""

    kind: Literal["hub"] = "hub"
    name: str
    subset: str | None = None
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)
    limit: PositiveInt | None = None


TableSource = Annotated[FileSource | HubSource, Field(discriminator="kind")]


class DataSection(Section):
    """Where text comes from. Either a `world` (synthetic, makes everything) or tables."""

    world: WorldSource | None = None
    preferences: TableSource | None = None
    prompts: TableSource | None = None
    """Absent: the prompts of the preference pairs."""
    sft: TableSource | None = None
    """Absent: the chosen answers of the preference pairs."""
    eval_fraction: Fraction = 0.1
    """Of tables: the share of prompts kept out for evaluation."""
    max_prompt_tokens: PositiveInt = 16
    max_response_tokens: PositiveInt = 64
    long_prompt: Literal["truncate_left", "reject"] = "truncate_left"
    """What happens to a prompt longer than max_prompt_tokens: keep its end, or leave it out. Counted either way."""
    long_response: Literal["truncate_right", "reject"] = "truncate_right"
    """SFT and preference answers longer than max_response_tokens."""


# ---------------------------------------------------------------- offline stages


class SftSection(Section):
    epochs: Annotated[float, Field(ge=0.0)] = 4.0
    """0: a pretrained model is taken as it is, and needs no demonstrations. For one that has had its fine-tuning."""
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    warmup_fraction: Fraction = 0.05
    weight_decay: float = 0.0
    threads: PositiveInt = 2


class DpoSection(Section):
    """Direct preference optimisation on the run's preferences (Rafailov et al. 2023): where the reward model is poor,
    or after PPO. It starts from PPO's final policy where that stage is among `stages`, else from the SFT policy; its
    start is its reference."""

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    epochs: PositiveFloat = 1.0
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-4
    warmup_fraction: Fraction = 0.05
    threads: PositiveInt = 2


# ---------------------------------------------------------------- online


class AutoscaleSection(Section):
    """The number of rollout actors, from measured idleness: the learner waits for rollouts → add; actors wait for
    prompts at the gate → remove."""

    min_actors: PositiveInt = 1
    max_actors: PositiveInt = 8
    add_above_learner_idle: Fraction = 0.25
    """Share of the window that the learner spent waiting for samples, above which an actor is added."""
    remove_above_actor_idle: Fraction = 0.5
    """Share of the window that actors had nothing in flight, above which one is removed."""
    window_s: PositiveFloat = 60.0
    cool_down_s: PositiveFloat = 60.0
    """No further change for so long after one: a new actor has to boot before it shows."""


class RolloutSection(Section):
    """Actors and their vLLM engines."""

    actors: PositiveInt = 1
    """At the start; `keel scale RUN --actors N` changes it while the run goes on."""
    autoscale: AutoscaleSection | None = None
    engine: Literal["vllm", "scripted"] = "vllm"
    """scripted: a stand-in that answers at random, for tests of the plumbing."""
    engine_core: Literal["auto", "process", "thread"] = "auto"
    """Where vLLM's engine core runs. thread: inside the actor, faster to start, CPU only, falls back to process."""
    temperature: PositiveFloat = 1.0
    max_concurrent_requests: PositiveInt = 64
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    kv_cache_gib: PositiveFloat = 0.125
    gpu_memory_utilization: Fraction = 0.85
    cpus_per_actor: PositiveFloat = 0.5
    gpus_per_actor: Annotated[float, Field(ge=0.0)] = 0.0
    tensor_parallel_size: PositiveInt = 1
    """GPUs that one engine is split over. All of an engine's GPUs come from one placement group, on one node."""
    chunked_prefill: bool = True
    """Long prompts enter in pieces between decode steps, so they do not stall the other requests."""
    max_batched_tokens: PositiveInt | None = None
    """Most tokens of one engine step, prefill and decode together. Absent: vLLM's own choice."""
    prefix_caching: bool = True
    """Requests that share a prompt share its keys and values. A weight update always clears the cache."""
    boot_timeout_s: PositiveFloat = 180.0
    generate_timeout_s: PositiveFloat = 120.0
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Of each actor. What dies with its host does not count."""
    probe_tolerance: PositiveFloat = 1e-4
    """Largest difference, in nats, between engine and learner log-probs of the probe sequence after a first sync."""


class CheckpointSection(Section):
    every_steps: PositiveInt = 10
    keep_last: PositiveInt = 2


class EvaluationSection(Section):
    prompts: PositiveInt = 512
    samples_shown: PositiveInt = 16
    gold: str | None = None
    """"package.module:function": (prompt, answer) → float. Measured, never trained on."""


# ---------------------------------------------------------------- where it runs


class RedisSection(Section):
    url: str | None = None
    """redis:// or rediss:// URL of a server ≥ 7. Absent: one is started on loopback and stopped with the run."""
    lease_s: PositiveFloat = 30.0
    command_timeout_s: PositiveFloat = 10.0


class WeightsSection(Section):
    """How policy weights travel from the learner to the engines."""

    transport: Literal["auto", "object_store", "collective"] = "auto"
    """object_store: one packed copy in Ray's object store, read by each actor. collective: broadcast to all engines
    from rank 0 (NCCL between GPUs, gloo between CPUs), with the object store for late joiners. auto: collective where
    both learner and engines have whole GPUs of their own, object_store otherwise."""
    bucket_mib: PositiveInt = 256
    """Tensors travel in buckets of about this size."""
    timeout_s: PositiveFloat = 120.0
    """Deadline of each phase of a collective update: forming the group, one bucket, loading."""


class PlacementSection(Section):
    """Where processes go on a cluster."""

    spread: Literal["pack", "spread"] = "pack"
    """pack: leave it to Ray; spread: rollout actors evenly over nodes. The learner's ranks are placed first, on as few
    nodes as they fit."""
    colocate: bool = False
    """The learner's rank and the engine take turns on one GPU: the engine sleeps while the learner trains; the weights
    and moments of the learner are in host memory while the engine generates. Weights go through CUDA IPC, adapters
    through the object store. Needs learner.max_staleness 0, one rank and one actor."""
    wait_s: PositiveFloat = 60.0
    """How long to wait for the cluster to have what the plan asks for (an autoscaling cluster grows meanwhile)."""


class RaySection(Section):
    address: str | None = None
    """Absent: a local Ray is started and stopped with the run. "auto": the cluster this driver runs on."""
    num_cpus: PositiveInt | None = None
    object_store_mib: PositiveInt = 256


class MetricsSection(Section):
    enabled: bool = True
    discovery_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the run's Prometheus HTTP service discovery; 0 takes a free one, printed at start."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    runs_dir: Path = Path("runs")
    stages: tuple[Stage, ...] = DEFAULT_STAGES
    model: ModelSection = NewModel()
    data: DataSection
    sft: SftSection = SftSection()
    collect: CollectSection = CollectSection()
    rm: RmSection = RmSection()
    dpo: DpoSection = DpoSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    review: ReviewSection = ReviewSection()
    learner: LearnerSection = LearnerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    guard: GuardSection = GuardSection()
    redis: RedisSection = RedisSection()
    weights: WeightsSection = WeightsSection()
    placement: PlacementSection = PlacementSection()
    ray: RaySection = RaySection()
    metrics: MetricsSection = MetricsSection()

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / self.name

    @property
    def max_sequence_tokens(self) -> int:
        return self.data.max_prompt_tokens + self.data.max_response_tokens
