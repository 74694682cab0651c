"""The PPO update: epochs of mini-batches over one batch of experience, each mini-batch one optimiser step.

A mini-batch's rows are shared out to the ranks, and each rank's share is cut into micro-batches that fit the token
budget. Every loss is divided by the whole mini-batch's token count, so neither changes loss or gradient. Every branch
is taken on numbers summed over all ranks, so all ranks take the same. Nothing that is not finite is ever stepped on.
Shapes: B sequences, T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from cluster.errors import ConfigError, NonFiniteError
from configs.run import LearnerSection
from learner.algo.losses import (
    clipped_surrogate,
    clipped_value_loss,
    is_clipped,
    probability_ratio,
    token_mean,
)
from learner.algo.rewards import kl_k1, kl_k3
from learner.critic import Critic
from learner.experience import Experience, share_of
from learner.policy import Policy
from learner.ranks import SOLO, Ranks
from learner.schedule import ScheduledAdamW
from learner.share import Share
from learner.update_stats import UpdateStats as UpdateStats
from learner.update_stats import UpdateSums

_MOVEMENT_SHARE: Final = 4
_MOVEMENT_MIN_ROWS: Final = 8
"""The movement after the last step is measured on a quarter of the batch: one forward pass, a twelfth of the update."""


@dataclass(frozen=True)
class Trainable:
    """The two models under training and their optimisers. No critic: an estimator that needs none."""

    policy: Policy
    policy_optimiser: ScheduledAdamW
    critic: Critic | None = None
    critic_optimiser: ScheduledAdamW | None = None

    def set_step(self, step: int, *, scale: float = 1.0) -> float:
        """Learning rates of training step `step` (from 0), times `scale`; returns the policy's."""
        if self.critic_optimiser is not None:
            self.critic_optimiser.set_step(step, scale=scale)
        return self.policy_optimiser.set_step(step, scale=scale)


@dataclass(frozen=True)
class _Minibatch:
    """What one optimiser step is taken on; this rank's share of it is worked on."""

    experience: Experience
    share: Share
    ranks: Ranks
    tokens: float
    """Of the whole mini-batch."""

    def parts(self) -> Iterator[tuple[Experience, float]]:
        """(micro-batch, its weight). The weight makes up for sharded models' gradients being averaged over ranks; it
        is 0 for a micro-batch that only keeps step with the other ranks."""
        for rows in self.share.slots:
            yield self.experience.select(rows or self.share.idle_rows), float(self.ranks.size) if rows else 0.0


