"""The reward model's loss against numbers worked by hand, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from reward_service.rm.loss import LossSettings, pair_losses, weighted_mean


def losses(
    chosen: list[float], rejected: list[float], *, margins: list[float] | None = None, **settings: float
) -> list[float]:
    values: list[float] = pair_losses(
        torch.tensor(chosen, dtype=torch.float64),
        torch.tensor(rejected, dtype=torch.float64),
        margins_B=None if margins is None else torch.tensor(margins, dtype=torch.float64),
        settings=LossSettings(**settings),
    ).tolist()
    return values


def test_bradley_terry() -> None:
    # −log σ(−0.5) = log(1 + 1.648721) = 0.974077; −log σ(1.7) = log(1 + 0.182684) = 0.167786
    assert losses([1.0, 3.2], [1.5, 1.5]) == pytest.approx([0.974077, 0.167786], abs=1e-6)
    assert losses([0.3], [0.3]) == pytest.approx([math.log(2)])


def test_a_margin_is_taken_from_the_gap() -> None:
    # 3.2 − 1.5 − 2.2 = −0.5, and no margin at all
    assert losses([3.2, 3.2], [1.5, 1.5], margins=[2.2, 0.0]) == pytest.approx([0.974077, 0.167786], abs=1e-6)


def test_smoothed_labels_believe_a_tenth_of_the_reverse() -> None:
    # 0.9·0.167786 + 0.1·(0.167786 + 1.7): −log σ(−Δ) = −log σ(Δ) + Δ
    assert losses([3.2], [1.5], label_smoothing=0.1) == pytest.approx([0.337786], abs=1e-6)


def test_the_smoothed_minimum_is_at_the_log_odds_of_a_right_label() -> None:
    """ε = 0.2: the loss pulls the gap to log(0.8/0.2), not to infinity."""
    best = math.log(4)
    at, below, above = losses([best, best - 0.1, best + 0.1], [0.0] * 3, label_smoothing=0.2)
    assert at < below
    assert at < above


def test_centring_penalises_the_pairs_sum() -> None:
    # 0.01·(3.2 + 1.5)² = 0.2209
    assert losses([3.2], [1.5], centering=0.01) == pytest.approx([0.388686], abs=1e-6)


@pytest.mark.parametrize(("chosen", "rejected"), [(1.0, 1.5), (3.2, 1.5), (0.0, 40.0)])
def test_the_gradient_is_sigma_of_the_gap_less_one(chosen: float, rejected: float) -> None:
    gap = torch.tensor([chosen - rejected], dtype=torch.float64, requires_grad=True)
    pair_losses(gap, torch.zeros(1, dtype=torch.float64), settings=LossSettings()).sum().backward()  # type: ignore[no-untyped-call]
    assert gap.grad is not None
    assert gap.grad.item() == pytest.approx(1 / (1 + math.exp(rejected - chosen)) - 1, abs=1e-12)


def test_weights_multiply_the_pairs_losses() -> None:
    # (2·0.974077 + 0·0.167786 + 1·0.693147) / 3
    pair_loss = torch.tensor([0.974077, 0.167786, 0.693147])
    assert weighted_mean(pair_loss, torch.tensor([2.0, 0.0, 1.0])).item() == pytest.approx(0.880434, abs=1e-5)
