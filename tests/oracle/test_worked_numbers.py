"""The requirements' worked numbers, computed by hand, against the learner's functions."""

from __future__ import annotations

import math

import pytest
import torch

from learner.algo.losses import (
    behaviour_weight,
    categorical_entropy,
    clipped_surrogate,
    clipped_value_loss,
    is_clipped,
    probability_ratio,
    token_mean,
)
from learner.algo.rewards import kl_k1, kl_k3, penalised_scores, token_rewards


def column(*values: float) -> torch.Tensor:
    """One sequence: [1, T]."""
    return torch.tensor([values], dtype=torch.float64)


def test_reward_less_kl_is_the_objective() -> None:
    """RM 2.5, KL 3.0, β 0.1: objective 2.2; the KL of 3 nats is spread over tokens as 1.5 + 2 − 0.5."""
    rewards_BT = token_rewards(
        column(-1.0, -0.5, -2.0, 0.0),
        ref_logprobs_BT=column(-2.5, -2.5, -1.5, -9.0),
        mask_BT=column(1, 1, 1, 0),
        scores_B=torch.tensor([2.5], dtype=torch.float64),
        beta=0.1,
    )
    assert rewards_BT.sum().item() == pytest.approx(2.2)
    assert rewards_BT.tolist()[0] == pytest.approx([-0.15, -0.2, 0.05 + 2.5, 0.0])


def test_a_good_action_made_likelier_is_clipped() -> None:
    """π_old 0.02, π_new 0.06, Â = +4, ε 0.2: ratio 3, unclipped 12, clipped 4.8, contribution 4.8."""
    ratio = probability_ratio(column(math.log(0.06)), prox_logprobs_BT=column(math.log(0.02)))
    assert ratio.item() == pytest.approx(3.0)
    assert (ratio * 4).item() == pytest.approx(12.0)
    assert clipped_surrogate(ratio, advantages_BT=column(4.0), clip_epsilon=0.2).item() == pytest.approx(4.8)
    assert is_clipped(ratio, advantages_BT=column(4.0), clip_epsilon=0.2).item() == 1.0


def test_a_bad_action_made_likelier_is_not_clipped() -> None:
    """π_old 0.10, π_new 0.13, Â = −3, ε 0.2: ratio 1.3, unclipped −3.9, clipped −3.6; the minimum is −3.9, and its
    gradient still pushes the action down."""
    logprob = column(math.log(0.13)).requires_grad_()
    ratio = probability_ratio(logprob, prox_logprobs_BT=column(math.log(0.10)))
    objective = clipped_surrogate(ratio, advantages_BT=column(-3.0), clip_epsilon=0.2)
    assert ratio.item() == pytest.approx(1.3)
    assert objective.item() == pytest.approx(-3.9)
    assert is_clipped(ratio, advantages_BT=column(-3.0), clip_epsilon=0.2).item() == 0.0
    objective.sum().backward()  # type: ignore[no-untyped-call]
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(-3.9)  # d(ρ·A)/d log π = ρ·A


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        (0.5, 2.0, 1.0, 0.0),
        (0.5, -2.0, -1.6, 1.0),
        (1.1, 2.0, 2.2, 0.0),
        (1.1, -2.0, -2.2, 0.0),
        (1.5, 2.0, 2.4, 1.0),
        (1.5, -2.0, -3.0, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_all_sides_of_the_clip(ratio: float, advantage: float, objective: float, clipped: float) -> None:
    got = clipped_surrogate(column(ratio), advantages_BT=column(advantage), clip_epsilon=0.2)
    assert got.item() == pytest.approx(objective)
    assert is_clipped(column(ratio), advantages_BT=column(advantage), clip_epsilon=0.2).item() == clipped


def test_an_extreme_ratio_stays_finite() -> None:
    ratio = probability_ratio(column(0.0, -1e4), prox_logprobs_BT=column(-1e4, 0.0))
    assert torch.isfinite(ratio).all()


@pytest.mark.parametrize(("prox", "behaviour", "weight"), [(0.3, 0.1, 2.0), (0.3, 0.2, 1.5), (0.1, 0.4, 0.25)])
def test_behaviour_weight_is_capped_above_only(prox: float, behaviour: float, weight: float) -> None:
    got = behaviour_weight(column(math.log(prox)), behaviour_logprobs_BT=column(math.log(behaviour)), cap=2.0)
    assert got.item() == pytest.approx(weight)


def test_behaviour_weight_carries_no_gradient() -> None:
    prox = column(-1.0).requires_grad_()
    assert not behaviour_weight(prox, behaviour_logprobs_BT=column(-2.0), cap=2.0).requires_grad


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [
        (1.0, 0.0, 2.0, 1.62),  # clipped to 0.2: ½·1.8²
        (1.0, 0.0, 0.0, 0.5),  # clipped error 0.04 is smaller: ½·1²
        (0.1, 0.0, 1.0, 0.405),  # within the clip: ½·0.9²
    ],
)
def test_value_loss_takes_the_larger_error(value: float, old: float, target: float, loss: float) -> None:
    got = clipped_value_loss(column(value), old_values_BT=column(old), returns_BT=column(target), value_clip=0.2)
    assert got.item() == pytest.approx(loss)


def test_kl_estimators_by_hand() -> None:
    """p = 0.5, q = 0.25: k1 = log 2; k3 = ½ − 1 + log 2."""
    p, q = column(math.log(0.5)), column(math.log(0.25))
    assert kl_k1(p, other_logprobs_BT=q).item() == pytest.approx(0.6931472)
    assert kl_k3(p, other_logprobs_BT=q).item() == pytest.approx(0.1931472)


def test_kl_estimators_agree_with_the_exact_divergence_in_expectation() -> None:
    """Summed over all outcomes with p's weights both estimators are KL(p‖q) — and not KL(q‖p)."""
    p, q = [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]
    forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    reverse = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert abs(forward - reverse) > 0.03
    p_BT, q_BT, weights_BT = column(*map(math.log, p)), column(*map(math.log, q)), column(*p)
    assert (weights_BT * kl_k1(p_BT, other_logprobs_BT=q_BT)).sum().item() == pytest.approx(forward)
    assert (weights_BT * kl_k3(p_BT, other_logprobs_BT=q_BT)).sum().item() == pytest.approx(forward)


def test_penalties_by_hand() -> None:
    got = penalised_scores(
        torch.tensor([1.5, 1.5]),
        truncated_B=torch.tensor([True, False]),
        response_tokens_B=torch.tensor([10, 5]),
        missing_eos_penalty=1.0,
        length_penalty_per_token=0.02,
    )
    assert got.tolist() == pytest.approx([0.3, 1.4])


def test_a_sequence_without_tokens_cannot_carry_a_score() -> None:
    with pytest.raises(ValueError, match="without valid response tokens"):
        token_rewards(column(0.0), ref_logprobs_BT=column(0.0), mask_BT=column(0.0), scores_B=torch.ones(1), beta=0.1)


def test_entropy_of_a_fair_and_a_loaded_die() -> None:
    assert categorical_entropy(torch.zeros(4)).item() == pytest.approx(1.3862944)
    loaded = torch.tensor([0.75, 0.25]).log()
    assert categorical_entropy(loaded).item() == pytest.approx(0.5623351)


def test_token_mean_over_slices_is_the_mean_of_the_whole() -> None:
    first = token_mean(column(1.0, 3.0, 99.0), mask_BT=column(1, 1, 0), total_tokens=3)
    second = token_mean(column(5.0, 99.0, 99.0), mask_BT=column(1, 0, 0), total_tokens=3)
    assert (first + second).item() == pytest.approx(3.0)
