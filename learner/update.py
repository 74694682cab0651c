"""The PPO update: epochs of mini-batches over one batch of experience, each mini-batch one optimiser step.

A mini-batch is cut into micro-batches that fit the token budget; every loss is divided by the mini-batch's own token
count, so the cut changes neither loss nor gradient. Nothing that is not finite is ever stepped on.
Shapes: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
from learner.batch import micro_batches, padding_share
from learner.critic import Critic
from learner.experience import Experience, overhead_tokens
from learner.policy import Policy
from learner.schedule import ScheduledAdamW

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

    def set_step(self, step: int) -> float:
        """Learning rates of training step `step` (from 0); returns the policy's."""
        if self.critic_optimiser is not None:
            self.critic_optimiser.set_step(step)
        return self.policy_optimiser.set_step(step)


@dataclass(frozen=True)
class UpdateStats:
    """Plain numbers of one update, averaged over all tokens trained on unless they say otherwise."""

    policy_loss: float
    value_loss: float | None
    entropy_nats_per_token: float
    clip_fraction: float
    value_clip_fraction: float | None
    ratio_mean: float
    ratio_max: float
    step_kl_nats_per_token: float
    """KL(π_prox‖π_new) after the last step: k3, averaged over the tokens of a quarter of the batch."""
    step_kl_nats_per_sequence: float
    update_kl_k1_nats_per_token: float
    update_kl_k3_nats_per_token: float
    """The same movement, averaged over the update's mini-batches as they were trained on."""
    grad_norm_policy: float
    """Before clipping; mean over optimiser steps."""
    grad_norm_critic: float | None
    policy_steps: int
    critic_steps: int
    stopped_early: bool
    micro_batches: int
    padding_share: float
    learning_rate: float


@dataclass
class _Sums:
    """Running sums over an update; means are taken once, at the end."""

    tokens: float = 0.0
    value_tokens: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    ratio_max: float = 0.0
    policy_norms: list[float] = field(default_factory=list)
    critic_norms: list[float] = field(default_factory=list)
    padding: list[float] = field(default_factory=list)
    micro_batches: int = 0
    stopped_early: bool = False

    def add(self, **sums: float) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def mean(self, name: str, count: float) -> float | None:
        return self.sums[name] / count if name in self.sums and count else None


