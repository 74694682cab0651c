"""Checks across sections: what each value alone cannot show. Pure; every contradiction is reported, not the first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from configs.errors import ConfigError
from configs.run import (
    STAGES,
    AdaptiveKl,
    ConstrainedKl,
    FixedKl,
    FunctionReward,
    ModelReward,
    NewModel,
    OptimizerSection,
    RunConfig,
)

VLLM_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head sizes that vLLM's CPU and GPU kernels have. Others end the engine at its first forward pass."""
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_MAX_BETA_CHANGE = 0.2
"""The adaptive controller's clip of KL/target - 1."""
_MAX_ADAPTER_RANK = 512


def cross_check(config: RunConfig, *, where: str = "configuration") -> None:
    """Raises ConfigError listing every contradiction in `config`."""
    checks = (
        _finite, _stages, _model, _data, _taken_as_is, _references, _batches, _kl, _optimisers, _times, _resources,
        _rewards, _refresh, _guard,
    )  # fmt: skip
    problems = [problem for check in checks for problem in check(config)]
    if problems:
        count = f"{len(problems)} contradiction{'s' if len(problems) > 1 else ''} between settings"
        got = problems[0] if len(problems) == 1 else "\n    - " + "\n    - ".join(problems)
        raise ConfigError(f"{where}: {count}", got=got, do="change one of the keys named in each line")


def _finite(config: RunConfig) -> Iterator[str]:
    for path, value in _leaves(config, ""):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{path}: got {value}; a finite number is needed"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def _stages(config: RunConfig) -> Iterator[str]:
    if not config.stages:
        yield "stages: got none; name at least one"
    elif list(config.stages) != [stage for stage in STAGES if stage in config.stages]:
        yield f"stages: got {', '.join(config.stages)}; each at most once, in the order {', '.join(STAGES)}"


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    if not isinstance(model, NewModel):
        return
    if config.max_sequence_tokens > model.max_position_embeddings:
        yield (
            f"data.max_prompt_tokens + data.max_response_tokens = {config.max_sequence_tokens}, more than "
            f"model.max_position_embeddings = {model.max_position_embeddings}"
        )
    if model.hidden_size % model.heads:
        yield f"model.hidden_size = {model.hidden_size} is no multiple of model.heads = {model.heads}"
    elif model.hidden_size // model.heads not in VLLM_HEAD_DIMS and config.rollout.engine == "vllm":
        yield (
            f"model.hidden_size / model.heads = {model.hidden_size // model.heads}: vLLM has no kernel for that head "
            f"size; one of {', '.join(map(str, VLLM_HEAD_DIMS))}"
        )
    if model.tokenizer == "byte_bpe" and model.vocab_size < 260:
        yield f"model.vocab_size = {model.vocab_size}: byte_bpe needs 256 bytes and 4 special tokens, 260 at least"


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    tables = [name for name in ("preferences", "prompts", "sft") if getattr(data, name) is not None]
    if data.world is not None and tables:
        yield f"data.world makes all data itself, but data.{tables[0]} is set as well; keep one of them"
    needed = ("prompts", "sft") if config.sft.epochs else ("prompts",)
    if data.world is None and not tables:
        yield f"data: no source; set data.world, data.preferences, or {' and '.join(f'data.{name}' for name in needed)}"
    if data.world is None and tables and data.preferences is None:
        yield from (
            f"data.{name} is missing: without data.preferences it has nothing to come from"
            for name in needed
            if name not in tables
        )
    pairs_for = {"dpo"} | ({"collect", "rm"} if config.reward.needs_model else set())
    if data.preferences is None and config.collect.judge is None and pairs_for & set(config.stages):
        yield "collect.judge is missing: with no data.preferences, pairs are sampled from the policy and need a judge"
    if data.world is None and tables and data.eval_fraction in (0.0, 1.0) and "evaluate" in config.stages:
        yield f"data.eval_fraction = {data.eval_fraction:g}: leaves no prompts to evaluate, or none to train on"


def _taken_as_is(config: RunConfig) -> Iterator[str]:
    rm = config.rm
    if config.sft.epochs == 0.0 and isinstance(config.model, NewModel):
        yield "sft.epochs = 0 takes the model as it is, but one of model.kind = new has learned nothing; train it"
    if rm.models and rm.members not in (1, len(rm.models)):
        yield f"rm.members = {rm.members}, but rm.models names {len(rm.models)}; leave rm.members out"


