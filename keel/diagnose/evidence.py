"""Statistics that the patterns share: when a series left its baseline for good, when it passed a threshold, what moved
with what, and how the objective divides between the score and the penalty. Robust: medians, ranks, runs of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import stats

from configs.guard import Above, Below
from keel.diagnose.record import RunRecord, Values

_NO_BETA: Final = 1e-6
_FAR: Final = 3.0
"""Nats per answer, from which on a penalty would matter."""
_MAD_TO_STD: Final = 1.4826
"""Of a normal distribution."""
_CUSUM_SLACK: Final = 0.5
_CUSUM_ALARM: Final = 8.0
"""Page 1954: S ← max(0, S + z − slack), in standard deviations of the baseline. At a slack of half a deviation and this
alarm a stationary series is away falsely about once in 10⁴ steps (Siegmund's approximation)."""


def ramp(value: float, low: float, high: float) -> float:
    """0 at `low`, 1 at `high`, straight between; `low` may lie over `high`. NaN is 0."""
    if not np.isfinite(value):
        return 0.0 if np.isnan(value) else float((value > low) == (high > low))
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def known(values: Values) -> Values:
    here: Values = values[~np.isnan(values)]
    return here


def baseline(values: Values) -> tuple[float, float]:
    """Median and robust deviation of the first steps: a fifth of them, 5 to 10. (NaN, NaN) with nothing there."""
    here = known(values)
    if not len(here):
        return float("nan"), float("nan")
    first = here[: min(10, max(5, len(here) // 5))]
    middle = float(np.median(first))
    spread = _MAD_TO_STD * float(np.median(np.abs(first - middle)))
    return middle, max(spread, 0.05 * abs(middle), 1e-9)


def start_and_end(values: Values) -> tuple[float, float]:
    """Medians of the first three and the last five known values."""
    here = known(values)
    return (float(np.median(here[:3])), float(np.median(here[-5:]))) if len(here) else (float("nan"), float("nan"))


def departure(record: RunRecord, name: str, *, upward: bool = True) -> int | None:
    """The step from which on the series drifted away from its baseline, by CUSUM: the last one at which the sum was 0
    before it first alarmed. None while it stays."""
    values = record.values(name)
    middle, spread = baseline(values)
    if np.isnan(middle):
        return None
    total, since = 0.0, None
    for step, value in zip(record.steps, values, strict=True):
        if np.isnan(value):
            continue
        z = (value - middle) / spread * (1 if upward else -1)
        total = max(0.0, total + min(z, 4.0) - _CUSUM_SLACK)
        if total == 0.0:
            since = None
        elif since is None:
            since = int(step)
        if total > _CUSUM_ALARM:
            return since
    return None


def sustained(record: RunRecord, over: np.ndarray, *, run: int = 2) -> int | None:
    """The first step of the first `run` recorded steps in a row that are True; of a record's very end, fewer do."""
    count = 0
    for index, flag in enumerate(over):
        count = count + 1 if flag else 0
        if count >= min(run, len(over)) or (count and index == len(over) - 1 and len(over) <= run):
            return int(record.steps[index - count + 1])
    return None


@dataclass(frozen=True)
class Crossing:
    """A signal that went over its threshold (under it, for one that is to stay high). `worst`: the farthest value that
    lasted two steps. `departed`: when it left its baseline, which may be long before."""

    name: str
    first_step: int
    threshold: float
    start: float
    worst: float
    last: float
    departed: int | None
    still: bool

    @property
    def first_sign(self) -> int:
        return self.first_step if self.departed is None else min(self.departed, self.first_step)


def crossing(record: RunRecord, name: str, *, threshold: float | None = None, run: int = 2) -> Crossing | None:
    """How `name` crossed its warning threshold, or the one given; None when it did not, or has none."""
    limits = getattr(record.thresholds, name, None)
    if not isinstance(limits, Above | Below):
        return None
    limit = threshold if threshold is not None else (limits.warn if limits.warn is not None else limits.act)
    values = record.values(name)
    if limit is None or not len(known(values)):
        return None
    sign = 1.0 if isinstance(limits, Above) else -1.0
    over = sign * np.nan_to_num(values, nan=-sign * np.inf) > sign * limit
    first = sustained(record, over, run=run)
    if first is None:
        return None
    start, last = start_and_end(values)
    return Crossing(
        name=name,
        first_step=first,
        threshold=limit,
        start=start,
        worst=worst_lasting(values, upward=sign > 0),
        last=last,
        departed=departure(record, name, upward=sign > 0),
        still=bool(sign * last > sign * limit),
    )


def worst_lasting(values: Values, *, upward: bool = True) -> float:
    """The highest level (lowest, when not `upward`) that two known steps in a row held. NaN with nothing there."""
    here = known(values) if upward else -known(values)
    if not len(here):
        return float("nan")
    lasting = float(np.max(np.minimum(here[:-1], here[1:]))) if len(here) > 1 else float(here[0])
    return lasting if upward else -lasting


def correlation(a: Values, b: Values) -> float:
    """Spearman's rank correlation over the steps that have both; NaN for fewer than 8 of them or a constant."""
    both = ~(np.isnan(a) | np.isnan(b))
    if int(both.sum()) < 8 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return float("nan")
    return float(stats.spearmanr(a[both], b[both]).statistic)


@dataclass(frozen=True)
class Objective:
    """What the policy was paid at its farthest point from the reference: the gain in normalised score, and β·KL."""

    step: int
    score_gain: float
    """Standard deviations of the reward model's scores."""
    penalty: float
    kl: float
    beta: float

    @property
    def free(self) -> bool:
        """The penalty holds nothing: it is next to nothing beside the gain."""
        return self.penalty <= 0.02 * max(self.score_gain, 0.5)

    @property
    def ratio(self) -> float:
        return self.score_gain / self.penalty if self.penalty > 0 else float("inf")


def objective(record: RunRecord) -> Objective | None:
    """At the step of the largest KL (a median of three). The gain is over the first steps. None where either term is
    not recorded."""
    kl, beta = record.values("kl_nats_per_sequence"), record.values("beta")
    score = _scores(record)
    usable = np.flatnonzero(~(np.isnan(kl) | np.isnan(beta) | np.isnan(score)))
    if len(usable) < 3:
        return None
    free = usable[(beta[usable] <= _NO_BETA) & (kl[usable] >= _FAR)]
    if len(free) >= 3:  # Before the guard raised it: what happened then is the question.
        usable = usable[usable <= free[-1]]
    smooth = [float(np.median(kl[usable[max(0, i - 1) : i + 2]])) for i in range(len(usable))]
    at = int(np.argmax(smooth))
    here = usable[max(0, at - 1) : at + 2]
    top = float(np.median(beta[here]))
    return Objective(
        step=int(record.steps[usable[at]]),
        score_gain=float(np.median(score[here]) - np.median(score[usable[:2]])),
        penalty=top * max(smooth[at], 0.0),
        kl=smooth[at],
        beta=top,
    )


def _scores(record: RunRecord) -> Values:
    """A step's mean score in standard deviations: z against the calibration; without one, against all rewards so far,
    as the learner normalises them, where one scale scored throughout; else its own normalised mean."""
    z, mean, spread = (record.values(name) for name in ("proxy_z", "reward_mean", "reward_std"))
    if len(known(z)):
        return z
    if len(set(record.rm_versions())) > 1 or np.isnan(mean + spread).any():
        return record.values("reward_normalised_mean")
    count = np.arange(1, len(mean) + 1)
    so_far = np.cumsum(mean) / count
    variance = np.cumsum(spread**2 + mean**2) / count - so_far**2
    scores: Values = (mean - mean[:1]) / np.sqrt(np.maximum(variance, 1e-12))
    return scores


@dataclass(frozen=True)
class Harm:
    """Whether somebody independent of the reward model says that the answers got worse. `known`: there is such a
    measure. `sentences`: in numbers."""

    known: bool = False
    size: float = 0.0
    """0 none – 1 surely."""
    first_step: int | None = None
    sentences: tuple[str, ...] = ()


def harm(record: RunRecord) -> Harm:
    """By gold, where there is one, and by the judge's win rate."""
    sentences: list[str] = []
    sizes, firsts = [0.0], []
    gold = record.values("gold_mean")
    if len(known(gold)) >= 6:
        fall = _fall(record, "gold_mean")
        if fall is not None:
            step, top, low, size = fall
            sizes.append(size)
            firsts.append(step)
            sentences.append(f"gold fell from {top:+.2f} to {low:+.2f}, from step {step} on")
    for line in record.evaluations:
        high, rate = line.get("win_rate_high"), line.get("win_rate")
        if isinstance(high, int | float) and isinstance(rate, int | float) and high < 0.5:
            step = int(line.get("step") or 0)
            sizes.append(ramp(float(high), 0.5, 0.4))
            firsts.append(step)
            sentences.append(f"the judge preferred only {rate:.0%} of the answers to the reference's at step {step}")
            break
    measured = len(known(gold)) >= 6 or any(
        isinstance(line.get("win_rate"), int | float) for line in record.evaluations
    )
    return Harm(measured, max(sizes), min(firsts, default=None), tuple(sentences))


def thrives(record: RunRecord) -> bool:
    """Whether somebody independent of the reward model says that the answers got better, and not worse since."""
    start, end = start_and_end(record.values("gold_mean"))
    rates = [rate for line in record.evaluations if isinstance(rate := line.get("win_rate_low"), int | float)]
    better = end > start if not np.isnan(end) else bool(rates) and float(rates[-1]) > 0.5
    return better and harm(record).size == 0.0


def _fall(record: RunRecord, name: str) -> tuple[int, float, float, float] | None:
    """(first step, from, to, 0–1) of the largest lasting fall below what was reached before, of means of five steps, in
    units of the noise between steps. None for a fall that noise explains."""
    values = record.values(name)
    at = np.flatnonzero(~np.isnan(values))
    here = values[at]
    width = min(5, max(2, len(here) // 4))
    means = np.convolve(here, np.ones(width) / width, mode="valid")
    best = np.maximum.accumulate(means)
    end = int(np.argmax(best - means))
    noise = float(np.std(np.diff(here)) / np.sqrt(2)) if len(here) > 2 else 0.0
    fall, scale = float((best - means)[end]), max(noise, 0.02 * float(np.ptp(here)), 1e-9)
    if fall < 3.0 * scale or fall < 0.3 * max(abs(float(best[end])), scale):
        return None
    peak = int(np.flatnonzero(means[: end + 1] >= best[end])[0])
    return int(record.steps[at[peak]]), float(best[end]), float(means[end]), ramp(fall / scale, 3.0, 8.0)
