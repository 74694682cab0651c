"""What drives an annotator: whose votes follow the length of answers, or certain words, more than the others' do.

Pure: numpy inside functions, no torch, no queue. The same result whichever answer of a pair is written first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from cluster.data_records import PreferencePair
from cluster.preference_table import Vote
from reward_service.audit.cues import false_discovery_rates, terms, two_sided_p
from reward_service.audit.lengths import length_unit, lengths_of

if TYPE_CHECKING:
    import numpy as np

LENGTH: Final = "length"
MAX_Q: Final = 0.001
"""Strict: what is found here names a person."""
LEAST_EFFECT: Final = 0.25
"""Log-odds under which a bias is not worth a name, however sure: odds of 1.28."""
MIN_VOTES: Final = 50
"""Votes that an annotator must have cast, and MIN_DIFFERING of them on pairs whose answers differ in the feature."""
MIN_DIFFERING: Final = 20
_RIDGE: Final = 1.0
"""Keeps coefficients finite where a feature decides every vote; with hundreds of votes it changes little else."""
_LEAST_ERROR: Final = 1e-3
_CLIP_STD: Final = 3.0
_ALIKE_Z: Final = 3.0
_NEWTON_STEPS: Final = 50
_SAYS: Final = "says "


@dataclass(frozen=True)
class AnnotatorBias:
    """One annotator's liking for a feature of answers, beyond that of the typical annotator.

    `feature`: LENGTH, or a word. `coefficient`: log-odds of the vote for each standard deviation of the difference in
    length, or for the word being in one answer alone, minus the mean of the annotators who are alike. `q`: the rate of
    false findings among all with a q so small (Benjamini and Hochberg 1995).
    """

    annotator: str
    feature: str
    coefficient: float
    z: float
    q: float

    @property
    def says(self) -> str:
        """In words."""
        verb = "prefers" if self.coefficient > 0 else "avoids"
        return f"{verb} {'longer answers' if self.feature == LENGTH else f'answers that say {self.feature!r}'}"


def biases(
    votes: Sequence[Vote],
    pairs: Sequence[PreferencePair],
    cue_words: Sequence[str] = (),
    *,
    max_q: float = MAX_Q,
    least_effect: float = LEAST_EFFECT,
) -> list[AnnotatorBias]:
    """Which annotators' votes follow length, or one of `cue_words`, more or less than the others' do; strongest first.

    For each annotator one logistic regression of the vote on the difference in length and in the presence of each word
    (words or pairs of words, as audit/cues.py's `terms` finds them). What all annotators like, for whatever reason, is
    in every annotator's coefficients; the mean of those who are alike is taken off, so what is left is this one's own.
    It takes three annotators, most of them alike: what most of them lean to is a bias of the data.
    Standard errors count each pair once, however many judged it (sandwich estimate, clustered by pair).
    """
    numbers = {pair.pair_id: number for number, pair in enumerate(pairs)}
    rows: dict[str, list[tuple[int, bool]]] = defaultdict(list)
    for vote in votes:
        if vote.pair_id in numbers:
            rows[vote.annotator].append((numbers[vote.pair_id], vote.prefers_chosen))
    features = _features(pairs, cue_words)
    fits = {name: _fit(own, features) for name, own in sorted(rows.items()) if len(own) >= MIN_VOTES}
    found: list[AnnotatorBias] = []
    for feature in features:
        estimates = {name: fit[feature] for name, fit in fits.items() if feature in fit}
        found += _against_the_rest(feature, estimates, pairs=len(pairs))
    qs = false_discovery_rates([two_sided_p(bias.z) for bias in found])
    named = [
        replace(bias, q=q)
        for bias, q in zip(found, qs, strict=True)
        if q <= max_q and abs(bias.coefficient) >= least_effect
    ]
    return sorted(named, key=lambda bias: -abs(bias.z))


def _features(pairs: Sequence[PreferencePair], words: Sequence[str]) -> dict[str, np.ndarray]:
    """Feature → its difference, chosen − rejected, by pair. Length in standard deviations; words without those that
    tell nothing beside an earlier one, as "are" beside "amazing" in "you are amazing"."""
    import numpy as np

    longer_by = [chosen - rejected for chosen, rejected in lengths_of(pairs, unit=length_unit(pairs))]
    lengths = np.array(longer_by, dtype=float)
    scale = float(np.sqrt(np.mean(lengths**2))) if len(lengths) else 0.0
    features = {LENGTH: np.clip(lengths / scale, -_CLIP_STD, _CLIP_STD)} if scale > 0 else {}
    said = [(terms(pair.chosen), terms(pair.rejected)) for pair in pairs]
    seen: set[bytes] = set()
    for word in dict.fromkeys(word.casefold() for word in words):
        column = np.array([(word in chosen) - (word in rejected) for chosen, rejected in said], dtype=np.int8)
        if column.tobytes() not in seen:
            seen.add(column.tobytes())
            features[f"{_SAYS}{word}"] = column.astype(float)
    return features


@dataclass(frozen=True)
class _Estimate:
    """One annotator's coefficient for one feature. `influence`: what each of `numbers`, the pairs judged, did to it."""

    coefficient: float
    numbers: np.ndarray
    influence: np.ndarray

    @property
    def error(self) -> float:
        return max(_LEAST_ERROR, float((self.influence**2).sum() ** 0.5))


def _fit(rows: Sequence[tuple[int, bool]], features: Mapping[str, np.ndarray]) -> dict[str, _Estimate]:
    """Maximum of Σ log σ(x·b) − ridge·|b|²/2 by Newton's method, rows x signed by the vote. No intercept: turning a
    pair over turns the vote and every difference over."""
    import numpy as np

    numbers = np.array([number for number, _ in rows])
    columns = {name: column[numbers] for name, column in features.items()}
    used = [name for name, column in columns.items() if np.count_nonzero(column) >= MIN_DIFFERING]
    if not used:
        return {}
    signs = np.array([1.0 if vote else -1.0 for _, vote in rows])
    signed = np.stack([columns[name] for name in used], axis=1) * signs[:, None]
    b, ridge = np.zeros(len(used)), _RIDGE * np.eye(len(used))
    for _ in range(_NEWTON_STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(signed @ b, -30, 30)))
        inverse = np.linalg.inv(signed.T @ (signed * (p * (1 - p))[:, None]) + ridge)
        step = inverse @ (signed.T @ (1 - p) - ridge @ b)
        b = b + step
        if float(np.max(np.abs(step))) < 1e-8:
            break
    influence = (signed * (1 - p)[:, None]) @ inverse
    return {name: _Estimate(float(b[i]), numbers, influence[:, i]) for i, name in enumerate(used)}


