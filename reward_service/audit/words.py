"""Words that draw one annotator more than the others: candidates for what an annotator likes apart from quality.

The majority's cues do not show them, since the others outvote each annotator. So per pair the annotator's vote (+1 for
the chosen answer, −1 for the other) is compared with the mean vote of the others, and that difference regressed on
which answer has the word, with the difference of lengths taken out of both (Frisch–Waugh). An annotator who is like the
others has an expected difference of 0 for every word. Deterministic.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from cluster.data_records import PreferencePair
from cluster.preference_table import Vote
from reward_service.audit.cues import MIN_PAIRS, false_discovery_rates, terms, two_sided_p
from reward_service.audit.lengths import LengthPair
from reward_service.audit.records import Draw

MAX_Q: Final = 0.01
MAX_OVERLAP: Final = 0.5
"""Of the pairs that differ in the rarer of two words, those that differ in the other too."""


@dataclass(frozen=True)
class Drawing:
    """`places`: numbers of the pairs that differ in the term."""

    draw: Draw
    places: frozenset[int]

    @property
    def least_effect(self) -> float:
        """Lower end of the effect's 95 % interval."""
        return self.draw.effect * (1 - 1.96 / self.draw.z)


def drawing_words(
    pairs: Sequence[PreferencePair],
    lengths: Sequence[LengthPair],
    *,
    votes: Iterable[Vote],
    max_q: float = MAX_Q,
    min_share: float = 0.005,
) -> list[Drawing]:
    """Words and word pairs that draw an annotator more than the others, strongest first. A pair that one annotator
    alone judged counts for nothing."""
    judged = _judged(pairs, lengths, votes)
    matrix, names = _matrix([one.pair for one in judged], least=max(MIN_PAIRS, math.ceil(min_share * len(judged))))
    found = [
        drawing
        for annotator, rows in sorted(_departures(judged).items())
        for drawing in _tests(annotator, rows, lengths=[one.longer_by for one in judged], matrix=matrix, names=names)
    ]
    qs = false_discovery_rates([two_sided_p(one.draw.z) for one in found])
    passed = [
        Drawing(msgspec.structs.replace(one.draw, q=q), one.places)
        for one, q in zip(found, qs, strict=True)
        if q <= max_q and one.draw.effect > 0
    ]
    return sorted(_together(passed), key=lambda one: (-one.draw.z, one.draw.annotator, one.draw.term))


def _together(drawings: Sequence[Drawing]) -> list[Drawing]:
    """One for those terms of an annotator that always come together, under the longest single word among them."""
    groups: dict[tuple[str, frozenset[int]], list[Draw]] = {}
    for one in drawings:
        groups.setdefault((one.draw.annotator, one.places), []).append(one.draw)
    kept: list[Drawing] = []
    for (_, places), draws in groups.items():
        first = min(draws, key=lambda draw: (" " in draw.term, -len(draw.term), draw.term))
        also = tuple(draw.term for draw in draws if draw is not first)
        kept.append(Drawing(msgspec.structs.replace(first, also=also), places))
    return kept


@dataclass(frozen=True)
class _Judged:
    """A pair with two votes or more. `votes`: annotator → +1 for the chosen answer, −1 for the other."""

    pair: PreferencePair
    longer_by: int
    votes: Mapping[str, float]


def _judged(pairs: Sequence[PreferencePair], lengths: Sequence[LengthPair], votes: Iterable[Vote]) -> list[_Judged]:
    by_pair: dict[str, dict[str, float]] = defaultdict(dict)
    for vote in votes:
        by_pair[vote.pair_id][vote.annotator] = 1.0 if vote.prefers_chosen else -1.0
    return [
        _Judged(pair, chosen - rejected, by_pair[pair.pair_id])
        for pair, (chosen, rejected) in zip(pairs, lengths, strict=True)
        if len(by_pair.get(pair.pair_id, ())) > 1
    ]


def _matrix(pairs: Sequence[PreferencePair], *, least: int) -> tuple[Any, list[str]]:
    """Sparse [pairs, terms], and the terms in which `least` pairs or more differ: +1 where the chosen answer alone has
    the term, −1 where the other one has."""
    import numpy as np
    from scipy.sparse import csr_array

    both = [(terms(pair.chosen), terms(pair.rejected)) for pair in pairs]
    counts = Counter(term for chosen, rejected in both for term in chosen ^ rejected)
    names = sorted(term for term, count in counts.items() if count >= least)
    place = {term: number for number, term in enumerate(names)}
    entries = [
        (row, place[term], 1.0 if term in chosen else -1.0)
        for row, (chosen, rejected) in enumerate(both)
        for term in chosen ^ rejected
        if term in place
    ]
    rows, columns, values = np.array(entries).T if entries else np.zeros((3, 0))
    return csr_array((values, (rows.astype(int), columns.astype(int))), shape=(len(pairs), len(names))), names


def _departures(judged: Sequence[_Judged]) -> dict[str, list[tuple[int, float]]]:
    """Annotator → (pair's number, own vote − mean vote of the others)."""
    departures: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for number, one in enumerate(judged):
        total = sum(one.votes.values())
        for annotator, vote in one.votes.items():
            departures[annotator].append((number, vote - (total - vote) / (len(one.votes) - 1)))
    return departures


def _tests(
    annotator: str, rows: Sequence[tuple[int, float]], *, lengths: Sequence[int], matrix: Any, names: Sequence[str]
) -> list[Drawing]:
    """One regression a term: departure on the term's side, both with the length difference taken out."""
    import numpy as np

    numbers = np.array([number for number, _ in rows], dtype=int)
    departure = np.array([one for _, one in rows])
    length = np.array([lengths[number] for number in numbers], dtype=float)
    terms_here = matrix[numbers]
    square = float(length @ length)
    slope = float(length @ departure) / square if square else 0.0
    variance = float(np.mean((departure - slope * length) ** 2))
    if variance == 0.0 or not names:
        return []
    count = abs(terms_here).T @ np.ones(len(numbers))
    along, toward = terms_here.T @ length, terms_here.T @ departure
    free = count - (along**2 / square if square else 0.0)
    by_column = terms_here.tocsc()
    found: list[Drawing] = []
    for term in np.flatnonzero((count >= MIN_PAIRS) & (free > 1e-9 * count)):
        effect = float(toward[term] - along[term] * slope) / float(free[term])
        z = effect * math.sqrt(float(free[term]) / variance)
        places = by_column.indices[by_column.indptr[term] : by_column.indptr[term + 1]]
        draw = Draw(annotator=annotator, term=names[term], effect=effect, z=z, q=1.0)
        found.append(Drawing(draw, frozenset(numbers[places].tolist())))
    return found


def independent_words(drawings: Sequence[Drawing]) -> list[str]:
    """Single words that stand for all of them in one regression: those whose presence mostly follows from a stronger
    one's ("you" beside "love" in "I love you") are left out."""
    kept: list[Drawing] = []
    single = [one for one in drawings if " " not in one.draw.term]
    for one in sorted(single, key=lambda one: (-one.least_effect, one.draw.term)):
        if all(_overlap(one.places, other.places) <= MAX_OVERLAP for other in kept):
            kept.append(one)
    return [one.draw.term for one in kept]


def _overlap(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / min(len(a), len(b))
