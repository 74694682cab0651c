"""Do annotators agree, and who runs against the rest? From votes alone. What drives each: annotator_bias.py.

Pure: numpy inside functions, no torch, no queue. Votes are about pairs, so every measure here gives the same whichever
answer of a pair is written first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from cluster.data_records import PreferencePair
from cluster.preference_table import Vote
from cluster.ratings import Rating
from reward_service.audit.annotator_bias import LENGTH, AnnotatorBias, biases
from reward_service.preferences import wilson_interval

__all__ = [
    "LENGTH", "Agreement", "AnnotatorAgreement", "AnnotatorBias", "agreement", "alpha_interval", "biases", "votes_of",
]  # fmt: skip

MIN_COMPARED: Final = 20
"""Pairs on which an annotator must be compared with the others before anything is said."""
FAR_BELOW: Final = 0.1
"""An annotator is far below the rest if the whole interval is this much under the others' median."""


@dataclass(frozen=True)
class AnnotatorAgreement:
    """One annotator against the majority of the others, on pairs where the others have one.

    `share` of `compared` pairs agree; `low`, `high`: its 95 % Wilson interval. `against`: why this annotator's votes
    run against the rest, else "".
    """

    annotator: str
    votes: int
    compared: int
    share: float | None
    low: float | None
    high: float | None
    against: str = ""


@dataclass(frozen=True)
class Agreement:
    """`alpha_votes`, `alpha_ratings`: Krippendorff's alpha, 1 perfect, 0 as by chance; None where nobody judged what
    another judged. `pairwise`: share of `pairwise_count` couples of votes on one pair that agree."""

    alpha_votes: float | None
    alpha_ratings: float | None
    pairwise: float | None
    pairwise_count: int
    annotators: tuple[AnnotatorAgreement, ...]


def votes_of(pairs: Iterable[PreferencePair]) -> list[Vote]:
    """The votes of named annotators that pairs carry."""
    return [
        Vote(pair.pair_id, name, vote)
        for pair in pairs
        if pair.votes is not None and pair.annotators is not None
        for name, vote in zip(pair.annotators, pair.votes, strict=True)
        if name
    ]


def agreement(votes: Sequence[Vote], *, ratings: Sequence[Rating] = ()) -> Agreement:
    """Every measure at once. Pairs judged by one annotator count for nothing here."""
    by_pair = _by_pair(votes)
    counts = [(sum(ballot.values()), len(ballot)) for ballot in by_pair.values() if len(ballot) > 1]
    couples = sum(total * (total - 1) // 2 for _, total in counts)
    agreeing = sum(math.comb(first, 2) + math.comb(total - first, 2) for first, total in counts)
    return Agreement(
        alpha_votes=_alpha_of_counts(counts),
        alpha_ratings=alpha_interval(ratings),
        pairwise=agreeing / couples if couples else None,
        pairwise_count=couples,
        annotators=_annotators(by_pair),
    )


def _by_pair(votes: Iterable[Vote]) -> dict[str, dict[str, bool]]:
    by_pair: dict[str, dict[str, bool]] = defaultdict(dict)
    for vote in votes:
        by_pair[vote.pair_id][vote.annotator] = vote.prefers_chosen
    return dict(by_pair)


# ---------------------------------------------------------------- alpha


def _alpha_of_counts(counts: Sequence[tuple[int, int]]) -> float | None:
    """Nominal alpha of (votes for the first answer, votes) by pair.

    "First" is arbitrary; were it the answer that won, nearly all votes would be in one category, and agreement by
    chance would look likely. So each pair counts in both orders: both categories are then equally common, exactly.
    """
    if not counts:
        return None
    import krippendorff
    import numpy as np

    first = np.array([first for first, _ in counts])
    second = np.array([total - first for first, total in counts])
    both_orders = np.concatenate([np.stack([first, second], axis=1), np.stack([second, first], axis=1)])
    return float(krippendorff.alpha(value_counts=both_orders, level_of_measurement="nominal"))


def alpha_interval(ratings: Sequence[Rating]) -> float | None:
    """Interval alpha of ratings: 1 − (mean squared difference within an answer) / (the same over all ratings).

    In closed form, from sums and sums of squares: the usual table of value × value does not fit where ratings are
    continuous. Krippendorff 2011, "Computing Krippendorff's alpha-reliability". None where no answer has two ratings,
    or all ratings are equal.
    """
    by_answer: dict[str, list[float]] = defaultdict(list)
    for rating in ratings:
        by_answer[rating.answer_id].append(rating.rating)
    units = [values for values in by_answer.values() if len(values) > 1]
    everything = [value for values in units for value in values]
    expected = _squared_differences(everything)
    if expected <= 0:
        return None
    observed = math.fsum(_squared_differences(values) / (len(values) - 1) for values in units)
    return 1.0 - (len(everything) - 1) * observed / expected


def _squared_differences(values: Sequence[float]) -> float:
    """Σ over ordered couples of (x − y)² = 2·n·Σ(x − mean)²."""
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values)
    return 2 * len(values) * math.fsum((value - mean) ** 2 for value in values)


# ---------------------------------------------------------------- one against the rest


def _annotators(by_pair: Mapping[str, Mapping[str, bool]]) -> tuple[AnnotatorAgreement, ...]:
    total: dict[str, int] = defaultdict(int)
    compared: dict[str, int] = defaultdict(int)
    agrees: dict[str, int] = defaultdict(int)
    for ballot in by_pair.values():
        for_chosen = sum(ballot.values())
        for name, vote in ballot.items():
            total[name] += 1
            balance = 2 * (for_chosen - vote) - (len(ballot) - 1)
            if balance:
                compared[name] += 1
                agrees[name] += vote == (balance > 0)
    shares = {name: agrees[name] / count for name, count in compared.items() if count >= MIN_COMPARED}
    return tuple(_one(name, total[name], compared[name], agrees[name], shares) for name in sorted(total))


def _one(name: str, votes: int, compared: int, agrees: int, shares: Mapping[str, float]) -> AnnotatorAgreement:
    if not compared:
        return AnnotatorAgreement(name, votes, 0, None, None, None)
    share = agrees / compared
    low, high = wilson_interval(share, n=compared)
    others = [other for who, other in shares.items() if who != name]
    against = ""
    if compared >= MIN_COMPARED and high < 0.5:
        against = f"disagrees with the majority of the others more often than not (at most {high:.0%} agreement)"
    elif compared >= MIN_COMPARED and len(others) > 1 and high < median(others) - FAR_BELOW:
        against = (
            f"agrees with the others in at most {high:.0%}, while these agree among themselves in {median(others):.0%}"
        )
    return AnnotatorAgreement(name, votes, compared, share, low, high, against)
