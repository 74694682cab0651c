"""Preferences: votes → labels, answers → pairs, and the small statistics that say what a reward model's accuracy is
worth. Pure Python, deterministic from a seed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.data_records import PreferencePair, Prompt, TableReport
from cluster.errors import DataError

Judge = Callable[[Prompt, str, str, random.Random], Sequence[bool]]
"""(prompt, answer_a, answer_b, rng) → votes, True where A is preferred."""

MIN_CONFIDENCE: Final = 0.6
IDENTICAL: Final = "identical answers"
EMPTY: Final = "empty answer"
LOW_CONFIDENCE: Final = "low confidence"


@dataclass(frozen=True)
class Majority:
    """The side with more votes and its share of them, in (0.5, 1]."""

    prefers_a: bool
    confidence: float


@dataclass(frozen=True)
class Candidate:
    """Two answers to one prompt, not yet judged."""

    prompt: Prompt
    answer_a: str
    answer_b: str


@dataclass(frozen=True)
class Collected:
    """Labelled pairs, and what became of every candidate."""

    pairs: list[PreferencePair]
    report: TableReport


def majority(votes: Sequence[bool], *, min_confidence: float = MIN_CONFIDENCE) -> Majority | None:
    """The majority's label; None when its share is under `min_confidence` or the votes are even.

    >>> majority([True, True, False, True, False])
    Majority(prefers_a=True, confidence=0.6)
    >>> majority([True, False]) is None
    True

    Raises DataError for no votes.
    """
    if not votes:
        raise DataError("a judge gave no votes", do="return at least one vote a pair")
    for_a = sum(votes)
    confidence = max(for_a, len(votes) - for_a) / len(votes)
    if 2 * for_a == len(votes) or confidence < min_confidence:
        return None
    return Majority(prefers_a=2 * for_a > len(votes), confidence=confidence)


def collect_pairs(
    candidates: Iterable[Candidate],
    *,
    judge: Judge,
    seed: int,
    policy_version: int | None = None,
    min_confidence: float = MIN_CONFIDENCE,
) -> Collected:
    """Have every candidate judged. Identical or empty answers and votes without a clear majority are counted, not used.

    Each candidate has its own random generator, seeded by `seed` and its place: a judge's draws for one pair do not
    depend on which others were skipped.
    """
    report = TableReport()
    pairs: list[PreferencePair] = []
    for index, candidate in enumerate(candidates):
        report.read += 1
        reason = _unusable(candidate)
        if reason is not None:
            report.reject(reason)
            continue
        rng = random.Random(f"judge {seed} {index}")
        votes = list(judge(candidate.prompt, candidate.answer_a, candidate.answer_b, rng))
        label = majority(votes, min_confidence=min_confidence)
        if label is None:
            report.reject(LOW_CONFIDENCE)
            continue
        pairs.append(_pair(candidate, votes, label=label, index=index, policy_version=policy_version))
    report.used = len(pairs)
    return Collected(pairs, report)


def ranking_pairs(
    prompt: Prompt, answers_best_first: Sequence[str], *, ranking_id: str, policy_version: int | None = None
) -> Collected:
    """A ranking of k answers → its k(k − 1)/2 pairs, the better answer chosen; equal texts are counted, not used."""
    report = TableReport()
    pairs: list[PreferencePair] = []
    for (better, chosen), (worse, rejected) in itertools.combinations(enumerate(answers_best_first), 2):
        report.read += 1
        reason = _unusable(Candidate(prompt, chosen, rejected))
        if reason is not None:
            report.reject(reason)
            continue
        pairs.append(
            PreferencePair(
                pair_id=f"{ranking_id}-{better}-{worse}",
                prompt=prompt,
                chosen=chosen,
                rejected=rejected,
                policy_version=policy_version,
            )
        )
    report.used = len(pairs)
    return Collected(pairs, report)


def _unusable(candidate: Candidate) -> str | None:
    if candidate.answer_a == candidate.answer_b:
        return IDENTICAL
    if not candidate.answer_a.strip() or not candidate.answer_b.strip():
        return EMPTY
    return None


def _pair(
    candidate: Candidate, votes: list[bool], *, label: Majority, index: int, policy_version: int | None
) -> PreferencePair:
    chosen, rejected = candidate.answer_a, candidate.answer_b
    if not label.prefers_a:
        chosen, rejected = rejected, chosen
    return PreferencePair(
        pair_id=f"judged-{index:07d}",
        prompt=candidate.prompt,
        chosen=chosen,
        rejected=rejected,
        votes=tuple(vote == label.prefers_a for vote in votes),
        confidence=label.confidence,
        policy_version=policy_version,
    )


# ---------------------------------------------------------------- statistics


def accuracy(margins: Sequence[float]) -> float:
    """Share of pairs scored in the judge's order: margin = score(chosen) − score(rejected); a margin of 0 is half."""
    if not margins:
        raise DataError("no pairs to measure accuracy on", do="raise rm.held_out_fraction or give more pairs")
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins)


def length_only_accuracy(train: Sequence[tuple[int, int]], held_out: Sequence[tuple[int, int]]) -> float:
    """Accuracy, on `held_out`, of a judge who sees lengths alone: (chosen, rejected) lengths in tokens.

    It prefers the longer or the shorter answer, whichever was right more often on `train`. A reward model that does
    no better has learned nothing but length.
    """
    longer_wins = sum((chosen > rejected) - (chosen < rejected) for chosen, rejected in train) >= 0
    sign = 1 if longer_wins else -1
    return accuracy([sign * (chosen - rejected) for chosen, rejected in held_out])


def wilson_interval(share: float, *, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval (95 % by default) of a proportion `share` seen in `n` trials. Wilson 1927.

    Unlike share ± z·σ it stays inside [0, 1] and holds for small n.
    """
    if n <= 0 or not 0.0 <= share <= 1.0:
        raise ValueError(f"no proportion: {share} of {n}")
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
