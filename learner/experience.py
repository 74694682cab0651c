"""From a batch of scored rollouts to what the update trains on: steps 2–4 of a PPO step. No gradient is taken here.

Shapes: B sequences, T response tokens. KL in nats; `per_token` or `per_sequence` in every name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.errors import ConfigError, NonFiniteError
from configs.run import LearnerSection
from learner.algo.advantages import ESTIMATORS, NEEDS_CRITIC, WHITENED, Trajectories, whiten
from learner.algo.losses import behaviour_weight
from learner.algo.normalise import ScoreNormaliser
from learner.algo.rewards import kl_k1, kl_k3, penalised_scores, token_rewards
from learner.batch import TrainBatch
from learner.critic import Critic
from learner.policy import Policy
from learner.ranks import SOLO, Ranks
from learner.sharding import compute_device
from learner.share import Share, rank_share

CPU_OVERHEAD_TOKENS = 64
SHARDED_CPU_OVERHEAD_TOKENS = 256
GPU_OVERHEAD_TOKENS = 8192
"""What one more forward pass costs, in tokens of padding. On one core with 1 M parameters an update takes the same time
at 48 to 128 of them; 64 keeps padding below a tenth. A sharded model gathers its weights once more: on two ranks an
update takes a sixth less CPU time at 256 than at 64. On a GPU kernels are so fast that only much padding is worth
another launch."""


@dataclass(frozen=True)
class ExperienceStats:
    """Plain numbers of one batch, before the update."""

    score_mean: float
    """Raw."""
    score_std: float
    score_normalised_mean: float
    """Normalised and clipped, before penalties."""
    kl_nats_per_sequence: float
    """KL(π_behaviour‖π_ref), k1 summed over each answer's tokens, averaged over answers: what feeds the controller."""
    kl_nats_per_token: float
    kl_k3_nats_per_token: float
    """The same by the estimator that is never negative."""
    entropy_nats_per_token: float
    """Of the proximal policy, over the whole vocabulary."""
    response_tokens_mean: float
    truncated_fraction: float
    behaviour_weight_mean: float
    behaviour_weight_capped_fraction: float
    behaviour_gap_max_nats: float
    """Largest |log π_prox − log π_behaviour| of a token: staleness and the engine's arithmetic together."""
    value_explained_variance: float | None
    """1 − var(returns − values)/var(returns); None without a critic or where the returns do not vary."""
    value_error_ratio: float | None
    """mean((returns − values)²)/var(returns): 1 is no better than their mean. None as above."""
    tokens: int


@dataclass(frozen=True)
class Experience:
    """A batch ready for the update. Everything is detached; rows match the batch's."""

    batch: TrainBatch
    prox_logprobs_BT: Tensor
    behaviour_weight_BT: Tensor
    """min(π_prox/π_behaviour, cap)."""
    rewards_BT: Tensor
    advantages_BT: Tensor
    values_BT: Tensor | None
    returns_BT: Tensor | None
    kl_nats_per_sequence_B: Tensor
    """k1 of KL(π_behaviour‖π_ref), summed over the answer's tokens."""
    entropy_BT: Tensor
    """Of the proximal policy."""
    scores_B: Tensor
    """Normalised and clipped, before penalties."""

    def select(self, rows: Sequence[int]) -> Experience:
        """These rows, with the padding that none of them needs cut off."""
        batch = self.batch.select(rows)
        width = batch.response_ids_BT.shape[1]
        index = torch.as_tensor(rows, device=self.prox_logprobs_BT.device)

        def cut(values_BT: Tensor) -> Tensor:
            return values_BT[index, :width]

        return replace(
            self,
            batch=batch,
            prox_logprobs_BT=cut(self.prox_logprobs_BT),
            behaviour_weight_BT=cut(self.behaviour_weight_BT),
            rewards_BT=cut(self.rewards_BT),
            advantages_BT=cut(self.advantages_BT),
            values_BT=None if self.values_BT is None else cut(self.values_BT),
            returns_BT=None if self.returns_BT is None else cut(self.returns_BT),
            kl_nats_per_sequence_B=self.kl_nats_per_sequence_B[index],
            entropy_BT=cut(self.entropy_BT),
            scores_B=self.scores_B[index],
        )


