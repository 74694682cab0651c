"""Statistics of a reward model: shares with intervals, calibration, distances between distributions, rank correlation,
and what length has to do with it. Pure functions, deterministic.

Legend: a *margin* is the score of the preferred answer less that of the other; n pairs or answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reward_service.card.records import Rate, Reliability, ReliabilityBin
from reward_service.preferences import accuracy, wilson_interval

MAX_BINS: Final = 10
PAIRS_PER_BIN: Final = 20
"""At least, so that a bin's share means something."""
CHANCE_DRAWS: Final = 400
MIN_RANKED: Final = 10
"""Fewest answers that a rank correlation is worth computing on."""
_RIDGE: Final = 0.05
"""Keeps slopes finite where a column separates the labels; nothing beside the information of a hundred pairs."""

Floats = NDArray[np.float64]


def rate(margins: Sequence[float]) -> Rate:
    """Share of margins above 0 (0 itself is half), with its interval. Raises DataError for none."""
    return share_rate(accuracy(margins), n=len(margins))


def share_rate(share: float, *, n: int) -> Rate:
    """`share` of `n`, with its 95 % Wilson interval."""
    low, high = wilson_interval(share, n=n)
    return Rate(share=share, low=low, high=high, n=n)


def rate_or_none(margins: Sequence[float]) -> Rate | None:
    """As `rate`; None where there are none."""
    return rate(margins) if margins else None


# ---------------------------------------------------------------- calibration


def reliability(margins: Sequence[float]) -> Reliability:
    """Calibration of P(preferred) = σ(margin), the Bradley–Terry probability.

    Pairs go by their confidence σ(|margin|) into bins of like size; the expected calibration error is
    Σ (n_b/n)·|share right in b − mean confidence in b| (Naeini et al. 2015, with equal-mass bins). A margin of 0 is
    half right. A perfectly calibrated model has an error too, on finitely many pairs: `chance`.
    """
    margins_N = np.asarray(margins, dtype=np.float64)
    confidence_N = sigmoid(np.abs(margins_N))
    right_N = np.where(margins_N == 0, 0.5, margins_N > 0)
    places = _bins(confidence_N)
    rng = np.random.default_rng(0)
    chance = [
        _calibration_error(confidence_N, (rng.random(len(margins)) < confidence_N).astype(np.float64), places)
        for _ in range(CHANCE_DRAWS)
    ]
    fit = logistic([margins])
    return Reliability(
        error=_calibration_error(confidence_N, right_N, places),
        chance=float(np.quantile(chance, 0.95)),
        slope=fit.slopes[0],
        slope_error=fit.errors[0],
        bins=tuple(
            ReliabilityBin(
                low=float(confidence_N[place].min()),
                high=float(confidence_N[place].max()),
                confidence=float(confidence_N[place].mean()),
                right=share_rate(float(right_N[place].mean()), n=len(place)),
            )
            for place in places
        ),
    )


