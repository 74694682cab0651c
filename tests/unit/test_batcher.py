"""Batches leave when full or due, in order; forward groups partition, respect the budget and waste little."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.batcher import Batcher, BatchLimits, forward_groups


class ManualClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(*, count: int = 4, tokens: int = 100, wait_s: float = 0.5) -> tuple[Batcher[str], ManualClock]:
    clock = ManualClock()
    return Batcher(BatchLimits(count=count, tokens=tokens, wait_s=wait_s), clock=clock), clock


def test_nothing_waits_nothing_is_due() -> None:
    batcher, _ = make()
    assert batcher.due_in_s() is None
    assert batcher.take() == []
    assert batcher.take(flush=True) == []


def test_part_filled_batch_waits_for_its_oldest_item() -> None:
    batcher, clock = make(wait_s=0.5)
    batcher.add("a", tokens=1)
    clock.now_s += 0.25
    batcher.add("b", tokens=1)
    assert batcher.due_in_s() == 0.25
    assert batcher.take() == []
    clock.now_s += 0.25
    assert batcher.due_in_s() == 0.0
    assert batcher.take() == ["a", "b"]
    assert len(batcher) == 0


def test_what_stays_behind_keeps_its_own_arrival_time() -> None:
    batcher, clock = make(count=2, wait_s=0.5)
    batcher.add("a", tokens=1)
    clock.now_s += 0.25
    for name in "bc":
        batcher.add(name, tokens=1)
    assert batcher.take() == ["a", "b"]
    assert batcher.due_in_s() == 0.5
    clock.now_s += 0.5
    assert batcher.take() == ["c"]


def test_full_by_count_leaves_at_once_and_leaves_the_rest() -> None:
    batcher, _ = make(count=2)
    for name in "abc":
        batcher.add(name, tokens=1)
    assert batcher.take() == ["a", "b"]
    assert batcher.take() == []
    assert batcher.take(flush=True) == ["c"]


def test_full_by_tokens_leaves_at_once() -> None:
    batcher, _ = make(tokens=10)
    batcher.add("a", tokens=6)
    assert batcher.take() == []
    batcher.add("b", tokens=6)
    assert batcher.take() == ["a"]
    assert batcher.take() == []


def test_an_item_over_the_budget_goes_alone() -> None:
    batcher, _ = make(tokens=10)
    batcher.add("huge", tokens=500)
    batcher.add("b", tokens=1)
    assert batcher.take() == ["huge"]
    assert batcher.take(flush=True) == ["b"]


@pytest.mark.parametrize("limits", [(0, 1, 0.0), (1, 0, 0.0), (1, 1, -1.0)])
def test_senseless_limits_are_refused(limits: tuple[int, int, float]) -> None:
    count, tokens, wait_s = limits
    with pytest.raises(ValueError, match="batch limits"):
        BatchLimits(count=count, tokens=tokens, wait_s=wait_s)


def test_an_item_without_tokens_is_refused() -> None:
    batcher, _ = make()
    with pytest.raises(ValueError, match="at least one token"):
        batcher.add("a", tokens=0)


@given(
    items=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), max_size=40),
    count=st.integers(1, 8),
    tokens=st.integers(1, 60),
    wait_s=st.floats(0, 1),
)
def test_batcher_keeps_order_loses_nothing_and_stays_within_limits(
    items: list[tuple[int, float]], count: int, tokens: int, wait_s: float
) -> None:
    clock = ManualClock()
    batcher: Batcher[int] = Batcher(BatchLimits(count=count, tokens=tokens, wait_s=wait_s), clock=clock)
    batches: list[list[int]] = []
    for index, (size, pause_s) in enumerate(items):
        batcher.add(index, tokens=size)
        clock.now_s += pause_s
        while batch := batcher.take():
            batches.append(batch)
        due_s = batcher.due_in_s()
        assert due_s is None or 0 < due_s <= wait_s + 1e-9  # whatever was due has been taken
    while batch := batcher.take(flush=True):
        batches.append(batch)
    assert [index for batch in batches for index in batch] == list(range(len(items)))
    for batch in batches:
        assert len(batch) <= count
        assert len(batch) == 1 or sum(items[index][0] for index in batch) <= tokens


@given(lengths=st.lists(st.integers(1, 50), max_size=60), count=st.integers(1, 16), budget=st.integers(1, 200))
def test_groups_partition_and_respect_the_padded_budget(lengths: list[int], count: int, budget: int) -> None:
    groups = forward_groups(lengths, count=count, token_budget=budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert 1 <= len(group) <= count
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= budget


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), budget=st.integers(50, 200))
def test_groups_are_length_sorted_so_neighbours_never_interleave(lengths: list[int], budget: int) -> None:
    groups = forward_groups(lengths, count=16, token_budget=budget)
    spans = [(min(lengths[i] for i in group), max(lengths[i] for i in group)) for group in groups]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_groups_by_hand() -> None:
    assert forward_groups([], count=4, token_budget=10) == []
    assert forward_groups([5, 1, 5, 1], count=4, token_budget=10) == [[1, 3], [0, 2]]
    assert forward_groups([3, 3, 3], count=2, token_budget=100) == [[0, 1], [2]]
    assert forward_groups([99, 1], count=4, token_budget=10) == [[1], [0]]