def normalised_scores(
    batch: TrainBatch, normaliser: ScoreNormaliser, *, score_clip: float
) -> tuple[Tensor, ScoreNormaliser]:
    """([B] normalised and clipped scores, the normaliser that has seen them). Each row by its own reward-model version,
    whose statistics take in this batch first. Raises NonFiniteError on a score that is NaN or infinite."""
    if not bool(torch.isfinite(batch.score_B).all()):
        bad = [
            task for task, score in zip(batch.task_ids, batch.score_B.tolist(), strict=True) if not math.isfinite(score)
        ]
        raise NonFiniteError("a score is not finite", got=f"tasks {bad[:3]}", do="look at the reward service's log")
    scores_B = torch.zeros(len(batch), dtype=torch.float32, device=batch.score_B.device)
    for rm_version in sorted(set(batch.rm_versions)):
        rows = [row for row, version in enumerate(batch.rm_versions) if version == rm_version]
        raw_R = batch.score_B[rows]
        normaliser = normaliser.observe(rm_version, raw_R.tolist())
        scores_B[rows] = normaliser.normalise(rm_version, raw_R, clip=score_clip).float()
    return scores_B, normaliser


def make_experience(
    batch: TrainBatch,
    *,
    policy: Policy,
    critic: Critic | None,
    scores_B: Tensor,
    beta: float,
    settings: LearnerSection,
    ranks: Ranks = SOLO,
) -> Experience:
    """Rewards, values, advantages, returns and proximal log-probabilities of a batch.

    scores_B: what `normalised_scores` gave. The policy's forward here *is* the proximal policy: call it before the
    update. Each rank runs its share of the rows through the models, and every rank gets the whole result. Raises
    ConfigError when the estimator needs a critic or groups that are not there, NonFiniteError when a model's output is
    NaN or infinite.
    """
    if settings.advantages in NEEDS_CRITIC and critic is None:
        raise ConfigError(f"learner.advantages {settings.advantages} needs a critic", do="give one, or use reinforce")
    device = compute_device(policy)
    batch, scores_B = batch.to(device), scores_B.to(device)
    mask_BT = batch.mask_BT
    used_critic = critic if settings.advantages in NEEDS_CRITIC else None
    share = share_of(batch, settings=settings, ranks=ranks)
    prox_BT, entropy_BT, values_BT = _forward(batch, policy, used_critic, share, ranks)
    rewards_BT = token_rewards(
        batch.behaviour_logprobs_BT,
        ref_logprobs_BT=batch.ref_logprobs_BT,
        mask_BT=mask_BT,
        beta=beta,
        scores_B=penalised_scores(
            scores_B,
            truncated_B=batch.truncated_B,
            response_tokens_B=batch.response_tokens_B,
            missing_eos_penalty=settings.missing_eos_penalty,
            length_penalty_per_token=settings.length_penalty_per_token,
        ),
    )
    advantages_BT, returns_BT = _advantages(
        Trajectories(
            rewards_BT=rewards_BT,
            mask_BT=mask_BT,
            values_BT=values_BT,
            group_B=batch.group_B,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
        ),
        settings.advantages,
    )
    kl_BT = kl_k1(batch.behaviour_logprobs_BT, other_logprobs_BT=batch.ref_logprobs_BT) * mask_BT
    return Experience(
        batch=batch,
        prox_logprobs_BT=prox_BT,
        behaviour_weight_BT=behaviour_weight(
            prox_BT, behaviour_logprobs_BT=batch.behaviour_logprobs_BT, cap=settings.behaviour_weight_cap
        ),
        rewards_BT=rewards_BT,
        # After whitening, so that a row that counts less does not make the others count more. The critic still learns
        # from it: its score is uncertain, not absent.
        advantages_BT=advantages_BT * batch.weight_B[:, None],
        values_BT=values_BT,
        returns_BT=returns_BT,
        kl_nats_per_sequence_B=kl_BT.sum(1),
        entropy_BT=entropy_BT,
        scores_B=scores_B,
    )


def _advantages(trajectories: Trajectories, name: str) -> tuple[Tensor, Tensor | None]:
    """(advantages_BT, whitened where the estimator sets no scale; returns_BT | None)."""
    try:
        advantages_BT, returns_BT = ESTIMATORS[name](trajectories)
    except ValueError as error:
        raise ConfigError(
            f"learner.advantages {name} cannot use this batch",
            got=str(error),
            do="set learner.samples_per_prompt to 2 or more",
        ) from error
    if name in WHITENED:
        advantages_BT = whiten(advantages_BT, mask_BT=trajectories.mask_BT)
    return advantages_BT, returns_BT


