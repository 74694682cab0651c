"""Tiny models, random rollouts and one update, for tests of the learner."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, pack_floats, pack_ids
from configs.run import FixedKl, LearnerSection, OptimizerSection
from learner.algo.normalise import ScoreNormaliser
from learner.batch import TrainBatch
from learner.critic import Critic
from learner.experience import Experience, make_experience, normalised_scores
from learner.policy import Policy
from learner.schedule import ScheduledAdamW
from learner.update import Trainable, UpdateStats, ppo_update

VOCAB = 13
SETTINGS = LearnerSection(
    batch_size=6,
    policy=OptimizerSection(learning_rate=1e-3, warmup_steps=0, decay="constant"),
    critic=OptimizerSection(learning_rate=1e-3, warmup_steps=0, decay="constant"),
    kl=FixedKl(beta=0.1),
)


def llama_config(**changes: object) -> LlamaConfig:
    sizes: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**sizes, **changes})


def new_policy(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    return Policy(LlamaForCausalLM(llama_config()))


def new_critic(seed: int = 1, *, mean: float = 0.0, std: float = 1.0) -> Critic:
    torch.manual_seed(seed)
    return Critic(LlamaForSequenceClassification(llama_config(num_labels=1)), mean=mean, std=std)


def rollouts(count: int = 6, *, seed: int = 5, drift: float = 0.3) -> list[ScoredRollout]:
    """Random answers of random lengths, with log-probabilities that are near no model's in particular."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        drawn: list[int] = torch.randint(0, VOCAB, (size,), generator=generator).tolist()
        return drawn

    made = []
    for index in range(count):
        response = ids(1, 9)
        logprobs = (-2.5 + drift * torch.randn(2, len(response), generator=generator)).tolist()
        task = PromptTask(
            task_id=f"t-{index}",
            prompt_id=f"p-{index // 2}",
            group_id=f"p-{index // 2}",
            prompt_ids_i32=pack_ids(ids(1, 5)),
            max_new_tokens=8,
            temperature=0.8,
        )
        rollout = Rollout(
            task=task,
            response_ids_i32=pack_ids(response),
            behaviour_logprobs_f32=pack_floats(logprobs[0]),
            version_runs=(VersionRun(0, 0),),
            finish_reason="length" if index == 0 else "stop",
            actor="rollout-0",
            generate_s=0.0,
        )
        reward = float(torch.randn(1, generator=generator))
        made.append(
            ScoredRollout(
                rollout=rollout,
                member_scores=(reward,),
                reward=reward,
                uncertainty=0.0,
                ref_logprobs_f32=pack_floats(logprobs[1]),
                rm_version="rm-1",
            )
        )
    return made


def experience_of(
    batch: TrainBatch, policy: Policy, critic: Critic | None, settings: LearnerSection = SETTINGS
) -> Experience:
    scores_B, _ = normalised_scores(batch, ScoreNormaliser(), score_clip=settings.score_clip)
    return make_experience(batch, policy=policy, critic=critic, scores_B=scores_B, beta=0.1, settings=settings)


def trainable(policy: Policy, critic: Critic | None, settings: LearnerSection = SETTINGS) -> Trainable:
    return Trainable(
        policy=policy,
        policy_optimiser=ScheduledAdamW(policy, section=settings.policy, total_steps=10),
        critic=critic,
        critic_optimiser=ScheduledAdamW(critic, section=settings.critic, total_steps=10) if critic else None,
    )


def update(
    experience: Experience, policy: Policy, critic: Critic | None, settings: LearnerSection = SETTINGS
) -> UpdateStats:
    return ppo_update(
        experience,
        trainable=trainable(policy, critic, settings),
        settings=settings,
        rng=torch.Generator().manual_seed(0),
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def tuned(**changes: object) -> LearnerSection:
    return SETTINGS.model_copy(update=changes)
