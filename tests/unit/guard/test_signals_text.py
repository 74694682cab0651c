"""Repetition, compression, rare tokens, copies: worked numbers, and what has to hold for any answers."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.guard.copying import RunIndex
from learner.guard.spans import MAX_TOKENS, Spans, TokenIds
from learner.guard.text_signals import (
    Compression,
    RareTokens,
    distinct_bigrams,
    longest_repeat_fraction,
    repeated_bigrams,
)


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, dtype=np.int32)


def distinct(answers: list[TokenIds]) -> float | None:
    return distinct_bigrams(answers, repeated_B=repeated_bigrams(answers))


SEQUENCES = st.lists(st.integers(0, 4), max_size=24)


def longest_repeat_by_hand(tokens: list[int]) -> int:
    for length in range(len(tokens) - 1, 0, -1):
        spans = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
        if len(set(spans)) < len(spans):
            return length
    return 0


@given(SEQUENCES)
@settings(max_examples=150, deadline=None)
def test_the_longest_repeat_is_the_longest_repeat(tokens: list[int]) -> None:
    assert Spans(ids(*tokens)).longest_repeat() == longest_repeat_by_hand(tokens)


@given(SEQUENCES, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_runs_have_equal_hashes_where_they_are_equal_and_only_there(tokens: list[int], n: int) -> None:
    runs = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    hashes = Spans(ids(*tokens)).hashes(n).tolist()
    assert len(hashes) == len(runs)
    assert len(set(zip(runs, hashes, strict=True))) == len(set(runs)) == len(set(hashes))


@given(st.lists(SEQUENCES, max_size=4))
@settings(max_examples=100, deadline=None)
def test_distinct_bigrams_by_hand(answers: list[list[int]]) -> None:
    shares = [len(set(pairwise(one))) / (len(one) - 1) for one in answers if len(one) > 1]
    found = distinct([ids(*one) for one in answers])
    assert found == (pytest.approx(np.mean(shares)) if shares else None)
    repeated = [max(len(one) - 1, 0) - len(set(pairwise(one))) for one in answers]
    assert repeated_bigrams([ids(*one) for one in answers]).tolist() == repeated


def test_a_loop_repeats_nearly_all_of_itself() -> None:
    loop = ids(*[1, 2, 3] * 20)
    assert longest_repeat_fraction([loop]) == pytest.approx(57 / 60)
    assert distinct([loop]) == pytest.approx(3 / 59)
    assert longest_repeat_fraction([loop, ids(*range(60))]) == pytest.approx(57 / 120)


def test_no_answers_and_empty_ones_tell_nothing() -> None:
    assert distinct([]) is None
    assert distinct([ids(), ids(1)]) is None
    assert longest_repeat_fraction([ids()]) is None
    assert longest_repeat_fraction([ids(1)]) == 0.0


def test_a_huge_answer_is_cut_and_large_token_ids_are_fine() -> None:
    huge = np.full(5 * MAX_TOKENS, 2**31 - 1, dtype=np.int32)
    assert longest_repeat_fraction([huge]) == pytest.approx((MAX_TOKENS - 1) / MAX_TOKENS)
    assert distinct([huge]) == pytest.approx(1 / (MAX_TOKENS - 1))


def words(rng: random.Random, count: int, vocabulary: int) -> str:
    return " ".join(f"w{rng.randrange(vocabulary)}ü" for _ in range(count))


def test_compression_is_1_for_alike_answers_whatever_their_length() -> None:
    """Long texts compress better than short ones of the same kind; the ratio must not say so."""
    rng = random.Random(0)
    compression = Compression([words(rng, rng.randrange(10, 60), 400) for _ in range(600)])
    for length in (10, 30, 120, 600):
        assert compression.ratio([words(rng, length, 400) for _ in range(64)]) == pytest.approx(1.0, abs=0.1)


def test_answers_that_repeat_themselves_compress_better_and_alike_answers_do_not() -> None:
    rng = random.Random(0)
    compression = Compression([words(rng, 30, 400) for _ in range(600)])
    looped = compression.ratio([" ".join([words(rng, 5, 400)] * 6) for _ in range(64)])
    assert looped is not None
    assert looped > 2
    assert compression.ratio([words(rng, 30, 400)] * 64) == pytest.approx(1.0, abs=0.1)


def test_compression_of_too_little_cannot_be_told() -> None:
    rng = random.Random(0)
    assert Compression([words(rng, 30, 400) for _ in range(60)]).ratio(["too short", ""]) is None
    assert Compression([]).ratio([words(rng, 30, 400)]) is None
    assert Compression(["one answer of few words and no more than these"]).ratio([words(rng, 30, 400)]) is None


def test_tokens_that_the_reference_never_used_are_rare() -> None:
    rare = RareTokens([ids(*[1, 2, 3] * 10)] * 20)
    assert rare.fraction([ids(1, 2, 3, 3)]) == 0.0
    assert rare.fraction([ids(1, 2, 99, 98)]) == pytest.approx(0.5)
    assert rare.fraction([]) is None
    assert rare.fraction([ids()]) is None
    assert RareTokens([]).fraction([ids(1)]) is None


def test_a_small_reference_expects_tokens_that_it_has_not_seen() -> None:
    """Zipf's law: of few answers, a large share of the next one's tokens is new, though the policy is the same."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 5001)

    def sample(count: int) -> list[TokenIds]:
        drawn = rng.choice(5000, size=(count, 40), p=weights / weights.sum())
        return list(drawn.astype(np.int32))

    reference = sample(64)
    seen = set(np.concatenate(reference).tolist())
    fresh = sample(128)
    assert np.mean([token not in seen for token in np.concatenate(fresh).tolist()]) > 0.15
    excess = RareTokens(reference).fraction(fresh)
    assert excess is not None
    assert excess < 0.03


def test_copies_are_found_word_for_word_and_from_the_given_length_on() -> None:
    index = RunIndex([ids(*range(100)), ids(*range(200, 220))], n=8)
    assert index.runs == 93 + 13
    copy, almost, own = ids(900, *range(40, 48)), ids(900, *range(40, 47), 901), ids(*range(300, 330))
    assert index.copied_share([copy]) == 1.0
    assert index.copied_share([almost]) == 0.0
    assert index.copied_share([copy, almost, own, copy]) == 0.5
    assert index.copied_share([ids(1, 2)]) is None, "too short to copy"
    assert RunIndex([], n=8).copied_share([copy]) is None


def test_an_index_that_is_too_large_keeps_a_sample_that_still_finds_long_copies() -> None:
    rng = np.random.default_rng(0)
    texts = list(rng.integers(0, 5000, size=(400, 200)).astype(np.int32))
    index = RunIndex(texts, n=8, max_runs=5000)
    assert index.runs == 5000
    others = list(rng.integers(0, 5000, size=(50, 200)).astype(np.int32))
    assert index.copied_share(texts[:50]) == 1.0
    assert index.copied_share(others) == 0.0
