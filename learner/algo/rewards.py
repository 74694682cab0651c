"""Rewards per token, and the estimators of KL divergence they rest on.

Shapes: B sequences, T response tokens. KL is KL(π‖π_ref), estimated on samples of π; never the reverse.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_k1(logprobs_BT: Tensor, *, other_logprobs_BT: Tensor) -> Tensor:
    """log p − log q of tokens sampled from p: unbiased for KL(p‖q), may be negative on a sample (Schulman 2020, k1).

    Example: p = 0.5, q = 0.25: log 2 = 0.693 nats.
    """
    return logprobs_BT - other_logprobs_BT


def kl_k3(logprobs_BT: Tensor, *, other_logprobs_BT: Tensor) -> Tensor:
    """q/p − 1 − log(q/p) of tokens sampled from p: unbiased for KL(p‖q), never negative, less variance (Schulman 2020).

    Example: p = 0.5, q = 0.25: 0.5 − 1 + log 2 = 0.193 nats.
    """
    log_ratio_BT = (other_logprobs_BT - logprobs_BT).clamp(-20.0, 20.0)
    return log_ratio_BT.expm1() - log_ratio_BT


def penalised_scores(
    scores_B: Tensor,
    *,
    truncated_B: Tensor,
    response_tokens_B: Tensor,
    missing_eos_penalty: float,
    length_penalty_per_token: float,
) -> Tensor:
    """Normalised scores less the penalty of answers cut off before their end, less a price per token.

    Example: score 1.5, truncated, 10 tokens, penalties 1 and 0.02: 1.5 − 1 − 0.2 = 0.3.
    """
    truncation_B = missing_eos_penalty * truncated_B.to(scores_B.dtype)
    return scores_B - truncation_B - length_penalty_per_token * response_tokens_B.to(scores_B.dtype)


def token_rewards(
    behaviour_logprobs_BT: Tensor, *, ref_logprobs_BT: Tensor, mask_BT: Tensor, scores_B: Tensor, beta: float
) -> Tensor:
    """−β·(log π_behaviour − log π_ref) on every valid token, plus the score on the last one; 0 on padding
    (Ziegler et al. 2019; Ouyang et al. 2022).

    Example: β = 0.1, log-prob differences (1, 2), score 2.5: rewards (−0.1, 2.3), which sum to 2.5 − 0.1·3 = 2.2.

    Raises ValueError when a sequence has no valid token to carry its score.
    """
    last_B = mask_BT.sum(1).long() - 1
    if bool((last_B < 0).any()):
        raise ValueError("a sequence without valid response tokens cannot carry a score")
    penalties_BT = -beta * kl_k1(behaviour_logprobs_BT, other_logprobs_BT=ref_logprobs_BT) * mask_BT
    rows_B = torch.arange(mask_BT.shape[0], device=mask_BT.device)
    return penalties_BT.index_put((rows_B, last_B), scores_B.to(penalties_BT.dtype), accumulate=True)