def ppo_update(
    experience: Experience, *, trainable: Trainable, settings: LearnerSection, rng: torch.Generator
) -> UpdateStats:
    """Train policy and critic on one batch: `epochs` × `minibatches` optimiser steps, at most.

    When a mini-batch shows that the policy is further than max_step_kl_nats_per_token (k3) from the proximal policy,
    that mini-batch's policy gradient is discarded and the policy is done; the critic's regression goes on. `rng` (CPU)
    orders the rows. Raises NonFiniteError, before any step is taken on it, when a loss or gradient is NaN or infinite;
    the weights are then those of the last good step.
    """
    if (experience.returns_BT is not None) != (trainable.critic is not None):
        raise ConfigError(
            "experience and models do not match",
            got=f"returns {experience.returns_BT is not None}, critic {trainable.critic is not None}",
            do="give a critic exactly where learner.advantages is gae",
        )
    sums = _Sums()
    rows_total = len(experience.batch)
    for _ in range(settings.epochs):
        order = torch.randperm(rows_total, generator=rng)
        for chunk in order.tensor_split(min(settings.minibatches, rows_total)):
            _train_on(experience.select(chunk.tolist()), trainable, settings, sums)
    movement_rows = max(min(rows_total, _MOVEMENT_MIN_ROWS), rows_total // _MOVEMENT_SHARE)
    sample = torch.randperm(rows_total, generator=rng)[:movement_rows].tolist()
    step_kl_token, step_kl_sequence = policy_movement(experience.select(sample), trainable.policy, settings=settings)
    return _summary(sums, step_kl_token, step_kl_sequence, trainable.policy_optimiser.learning_rate)


@torch.no_grad()
def policy_movement(experience: Experience, policy: Policy, *, settings: LearnerSection) -> tuple[float, float]:
    """KL(π_prox‖π) in nats (per token, per sequence): k3 on the batch's tokens under the policy as it is now."""
    batch = experience.batch
    total = 0.0
    for rows in micro_batches(
        batch.sequence_tokens, token_budget=settings.token_budget, overhead_tokens=overhead_tokens(policy.device)
    ):
        part = experience.select(rows)
        logprobs_BT, _ = policy.response_logprobs(part.batch)
        k3_BT = kl_k3(part.prox_logprobs_BT, other_logprobs_BT=logprobs_BT)
        total += float((k3_BT * part.batch.mask_BT).sum())
    return total / float(batch.mask_BT.sum()), total / len(batch)


def _train_on(minibatch: Experience, trainable: Trainable, settings: LearnerSection, sums: _Sums) -> None:
    """One optimiser step of each model, or of the critic alone once the policy has moved far enough."""
    lengths = minibatch.batch.sequence_tokens
    groups = micro_batches(
        lengths, token_budget=settings.token_budget, overhead_tokens=overhead_tokens(trainable.policy.device)
    )
    sums.micro_batches += len(groups)
    sums.padding.append(padding_share(lengths, groups=groups))
    parts = [minibatch.select(rows) for rows in groups]
    tokens = float(minibatch.batch.mask_BT.sum())
    step_policy, policy_norm = False, 0.0
    try:
        if not sums.stopped_early:
            step_policy, policy_norm = _policy_gradient(parts, trainable, settings, sums)
        critic_norm = None
        if trainable.critic is not None and trainable.critic_optimiser is not None:
            critic_norm = _critic_gradient(parts, trainable.critic, trainable.critic_optimiser, settings, sums)
            sums.value_tokens += tokens
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


def _policy_gradient(
    parts: Sequence[Experience], trainable: Trainable, settings: LearnerSection, sums: _Sums
) -> tuple[bool, float]:
    """Accumulate the policy's gradient. (whether to step on it, its norm before clipping)."""
    total_tokens = sum(float(part.batch.mask_BT.sum()) for part in parts)
    measured: dict[str, Tensor] = {}
    ratio_max = torch.zeros((), device=trainable.policy.device)
    for part in parts:
        loss, terms, part_ratio_max = _policy_loss(part, trainable.policy, settings, total_tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        ratio_max = torch.maximum(ratio_max, part_ratio_max)
        for name, value in terms.items():
            measured[name] = measured[name] + value if name in measured else value
    totals = {name: float(value) for name, value in measured.items()}
    _require_finite("policy loss", totals["loss"], parts)
    sums.tokens += total_tokens
    sums.ratio_max = max(sums.ratio_max, float(ratio_max))
    sums.add(**totals)
    if totals["k3"] / total_tokens > settings.max_step_kl_nats_per_token:
        sums.stopped_early = True
        return False, 0.0
    norm = float(trainable.policy_optimiser.clip())
    _require_finite("policy gradient", norm, parts)
    return True, norm


def _policy_loss(
    part: Experience, policy: Policy, settings: LearnerSection, total_tokens: float
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(loss of this slice, sums over its tokens, largest ratio)."""
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
            "clipped": is_clipped(ratio_BT, advantages_BT=part.advantages_BT, clip_epsilon=settings.clip_epsilon),
            "k1": kl_k1(part.prox_logprobs_BT, other_logprobs_BT=logprobs_BT),
            "k3": kl_k3(part.prox_logprobs_BT, other_logprobs_BT=logprobs_BT),
            "entropy": entropy_BT,
        }
        terms = {name: (values_BT * mask_BT).sum() for name, values_BT in per_token.items()}
        return loss, terms, (ratio_BT * mask_BT).max()


def _critic_gradient(
    parts: Sequence[Experience], critic: Critic, optimiser: ScheduledAdamW, settings: LearnerSection, sums: _Sums
) -> float:
    """Accumulate the critic's gradient; its norm before clipping."""
    total_tokens = sum(float(part.batch.mask_BT.sum()) for part in parts)
    loss_sum = torch.zeros((), device=critic.device)
    clipped_sum = torch.zeros((), device=critic.device)
    for part in parts:
        if part.values_BT is None or part.returns_BT is None:
            raise ConfigError("a critic needs values and returns", do="use learner.advantages gae")
        mask_BT = part.batch.mask_BT
        values_BT = critic.values(part.batch)
        loss_BT = clipped_value_loss(
            values_BT, old_values_BT=part.values_BT, returns_BT=part.returns_BT, value_clip=settings.value_clip
        )
        loss = token_mean(loss_BT, mask_BT=mask_BT, total_tokens=total_tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            moved_BT = (values_BT - part.values_BT).abs() > settings.value_clip
            loss_sum += (loss_BT * mask_BT).sum()
            clipped_sum += (moved_BT * mask_BT).sum()
    _require_finite("value loss", float(loss_sum), parts)
    norm = float(optimiser.clip())
    _require_finite("critic gradient", norm, parts)
    sums.add(value_loss=float(loss_sum), value_clipped=float(clipped_sum))
    return norm


def _require_finite(what: str, value: float, parts: Sequence[Experience]) -> None:
    if not torch.isfinite(torch.tensor(value)):
        raise NonFiniteError(
            f"the {what} is not finite",
            got=f"{value} on {sum(len(part.batch) for part in parts)} rollouts; no step was taken on it",
            do="roll back to the last checkpoint; lower the learning rate or learner.clip_epsilon",
        )


def _summary(sums: _Sums, step_kl_token: float, step_kl_sequence: float, learning_rate: float) -> UpdateStats:
    def policy_mean(name: str) -> float:
        return sums.sums[name] / sums.tokens

    def norm(norms: list[float]) -> float | None:
        return sum(norms) / len(norms) if norms else None

    return UpdateStats(
        policy_loss=policy_mean("loss"),
        value_loss=sums.mean("value_loss", sums.value_tokens),
        entropy_nats_per_token=policy_mean("entropy"),
        clip_fraction=policy_mean("clipped"),
        value_clip_fraction=sums.mean("value_clipped", sums.value_tokens),
        ratio_mean=policy_mean("ratio"),
        ratio_max=sums.ratio_max,
        step_kl_nats_per_token=step_kl_token,
        step_kl_nats_per_sequence=step_kl_sequence,
        update_kl_k1_nats_per_token=policy_mean("k1"),
        update_kl_k3_nats_per_token=policy_mean("k3"),
        grad_norm_policy=norm(sums.policy_norms) or 0.0,
        grad_norm_critic=norm(sums.critic_norms),
        policy_steps=len(sums.policy_norms),
        critic_steps=len(sums.critic_norms),
        stopped_early=sums.stopped_early,
        micro_batches=sums.micro_batches,
        padding_share=sum(sums.padding) / len(sums.padding),
        learning_rate=learning_rate,
    )
