"""The PPO losses, per token, and the token mean that reduces them.

Shapes: everything is [B, T]; padding holds finite numbers and is masked in the reduction. The losses are per token and
the reduction takes the *global* token count, so a batch cut into micro-batches has the loss, and the gradient, of the
whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""A ratio of e²⁰ is far past any clip; more would overflow to inf and turn masked products into NaN."""


def probability_ratio(logprobs_BT: Tensor, *, prox_logprobs_BT: Tensor) -> Tensor:
    """π_θ / π_prox of each sampled token. Example: probabilities 0.06 and 0.02 give 3."""
    return (logprobs_BT - prox_logprobs_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def behaviour_weight(prox_logprobs_BT: Tensor, *, behaviour_logprobs_BT: Tensor, cap: float) -> Tensor:
    """Truncated importance weight min(π_prox / π_behaviour, cap) (Yao et al. 2025), detached.

    Multiplies the surrogate in decoupled PPO (Hilton et al. 2022; Fu et al. 2025): it corrects for samples of an older
    policy and for the engine's other arithmetic, while ratio and clip stay against the proximal policy. 1 when both
    policies agree. Example: probabilities 0.3 and 0.1, cap 2: min(3, 2) = 2.
    """
    log_ratio_BT = (prox_logprobs_BT - behaviour_logprobs_BT).detach()
    return log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def clipped_surrogate(ratio_BT: Tensor, *, advantages_BT: Tensor, clip_epsilon: float) -> Tensor:
    """PPO's objective per token (Schulman et al. 2017, eq. 7), to be *maximised*: min(ρ·A, clip(ρ, 1 ± ε)·A).

    Example: ρ = 3, A = +4, ε = 0.2: min(12, 4.8) = 4.8. ρ = 1.3, A = −3: min(−3.9, −3.6) = −3.9: the minimum is
    pessimistic, and still pushes an over-likely bad action down.
    """
    clipped_BT = ratio_BT.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon)
    return torch.min(ratio_BT * advantages_BT, clipped_BT * advantages_BT)


def is_clipped(ratio_BT: Tensor, *, advantages_BT: Tensor, clip_epsilon: float) -> Tensor:
    """1.0 where the clip stops the gradient: ρ > 1 + ε with A > 0, or ρ < 1 − ε with A < 0."""
    high_BT = (ratio_BT > 1.0 + clip_epsilon) & (advantages_BT > 0)
    low_BT = (ratio_BT < 1.0 - clip_epsilon) & (advantages_BT < 0)
    return (high_BT | low_BT).to(ratio_BT.dtype)


def clipped_value_loss(values_BT: Tensor, *, old_values_BT: Tensor, returns_BT: Tensor, value_clip: float) -> Tensor:
    """½·max((V − R)², (V_clip − R)²) per token, V_clip = V_old + clip(V − V_old, ±value_clip) (the PPO baselines of
    Dhariwal et al. 2017; Huang et al. 2024).

    Example: V = 1, V_old = 0, R = 2, clip 0.2: max((1 − 2)², (0.2 − 2)²)/2 = 3.24/2 = 1.62.
    """
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-value_clip, value_clip)
    return 0.5 * torch.max((values_BT - returns_BT).square(), (clipped_BT - returns_BT).square())


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, −Σ p·log p. [..., V] → [...]. Example: 4 equal logits: log 4 = 1.386."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def token_mean(values_BT: Tensor, *, mask_BT: Tensor, total_tokens: float) -> Tensor:
    """Σ over valid tokens / total_tokens, where total_tokens counts the whole mini-batch, not this slice of it.

    Example: slices (1, 3) and (5) of one mini-batch of 3 tokens: 4/3 + 5/3 = 3, the mean of (1, 3, 5).
    """
    return (values_BT * mask_BT).sum() / total_tokens