def named_functions(config: RunConfig) -> dict[str, str]:
    """Key → "package.module:function", of every function that a configuration names."""
    world, refresh, watch = config.data.world, config.rm.refresh, config.guard.watch
    named = {
        "data.world.factory": world.factory if world else None,
        "collect.judge": config.collect.judge,
        "rm.refresh.judge": refresh.judge if refresh and refresh.judge != "review" else None,
        "guard.watch.judge": watch.judge if watch and watch.judge != "review" else None,
        "evaluation.gold": config.evaluation.gold,
    }
    for index, source in enumerate(config.reward.sources):
        if isinstance(source, FunctionReward):
            named[f"reward.sources[{index}].path"] = source.path
    return {key: reference for key, reference in named.items() if reference is not None}


def _references(config: RunConfig) -> Iterator[str]:
    for path, reference in named_functions(config).items():
        if not _REFERENCE.fullmatch(reference):
            yield f"{path}: got {reference!r}; write package.module:function"


def _batches(config: RunConfig) -> Iterator[str]:
    learner = config.learner
    if learner.batch_size % learner.samples_per_prompt:
        yield (
            f"learner.batch_size = {learner.batch_size} is no multiple of "
            f"learner.samples_per_prompt = {learner.samples_per_prompt}"
        )
    if learner.advantages in ("group_relative", "leave_one_out") and learner.samples_per_prompt < 2:
        yield (
            f"learner.advantages = {learner.advantages} compares answers to one prompt: "
            f"learner.samples_per_prompt = {learner.samples_per_prompt}, 2 at least"
        )
    if learner.minibatches > learner.batch_size:
        yield f"learner.minibatches = {learner.minibatches}, more than learner.batch_size = {learner.batch_size}"
    for path, budget in (("learner", learner.token_budget), ("reward", config.reward.token_budget)):
        if budget < config.max_sequence_tokens:
            yield (
                f"{path}.token_budget = {budget}, less than one sequence "
                f"(data.max_prompt_tokens + data.max_response_tokens = {config.max_sequence_tokens})"
            )


def _kl(config: RunConfig) -> Iterator[str]:
    kl, batch = config.learner.kl, config.learner.batch_size
    if isinstance(kl, AdaptiveKl | ConstrainedKl) and not kl.beta_min <= kl.beta_init <= kl.beta_max:
        yield (
            f"learner.kl.beta_init = {kl.beta_init:g} lies outside [learner.kl.beta_min, learner.kl.beta_max] = "
            f"[{kl.beta_min:g}, {kl.beta_max:g}]"
        )
    if isinstance(kl, AdaptiveKl) and batch * _MAX_BETA_CHANGE >= kl.horizon_samples:
        yield (
            f"learner.kl.horizon_samples = {kl.horizon_samples}: one step of learner.batch_size = {batch} could take β "
            f"to 0 (β changes by up to {_MAX_BETA_CHANGE}·batch/horizon); more than {_MAX_BETA_CHANGE * batch:g} "
            f"is needed, {10 * batch} is usual"
        )
    budget = config.learner.kl_budget
    if budget.start == 0.0:
        yield "learner.kl_budget.start = 0: a KL target of 0 cannot be approached; set 0.1 or more"
    elif budget.start < 1.0 and budget.widen_steps == 0:
        yield f"learner.kl_budget.start = {budget.start:g} has no effect while learner.kl_budget.widen_steps = 0"
    elif budget.start < 1.0 and isinstance(kl, FixedKl):
        yield f"learner.kl_budget.start = {budget.start:g}, but learner.kl.kind = fixed has no KL target to widen"


def _optimisers(config: RunConfig) -> Iterator[str]:
    sections: dict[str, OptimizerSection] = {"policy": config.learner.policy, "critic": config.learner.critic}
    for name, section in sections.items():
        if not all(0.0 <= beta < 1.0 for beta in section.betas):
            yield f"learner.{name}.betas: got {list(section.betas)}; both in [0, 1)"
        if section.weight_decay < 0.0:
            yield f"learner.{name}.weight_decay: got {section.weight_decay:g}; 0 or more"


