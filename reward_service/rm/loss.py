"""The reward model's loss on pairs of answers. torch only.

Legend: B pairs. r_w, r_l: scores of the preferred and of the other answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LossSettings:
    """As rm.label_smoothing and rm.centering."""

    label_smoothing: float = 0.0
    centering: float = 0.0


def pair_losses(
    chosen_B: Tensor, rejected_B: Tensor, *, margins_B: Tensor | None = None, settings: LossSettings
) -> Tensor:
    """[B] Bradley–Terry loss −log σ(r_w − r_l − margin) of each pair, with label smoothing ε and the centring penalty:

        (1 − ε)·loss(chosen over rejected) + ε·loss(rejected over chosen) + centering·(r_w + r_l)²

    Bradley & Terry 1952; margins: Touvron et al. 2023, §3.2.2; centring: Eisenstein et al. 2023. Without any of them a
    pair at r_w = 1.0, r_l = 1.5 costs log(1 + e^0.5) = 0.9741, one at 3.2 and 1.5 log(1 + e^−1.7) = 0.1678, and the
    derivative by r_w − r_l = Δ is σ(Δ) − 1.
    """
    margins = 0.0 if margins_B is None else margins_B
    gap_B = chosen_B - rejected_B
    losses_B = -nn.functional.logsigmoid(gap_B - margins)
    if settings.label_smoothing:
        reversed_B = -nn.functional.logsigmoid(-gap_B - margins)
        losses_B = (1 - settings.label_smoothing) * losses_B + settings.label_smoothing * reversed_B
    if settings.centering:
        losses_B = losses_B + settings.centering * (chosen_B + rejected_B) ** 2
    return losses_B


def weighted_mean(losses_B: Tensor, weights_B: Tensor) -> Tensor:
    """Σ w·loss / B. Not over Σ w: the weights' mean is 1 over the whole data, and a batch of heavy pairs shall count
    for more than one of light pairs."""
    return (losses_B * weights_B).mean()
