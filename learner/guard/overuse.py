"""Words that the policy uses far more often than the policy before training did: "fantastic" in one answer of fifty.

Counted is in how many answers a term stands, a word or two neighbouring ones, over a window of recent steps and over
the reference's answers. A term is over-used where all three hold:

1. **It is no accident.** P(at least so many of its occurrences fall into the window | all its occurrences) where both
   sides use it alike: the conditional test of two Poisson rates (Przyborowski & Wilenski 1940), at level
   STEP_LEVEL / K a step. K counts the terms that could be found at all (Tarone 1990: chosen by their total on both
   sides, which says nothing about the difference). So a step raises a false alarm with a chance of at most STEP_LEVEL
   (Bonferroni), and a thousand steps expect at most a thousand times that: half an alarm. It holds for any dependence
   between steps, whose windows overlap. Answers to one prompt resemble each other: counts and sizes are divided by the
   design effect Σx²/Σx, x being a prompt's answers with the term (after Rao & Scott 1992): within a step as counted,
   and times the number of steps of the window that a prompt is in on average, where a run has few prompts.
2. **It is more than getting better.** Its share of answers is at least LIFT times the reference's. A policy that learns
   to say a fitting thing whenever it fits raises its share too, but by no more than 1 / (the share of fitting answers
   in which the reference says it already): where that is at least 1/LIFT, no alarm. What a reward model pays for out
   of place has no such limit. The price: a term in more than 1/LIFT of the reference's answers is never found.
3. **It is not a handful**: MIN_ANSWERS answers of the window.

How much, times how long, is a sum of its own (`cusum`): a policy that moves fast garbles a phrase for some steps, and a
sum forgets it; a word that is paid for goes on, and it grows.

Found terms are ordered by the z of their smoothed log-odds, with an informative Dirichlet prior from both sides
together (Monroe, Colaresi & Quinn 2008, "Fightin' Words", eq. 16–22), which puts a sure large difference before a sure
small one.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from scipy.special import betainc

from learner.guard.terms import Vocabulary, count_terms

STEP_LEVEL: Final = 5e-4
LIFT: Final = 4.0
MIN_ANSWERS: Final = 4
MIN_TOTAL: Final = 3
"""Occurrences on both sides together under which no term can reach the level."""
WINDOW_ANSWERS: Final = 512
"""The window is as many of the last steps as hold so many answers,"""
WINDOW_STEPS: Final = 32
"""and no more than these."""
ALLOWANCE: Final = 0.05
"""Share of answers in excess of the reference's that adds nothing to the sum."""
STEP_TERMS: Final = 1000
"""Of each step so many terms are kept, those that exceed the reference's share most."""
PRIOR_ANSWERS: Final = 100.0
"""Weight of the prior, in answers."""
PRIOR_COUNT: Final = 0.01
"""And for every term, so that all logarithms exist."""


@dataclass(frozen=True)
class OverusedTerm:
    """Shares are of answers; `p` is of one test, before the correction."""

    term: str
    share: float
    reference_share: float
    log_odds: float
    z: float
    p: float


@dataclass
class _Step:
    """The kept terms of a step: in how many of its answers they stand, and Σx² over its prompts, x being a prompt's
    answers with the term."""

    answers: int = 0
    prompts: frozenset[str] = frozenset()
    counts: Counter[str] = field(default_factory=Counter)
    squares: Counter[str] = field(default_factory=Counter)


