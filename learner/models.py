"""The models that a run's learner trains, from the directories that the offline stages left; whole or sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.errors import ModelError
from cluster.reward_models import RewardModels
from configs.run import LearnerSection, RunConfig
from learner.algo.advantages import NEEDS_CRITIC
from learner.critic import Critic
from learner.policy import Policy
from learner.ranks import Ranks
from learner.schedule import ScheduledAdamW
from learner.sharding import hollow_model, shard
from learner.update import Trainable

_M = TypeVar("_M", Policy, Critic)


def load_trainable(config: RunConfig, *, run_dir: Path, ranks: Ranks) -> Trainable:
    """Policy from sft/model, critic from the reward model's first member, and new optimisers. With a mesh, every rank
    calls it together. Raises ModelError."""
    settings = config.learner
    policy = _policy(config, run_dir, ranks)
    policy_optimiser = ScheduledAdamW(policy, section=settings.policy, total_steps=settings.steps)
    if settings.advantages not in NEEDS_CRITIC:
        return Trainable(policy=policy, policy_optimiser=policy_optimiser)
    critic = _critic(config, run_dir, ranks, vocab_size=policy.vocab_size)
    return Trainable(
        policy=policy,
        policy_optimiser=policy_optimiser,
        critic=critic,
        critic_optimiser=ScheduledAdamW(critic, section=settings.critic, total_steps=settings.steps),
    )


def learner_device(config: RunConfig) -> torch.device:
    """Ray shows a rank its own GPU alone, as the first."""
    return torch.device("cuda", 0) if config.learner.on_gpu else torch.device("cpu")


def _policy(config: RunConfig, run_dir: Path, ranks: Ranks) -> Policy:
    settings, path = config.learner, run_dir / "sft" / "model"
    options = _options(settings) | {"lora": settings.lora}
    if ranks.rank == 0:
        policy = Policy.load(path, **options)
        _tell_packing(policy, ranks)
    else:
        from transformers import AutoModelForCausalLM

        options["sequence_packing"] = _hear_packing(ranks)
        policy = Policy(hollow_model(AutoModelForCausalLM, path), **options)
    return _placed(policy, config, ranks)


def _critic(config: RunConfig, run_dir: Path, ranks: Ranks, *, vocab_size: int) -> Critic:
    # Of the first version, also on a resumed run: its shape is what counts then, the weights are the checkpoint's.
    model = RewardModels(run_dir / "rm").versions()[0]
    path, calibration = model.member_dirs[0], model.manifest.calibration
    if calibration is None:
        raise ModelError("the reward model has no calibration", got=str(model.path), do="run the rm stage again")
    options = _options(config.learner) | {"mean": calibration.mean, "std": calibration.std}
    if ranks.rank == 0:
        critic = Critic.load(path, vocab_size=vocab_size, **options)
        _tell_packing(critic, ranks)
    else:
        from transformers import AutoModelForSequenceClassification

        options["sequence_packing"] = _hear_packing(ranks)
        critic = Critic(hollow_model(AutoModelForSequenceClassification, path, num_labels=1), **options)
    return _placed(critic, config, ranks)


def _tell_packing(model: Policy | Critic, ranks: Ranks) -> None:
    """Rank 0, which alone can try its weights: whether they take packed sequences."""
    ranks.tell(b"packed" if model.packing else b"padded")


def _hear_packing(ranks: Ranks) -> bool:
    """The other ranks. This waits while rank 0 reads, however large the model is: a collective has its time-out."""
    return ranks.listen() == b"packed"


def _options(settings: LearnerSection) -> dict[str, Any]:
    return {
        "gradient_checkpointing": settings.gradient_checkpointing,
        "dtype": settings.dtype,
        "sequence_packing": settings.sequence_packing == "auto",
    }


def _placed(model: _M, config: RunConfig, ranks: Ranks) -> _M:
    """Sharded over the ranks, or whole on this one's device."""
    if ranks.mesh is None:
        # A learner that shares its GPU begins in host memory: the first turn is the engine's.
        return model if config.placement.colocate else model.to(learner_device(config))
    shard(model, ranks=ranks, dtype=config.learner.dtype, offload=config.learner.optimizer_offload)
    return model
