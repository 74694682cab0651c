"""Votes → the label of a pair, and labels without the votes of some annotators. Pure Python; no torch, no queue."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from cluster.data_records import PreferencePair
from cluster.errors import DataError

MIN_CONFIDENCE: Final = 0.6
"""Least share of the votes that the chosen answer needs: three of five."""


@dataclass(frozen=True)
class Majority:
    """The side with more votes and its share of them, in (0.5, 1]."""

    prefers_a: bool
    confidence: float


def majority(votes: Sequence[bool], *, ties: int = 0, min_confidence: float = MIN_CONFIDENCE) -> Majority | None:
    """The majority's label; None when its share is under `min_confidence` or not more than half of those who chose.

    `ties`: judgements that found both answers equal. They count among all, and for neither answer.

    >>> majority([True, True, False, True, False])
    Majority(prefers_a=True, confidence=0.6)
    >>> majority([True, False]) is None
    True
    >>> majority([True], ties=2) is None
    True

    Raises DataError for no votes at all.
    """
    total = len(votes) + ties
    if not total:
        raise DataError("a judge gave no votes", do="return at least one vote a pair")
    for_a = sum(votes)
    confidence = max(for_a, len(votes) - for_a) / total
    if 2 * for_a == len(votes) or confidence < min_confidence:
        return None
    return Majority(prefers_a=2 * for_a > len(votes), confidence=confidence)


def turned(pair: PreferencePair) -> PreferencePair:
    """The same judgements with `chosen` and `rejected` changing places."""
    version, rejected_version = pair.policy_version, pair.rejected_version
    if rejected_version is not None:
        version, rejected_version = rejected_version, version
    return msgspec.structs.replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        votes=None if pair.votes is None else tuple(not vote for vote in pair.votes),
        policy_version=version,
        rejected_version=rejected_version,
    )


def with_votes_of(pair: PreferencePair, keep: Sequence[bool]) -> PreferencePair:
    """The pair with the votes at the places where `keep` is true, and no confidence; its order is left as it is."""
    return msgspec.structs.replace(
        pair,
        votes=None if pair.votes is None else tuple(v for v, kept in zip(pair.votes, keep, strict=True) if kept),
        annotators=(
            None if pair.annotators is None else tuple(a for a, kept in zip(pair.annotators, keep, strict=True) if kept)
        ),
        confidence=None,
    )


def labelled(pair: PreferencePair, *, ties: int = 0, min_confidence: float = MIN_CONFIDENCE) -> PreferencePair | None:
    """The pair in the order of its votes' majority, with its confidence; None where there is no clear one.

    Raises DataError for a pair without votes.
    """
    label = majority(pair.votes or (), ties=ties, min_confidence=min_confidence)
    if label is None:
        return None
    ordered = pair if label.prefers_a else turned(pair)
    return msgspec.structs.replace(ordered, confidence=label.confidence)


# ---------------------------------------------------------------- annotators kept out


@dataclass(frozen=True)
class Split:
    """Pairs after annotators were kept apart. A pair may be in more than one list.

    `pairs`: labelled by the annotators that remain; pairs of unknown annotators are as they were. `unclear`: those on
    which the rest has no clear majority, in the order they came in. `held_out`: pairs that the held-out annotators
    judged with a clear majority, with their votes alone and in their order. All keep their pair_id.
    """

    pairs: list[PreferencePair]
    unclear: list[PreferencePair]
    held_out: list[PreferencePair]


def held_out_annotators(pairs: Iterable[PreferencePair], fraction: float, *, seed: int = 0) -> tuple[str, ...]:
    """The annotators of `pairs` to keep out of training: `fraction` of them, rounded down, sorted.

    Drawn by a hash of seed and id, so the same people are kept out whichever of their pairs are there, as long as
    their number is the same.
    """
    return pick_held_out({name for pair in pairs for name in pair.annotators or () if name}, fraction, seed=seed)


def pick_held_out(annotators: Iterable[str], fraction: float, *, seed: int) -> tuple[str, ...]:
    """The same, from the ids themselves."""
    everyone = sorted(set(annotators), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = math.floor(fraction * len(everyone) + 1e-9)  # 0.29 × 100 is 28.999…
    return tuple(sorted(everyone[:count]))


def without_annotators(
    pairs: Iterable[PreferencePair], held_out: Sequence[str], *, min_confidence: float = MIN_CONFIDENCE
) -> Split:
    """Take the votes of `held_out` out of the labels. Nothing changes for a pair that none of them judged."""
    kept_out = frozenset(held_out)
    split = Split([], [], [])
    for pair in pairs:
        if pair.votes is None or pair.annotators is None or kept_out.isdisjoint(pair.annotators):
            split.pairs.append(pair)
            continue
        theirs = [name in kept_out for name in pair.annotators]
        alone = labelled(with_votes_of(pair, theirs), min_confidence=min_confidence)
        if alone is not None:
            split.held_out.append(alone)
        if all(theirs):
            continue
        remaining = with_votes_of(pair, [not held for held in theirs])
        label = labelled(remaining, min_confidence=min_confidence)
        if label is None:
            split.unclear.append(remaining)
        else:
            split.pairs.append(label)
    return split
