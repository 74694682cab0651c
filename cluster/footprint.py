"""What each process of a run holds at its peak, from the model's sizes and the configuration: arithmetic, no torch.

What the code does, and so what is counted:
- Learner: float32 parameters, gradients and two Adam moments, 16 B a trained parameter, divided by the ranks (FSDP2).
  With dtype bfloat16, one rank keeps a 16-bit copy of a model's matrices while it is in use (autocast); several gather
  the layer at work and the next, and the embedding and head, in 16 bit. Policy and critic take turns, so their
  activations do not add up.
- Engine: weights in rollout.dtype, split by tensor parallelism; the rest of its share of the GPU is KV cache.
- Reward worker: every ensemble member and the reference policy, in reward.dtype; with rm.refresh, another version of
  the members beside them while they are replaced. int8: one byte for what is inside a linear layer, four for the rest.
- SFT and RM stages: float32 AdamW, whole batches without gradient checkpointing, in one process (rm.parallel: several).
  Models that are taken as they are (sft.epochs 0, rm.models) are copied, and reward models measured: a forward pass
  alone, all members in memory.

Activations of a layer are what autograd keeps for its backward pass, tensor by tensor, with attention that never holds
its scores (SDPA, FlashAttention); checkpointing keeps the input of each layer and one layer whole (Chen et al. 2016).
Names as in architecture.py: H, I, A, K, V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from cluster.architecture import Architecture
from configs.run import RunConfig

GIB: Final = 1 << 30
MIB: Final = 1 << 20
FLOAT32: Final = 4
DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": FLOAT32, "bfloat16": 2, "float16": 2}
Precision = Literal["float32", "autocast", "bfloat16"]
"""float32; 16-bit products on float32 weights (autocast); all in 16 bit but the norms' inner part (FSDP2's cast)."""

PARTS: Final = ("weights", "working copies", "gradients", "optimiser", "activations", "head", "KV cache", "base")
"""Columns of the plan. working copies: 16-bit casts, gathered layers, weights on their way to the engines. head:
logits. base: interpreter, libraries, CUDA context."""

HEAD_CHUNK_BYTES: Final[Mapping[str, int]] = {"cpu": 4 * MIB, "cuda": 512 * MIB}
"""Logits that the learner's head makes at a time."""
HEAD_KEPT_BYTES: Final[Mapping[str, int]] = {"cpu": 16 * MIB, "cuda": 512 * MIB}
"""Logits that are no more than this altogether are kept for the backward pass."""
SCORER_LOGIT_BYTES: Final = 256 * MIB
"""Logits that a reward worker makes at a time."""
MEASURED_ROWS: Final = 64
"""Answers in a pass of the rm stage over a model that it measures."""
HOST_RETAINED: Final = 2.0
"""Resident memory over live tensors, for what comes and goes on a CPU: the C allocator keeps what was freed. Measured
on models of 1 and 28 million parameters: 2.3 and 1.9."""
_PROCESS_HOST_BYTES: Final = 450 * MIB
"""A process with torch, transformers and ray loaded; measured."""
_ENGINE_HOST_BYTES: Final = 620 * MIB
"""One with vLLM on a CPU; measured."""
_GPU_PROCESS_HOST_BYTES: Final = 3 * GIB
"""Host memory of a process that has a GPU open: CUDA's libraries and pinned buffers. Estimated."""
_CUDA_CONTEXT_BYTES: Final = 1 * GIB
"""Of the GPU, before the first tensor: context, kernels, cuBLAS workspace; with fragmentation. Estimated."""
_COLLECTIVES_BYTES: Final = GIB // 2
"""Buffers of NCCL's channels in a group of ranks. Estimated."""
_ENGINE_BATCHED_TOKENS: Final = 2048
"""vLLM's own choice of max_num_batched_tokens for an engine inside a program."""


@dataclass(frozen=True)
class Footprint:
    """Part → bytes at the peak: in host memory, and on each GPU that the process uses (empty without one)."""

    host: Mapping[str, int]
    gpu: Mapping[str, int] = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())


# ---------------------------------------------------------------- activations