def share_of(batch: TrainBatch, *, settings: LearnerSection, ranks: Ranks) -> Share:
    """This rank's rows of the batch, in micro-batches that fit the token budget."""
    overhead = CPU_OVERHEAD_TOKENS if ranks.mesh is None else SHARDED_CPU_OVERHEAD_TOKENS
    if batch.response_tokens_B.device.type != "cpu":
        overhead = GPU_OVERHEAD_TOKENS
    return rank_share(
        batch.sequence_tokens,
        rank=ranks.rank,
        ranks=ranks.size,
        token_budget=settings.token_budget,
        overhead_tokens=overhead,
    )


@torch.no_grad()
def _forward(
    batch: TrainBatch, policy: Policy, critic: Critic | None, share: Share, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(proximal logprobs_BT, entropy_BT, values_BT | None), micro-batch by micro-batch, of all ranks."""
    outputs_OBT = torch.zeros(3, *batch.behaviour_logprobs_BT.shape, device=batch.behaviour_logprobs_BT.device)
    for rows in share.slots:
        part = batch.select(rows or share.idle_rows)
        width = part.response_ids_BT.shape[1]
        logprobs_BT, entropies_BT = policy.response_logprobs(part)
        predicted_BT = critic.values(part) if critic is not None else None
        if rows:
            outputs_OBT[0, rows, :width], outputs_OBT[1, rows, :width] = logprobs_BT, entropies_BT
            if predicted_BT is not None:
                outputs_OBT[2, rows, :width] = predicted_BT
    # Every row is some one rank's and zero on the others, so the sum is exact.
    prox_BT, entropy_BT, values_BT = ranks.sum(outputs_OBT).unbind()
    for what, output_BT in (("policy's log-probabilities", prox_BT), ("critic's values", values_BT)):
        if not bool(torch.isfinite(output_BT).all()):
            raise NonFiniteError(
                f"the {what} are not finite",
                got=f"on a batch of {len(batch)}",
                do="roll back to the last checkpoint and lower the learning rate",
            )
    return prox_BT, entropy_BT, None if critic is None else values_BT


def experience_stats(experience: Experience, *, settings: LearnerSection) -> ExperienceStats:
    """The batch in plain numbers, for the KL controller, the guard and the metrics."""
    batch, mask_BT = experience.batch, experience.batch.mask_BT
    tokens = float(mask_BT.sum())

    def per_token(values_BT: Tensor) -> float:
        return float((values_BT * mask_BT).sum()) / tokens

    k3_BT = kl_k3(batch.behaviour_logprobs_BT, other_logprobs_BT=batch.ref_logprobs_BT)
    explained_variance, error_ratio = _value_fit(experience)
    gap_BT = (experience.prox_logprobs_BT - batch.behaviour_logprobs_BT).abs() * mask_BT
    return ExperienceStats(
        score_mean=float(batch.score_B.mean()),
        score_std=float(batch.score_B.std(correction=0)),
        score_normalised_mean=float(experience.scores_B.mean()),
        kl_nats_per_sequence=float(experience.kl_nats_per_sequence_B.mean()),
        kl_nats_per_token=float(experience.kl_nats_per_sequence_B.sum()) / tokens,
        kl_k3_nats_per_token=per_token(k3_BT),
        entropy_nats_per_token=per_token(experience.entropy_BT),
        response_tokens_mean=tokens / len(batch),
        truncated_fraction=float(batch.truncated_B.float().mean()),
        behaviour_weight_mean=per_token(experience.behaviour_weight_BT),
        behaviour_weight_capped_fraction=per_token(
            (experience.behaviour_weight_BT >= settings.behaviour_weight_cap).float()
        ),
        behaviour_gap_max_nats=float(gap_BT.max()),
        value_explained_variance=explained_variance,
        value_error_ratio=error_ratio,
        tokens=int(tokens),
    )


def _value_fit(experience: Experience) -> tuple[float | None, float | None]:
    """(explained variance, error ratio) of the values before the update."""
    if experience.values_BT is None or experience.returns_BT is None:
        return None, None
    valid_BT = experience.batch.mask_BT.bool()
    returns_N, values_N = experience.returns_BT[valid_BT], experience.values_BT[valid_BT]
    variance, errors_N = float(returns_N.var(correction=0)), returns_N - values_N
    if variance <= 1e-12:
        return None, None
    return 1.0 - float(errors_N.var(correction=0)) / variance, float(errors_N.square().mean()) / variance
