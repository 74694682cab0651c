"""Gradients of the losses against central finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.algo.losses import clipped_surrogate, clipped_value_loss, probability_ratio, token_mean

_MASK_BT = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.float64)


def finite_differences(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        bump = torch.zeros_like(at).flatten()
        bump[index] = step
        bump = bump.view_as(at)
        gradient.view(-1)[index] = (loss(at + bump) - loss(at - bump)) / (2 * step)
    return gradient


def randoms(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def autograd_of(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    loss(leaf).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def test_surrogate_gradient() -> None:
    prox_BT, move_BT, advantages_BT, weight_BT = randoms(4)

    def loss(logprobs_BT: Tensor) -> Tensor:
        ratio_BT = probability_ratio(logprobs_BT, prox_logprobs_BT=prox_BT)
        objective_BT = clipped_surrogate(ratio_BT, advantages_BT=advantages_BT, clip_epsilon=0.2)
        return -token_mean(weight_BT.abs() * objective_BT, mask_BT=_MASK_BT, total_tokens=9.0)

    at = prox_BT + 0.3 * move_BT
    gradient = autograd_of(loss, at)
    torch.testing.assert_close(gradient, finite_differences(loss, at), atol=1e-8, rtol=1e-6)
    assert (gradient[_MASK_BT.bool()] == 0).any(), "some tokens should sit on the flat side of the clip"
    assert (gradient[_MASK_BT.bool()] != 0).any()
    assert not gradient[~_MASK_BT.bool()].any()


def test_value_loss_gradient() -> None:
    old_BT, move_BT, returns_BT = randoms(3)

    def loss(values_BT: Tensor) -> Tensor:
        loss_BT = clipped_value_loss(values_BT, old_values_BT=old_BT, returns_BT=returns_BT, value_clip=0.2)
        return token_mean(loss_BT, mask_BT=_MASK_BT, total_tokens=9.0)

    at = old_BT + 0.4 * move_BT
    gradient = autograd_of(loss, at)
    torch.testing.assert_close(gradient, finite_differences(loss, at), atol=1e-8, rtol=1e-6)
    assert not gradient[~_MASK_BT.bool()].any()
