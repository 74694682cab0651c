"""Preferences: votes → labels, answers → pairs, and the small statistics that say what a reward model's accuracy is
worth. Pure Python, deterministic from a seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.data_records import PreferencePair, Prompt, TableReport
from cluster.errors import DataError
from cluster.labels import MIN_CONFIDENCE, labelled

Judge = Callable[[Prompt, str, str, random.Random], Sequence[bool] | Mapping[str, bool]]
"""(prompt, answer_a, answer_b, rng) → votes, True where A is preferred: a list, or a mapping by annotator."""

IDENTICAL: Final = "identical answers"
EMPTY: Final = "empty answer"
LOW_CONFIDENCE: Final = "low confidence"


@dataclass(frozen=True)
class Candidate:
    """Two answers to one prompt, not yet judged, and the policy versions that gave them, where they are known."""

    prompt: Prompt
    answer_a: str
    answer_b: str
    version_a: int | None = None
    version_b: int | None = None


@dataclass(frozen=True)
class Collected:
    """Labelled pairs, and what became of every candidate. `places`: which candidate each pair was. `unclear`: those
    without a clear majority, answer A as `chosen`, with their votes."""

    pairs: list[PreferencePair]
    report: TableReport
    places: list[int] = field(default_factory=list)
    unclear: list[PreferencePair] = field(default_factory=list)


def collect_pairs(
    candidates: Iterable[Candidate],
    *,
    judge: Judge,
    seed: int,
    policy_version: int | None = None,
    min_confidence: float = MIN_CONFIDENCE,
    name: str = "judged",
    source: str | None = None,
) -> Collected:
    """Have every candidate judged. Identical or empty answers and votes without a clear majority are counted, not used.
    `name`: what the pairs' ids begin with. `policy_version`: of candidates that do not name their own.

    Each candidate has its own random generator, seeded by `seed` and its place: a judge's draws for one pair do not
    depend on which others were skipped. Raises DataError for a judge that gives no vote.
    """
    collected = Collected([], TableReport())
    report = collected.report
    for index, candidate in enumerate(candidates):
        report.read += 1
        reason = _unusable(candidate)
        if reason is not None:
            report.reject(reason)
            continue
        rng = random.Random(f"judge {seed} {index}")
        votes = judge(candidate.prompt, candidate.answer_a, candidate.answer_b, rng)
        judged = _pair(candidate, votes, pair_id=f"{name}-{index:07d}", policy_version=policy_version, source=source)
        pair = labelled(judged, min_confidence=min_confidence)
        if pair is None:
            report.reject(LOW_CONFIDENCE)
            collected.unclear.append(judged)
            continue
        collected.pairs.append(pair)
        collected.places.append(index)
    report.used = len(collected.pairs)
    return collected


def is_usable(candidate: Candidate) -> bool:
    """There is something to compare."""
    return _unusable(candidate) is None


def _unusable(candidate: Candidate) -> str | None:
    if candidate.answer_a == candidate.answer_b:
        return IDENTICAL
    if not candidate.answer_a.strip() or not candidate.answer_b.strip():
        return EMPTY
    return None


def _pair(
    candidate: Candidate,
    votes: Sequence[bool] | Mapping[str, bool],
    *,
    pair_id: str,
    policy_version: int | None,
    source: str | None,
) -> PreferencePair:
    """Answer A as `chosen`, whatever the votes say."""
    version_a, version_b = candidate.version_a, candidate.version_b
    if version_a is None and version_b is None:
        version_a = version_b = policy_version
    return PreferencePair(
        pair_id=pair_id,
        prompt=candidate.prompt,
        chosen=candidate.answer_a,
        rejected=candidate.answer_b,
        votes=tuple(map(bool, votes.values() if isinstance(votes, Mapping) else votes)),
        annotators=tuple(votes) if isinstance(votes, Mapping) else None,
        policy_version=version_a,
        rejected_version=None if version_b == version_a else version_b,
        source=source,
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
