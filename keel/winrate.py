"""What comparisons with the reference's answers say, as plain numbers: win rate, the same at equal length, agreement of
reward model and judge; how far rewards on fixed prompts have shifted; what the policy has forgotten. Pure functions.

Legend: an *outcome* is that of one pair, for the policy's answer: 1 won, 0 lost, 0.5 a tie, None not judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from reward_service.card.statistics import ks_distance, logistic
from reward_service.preferences import accuracy, wilson_interval

MIN_LENGTH_CONTROLLED: Final = 20
"""Fewer judged pairs than this cannot tell length from the rest."""
MIN_AGREEMENT: Final = 20
"""Of fewer pairs with a winner a share says little: of five, every second fair coin says less than half."""
_MIN_EACH_SIDE: Final = 3
"""Pairs in which the policy's answer is no longer than the reference's, and in which it is no shorter: equal length has
to lie within what was seen."""
_MIN_STD: Final = 1e-8


@dataclass(frozen=True)
class WinRate:
    """Share of `n` pairs that the policy won, a tie counting half, with its 95 % interval."""

    share: float
    low: float
    high: float
    n: int


def win_rate(outcomes: Sequence[float | None]) -> WinRate | None:
    """With Wilson's interval (1927) for n trials. A tie counts half; it varies less than a trial does, so with many
    ties the interval is wider than it need be. None where nothing was judged.

    >>> round(win_rate([1.0, 1.0, 0.5, 0.0]).share, 3)
    0.625
    """
    judged = [outcome for outcome in outcomes if outcome is not None]
    if not judged:
        return None
    share = statistics.fmean(judged)
    low, high = wilson_interval(share, n=len(judged))
    return WinRate(share, low, high, len(judged))


def length_controlled(outcomes: Sequence[float | None], length_differences: Sequence[float]) -> float | None:
    """The win rate to be expected at equal length: σ(θ) of the regression

        P(policy preferred) = σ(θ + φ · tanh(Δ / std(Δ)))

    with Δ the policy's length less the reference's (Dubois et al. 2024, AlpacaEval 2; without their term for each
    prompt's difficulty, which takes many policies to fit). A tie counts as half a win and half a loss. None with fewer
    than MIN_LENGTH_CONTROLLED pairs, and where nearly all answers are longer, or nearly all shorter: what would hold at
    equal length is then a guess.
    """
    seen = [(won, delta) for won, delta in zip(outcomes, length_differences, strict=True) if won is not None]
    if len(seen) < MIN_LENGTH_CONTROLLED:
        return None
    deltas = [delta for _, delta in seen]
    shorter, longer = sum(delta <= 0 for delta in deltas), sum(delta >= 0 for delta in deltas)
    if min(shorter, longer) < _MIN_EACH_SIDE:
        return None
    scale = statistics.pstdev(deltas) or 1.0
    policy: list[float] = []
    length: list[float] = []
    for won, delta in seen:
        # The fit knows no weights: each pair counts twice, a tie once for either side.
        for sign in {1.0: (1.0, 1.0), 0.0: (-1.0, -1.0)}.get(won, (1.0, -1.0)):
            policy.append(sign)
            length.append(sign * math.tanh(delta / scale))
    theta = logistic([policy, length]).slopes[0]
    return 1.0 / (1.0 + math.exp(-theta))


def agreement(outcomes: Sequence[float | None], reward_margins: Sequence[float]) -> float | None:
    """Share of the pairs with a winner that the reward model orders as the judge does; equal rewards are half right.
    `reward_margins`: reward of the policy's answer less the reference's. None with fewer than MIN_AGREEMENT of them:
    this share is judged without an interval."""
    margins = [
        margin if won == 1.0 else -margin
        for won, margin in zip(outcomes, reward_margins, strict=True)
        if won in (0.0, 1.0)
    ]
    return accuracy(margins) if len(margins) >= MIN_AGREEMENT else None


@dataclass(frozen=True)
class Shift:
    """Of rewards on the same prompts. `ks`: largest gap between the cumulative distributions (two-sample
    Kolmogorov–Smirnov), 0 to 1. `z`: change of the mean in standard deviations of the baseline; with its sign."""

    ks: float
    z: float


def shift(now: Sequence[float], *, baseline: Sequence[float]) -> Shift | None:
    """None with fewer than two rewards on either side.

    >>> shift([3.0, 5.0], baseline=[1.0, 3.0])
    Shift(ks=0.5, z=2.0)
    """
    if min(len(now), len(baseline)) < 2:
        return None
    spread = max(statistics.pstdev(baseline), _MIN_STD)
    z = (statistics.fmean(now) - statistics.fmean(baseline)) / spread
    return Shift(ks=ks_distance(now, baseline)[0], z=z)


def perplexity_ratio(nats_per_token: float, *, before: float) -> float:
    """exp(NLL) over exp(NLL before): 1 is nothing forgotten.

    >>> round(perplexity_ratio(1.2, before=1.0), 3)
    1.221
    """
    return math.exp(min(nats_per_token - before, 700.0))


def versus_fields(
    outcomes: Sequence[float | None], *, token_differences: Sequence[float], reward_margins: Sequence[float] | None
) -> dict[str, float | None]:
    """What a record of an evaluation says of the comparison; null what cannot be told."""
    rate = win_rate(outcomes)
    return {
        "win_rate": None if rate is None else rate.share,
        "win_rate_low": None if rate is None else rate.low,
        "win_rate_high": None if rate is None else rate.high,
        "win_rate_length_controlled": length_controlled(outcomes, token_differences),
        "rm_judge_agreement": None if reward_margins is None else agreement(outcomes, reward_margins),
    }