def _rewards(config: RunConfig) -> Iterator[str]:
    rm, reward = config.rm, config.reward
    if not reward.sources:
        yield "reward.sources: none; leave it out for the reward model alone"
    if sum(source.kind == "model" for source in reward.sources) > 1:
        yield "reward.sources: kind model twice; members of an ensemble are rm.members"
    if not reward.needs_model and config.learner.advantages == "gae" and "ppo" in config.stages:
        yield (
            "learner.advantages = gae without a reward model among reward.sources: the critic starts from it; use "
            "group_relative, leave_one_out or reinforce"
        )
    if reward.aggregation != "mean" and rm.ensemble == 1:
        yield f"reward.aggregation = {reward.aggregation} with one member; set rm.members to 2 or more"
    if reward.uncertain != "keep" and rm.ensemble == 1:
        yield f"reward.uncertain = {reward.uncertain} with one member, which agrees with itself; set rm.members"
    if reward.dtype == "int8" and reward.gpus_per_worker:
        yield "reward.dtype = int8 with reward.gpus_per_worker: dynamic quantisation runs on the CPU; use bfloat16"
    if rm.members > 1 and rm.member_leaves_out == 1.0:
        yield "rm.member_leaves_out = 1: leaves members nothing to learn from"


def _refresh(config: RunConfig) -> Iterator[str]:
    refresh = config.rm.refresh
    if refresh is None:
        return
    if not config.reward.needs_model:
        yield "rm.refresh without a reward model among reward.sources: there is nothing to refresh"
    if refresh.judge is None and config.collect.judge is None and "ppo" in config.stages:
        yield 'rm.refresh.judge is missing, and so is collect.judge: name a function, or "review" for people'
    after = refresh.freeze_after_version
    if after is not None and after < refresh.freeze_before_version:
        yield (
            f"rm.refresh.freeze_after_version = {after}, before rm.refresh.freeze_before_version = "
            f"{refresh.freeze_before_version}: no version lies between"
        )
    reasons = ("every_versions", "kl_over_nats_per_sequence", "disagreement_over", "plateau_versions")
    asked_for = config.guard.enabled and "refresh_rm" in config.guard.actions
    if not asked_for and all(getattr(refresh, name) is None for name in reasons):
        yield f"rm.refresh: no reason to refresh; set one of {', '.join(reasons)}, or guard.actions with refresh_rm"
    if not refresh.temperatures:
        yield "rm.refresh.temperatures: none"
    if refresh.plateau_versions is not None and config.reward.sources != (ModelReward(),):
        yield (
            "rm.refresh.plateau_versions with reward.sources: a plateau is seen on the reward model's own scale; use "
            "another reason"
        )
    if refresh.disagreement_over is not None and refresh.earlier_fraction == 1.0:
        yield (
            "rm.refresh.disagreement_over with rm.refresh.earlier_fraction = 1: disagreement is measured on pairs of "
            "which both answers are the policy's own; leave some"
        )


def _guard(config: RunConfig) -> Iterator[str]:
    guard, kl = config.guard, config.learner.kl
    if not guard.enabled:
        return
    limits = guard.thresholds.kl_nats_per_sequence
    first = limits.act if limits.warn is None else limits.warn
    if not isinstance(kl, FixedKl) and first is not None:
        key, target = (
            ("target_nats_per_sequence", kl.target_nats_per_sequence)
            if isinstance(kl, AdaptiveKl)
            else ("limit_nats_per_sequence", kl.limit_nats_per_sequence)
        )
        if target >= first:
            yield (
                f"learner.kl.{key} = {target:g}, not under guard.thresholds.kl_nats_per_sequence ({first:g}): the "
                "guard would speak against what β steers to; set warn and act above it"
            )
    if "raise_beta" in guard.actions and not isinstance(kl, FixedKl) and guard.beta_floor > kl.beta_max:
        yield f"guard.beta_floor = {guard.beta_floor:g}, more than learner.kl.beta_max = {kl.beta_max:g}"
    for action in ("freeze_rm", "refresh_rm"):
        if action in guard.actions and config.rm.refresh is None:
            yield f"guard.actions has {action}, but without rm.refresh the reward model stays as it is"
    watch = guard.watch
    if watch is None:
        return
    judged = watch.judge or config.collect.judge or config.evaluation.gold
    if judged is None and watch.canary is None and watch.anchor_texts == 0:
        yield "guard.watch measures nothing: no judge (guard.watch.judge), no canary, no anchor_texts"