class Overuse:
    """The reference's terms, and a window of the last steps'. `prompts`: what each text answers, by any name."""

    def __init__(self, texts: Sequence[str], *, prompts: Sequence[str]) -> None:
        self._vocabulary = Vocabulary()
        self._reference = count_terms(texts, prompts=prompts, vocabulary=self._vocabulary)
        self._testable = int((self._reference.counts >= MIN_TOTAL).sum())
        self._steps: deque[_Step] = deque()

    @property
    def has_reference(self) -> bool:
        return self._reference.answers > 0

    def observe(self, texts: Sequence[str], *, prompts: Sequence[str]) -> list[OverusedTerm]:
        """Take a step's answers in, and tell what is over-used in the window then: the surest first."""
        if not self.has_reference or not texts:
            return []
        self._steps.append(self._kept(texts, prompts))
        while len(self._steps) > 1 and (
            len(self._steps) > WINDOW_STEPS
            or sum(step.answers for step in self._steps) - self._steps[0].answers >= WINDOW_ANSWERS
        ):
            self._steps.popleft()
        return self._found()

    def reset(self) -> None:
        self._steps.clear()

    def to_state(self) -> list[dict[str, Any]]:
        return [
            {
                "answers": step.answers,
                "prompts": sorted(step.prompts),
                "terms": {term: [step.counts[term], step.squares[term]] for term in step.counts},
            }
            for step in self._steps
        ]

    def load_state(self, state: Iterable[Mapping[str, Any]]) -> None:
        self._steps = deque(
            _Step(
                answers=int(step["answers"]),
                prompts=frozenset(step.get("prompts", ())),  # Older checkpoints do not name them.
                counts=Counter({term: int(count) for term, (count, _) in step["terms"].items()}),
                squares=Counter({term: int(square) for term, (_, square) in step["terms"].items()}),
            )
            for step in state
        )

    def _kept(self, texts: Sequence[str], prompts: Sequence[str]) -> _Step:
        """Without terms that are no more frequent than in the reference, and with STEP_TERMS of the others. Leaving
        counts out can hide an over-use, never make one."""
        vocabulary = self._vocabulary.copy()  # words that are new are forgotten again, so it does not grow
        step = count_terms(texts, prompts=prompts, vocabulary=vocabulary)
        expected, _ = self._reference.of(step.keys)
        excess = step.counts - expected * (step.answers / self._reference.answers)
        risen = np.flatnonzero(excess > 0)
        risen = risen[np.lexsort((step.keys[risen], -excess[risen]))[:STEP_TERMS]]
        names = [vocabulary.term(key) for key in step.keys[risen].tolist()]
        return _Step(
            answers=step.answers,
            prompts=frozenset(prompts),
            counts=Counter(dict(zip(names, step.counts[risen].tolist(), strict=True))),
            squares=Counter(dict(zip(names, step.squares[risen].tolist(), strict=True))),
        )

    def _found(self) -> list[OverusedTerm]:
        window = _Step(answers=sum(step.answers for step in self._steps))
        for step in self._steps:
            window.counts.update(step.counts)
            window.squares.update(step.squares)
        different = len(frozenset[str]().union(*(step.prompts for step in self._steps)))
        repeats = max(sum(len(step.prompts) for step in self._steps) / max(different, 1), 1.0)
        names = list(window.counts)
        earlier, earlier_squares = self._reference.of(self._vocabulary.keys(names))
        totals = np.array([window.counts[term] for term in names], dtype=np.int64)
        new = int(((earlier < MIN_TOTAL) & (earlier + totals >= MIN_TOTAL)).sum())
        level = STEP_LEVEL / max(self._testable + new, 1)
        lifted = totals >= LIFT * earlier * (window.answers / self._reference.answers)
        found = [
            self._tested(
                names[place], window, repeats=repeats, count=int(earlier[place]), squares=int(earlier_squares[place])
            )
            for place in np.flatnonzero(lifted & (totals >= MIN_ANSWERS)).tolist()
        ]
        return _without_echoes(sorted((one for one in found if one.p <= level), key=lambda one: (-one.z, one.term)))

    def _tested(self, term: str, window: _Step, *, repeats: float, count: int, squares: int) -> OverusedTerm:
        """`repeats`: steps of the window that a prompt is in. `count`, `squares`: the reference's."""
        now, answers = _effective(window.counts[term], repeats * window.squares[term], window.answers)
        earlier, earlier_answers = _effective(count, squares, self._reference.answers)
        log_odds, error = log_odds_ratio(now, answers=answers, other=earlier, other_answers=earlier_answers)
        return OverusedTerm(
            term=term,
            share=window.counts[term] / window.answers,
            reference_share=count / self._reference.answers,
            log_odds=log_odds,
            z=log_odds / error,
            p=rate_p(now, answers=answers, other=earlier, other_answers=earlier_answers),
        )


def cusum(before: float, excess: float) -> float:
    """The sum over steps of (excess − ALLOWANCE), in share · steps, since the excess was last within the allowance.

    A cumulative sum with reference value ALLOWANCE (Page 1954): of all rules with the same rate of false alarms the one
    that finds a lasting shift soonest (Moustakides 1986). Page's comes down as it went up; this one starts anew at
    once, so that no alarm outlasts its cause by as long as that lasted.

    >>> round(cusum(cusum(0.0, 0.15), 0.25), 6), cusum(0.3, 0.05)
    (0.3, 0.0)
    """
    return before + excess - ALLOWANCE if excess > ALLOWANCE else 0.0


def _effective(count: int, squares: float, answers: int) -> tuple[float, float]:
    """(count, answers), both divided by the term's design effect."""
    effect = max(squares / count, 1.0) if count else 1.0
    return count / effect, answers / effect


def rate_p(count: float, *, answers: float, other: float, other_answers: float) -> float:
    """P(X ≥ count) for X binomial with count + other trials and chance answers/(answers + other_answers): the one-sided
    conditional test that both have the same rate. By the incomplete beta function, so that counts may be fractions.

    >>> round(rate_p(2, answers=1, other=0, other_answers=1), 6)  # both of two in one half
    0.25
    """
    if count <= 0:
        return 1.0
    return float(betainc(count, other + 1.0, answers / (answers + other_answers)))


def log_odds_ratio(count: float, *, answers: float, other: float, other_answers: float) -> tuple[float, float]:
    """(Difference of the smoothed log-odds of standing in an answer, its standard error).

    With prior counts a = PRIOR_ANSWERS · (share on both sides together) + PRIOR_COUNT of a₀ = PRIOR_ANSWERS:
    log((y + a)/(n + a₀ − y − a)) each, and a variance of Σ 1/(y + a), as Monroe et al. 2008, eq. 16 and 20.
    """
    prior = PRIOR_ANSWERS * (count + other) / (answers + other_answers) + PRIOR_COUNT

    def log_odds(y: float, n: float) -> float:
        return math.log((y + prior) / max(n + PRIOR_ANSWERS - y - prior, PRIOR_COUNT))

    error = math.sqrt(1.0 / (count + prior) + 1.0 / (other + prior))
    return log_odds(count, answers) - log_odds(other, other_answers), error


def _without_echoes(found: Sequence[OverusedTerm]) -> list[OverusedTerm]:
    """Without pairs that stand in no more answers than one of their words that is found as well."""
    shares = {one.term: one.share for one in found}
    return [
        one for one in found if " " not in one.term or all(shares.get(word) != one.share for word in one.term.split())
    ]
