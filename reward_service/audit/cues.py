"""Words and word pairs that go with being preferred: what a reward model may learn in place of quality.

A pair of answers tells something about a term only where one of the two answers has it and the other has not. Over
these, log-odds with an informative Dirichlet prior (Monroe, Colaresi & Quinn 2008, "Fightin' Words", eq. 16–22) compare
how much of the preferred side a term makes up with how much of the other side; so where preferred answers are longer as
a whole, not every word of them is a cue. Pure Python, deterministic.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from cluster.data_records import PreferencePair

PRIOR_SHARE: Final = 0.05
"""Strength of the prior, as a share of all differences; the prior expects a term in both sides alike."""
PRIOR_COUNT: Final = 0.5
"""Added for every term, so that a rare one on one side alone has finite log-odds."""
MIN_PAIRS: Final = 8
"""Fewest pairs that must differ in a term, whatever `min_share` says."""

_TOKEN: Final = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")


class Cue(msgspec.Struct, frozen=True, kw_only=True):
    """A term whose presence goes with the label.

    `log_odds` > 0 where it favours the chosen answer; `z` is it over its standard error, `q` the smallest
    false-discovery rate at which it is still found. Shares are of all chosen and of all rejected answers; `pairs`
    differ in it. `accuracy`: of a judge who knows this term alone, 0.5 where both or neither of the answers have it.
    """

    term: str
    log_odds: float
    z: float
    q: float
    chosen_share: float
    rejected_share: float
    pairs: int
    accuracy: float
    favours: Literal["chosen", "rejected"]
    also: tuple[str, ...] = ()
    """Terms that make exactly the same difference, since they always come with this one."""

    @property
    def standard_error(self) -> float:
        return abs(self.log_odds / self.z) if self.z else 0.0


def terms(text: str) -> frozenset[str]:
    """Words of `text` in lower case, and pairs of neighbours with nothing but white space between them.

    >>> sorted(terms("You are safe. Safe!"))
    ['are', 'are safe', 'safe', 'you', 'you are']
    """
    found = _TOKEN.findall(text.casefold())
    words = [token if token[0].isalnum() or token[0] == "_" else "" for token in found]
    pairs = {f"{first} {second}" for first, second in itertools.pairwise(words) if first and second}
    return frozenset(pairs.union(words) - {""})


def lexical_cues(
    pairs: Sequence[PreferencePair], *, max_q: float = 0.01, min_share: float = 0.005, limit: int | None = None
) -> list[Cue]:
    """Terms of the answers that go with the label, strongest first; `limit` at most.

    `max_q`: expected share of false ones among them. `min_share`: of the pairs must differ in a term.
    """
    return contrast([(pair.chosen, pair.rejected) for pair in pairs], max_q=max_q, min_share=min_share, limit=limit)


def contrast(
    texts: Sequence[tuple[str, str]], *, max_q: float = 0.01, min_share: float = 0.005, limit: int | None = None
) -> list[Cue]:
    """`lexical_cues` of (preferred, other) texts."""
    counts = TermCounts.of(texts)
    least = max(MIN_PAIRS, math.ceil(min_share * len(texts)))
    tested = [term for term in counts.differing() if counts.differences(term) >= least]
    tested = [term for term in tested if not counts.is_redundant(term)]
    scores = [counts.log_odds(term) for term in tested]
    qs = false_discovery_rates([two_sided_p(log_odds / error) for log_odds, error in scores])
    found = (
        Cue(
            term=term,
            log_odds=log_odds,
            z=log_odds / error,
            q=q,
            chosen_share=counts.chosen[term] / len(texts),
            rejected_share=counts.rejected[term] / len(texts),
            pairs=counts.differences(term),
            accuracy=0.5 + abs(counts.only_chosen[term] - counts.only_rejected[term]) / (2 * len(texts)),
            favours="chosen" if log_odds > 0 else "rejected",
        )
        for term, (log_odds, error), q in zip(tested, scores, qs, strict=True)
        if q <= max_q
    )
    return _together(sorted(found, key=lambda cue: (-abs(cue.z), cue.term)), texts)[:limit]


def _together(cues: Sequence[Cue], texts: Sequence[tuple[str, str]]) -> list[Cue]:
    """One cue for those that always come together, under the longest single word among them."""
    if not cues:
        return []
    wanted = frozenset(cue.term for cue in cues)
    places: dict[str, list[int]] = {term: [] for term in wanted}
    for number, (chosen, rejected) in enumerate(texts):
        for term in (terms(chosen) ^ terms(rejected)) & wanted:
            places[term].append(number)
    groups: dict[tuple[int, ...], list[Cue]] = {}
    for cue in cues:
        groups.setdefault((*places[cue.term], cue.favours == "chosen"), []).append(cue)
    kept: list[Cue] = []
    for group in groups.values():
        first = min(group, key=lambda cue: (" " in cue.term, -len(cue.term), cue.term))
        kept.append(msgspec.structs.replace(first, also=tuple(cue.term for cue in group if cue is not first)))
    return kept


class TermCounts:
    """In how many pairs each term is where. `only_*`: in that answer and not in the other one."""

    def __init__(self) -> None:
        self.chosen: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.only_chosen: Counter[str] = Counter()
        self.only_rejected: Counter[str] = Counter()
        self._total_chosen = self._total_rejected = self._terms = 0

    @classmethod
    def of(cls, texts: Iterable[tuple[str, str]]) -> TermCounts:
        counts = cls()
        for chosen, rejected in texts:
            counts._add(terms(chosen), terms(rejected))
        counts._total_chosen = counts.only_chosen.total()
        counts._total_rejected = counts.only_rejected.total()
        counts._terms = len(counts.only_chosen.keys() | counts.only_rejected.keys())
        return counts

    def _add(self, chosen: frozenset[str], rejected: frozenset[str]) -> None:
        self.chosen.update(chosen)
        self.rejected.update(rejected)
        self.only_chosen.update(chosen - rejected)
        self.only_rejected.update(rejected - chosen)

    def differing(self) -> list[str]:
        """Terms in which at least one pair differs, in alphabetical order."""
        return sorted(self.only_chosen.keys() | self.only_rejected.keys())

    def differences(self, term: str) -> int:
        """Pairs that differ in it."""
        return self.only_chosen[term] + self.only_rejected[term]

    def is_redundant(self, term: str) -> bool:
        """A pair of words that tells no more than one of them: wherever that word makes a difference, so do both."""
        first, _, second = term.partition(" ")
        return bool(second) and any(
            (self.only_chosen[term], self.only_rejected[term]) == (self.only_chosen[word], self.only_rejected[word])
            for word in (first, second)
        )

    def log_odds(self, term: str) -> tuple[float, float]:
        """(log-odds ratio of preferred to other side, its standard error).

        With y differences for one side of n in all, and prior counts a of a₀: log((y + a)/(n + a₀ − y − a)) each, and
        the variance of their difference is about Σ 1/(y + a).
        """
        total = self._total_chosen + self._total_rejected
        prior_total = PRIOR_SHARE * total + PRIOR_COUNT * self._terms
        prior = PRIOR_SHARE * self.differences(term) + PRIOR_COUNT
        chosen, rejected = self.only_chosen[term] + prior, self.only_rejected[term] + prior
        rest_chosen = max(self._total_chosen + prior_total - chosen, PRIOR_COUNT)
        rest_rejected = max(self._total_rejected + prior_total - rejected, PRIOR_COUNT)
        ratio = math.log(chosen / rest_chosen) - math.log(rejected / rest_rejected)
        return ratio, math.sqrt(1 / chosen + 1 / rejected)


def two_sided_p(z: float) -> float:
    """P(|Z| ≥ |z|) of a standard normal."""
    return math.erfc(abs(z) / math.sqrt(2))


def false_discovery_rates(p_values: Sequence[float]) -> list[float]:
    """Benjamini & Hochberg 1995, as q-values in the order given: the least false-discovery rate that lets each pass.

    >>> [round(q, 3) for q in false_discovery_rates([0.01, 0.04, 0.03, 0.5])]
    [0.04, 0.053, 0.053, 0.5]
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place], reverse=True)
    qs = [1.0] * len(p_values)
    least = 1.0
    for rank, place in zip(range(len(p_values), 0, -1), order, strict=True):
        least = min(least, p_values[place] * len(p_values) / rank)
        qs[place] = least
    return qs
