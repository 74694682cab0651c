"""Rows are shared out to ranks evenly, each exactly once, in equally many micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch import micro_batches, padding_share
from learner.experience import CPU_OVERHEAD_TOKENS
from learner.share import rank_share, share_out

LENGTHS = st.lists(st.integers(2, 80), min_size=1, max_size=40)


def test_the_worked_example() -> None:
    assert share_out([5, 1, 4, 2], ranks=2) == [[0, 1], [2, 3]]


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, ranks=st.integers(1, 5))
def test_tokens_are_even(lengths: list[int], ranks: int) -> None:
    """Longest first: no rank has more than the even share and one row above it."""
    tokens = [sum(lengths[row] for row in rows) for rows in share_out(lengths, ranks=ranks)]
    assert sum(tokens) == sum(lengths)
    assert max(tokens) <= sum(lengths) / ranks + max(lengths)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, ranks=st.integers(1, 5), token_budget=st.sampled_from([1, 60, 200, 8192]))
def test_every_row_is_in_one_slot_of_one_rank(lengths: list[int], ranks: int, token_budget: int) -> None:
    shares = [
        rank_share(lengths, rank=rank, ranks=ranks, token_budget=token_budget, overhead_tokens=20)
        for rank in range(ranks)
    ]
    assert sorted(row for share in shares for rows in share.slots for row in rows) == list(range(len(lengths)))
    assert len({len(share.slots) for share in shares}) == 1, "sharded models gather all together"
    assert len({share.padding_share for share in shares}) == 1
    for share in shares:
        for rows in share.slots:
            longest = max((lengths[row] for row in rows), default=0)
            assert len(rows) <= 1 or len(rows) * longest <= token_budget


def test_one_rank_has_the_micro_batches_of_one_process() -> None:
    lengths = [9, 3, 30, 31, 8, 2, 60]
    share = rank_share(lengths, rank=0, ranks=1, token_budget=64, overhead_tokens=5)
    assert list(share.slots) == micro_batches(lengths, token_budget=64, overhead_tokens=5)


def test_more_ranks_than_rows_leaves_idle_slots() -> None:
    shares = [rank_share([7, 5], rank=rank, ranks=3, token_budget=64, overhead_tokens=5) for rank in range(3)]
    assert [share.slots for share in shares] == [([0],), ([1],), ([],)]
    assert shares[2].idle_rows == [1], "the shortest row"


def test_a_rank_with_few_long_rows_spreads_the_short_ones_of_another() -> None:
    """Rank 0 needs three forwards for its long rows; rank 1's short rows go over as many, not into idle ones."""
    lengths = [60, 60, 60, 30, 30, 30, 30, 30, 30]
    first, second = (
        rank_share(lengths, rank=rank, ranks=2, token_budget=64, overhead_tokens=1000) for rank in range(2)
    )
    assert len(first.slots) == len(second.slots)
    assert all(first.slots)
    assert all(second.slots)


@pytest.mark.parametrize("kind", ["even", "peaked"])
def test_less_than_a_tenth_is_padding_on_a_cpu(kind: str) -> None:
    """Mini-batches of 64: prompts of 8 to 16 tokens, answers of 5 to 64."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        answers = rng.integers(5, 65, 64) if kind == "even" else np.clip(rng.normal(30, 10, 64), 5, 64).astype(int)
        lengths = (rng.integers(8, 17, 64) + answers).tolist()
        groups = micro_batches(lengths, token_budget=8192, overhead_tokens=CPU_OVERHEAD_TOKENS)
        shares.append(padding_share(lengths, groups=groups))
    assert np.mean(shares) < 0.09
    assert np.mean([share < 0.1 for share in shares]) > 0.9