def layer_activation_bytes(architecture: Architecture, *, precision: Precision) -> int:
    """A token's share of what autograd keeps of one decoder layer. In floats of 4 or 2 bytes:

    two norms, each input, normalised and scaled copy (6H; in 16 bit the input is kept in float32; autocast casts the
    scaled copy once for each of the five matrices that read it), queries, keys, values and the attention's output
    (2A + 2K), gate, its activation, the other factor and their product (4I); float32 for the softmax's normaliser
    and the norms' two scales.
    """
    hidden, attention = architecture.hidden, 2 * architecture.query_size + 2 * architecture.kv_size
    small = FLOAT32 * (architecture.heads + 2)
    norms = {"float32": 24, "autocast": 26, "bfloat16": 16}[precision] * hidden
    width = FLOAT32 if precision == "float32" else 2
    return norms + width * (attention + 4 * architecture.inner) + small


def activation_bytes(architecture: Architecture, *, tokens: int, precision: Precision, checkpointing: bool) -> int:
    """Of a decoder's forward pass with a backward to come, and of that backward's own layer at work."""
    layer = layer_activation_bytes(architecture, precision=precision)
    residual = 2 if precision == "bfloat16" else FLOAT32
    width = FLOAT32 if precision == "float32" else 2
    inputs = architecture.layers * residual * architecture.hidden
    kept = inputs + layer if checkpointing else architecture.layers * layer
    final_norm_and_states = 4 * FLOAT32 * architecture.hidden
    at_work = width * 2 * architecture.inner + 2 * FLOAT32 * architecture.hidden
    return tokens * (kept + final_norm_and_states + at_work)


def inference_bytes(architecture: Architecture, *, tokens: int, sequence_tokens: int, width: int) -> int:
    """Of a forward pass alone: in the feed-forward block, the residual stream, its input, the activated gate, the other
    factor and their product; and a mask [B, 1, L, L] of one byte and of one float."""
    per_token = width * (3 * architecture.hidden + 3 * architecture.inner)
    return tokens * (per_token + (1 + width) * sequence_tokens)


# ---------------------------------------------------------------- learner


@dataclass(frozen=True)
class Trained:
    """One model under training."""

    parameters: int
    trained: int
    root: int
    """Parameters outside the layers: gathered for the whole pass."""
    has_vocabulary: bool


def has_critic(config: RunConfig) -> bool:
    return config.learner.advantages == "gae"


def models_of(architecture: Architecture, config: RunConfig) -> list[Trained]:
    lora = config.learner.lora
    policy = architecture.policy_parameters
    adapter = 0 if lora is None else architecture.adapter_parameters(lora.rank, targets=lora.target_modules)
    models = [Trained(policy + adapter, adapter or policy, architecture.root_parameters, True)]
    if has_critic(config):
        scorer = architecture.scorer_parameters
        root = architecture.embedding_parameters + 2 * architecture.hidden
        models.append(Trained(scorer, scorer, root, False))
    return models


