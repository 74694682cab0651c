"""Ratings of answers → pairs: each annotator's ratings on their own scale, averaged, compared within a prompt.

A generous annotator and a severe one may mean the same by 4 and by 2 of 5, so ratings become z-scores first: the
distance from the annotator's own mean, in the annotator's own standard deviations. Pure functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.data_records import PreferencePair, Prompt, TableReport, stable_prompt_id
from cluster.judgements import UNKNOWN, Rated

NO_VARIANCE: Final = "rating by an annotator whose ratings are all equal"
ONLY_ANSWER: Final = "only rated answer to its prompt"
EQUAL_RATINGS: Final = "answers rated equal"
_EQUAL_Z: Final = 1e-9

Opinions = list[tuple[str, bool | None]]
"""(annotator, prefers the chosen answer; None: equal)."""


@dataclass(frozen=True)
class Rating:
    """One annotator's rating of one answer. `z`: on that annotator's own scale; None if all theirs are equal."""

    answer_id: str
    annotator: str
    rating: float
    z: float | None


@dataclass
class _Answer:
    """All ratings of one answer."""

    answer_id: str
    prompt: Prompt
    text: str
    version: int | None
    judged_at: str | None = None
    zs: list[float] = field(default_factory=list)
    """Of the annotators who are not held out."""
    ratings: dict[str, float] = field(default_factory=dict)
    """Each named annotator's latest."""

    def mean_z(self) -> float:
        return math.fsum(self.zs) / len(self.zs)


def rated_pairs(
    rated: Sequence[Rated], *, held_out: Sequence[str], report: TableReport
) -> tuple[list[Rating], list[tuple[PreferencePair, Opinions]]]:
    """Every rating, and every pair of answers to one prompt whose mean z-scores differ, with what each named annotator
    who rated both holds of it. What makes no pair is counted in `report`; held-out annotators make no labels."""
    ratings: list[Rating] = []
    pairs: list[tuple[PreferencePair, Opinions]] = []
    for prompt_id, answers in _answers(rated, held_out=frozenset(held_out), ratings=ratings, report=report).items():
        if len(answers) == 1:
            report.read += 1
            report.reject(ONLY_ANSWER)
        for (i, first), (j, second) in itertools.combinations(enumerate(answers), 2):
            report.read += 1
            better, worse = sorted((first, second), key=_Answer.mean_z, reverse=True)
            if better.mean_z() - worse.mean_z() <= _EQUAL_Z:
                report.reject(EQUAL_RATINGS)
                continue
            both = sorted(better.ratings.keys() & worse.ratings.keys())
            opinions = [(name, _higher(better.ratings[name], worse.ratings[name])) for name in both]
            pairs.append((_pair(better, worse, pair_id=f"rated-{prompt_id}-{i}-{j}"), opinions))
    return ratings, pairs


def _pair(better: _Answer, worse: _Answer, *, pair_id: str) -> PreferencePair:
    return PreferencePair(
        pair_id=pair_id,
        prompt=better.prompt,
        chosen=better.text,
        rejected=worse.text,
        policy_version=better.version,
        rejected_version=None if worse.version == better.version else worse.version,
        judged_at=better.judged_at or worse.judged_at,
    )


def _answers(
    rated: Sequence[Rated], *, held_out: frozenset[str], ratings: list[Rating], report: TableReport
) -> dict[str, list[_Answer]]:
    """Prompt id → its answers that somebody rated on a scale that means something. Notes every rating."""
    scales = _scales(rated)
    found: dict[str, dict[str, _Answer]] = {}
    for one in rated:
        prompt_id = stable_prompt_id(one.prompt)
        answers = found.setdefault(prompt_id, {})
        answer_id = f"{prompt_id}-{len(answers)}"
        answer = answers.setdefault(one.answer, _Answer(answer_id, one.prompt, one.answer, one.policy_version))
        mean, std = scales[one.annotator]
        z = (one.rating - mean) / std if std > 0 else None
        ratings.append(Rating(answer.answer_id, one.annotator, one.rating, z))
        if z is None:
            report.read += 1
            report.reject(NO_VARIANCE)
            continue
        if one.annotator not in held_out:
            answer.zs.append(z)
        if one.annotator != UNKNOWN:
            answer.ratings[one.annotator] = one.rating
        answer.judged_at = one.judged_at or answer.judged_at
    used = {prompt_id: [answer for answer in answers.values() if answer.zs] for prompt_id, answers in found.items()}
    return {prompt_id: answers for prompt_id, answers in used.items() if answers}


def _scales(rated: Sequence[Rated]) -> dict[str, tuple[float, float]]:
    """Annotator → (mean, population standard deviation) of all their ratings."""
    values: dict[str, list[float]] = {}
    for one in rated:
        values.setdefault(one.annotator, []).append(one.rating)
    scales: dict[str, tuple[float, float]] = {}
    for name, ratings in values.items():
        mean = math.fsum(ratings) / len(ratings)
        variance = math.fsum((rating - mean) ** 2 for rating in ratings) / len(ratings)
        scales[name] = mean, 0.0 if min(ratings) == max(ratings) else math.sqrt(variance)
    return scales


def _higher(first: float, second: float) -> bool | None:
    return None if first == second else first > second