def _bins(confidence_N: Floats) -> list[NDArray[np.int64]]:
    """Places of the pairs in each bin. Equal confidences share one: their order is no reason to part them."""
    rounded_N = np.round(confidence_N, 9)
    wanted = max(1, min(MAX_BINS, len(rounded_N) // PAIRS_PER_BIN))
    bounds = np.unique(np.quantile(rounded_N, np.arange(1, wanted) / wanted, method="lower"))
    bin_N = np.searchsorted(bounds, rounded_N, side="left")
    return [np.flatnonzero(bin_N == number) for number in np.unique(bin_N)]


def _calibration_error(confidence_N: Floats, right_N: Floats, places: Sequence[NDArray[np.int64]]) -> float:
    gaps = [len(place) * abs(float(right_N[place].mean() - confidence_N[place].mean())) for place in places]
    return sum(gaps) / len(confidence_N)


def sigmoid(x: Floats) -> Floats:
    """1/(1 + e^−x), without overflow."""
    values: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return values


# ---------------------------------------------------------------- regression


@dataclass(frozen=True)
class LogisticFit:
    """Slopes of the label's log-odds per unit of each column, and their standard errors."""

    slopes: tuple[float, ...]
    errors: tuple[float, ...]

    def z(self, column: int) -> float:
        """The slope over its standard error."""
        return self.slopes[column] / self.errors[column] if self.errors[column] > 0 else 0.0


def logistic(columns: Sequence[Sequence[float]]) -> LogisticFit:
    """Logistic regression, without intercept, of "the first of two answers is preferred" on differences between them.

    Each column holds a difference, preferred less other, one a pair. Which answer is called the first is arbitrary, and
    swapping negates label and differences alike: so there is no intercept, and all labels may be written as 1. Newton's
    method with a trace of ridge; a column that is 0 throughout has slope 0.
    """
    x_NK = np.asarray(columns, dtype=np.float64).T
    scale_K = np.sqrt((x_NK**2).mean(axis=0))
    scale_K[scale_K == 0] = 1.0
    x_NK = x_NK / scale_K
    slopes_K = np.zeros(x_NK.shape[1])
    hessian_KK = np.eye(len(slopes_K))
    for _ in range(50):
        p_N = sigmoid(x_NK @ slopes_K)
        gradient_K = x_NK.T @ (1.0 - p_N) - _RIDGE * slopes_K
        hessian_KK = (x_NK * (p_N * (1.0 - p_N))[:, None]).T @ x_NK + _RIDGE * np.eye(len(slopes_K))
        step_K = np.linalg.solve(hessian_KK, gradient_K)
        slopes_K = slopes_K + np.clip(step_K, -2.0, 2.0)
        if float(np.abs(step_K).max()) < 1e-9:
            break
    errors_K = np.sqrt(np.diag(np.linalg.inv(hessian_KK)))
    return LogisticFit(tuple((slopes_K / scale_K).tolist()), tuple((errors_K / scale_K).tolist()))


@dataclass(frozen=True)
class Partial:
    """The part of margins that a difference explains, and the rest. `residuals`: [n]; `r2`: its share of Σ margin²."""

    slope: float
    r2: float
    residuals: tuple[float, ...]


def partial_out(margins: Sequence[float], differences: Sequence[float]) -> Partial:
    """Take out of the margins what `differences` explain by least squares through 0 (both change sign together).

    >>> partial_out([2.0, -1.0], [2.0, -1.0]).r2
    1.0
    """
    margins_N, differences_N = np.asarray(margins, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    power = float(differences_N @ differences_N)
    slope = float(margins_N @ differences_N) / power if power > 0 else 0.0
    residuals_N = margins_N - slope * differences_N
    total = float(margins_N @ margins_N)
    r2 = 1.0 - float(residuals_N @ residuals_N) / total if total > 0 else 0.0
    return Partial(slope, r2, tuple(residuals_N.tolist()))


# ---------------------------------------------------------------- distributions and ranks


def ks_distance(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """(largest gap between the cumulative distributions, its p-value): two-sample Kolmogorov–Smirnov."""
    from scipy.stats import ks_2samp

    found = ks_2samp(first, second)
    return float(found.statistic), float(found.pvalue)


@dataclass(frozen=True)
class Ranks:
    """Spearman's ρ with its 95 % interval, and Kendall's τ-b."""

    spearman: float
    low: float
    high: float
    kendall: float


def rank_correlation(first: Sequence[float], second: Sequence[float], *, n: int | None = None) -> Ranks | None:
    """Rank correlations of two scores of the same things. None for fewer than MIN_RANKED, or where one is constant.

    The interval is Fisher's with the standard error √((1 + ρ²/2)/(n − 3)) of Bonett & Wright 2000. `n`: independent
    observations, where that is not the number of points.
    """
    from scipy.stats import kendalltau, spearmanr

    count = len(first) if n is None else n
    if count < MIN_RANKED or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    spearman = float(spearmanr(first, second).statistic)
    reach = 1.959964 * math.sqrt((1.0 + spearman**2 / 2.0) / (count - 3))
    middle = math.atanh(max(-0.999999, min(0.999999, spearman)))
    return Ranks(
        spearman=spearman,
        low=math.tanh(middle - reach),
        high=math.tanh(middle + reach),
        kendall=float(kendalltau(first, second).statistic),
    )


def histogram_edges(samples: Sequence[Sequence[float]], *, bins: int = 30) -> tuple[float, ...]:
    """bins + 1 edges for all samples together; the half per cent at either end counts into the outer bins."""
    together_N = np.concatenate([np.asarray(sample, dtype=np.float64) for sample in samples])
    low, high = (float(value) for value in np.quantile(together_N, (0.005, 0.995)))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return tuple(np.linspace(low, high, bins + 1).tolist())


def histogram(values: Sequence[float], edges: Sequence[float]) -> tuple[int, ...]:
    """Counts between the edges; what lies outside goes to the outer bins."""
    inside_N = np.clip(np.asarray(values, dtype=np.float64), edges[0], edges[-1])
    return tuple(np.histogram(inside_N, bins=np.asarray(edges))[0].tolist())