def learner_tokens(config: RunConfig) -> int:
    """Most tokens of one forward pass of a rank: its token budget, or all rows that it can get if they are fewer."""
    learner, longest = config.learner, config.max_sequence_tokens
    rows = -(-learner.batch_size // (learner.minibatches * learner.ranks))
    return max(longest, min(learner.token_budget, rows * longest))


def learner_precision(config: RunConfig) -> Precision:
    """Sharded weights are cast when they are gathered, whole ones by autocast."""
    learner = config.learner
    if learner.dtype == "float32":
        return "float32"
    return "bfloat16" if learner.ranks > 1 or learner.optimizer_offload else "autocast"


def learner_rank(architecture: Architecture, config: RunConfig, *, first: bool = True) -> Footprint:
    """`first`: rank 0, which alone reads the weights from disk and packs them for the engines."""
    learner = config.learner
    at_rest = _learner_at_rest(architecture, config)
    at_work = _learner_at_work(architecture, config)
    travelling = publishing_bytes(architecture, config) if first else 0
    if not learner.on_gpu:
        at_work = {part: round(HOST_RETAINED * size) for part, size in at_work.items()}
        at_work["working copies"] = at_work.get("working copies", 0) + travelling
        return Footprint(host={**at_rest, **at_work, "base": _PROCESS_HOST_BYTES})
    base = _CUDA_CONTEXT_BYTES + (_COLLECTIVES_BYTES if learner.ranks > 1 else 0)
    loading = FLOAT32 * architecture.policy_parameters if first else 0
    host = {"working copies": max(travelling, loading), "base": _GPU_PROCESS_HOST_BYTES}
    if learner.optimizer_offload:
        return Footprint(host={**at_rest, **host}, gpu={**at_work, "base": base})
    return Footprint(host=host, gpu={**at_rest, **at_work, "base": base})


def _learner_at_rest(architecture: Architecture, config: RunConfig) -> dict[str, int]:
    models, ranks = models_of(architecture, config), config.learner.ranks
    trained = sum(model.trained for model in models)
    return {
        "weights": FLOAT32 * sum(model.parameters for model in models) // ranks,
        "gradients": FLOAT32 * trained // ranks,
        "optimiser": 2 * FLOAT32 * trained // ranks,
    }


def _learner_at_work(architecture: Architecture, config: RunConfig) -> dict[str, int]:
    """What comes and goes in a step, where it is most: a pass over the policy or the critic, or Adam's own copies."""
    passes = [_pass(architecture, config, model) for model in models_of(architecture, config)]
    largest = max(passes, key=lambda parts: sum(parts.values()))
    if config.learner.on_gpu and not config.learner.optimizer_offload:
        # On a GPU, AdamW takes all parameters of a model at once and holds one more copy of them.
        step = FLOAT32 * max(model.trained for model in models_of(architecture, config)) // config.learner.ranks
        if step > sum(largest.values()):
            return {"working copies": step}
    return largest


def _pass(architecture: Architecture, config: RunConfig, model: Trained) -> dict[str, int]:
    learner = config.learner
    device = "cuda" if learner.on_gpu else "cpu"
    sharded = learner.ranks > 1 or learner.optimizer_offload
    bfloat16 = learner.dtype == "bfloat16"
    tokens = learner_tokens(config)
    layer = architecture.layer_parameters
    gradient_copies = 0
    if sharded:
        width = 2 if bfloat16 else FLOAT32
        copies = width * (model.root + 2 * layer)
        if model.trained == model.parameters:  # gradients before they are reduced, and in the type they are reduced in
            gradient_copies = (width + FLOAT32) * (model.root + layer)
    else:
        copies = 2 * (architecture.layers * layer + model.root) if bfloat16 else 0
        if model.trained == model.parameters and model.has_vocabulary:  # the head's gradient before it is added
            gradient_copies = FLOAT32 * architecture.embedding_parameters
    head = 0
    if model.has_vocabulary:
        answers = tokens * config.data.max_response_tokens // config.max_sequence_tokens
        logits = answers * architecture.vocabulary * FLOAT32
        head = HEAD_CHUNK_BYTES[device] + (logits if logits <= HEAD_KEPT_BYTES[device] else 0)
    return {
        "working copies": copies + gradient_copies,
        "activations": activation_bytes(
            architecture,
            tokens=tokens,
            precision=learner_precision(config),
            checkpointing=learner.gradient_checkpointing,
        ),
        "head": head,
    }


# ---------------------------------------------------------------- weights on their way


def payload_bytes(architecture: Architecture, config: RunConfig) -> int:
    """Of one policy version as it travels: all weights or the adapter's, in the engines' type."""
    lora, width = config.learner.lora, DTYPE_BYTES[config.rollout.dtype]
    if lora is not None and lora.broadcast == "adapter":
        return width * architecture.adapter_parameters(lora.rank, targets=lora.target_modules)
    return width * architecture.policy_parameters


def publishing_bytes(architecture: Architecture, config: RunConfig) -> int:
    """Host memory of the learner's rank 0 while it packs a version: the packed buffer, and all tensors on the CPU where
    the weights are sharded, on a GPU or of another type."""
    learner = config.learner
    copied = learner.on_gpu or learner.ranks > 1 or config.rollout.dtype != "float32"
    return (2 if copied else 1) * payload_bytes(architecture, config)


# ---------------------------------------------------------------- engine


@dataclass(frozen=True)
class EngineFootprint:
    """An engine's process. `sequences`: of the greatest length, that its KV cache holds at once."""

    footprint: Footprint
    kv_bytes_per_token: int
    kv_bytes: int
    sequences: int


def engine(architecture: Architecture, config: RunConfig, *, gpu_bytes: int | None) -> EngineFootprint:
    """`gpu_bytes`: memory of the GPU it will have; None when unknown: one sequence is counted then."""
    rollout = config.rollout
    if rollout.engine == "scripted":
        return EngineFootprint(Footprint(host={"base": _PROCESS_HOST_BYTES}), 0, 0, rollout.max_concurrent_requests)
    width = DTYPE_BYTES[rollout.dtype]
    split = rollout.tensor_parallel_size
    kv_heads = max(1, architecture.kv_heads // split)
    per_token = 2 * architecture.layers * kv_heads * architecture.head_size * width
    weights = width * architecture.policy_parameters // split
    batched = rollout.max_batched_tokens or _ENGINE_BATCHED_TOKENS
    if not rollout.chunked_prefill:
        batched = max(batched, config.max_sequence_tokens)
    at_work = batched * width * (4 * architecture.hidden + 3 * architecture.inner // split)
    logits = 2 * FLOAT32 * rollout.max_concurrent_requests * architecture.vocabulary
    longest = per_token * config.max_sequence_tokens
    landed = payload_bytes(architecture, config)
    if rollout.gpus_per_actor == 0:
        cache = int(rollout.kv_cache_gib * GIB)
        host = {
            "weights": weights * split,
            "activations": at_work,
            "head": logits,
            "KV cache": cache,
            "base": _ENGINE_HOST_BYTES * split,
        }
        return EngineFootprint(Footprint(host=host), per_token, cache, cache // longest)
    rest = weights + at_work + logits + _CUDA_CONTEXT_BYTES
    cache = longest if gpu_bytes is None else int(rollout.gpu_memory_utilization * gpu_bytes) - rest
    gpu = {
        "weights": weights,
        "activations": at_work,
        "head": logits,
        "KV cache": max(longest, cache),
        "base": _CUDA_CONTEXT_BYTES,
    }
    host = {"working copies": landed, "base": _GPU_PROCESS_HOST_BYTES * split}
    return EngineFootprint(Footprint(host=host, gpu=gpu), per_token, cache, max(0, cache) // longest)


# ---------------------------------------------------------------- reward worker


def reward_worker(architecture: Architecture, config: RunConfig) -> Footprint:
    """All members of the ensemble and the reference policy; a pass over the members follows one over the reference."""
    reward, longest = config.reward, config.max_sequence_tokens
    width = _serving_width(config)
    tokens = max(longest, min(reward.token_budget, reward.batch_size * longest))
    members = config.rm.ensemble * scorer_bytes(architecture, config) if reward.needs_model else 0
    answers = tokens * config.data.max_response_tokens // longest
    at_work = inference_bytes(architecture, tokens=tokens, sequence_tokens=longest, width=width)
    logits = 3 * min(SCORER_LOGIT_BYTES, FLOAT32 * answers * architecture.vocabulary)
    parts = {"weights": members + width * architecture.policy_parameters, "activations": at_work, "head": logits}
    if config.rm.refresh is not None:
        parts["working copies"] = members
    if reward.gpus_per_worker == 0:
        return Footprint(host={**parts, "base": _PROCESS_HOST_BYTES})
    return _on_gpu(parts, loading=width * architecture.policy_parameters)


def _serving_width(config: RunConfig) -> int:
    """Bytes of what flows through the models that serve, and of the reference model's weights: int8 is inside the
    linear layers of the reward model alone."""
    return FLOAT32 if config.reward.dtype == "int8" else DTYPE_BYTES[config.reward.dtype]


def scorer_bytes(architecture: Architecture, config: RunConfig) -> int:
    """Weights of one reward model as it serves."""
    parameters, width = architecture.scorer_parameters, _serving_width(config)
    if config.reward.dtype != "int8":
        return width * parameters
    inside = architecture.layers * sum(inputs * outputs for _, inputs, outputs, _ in architecture.layer_linears())
    return inside + width * (parameters - inside)


def _on_gpu(parts: Mapping[str, int], *, loading: int) -> Footprint:
    """A process with all this on its GPU; `loading`: bytes of a model that come by way of host memory."""
    return Footprint(
        host={"working copies": loading, "base": _GPU_PROCESS_HOST_BYTES},
        gpu={**parts, "base": _CUDA_CONTEXT_BYTES},
    )


# ---------------------------------------------------------------- offline stages


def offline_stage(architecture: Architecture, config: RunConfig, *, stage: Literal["sft", "rm"]) -> Footprint:
    """Training, or what is done with models that are taken as they are. Scoring what was trained needs less."""
    if stage == "sft":
        return _copying(architecture) if config.sft.epochs == 0 else _training(architecture, config, stage=stage)
    return _measuring(architecture, config) if config.rm.models else _training(architecture, config, stage=stage)


def _copying(architecture: Architecture) -> Footprint:
    """The policy is loaded and saved, on the CPU and in the type that it has: float32 at most."""
    return Footprint(host={"weights": FLOAT32 * architecture.policy_parameters, "base": _PROCESS_HOST_BYTES})


def _measuring(architecture: Architecture, config: RunConfig) -> Footprint:
    """One reward model after another is copied as it is (float32 at most); all of them score MEASURED_ROWS answers a
    pass."""
    tokens = MEASURED_ROWS * config.max_sequence_tokens
    stored, scoring = FLOAT32 * architecture.scorer_parameters, scorer_bytes(architecture, config)
    at_work = inference_bytes(
        architecture, tokens=tokens, sequence_tokens=config.max_sequence_tokens, width=_serving_width(config)
    )
    all_members = config.rm.ensemble * scoring
    if config.learner.on_gpu and config.reward.dtype != "int8":
        return _on_gpu({"weights": all_members, "activations": at_work}, loading=stored)
    copies = {"working copies": stored - scoring} if scoring < stored else {}
    return Footprint(host={"weights": all_members, **copies, "activations": at_work, "base": _PROCESS_HOST_BYTES})


def _training(architecture: Architecture, config: RunConfig, *, stage: Literal["sft", "rm"]) -> Footprint:
    """TRL's trainers: the whole model in float32 with AdamW, a batch in one pass at the greatest length. A batch of the
    reward model is pairs: twice the sequences. SFT holds the logits of every position: as the head gave them, in
    float32, as log-probabilities and as their gradient."""
    on_gpu = config.learner.on_gpu
    rows = config.sft.batch_size if stage == "sft" else 2 * config.rm.batch_size
    tokens = rows * config.max_sequence_tokens
    parameters = architecture.policy_parameters if stage == "sft" else architecture.scorer_parameters
    precision: Precision = "autocast" if on_gpu else "float32"
    logits = (14 if on_gpu else 12) * tokens * architecture.vocabulary if stage == "sft" else 0
    retained = 1.0 if on_gpu else HOST_RETAINED
    side_by_side = min(config.rm.parallel, config.rm.members + config.rm.discriminator) if stage == "rm" else 1
    activations = activation_bytes(architecture, tokens=tokens, precision=precision, checkpointing=False)
    parts = {
        "weights": FLOAT32 * parameters,
        "working copies": 2 * parameters * on_gpu,
        "gradients": FLOAT32 * parameters,
        "optimiser": 2 * FLOAT32 * parameters,
        "activations": round(retained * activations),
        "head": round(retained * logits),
    }
    if not on_gpu:
        return _together(Footprint(host={**parts, "base": _PROCESS_HOST_BYTES}), side_by_side)
    return _together(_on_gpu(parts, loading=FLOAT32 * parameters), side_by_side)


def _together(one: Footprint, processes: int) -> Footprint:
    """Several of them, which share their GPU if they have one; and the process that waits for them."""
    if processes == 1:
        return one
    host = {part: processes * size for part, size in one.host.items()}
    host["base"] += _PROCESS_HOST_BYTES
    return Footprint(host=host, gpu={part: processes * size for part, size in one.gpu.items()})
