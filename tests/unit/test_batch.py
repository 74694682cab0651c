"""Batching: padding by length, and micro-batches that fit a token budget."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError, NonFiniteError
from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, pack_floats, pack_ids
from learner.batch import TrainBatch, micro_batches, padding_share, train_batch


def rollout(
    prompt: list[int],
    response: list[int],
    *,
    name: str = "t",
    group: str = "g",
    reward: float = 0.5,
    finish: str = "stop",
) -> ScoredRollout:
    task = PromptTask(
        task_id=name,
        prompt_id=group,
        group_id=group,
        prompt_ids_i32=pack_ids(prompt),
        max_new_tokens=8,
        temperature=0.7,
    )
    answer = Rollout(
        task=task,
        response_ids_i32=pack_ids(response),
        behaviour_logprobs_f32=pack_floats([-1.0 - t for t in range(len(response))]),
        version_runs=(VersionRun(0, 5), VersionRun(1, 6)),
        finish_reason=finish,
        actor="rollout-0",
        generate_s=0.1,
    )
    return ScoredRollout(
        rollout=answer,
        member_scores=(reward,),
        reward=reward,
        uncertainty=0.0,
        ref_logprobs_f32=pack_floats([-0.5] * len(response)),
        rm_version="rm-1",
    )


def three() -> TrainBatch:
    return train_batch(
        [
            rollout([7, 8], [1, 2, 3], name="a", group="x"),
            rollout([9], [4], name="b", group="y", finish="length"),
            rollout([5, 6, 7, 8], [0, 0], name="c", group="x", reward=2.0),
        ]
    )


def test_rows_are_padded_right_and_masked_by_length() -> None:
    batch = three()
    assert batch.sequence_ids_BL.tolist() == [[7, 8, 1, 2, 3, 0], [9, 4, 0, 0, 0, 0], [5, 6, 7, 8, 0, 0]]
    assert batch.response_ids_BT.tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]
    assert batch.mask_BT.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]], "id 0 is a token like any other"
    assert batch.behaviour_logprobs_BT.tolist() == [[-1, -2, -3], [-1, 0, 0], [-1, -2, 0]]
    assert batch.sequence_tokens == [5, 2, 6]
    assert batch.truncated_B.tolist() == [False, True, False]
    assert batch.group_B.tolist() == [0, 1, 0]
    assert batch.oldest_version_B.tolist() == [5, 5, 5]
    assert batch.score_B.tolist() == [0.5, 0.5, 2.0]
    assert batch.temperature_B.tolist() == pytest.approx([0.7] * 3)
    assert batch.task_ids == ("a", "b", "c")


def test_select_keeps_order_and_cuts_padding() -> None:
    part = three().select([1, 0])
    assert part.sequence_ids_BL.tolist() == [[9, 4, 0, 0, 0], [7, 8, 1, 2, 3]]
    assert part.response_ids_BT.tolist() == [[4, 0, 0], [1, 2, 3]]
    assert part.task_ids == ("b", "a")
    assert part.score_B.tolist() == [0.5, 0.5]
    short = three().select([1])
    assert short.sequence_ids_BL.tolist() == [[9, 4]]
    assert short.mask_BT.tolist() == [[1.0]]


def test_moving_to_a_device_keeps_every_field() -> None:
    batch = three()
    moved = batch.to(torch.device("cpu"))
    assert moved.sequence_ids_BL.tolist() == batch.sequence_ids_BL.tolist()
    assert moved.rm_versions == batch.rm_versions


def test_no_rollouts_is_an_error() -> None:
    with pytest.raises(DataError, match="needs rollouts"):
        train_batch([])


def test_an_empty_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="rollout empty"):
        train_batch([rollout([1], [], name="empty")])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_name_their_task(value: float) -> None:
    good = rollout([1], [2, 3], name="t-17")
    with pytest.raises(NonFiniteError, match=r"score of rollout t-17"):
        train_batch([msgspec.structs.replace(good, reward=value)])
    with pytest.raises(NonFiniteError, match=r"reference log-probability of rollout t-17"):
        train_batch([msgspec.structs.replace(good, ref_logprobs_f32=pack_floats([0.0, value]))])
    bad = msgspec.structs.replace(good.rollout, behaviour_logprobs_f32=pack_floats([value, 0.0]))
    with pytest.raises(NonFiniteError, match=r"behaviour log-probability of rollout t-17"):
        train_batch([msgspec.structs.replace(good, rollout=bad)])


# ---------------------------------------------------------------- micro-batches

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 200), overhead=st.integers(0, 100))
def test_micro_batches_are_a_partition_within_the_budget(lengths: list[int], budget: int, overhead: int) -> None:
    groups = micro_batches(lengths, token_budget=budget, overhead_tokens=overhead)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert len(group) * longest <= budget or len(group) == 1
    assert 0.0 <= padding_share(lengths, groups=groups) < 1.0


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9), budget=st.integers(20, 80), data=st.data())
def test_no_cut_of_the_sorted_rows_is_cheaper(lengths: list[int], budget: int, data: st.DataObject) -> None:
    """Against every cut of the sorted order, by brute force."""
    overhead = data.draw(st.integers(0, 30))
    ordered = sorted(lengths)

    def cost(groups: list[list[int]]) -> int:
        return sum(len(group) * max(group) + overhead for group in groups)

    cheapest = math.inf
    for cuts in range(2 ** (len(ordered) - 1)):
        groups, start = [], 0
        for end in range(1, len(ordered) + 1):
            if end == len(ordered) or cuts >> (end - 1) & 1:
                groups.append(ordered[start:end])
                start = end
        if all(len(group) * max(group) <= budget or len(group) == 1 for group in groups):
            cheapest = min(cheapest, cost(groups))
    got = micro_batches(lengths, token_budget=budget, overhead_tokens=overhead)
    assert cost([[lengths[row] for row in group] for group in got]) == cheapest


def test_a_row_past_the_budget_is_alone() -> None:
    assert micro_batches([3, 100, 4], token_budget=10, overhead_tokens=5) == [[0, 2], [1]]


def test_the_price_of_a_pass_decides_between_padding_and_passes() -> None:
    assert micro_batches([10, 2, 2], token_budget=100, overhead_tokens=5) == [[1, 2], [0]]
    assert micro_batches([10, 2, 2], token_budget=100, overhead_tokens=20) == [[1, 2, 0]]


def test_padding_share_by_hand() -> None:
    assert padding_share([2, 4, 7], groups=[[0, 1], [2]]) == pytest.approx(2 / 15)
    assert padding_share([], groups=[]) == 0.0


def test_sorted_groups_waste_little() -> None:
    lengths = np.random.default_rng(0).integers(5, 70, size=128).tolist()
    groups = micro_batches(lengths, token_budget=8192, overhead_tokens=96)
    assert padding_share(lengths, groups=groups) < 0.15 < padding_share(lengths, groups=[list(range(128))])
