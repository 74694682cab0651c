"""Votes, pairs and the statistics around a reward model's accuracy."""

from __future__ import annotations

import random

import pytest

from cluster.data_records import Prompt
from cluster.errors import DataError
from cluster.labels import Majority, majority
from reward_service.preferences import (
    Candidate,
    accuracy,
    collect_pairs,
    length_only_accuracy,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([True, True, True, False, False], Majority(prefers_a=True, confidence=0.6)),
        ([False, False, False, False, True], Majority(prefers_a=False, confidence=0.8)),
        ([True], Majority(prefers_a=True, confidence=1.0)),
        ([True, False], None),
        ([True] * 4 + [False] * 3, None),  # 4 of 7 is 57 %
    ],
)
def test_majority(votes: list[bool], expected: Majority | None) -> None:
    assert majority(votes) == expected


def test_ties_count_for_neither_side() -> None:
    assert majority([True, True], ties=1) == Majority(prefers_a=True, confidence=2 / 3)
    assert majority([True], ties=2) is None  # a third prefers it
    assert majority([], ties=3) is None


def test_majority_needs_votes() -> None:
    with pytest.raises(DataError, match="no votes"):
        majority([])


def _longer_wins(_prompt: Prompt, a: str, b: str, _rng: random.Random) -> list[bool]:
    return [len(a) > len(b)] * 4 + [len(a) < len(b)]


def test_collect_orders_pairs_and_counts_every_candidate() -> None:
    candidates = [
        Candidate("p0", "short", "much longer"),
        Candidate("p1", "same", "same"),
        Candidate("p2", "long one", "s"),
        Candidate("p3", "x", " "),
    ]
    collected = collect_pairs(candidates, judge=_longer_wins, seed=3, policy_version=2)
    assert [(pair.chosen, pair.rejected) for pair in collected.pairs] == [("much longer", "short"), ("long one", "s")]
    assert [pair.pair_id for pair in collected.pairs] == ["judged-0000000", "judged-0000002"]
    assert all(pair.votes == (True, True, True, True, False) for pair in collected.pairs)
    assert all(pair.confidence == 0.8 and pair.policy_version == 2 for pair in collected.pairs)
    assert collected.report.read == 4
    assert collected.report.used == 2
    assert collected.report.rejected == {"identical answers": 1, "empty answer": 1}


def test_collect_refuses_unclear_votes() -> None:
    def undecided(_prompt: Prompt, _a: str, _b: str, _rng: random.Random) -> list[bool]:
        return [True, False]

    collected = collect_pairs([Candidate("p", "a", "b")], judge=undecided, seed=0)
    assert collected.pairs == []
    assert collected.report.rejected == {"low confidence": 1}


def test_draws_depend_on_the_place_and_the_seed_only() -> None:
    def coin(_prompt: Prompt, _a: str, _b: str, rng: random.Random) -> list[bool]:
        return [rng.random() < 0.5 for _ in range(5)]

    different = [Candidate("p", f"a{i}", f"b{i}") for i in range(30)]
    first_skipped = [Candidate("p", "same", "same"), *different[1:]]
    whole = collect_pairs(different, judge=coin, seed=1).pairs
    assert collect_pairs(first_skipped, judge=coin, seed=1).pairs == whole[1:]
    assert collect_pairs(different, judge=coin, seed=2).pairs != whole


def test_a_judge_may_name_its_annotators() -> None:
    def panel(_prompt: Prompt, a: str, b: str, _rng: random.Random) -> dict[str, bool]:
        return {"ann": len(a) > len(b), "bo": True, "cy": len(a) > len(b)}

    candidates = [Candidate("p", "s", "longer", version_a=4, version_b=1), Candidate("p", "longer", "s", 4, 1)]
    first, second = collect_pairs(candidates, judge=panel, seed=0, source="collected").pairs
    assert (first.chosen, first.votes, first.annotators) == ("longer", (True, False, True), ("ann", "bo", "cy"))
    assert (first.policy_version, first.rejected_version, first.source) == (1, 4, "collected")
    assert (second.chosen, second.votes, second.confidence) == ("longer", (True, True, True), 1.0)
    assert (second.policy_version, second.rejected_version) == (4, 1)


def test_unclear_pairs_keep_their_votes() -> None:
    def split(_prompt: Prompt, a: str, _b: str, _rng: random.Random) -> dict[str, bool]:
        return {"ann": True, "bo": a == "clear"}

    candidates = [Candidate("p", "a", "b"), Candidate("p", "clear", "b")]
    collected = collect_pairs(candidates, judge=split, seed=0)
    assert [pair.chosen for pair in collected.pairs] == ["clear"]
    assert [(pair.chosen, pair.votes, pair.confidence) for pair in collected.unclear] == [("a", (True, False), None)]
    assert collected.report.rejected == {"low confidence": 1}


def test_a_judge_without_votes_is_an_error() -> None:
    with pytest.raises(DataError, match="no votes"):
        collect_pairs([Candidate("p", "a", "b")], judge=lambda *_: [], seed=0)


def test_accuracy_counts_ties_as_half() -> None:
    assert accuracy([1.0, -2.0, 0.0, 0.5]) == 2.5 / 4
    with pytest.raises(DataError):
        accuracy([])


def test_length_baseline_learns_its_direction() -> None:
    held_out = [(5, 3), (2, 4), (1, 6), (4, 4)]
    assert length_only_accuracy([(9, 1), (8, 2), (1, 2)], held_out) == pytest.approx(1.5 / 4)
    assert length_only_accuracy([(1, 9), (2, 8), (2, 1)], held_out) == pytest.approx(2.5 / 4)


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20.
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson_interval(successes / n, n=n) == pytest.approx((low, high), abs=5e-5)
    with pytest.raises(ValueError):
        wilson_interval(0.5, n=0)
