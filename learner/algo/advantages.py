"""Advantage estimators behind one call: `ESTIMATORS[name](trajectories) -> (advantages_BT, returns_BT | None)`.

Shapes: B sequences, T response tokens. All results are 0 where the mask is 0. `returns_BT` are the critic's targets;
None from the estimators that need no critic. An answer is an episode: nothing follows its last valid token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectories:
    """What any estimator may read.

    rewards_BT: reward of each response token (KL penalty and score). mask_BT: 1.0 on valid tokens, else 0.0.
    values_BT: the critic's value of the state *before* each token; only `gae` needs it. group_B: integer group of each
    sequence (answers to one prompt); only the group estimators need it.
    """

    rewards_BT: Tensor
    mask_BT: Tensor
    values_BT: Tensor | None = None
    group_B: Tensor | None = None
    gamma: float = 1.0
    gae_lambda: float = 0.95


Estimate = tuple[Tensor, Tensor | None]


def gae(trajectories: Trajectories) -> Estimate:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), recursive form:

        δ_t = r_t + γ·V_{t+1} − V_t          V after the last valid token is 0
        A_t = δ_t + γ·λ·A_{t+1}              returns_t = A_t + V_t

    Example: rewards (0, 1), values (0.5, 0.6), γ = 1, λ = 0.5. δ = (0 + 0.6 − 0.5, 1 − 0.6) = (0.1, 0.4),
    A = (0.1 + 0.5·0.4, 0.4) = (0.3, 0.4), returns = (0.8, 1.0).

    Raises ValueError without values.
    """
    if trajectories.values_BT is None:
        raise ValueError("gae needs values_BT")
    mask_BT = trajectories.mask_BT
    values_BT = trajectories.values_BT * mask_BT
    rewards_BT = trajectories.rewards_BT * mask_BT
    next_values_BT = torch.zeros_like(values_BT)
    next_values_BT[:, :-1] = values_BT[:, 1:]
    deltas_BT = (rewards_BT + trajectories.gamma * next_values_BT - values_BT) * mask_BT
    advantages_BT = _discounted_sums(deltas_BT, mask_BT, trajectories.gamma * trajectories.gae_lambda)
    return advantages_BT, advantages_BT + values_BT


def group_relative(trajectories: Trajectories) -> Estimate:
    """Group-relative advantages (Shao et al. 2024, GRPO): (R_b − mean) / std over the answers to one prompt, the same
    for every token of an answer. R_b = Σ_t r_{b,t}, undiscounted; std is the population's.

    Example: a group with R = (1, 3): mean 2, std 1, advantages −1 and +1.

    An answer left alone in its group, or a group of equal returns, says nothing: advantage 0.
    Raises ValueError without groups, or when no group has two answers.
    """
    returns_B, inverse_B, count_G = _grouped(trajectories)
    mean_B = _group_sums(returns_B, inverse_B, count_G)[inverse_B] / count_G[inverse_B]
    centred_B = returns_B - mean_B
    variance_B = _group_sums(centred_B.square(), inverse_B, count_G)[inverse_B] / count_G[inverse_B]
    std_B = variance_B.sqrt()
    advantages_B = torch.where(std_B > 1e-6, centred_B / std_B.clamp(min=1e-6), torch.zeros_like(centred_B))
    return advantages_B[:, None] * trajectories.mask_BT, None


def leave_one_out(trajectories: Trajectories) -> Estimate:
    """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024): R_b − mean of the *other* answers' R in the
    group, the same for every token of an answer. R_b = Σ_t r_{b,t}, undiscounted.

    Example: a group with R = (1, 2, 6): advantages 1 − 4 = −3, 2 − 3.5 = −1.5, 6 − 1.5 = 4.5.

    An answer left alone in its group has no baseline: advantage 0.
    Raises ValueError without groups, or when no group has two answers.
    """
    returns_B, inverse_B, count_G = _grouped(trajectories)
    others_B = (count_G[inverse_B] - 1.0).clamp(min=1.0)
    baseline_B = (_group_sums(returns_B, inverse_B, count_G)[inverse_B] - returns_B) / others_B
    advantages_B = torch.where(count_G[inverse_B] > 1, returns_B - baseline_B, torch.zeros_like(returns_B))
    return advantages_B[:, None] * trajectories.mask_BT, None


def reinforce(trajectories: Trajectories) -> Estimate:
    """REINFORCE (Williams 1992) with the batch as baseline: reward to go, G_t = Σ_{k≥t} γ^{k−t}·r_k, minus the mean of
    G over the batch's valid tokens.

    Example: one answer with rewards (0, 1, 3), γ = 1: G = (4, 4, 3), mean 11/3, advantages (1/3, 1/3, −2/3).
    """
    mask_BT = trajectories.mask_BT
    to_go_BT = _discounted_sums(trajectories.rewards_BT * mask_BT, mask_BT, trajectories.gamma)
    baseline = to_go_BT.sum() / mask_BT.sum().clamp(min=1.0)
    return (to_go_BT - baseline) * mask_BT, None


Estimator = Callable[[Trajectories], Estimate]
ESTIMATORS: Final[dict[str, Estimator]] = {
    "gae": gae,
    "group_relative": group_relative,
    "leave_one_out": leave_one_out,
    "reinforce": reinforce,
}
NEEDS_CRITIC: Final = frozenset({"gae"})
WHITENED: Final = frozenset({"gae", "reinforce"})
"""Estimators whose result has no scale of its own. The group estimators set theirs within the group."""


def whiten(values_BT: Tensor, *, mask_BT: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Mean 0 and (population) variance 1 over valid tokens; 0 elsewhere. The mean is not added back.

    Example: values (1, 3, 9) with mask (1, 1, 0): mean 2, std 1, result (−1, 1, 0). Equal values give zeros.
    """
    count = mask_BT.sum().clamp(min=1.0)
    centred_BT = (values_BT - (values_BT * mask_BT).sum() / count) * mask_BT
    std = (centred_BT.square().sum() / count).sqrt()
    return centred_BT / (std + epsilon)


def _discounted_sums(terms_BT: Tensor, mask_BT: Tensor, discount: float) -> Tensor:
    """S_t = x_t + discount·S_{t+1}, right to left; nothing crosses a masked position."""
    sums_BT = torch.zeros_like(terms_BT)
    running_B = torch.zeros_like(terms_BT[:, 0])
    for t in range(terms_BT.shape[1] - 1, -1, -1):
        running_B = (terms_BT[:, t] + discount * running_B) * mask_BT[:, t]
        sums_BT[:, t] = running_B
    return sums_BT


def _grouped(trajectories: Trajectories) -> tuple[Tensor, Tensor, Tensor]:
    """(returns_B, index of each sequence's group, answers per group as floats)."""
    if trajectories.group_B is None:
        raise ValueError("a group estimator needs group_B")
    returns_B = (trajectories.rewards_BT * trajectories.mask_BT).sum(1)
    _, inverse_B, count_G = torch.unique(trajectories.group_B, return_inverse=True, return_counts=True)
    if int(count_G.max()) < 2:
        raise ValueError("a group estimator needs at least two answers to some prompt; every group has one")
    return returns_B, inverse_B, count_G.to(returns_B.dtype)


def _group_sums(values_B: Tensor, inverse_B: Tensor, count_G: Tensor) -> Tensor:
    return torch.zeros_like(count_G).index_add(0, inverse_B, values_B)