def _times(config: RunConfig) -> Iterator[str]:
    learner, lease_s = config.learner, config.redis.lease_s
    if lease_s >= learner.task_deadline_s:
        yield (
            f"redis.lease_s = {lease_s:g}, not less than learner.task_deadline_s = {learner.task_deadline_s:g}: a task "
            "would be issued again while its lease still runs"
        )
    if learner.task_deadline_s >= learner.stall_timeout_s:
        yield (
            f"learner.task_deadline_s = {learner.task_deadline_s:g}, not less than learner.stall_timeout_s = "
            f"{learner.stall_timeout_s:g}: the run would end before a lost task is issued again"
        )


def _resources(config: RunConfig) -> Iterator[str]:
    rollout, reward, learner, ray = config.rollout, config.reward, config.learner, config.ray
    if learner.ranks > 1 and learner.gpus_per_rank not in (0.0, 1.0):
        yield (
            f"learner.gpus_per_rank = {learner.gpus_per_rank:g} with learner.ranks = {learner.ranks}: each rank takes "
            "a GPU of its own, or none"
        )
    if learner.ranks > max(1, learner.batch_size // learner.minibatches):
        yield (
            f"learner.ranks = {learner.ranks}, more than the {learner.batch_size // learner.minibatches} rollouts of a "
            "mini-batch (learner.batch_size / learner.minibatches): some ranks would have nothing to do"
        )
    if learner.optimizer_offload and not learner.on_gpu:
        yield "learner.optimizer_offload without learner.gpus_per_rank: everything is in host memory already"
    if learner.lora is not None and learner.lora.broadcast == "adapter" and learner.lora.rank > _MAX_ADAPTER_RANK:
        yield f"learner.lora.rank = {learner.lora.rank}: vLLM loads adapters of rank {_MAX_ADAPTER_RANK} at most; merge"
    if config.weights.transport == "collective" and config.placement.colocate:
        yield "weights.transport = collective with placement.colocate: on one GPU weights go through CUDA IPC; use auto"
    if learner.lora is not None and learner.lora.broadcast == "adapter" and config.weights.transport == "collective":
        yield (
            "learner.lora.broadcast = adapter with weights.transport = collective: an adapter goes through "
            "the object store; use auto"
        )
    yield from _autoscale(config)
    yield from _colocation(config)
    if rollout.gpus_per_actor and max(1.0, rollout.gpus_per_actor) != rollout.tensor_parallel_size:
        yield (
            f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size}, rollout.gpus_per_actor = "
            f"{rollout.gpus_per_actor:g}: an engine takes exactly the GPUs it is split over"
        )
    wanted = rollout.actors * rollout.cpus_per_actor + reward.workers * reward.cpus_per_worker + learner.cpus
    if config.rm.refresh is not None:
        wanted += config.rm.refresh.cpus
    if ray.address is None and ray.num_cpus is not None and wanted > ray.num_cpus:
        yield (
            f"ray.num_cpus = {ray.num_cpus}, less than the {wanted:g} that rollout actors, reward workers, the learner "
            "and a refresh of the reward model reserve: the last of them would wait for ever"
        )


def _autoscale(config: RunConfig) -> Iterator[str]:
    scale, actors = config.rollout.autoscale, config.rollout.actors
    if scale is not None and not scale.min_actors <= actors <= scale.max_actors:
        yield (
            f"rollout.actors = {actors} lies outside [rollout.autoscale.min_actors, rollout.autoscale.max_actors] = "
            f"[{scale.min_actors}, {scale.max_actors}]"
        )


def _colocation(config: RunConfig) -> Iterator[str]:
    learner, rollout = config.learner, config.rollout
    if not config.placement.colocate:
        return
    if learner.max_staleness or learner.ranks > 1 or rollout.actors > 1 or rollout.autoscale is not None:
        yield (
            f"placement.colocate takes turns on one GPU: learner.max_staleness = {learner.max_staleness} (0), "
            f"learner.ranks = {learner.ranks} (1), rollout.actors = {rollout.actors} (1), no rollout.autoscale"
        )
    if not 0.0 < learner.gpus_per_rank + rollout.gpus_per_actor <= 1.0:
        yield (
            f"placement.colocate: learner.gpus_per_rank + rollout.gpus_per_actor = "
            f"{learner.gpus_per_rank + rollout.gpus_per_actor:g}; shares of one GPU, e.g. 0.5 and 0.5"
        )
