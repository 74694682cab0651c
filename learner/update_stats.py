"""What one update did, in plain numbers: sums while it runs, means at its end.

All sums are over every rank's tokens, so every rank holds the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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
    ratio_tail_fraction: float
    """Tokens whose probability the update had changed by more than a factor of two when it trained on them."""
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
    """Of each rank."""
    padding_share: float
    learning_rate: float


@dataclass
class UpdateSums:
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

    def summary(self, *, step_kl_token: float, step_kl_sequence: float, learning_rate: float) -> UpdateStats:
        """The means. The two KL figures are those of `learner.update.policy_movement`."""
        return UpdateStats(
            policy_loss=self._policy_mean("loss"),
            value_loss=self._value_mean("value_loss"),
            entropy_nats_per_token=self._policy_mean("entropy"),
            clip_fraction=self._policy_mean("clipped"),
            value_clip_fraction=self._value_mean("value_clipped"),
            ratio_mean=self._policy_mean("ratio"),
            ratio_max=self.ratio_max,
            ratio_tail_fraction=self._policy_mean("tail"),
            step_kl_nats_per_token=step_kl_token,
            step_kl_nats_per_sequence=step_kl_sequence,
            update_kl_k1_nats_per_token=self._policy_mean("k1"),
            update_kl_k3_nats_per_token=self._policy_mean("k3"),
            grad_norm_policy=_mean(self.policy_norms) or 0.0,
            grad_norm_critic=_mean(self.critic_norms),
            policy_steps=len(self.policy_norms),
            critic_steps=len(self.critic_norms),
            stopped_early=self.stopped_early,
            micro_batches=self.micro_batches,
            padding_share=_mean(self.padding) or 0.0,
            learning_rate=learning_rate,
        )

    def _policy_mean(self, name: str) -> float:
        return self.sums[name] / self.tokens

    def _value_mean(self, name: str) -> float | None:
        return self.sums[name] / self.value_tokens if name in self.sums and self.value_tokens else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