def _against_the_rest(feature: str, estimates: Mapping[str, _Estimate], *, pairs: int) -> list[AnnotatorBias]:
    import numpy as np

    if len(estimates) < 3:
        return []
    alike = _alike(estimates)
    found: list[AnnotatorBias] = []
    for name, own in estimates.items():
        others = [estimates[other] for other in alike if other != name]
        weights = [one.error**-2 for one in others]
        typical = sum(one.coefficient * weight for one, weight in zip(others, weights, strict=True)) / sum(weights)
        influence = np.zeros(pairs)
        np.add.at(influence, own.numbers, own.influence)
        for one, weight in zip(others, weights, strict=True):
            np.add.at(influence, one.numbers, -weight / sum(weights) * one.influence)
        z = (own.coefficient - typical) / max(_LEAST_ERROR, float(np.sqrt((influence**2).sum())))
        found.append(AnnotatorBias(name, feature.removeprefix(_SAYS), own.coefficient - typical, z, 1.0))
    return found


def _alike(estimates: Mapping[str, _Estimate]) -> list[str]:
    """The annotators whose coefficients may be the same: the smallest majority that lies closest together, and all
    who are not far from its mean."""
    ordered = sorted(estimates, key=lambda name: estimates[name].coefficient)
    size = len(ordered) // 2 + 1

    def width(start: int) -> float:
        return estimates[ordered[start + size - 1]].coefficient - estimates[ordered[start]].coefficient

    start = min(range(len(ordered) - size + 1), key=width)
    core = ordered[start : start + size]
    typical = sum(estimates[name].coefficient for name in core) / size
    near = [name for name in ordered if abs(estimates[name].coefficient - typical) <= _ALIKE_Z * estimates[name].error]
    return sorted({*core, *near})