def ppo_update(
    experience: Experience,
    *,
    trainable: Trainable,
    settings: LearnerSection,
    rng: torch.Generator,
    ranks: Ranks = SOLO,
) -> UpdateStats:
    """Train policy and critic on one batch: `epochs` × `minibatches` optimiser steps, at most.

    When a mini-batch shows that the policy is further than max_step_kl_nats_per_token (k3) from the proximal policy,
    that mini-batch's policy gradient is discarded and the policy is done; the critic's regression goes on. `rng` (CPU,
    in the same state on every rank) orders the rows. Raises NonFiniteError, before any step is taken on it, when a loss
    or gradient is NaN or infinite; the weights are then those of the last good step.
    """
    if (experience.returns_BT is not None) != (trainable.critic is not None):
        raise ConfigError(
            "experience and models do not match",
            got=f"returns {experience.returns_BT is not None}, critic {trainable.critic is not None}",
            do="give a critic exactly where learner.advantages is gae",
        )
    sums = UpdateSums()
    rows_total = len(experience.batch)
    for _ in range(settings.epochs):
        order = torch.randperm(rows_total, generator=rng)
        for chunk in order.tensor_split(min(settings.minibatches, rows_total)):
            minibatch = _minibatch(experience.select(chunk.tolist()), settings, ranks)
            sums.micro_batches += len(minibatch.share.slots)
            sums.padding.append(minibatch.share.padding_share)
            _train_on(minibatch, trainable, settings, sums)
    movement_rows = max(min(rows_total, _MOVEMENT_MIN_ROWS), rows_total // _MOVEMENT_SHARE)
    sample = torch.randperm(rows_total, generator=rng)[:movement_rows].tolist()
    step_kl_token, step_kl_sequence = policy_movement(
        experience.select(sample), trainable.policy, settings=settings, ranks=ranks
    )
    return sums.summary(
        step_kl_token=step_kl_token,
        step_kl_sequence=step_kl_sequence,
        learning_rate=trainable.policy_optimiser.learning_rate,
    )


@torch.no_grad()
def policy_movement(
    experience: Experience, policy: Policy, *, settings: LearnerSection, ranks: Ranks = SOLO
) -> tuple[float, float]:
    """KL(π_prox‖π) in nats (per token, per sequence): k3 on the batch's tokens under the policy as it is now."""
    minibatch = _minibatch(experience, settings, ranks)
    total = torch.zeros((), dtype=torch.float64, device=experience.prox_logprobs_BT.device)
    for part, weight in minibatch.parts():
        logprobs_BT, _ = policy.response_logprobs(part.batch)
        if weight:
            k3_BT = kl_k3(part.prox_logprobs_BT, other_logprobs_BT=logprobs_BT)
            total += (k3_BT * part.batch.mask_BT).sum()
    k3_sum = float(ranks.sum(total))
    return k3_sum / minibatch.tokens, k3_sum / len(experience.batch)


def _minibatch(experience: Experience, settings: LearnerSection, ranks: Ranks) -> _Minibatch:
    return _Minibatch(
        experience=experience,
        share=share_of(experience.batch, settings=settings, ranks=ranks),
        ranks=ranks,
        tokens=float(experience.batch.response_tokens_B.sum()),
    )


def _train_on(minibatch: _Minibatch, trainable: Trainable, settings: LearnerSection, sums: UpdateSums) -> None:
    """One optimiser step of each model, or of the critic alone once the policy has moved far enough."""
    step_policy, policy_norm = False, 0.0
    try:
        if not sums.stopped_early:
            step_policy, policy_norm = _policy_gradient(minibatch, trainable, settings, sums)
        critic_norm = None
        if trainable.critic is not None and trainable.critic_optimiser is not None:
            critic_norm = _critic_gradient(minibatch, trainable.critic, trainable.critic_optimiser, settings, sums)
            sums.value_tokens += minibatch.tokens
        if step_policy:
            trainable.policy_optimiser.step()
            sums.policy_norms.append(policy_norm)
        if critic_norm is not None and trainable.critic_optimiser is not None:
            trainable.critic_optimiser.step()
            sums.critic_norms.append(critic_norm)
    finally:
        trainable.policy_optimiser.zero_grad()
        if trainable.critic_optimiser is not None:
            trainable.critic_optimiser.zero_grad()


_POLICY_TERMS: Final = ("loss", "ratio", "tail", "clipped", "k1", "k3", "entropy")
_TAIL_NATS: Final = math.log(2.0)


def _policy_gradient(
    minibatch: _Minibatch, trainable: Trainable, settings: LearnerSection, sums: UpdateSums
) -> tuple[bool, float]:
    """Accumulate the policy's gradient. (whether to step on it, its norm before clipping)."""
    device = minibatch.experience.prox_logprobs_BT.device
    measured = torch.zeros(len(_POLICY_TERMS), dtype=torch.float64, device=device)
    ratio_max = torch.zeros((), device=device)
    for part, weight in minibatch.parts():
        loss, terms, part_ratio_max = _policy_loss(part, trainable.policy, settings, minibatch.tokens)
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        if weight:
            ratio_max = torch.maximum(ratio_max, part_ratio_max)
            measured += terms
    totals = dict(zip(_POLICY_TERMS, minibatch.ranks.sum(measured).tolist(), strict=True))
    _require_finite("policy loss", totals["loss"], minibatch)
    sums.tokens += minibatch.tokens
    sums.ratio_max = max(sums.ratio_max, float(minibatch.ranks.max(ratio_max)))
    sums.add(**totals)
    if totals["k3"] / minibatch.tokens > settings.max_step_kl_nats_per_token:
        sums.stopped_early = True
        return False, 0.0
    norm = float(trainable.policy_optimiser.clip())
    _require_finite("policy gradient", norm, minibatch)
    return True, norm


def _policy_loss(
    part: Experience, policy: Policy, settings: LearnerSection, total_tokens: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss of this slice, sums over its tokens in the order of _POLICY_TERMS, largest ratio)."""
    mask_BT = part.batch.mask_BT
    logprobs_BT, entropy_BT = policy.response_logprobs(part.batch, entropy_grad=settings.entropy_bonus > 0)
    ratio_BT = probability_ratio(logprobs_BT, prox_logprobs_BT=part.prox_logprobs_BT)
    objective_BT = part.behaviour_weight_BT * clipped_surrogate(
        ratio_BT, advantages_BT=part.advantages_BT, clip_epsilon=settings.clip_epsilon
    )
    if settings.entropy_bonus > 0:
        objective_BT = objective_BT + settings.entropy_bonus * entropy_BT
    loss = -token_mean(objective_BT, mask_BT=mask_BT, total_tokens=total_tokens)
    with torch.no_grad():
        per_token = {
            "loss": -objective_BT,
            "ratio": ratio_BT,
            "tail": ((logprobs_BT - part.prox_logprobs_BT).abs() > _TAIL_NATS).double(),
            "clipped": is_clipped(ratio_BT, advantages_BT=part.advantages_BT, clip_epsilon=settings.clip_epsilon),
            "k1": kl_k1(part.prox_logprobs_BT, other_logprobs_BT=logprobs_BT),
            "k3": kl_k3(part.prox_logprobs_BT, other_logprobs_BT=logprobs_BT),
            "entropy": entropy_BT,
        }
        terms = torch.stack([(per_token[name] * mask_BT).sum() for name in _POLICY_TERMS])
        return loss, terms, (ratio_BT * mask_BT).max()


def _critic_gradient(
    minibatch: _Minibatch, critic: Critic, optimiser: ScheduledAdamW, settings: LearnerSection, sums: UpdateSums
) -> float:
    """Accumulate the critic's gradient; its norm before clipping."""
    measured = torch.zeros(2, dtype=torch.float64, device=minibatch.experience.prox_logprobs_BT.device)
    for part, weight in minibatch.parts():
        if part.values_BT is None or part.returns_BT is None:
            raise ConfigError("a critic needs values and returns", do="use learner.advantages gae")
        mask_BT = part.batch.mask_BT
        values_BT = critic.values(part.batch)
        loss_BT = clipped_value_loss(
            values_BT, old_values_BT=part.values_BT, returns_BT=part.returns_BT, value_clip=settings.value_clip
        )
        loss = token_mean(loss_BT, mask_BT=mask_BT, total_tokens=minibatch.tokens)
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        if weight:
            moved_BT = (values_BT.detach() - part.values_BT).abs() > settings.value_clip
            measured += torch.stack([(loss_BT.detach() * mask_BT).sum(), (moved_BT * mask_BT).sum()])
    value_loss, value_clipped = minibatch.ranks.sum(measured).tolist()
    _require_finite("value loss", value_loss, minibatch)
    norm = float(optimiser.clip())
    _require_finite("critic gradient", norm, minibatch)
    sums.add(value_loss=value_loss, value_clipped=value_clipped)
    return norm


def _require_finite(what: str, value: float, minibatch: _Minibatch) -> None:
    if not torch.isfinite(torch.tensor(value)):
        raise NonFiniteError(
            f"the {what} is not finite",
            got=f"{value} on {len(minibatch.experience.batch)} rollouts; no step was taken on it",
            do="roll back to the last checkpoint; lower the learning rate or learner.clip_epsilon",
        )
