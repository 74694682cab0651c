"""How preference pairs are split, shared out and weighed: by content, never by order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.data_records import PreferencePair, stable_prompt_id
from cluster.errors import DataError
from cluster.hf_training import FitSettings
from configs.run import DataSection, RmSection, RunConfig, WorldSource
from reward_service.rm.fit import FitJob, records_of
from reward_service.rm.loss import LossSettings
from reward_service.rm.pairs import (
    EncodedPair,
    held_out_position,
    member_share,
    rebalanced,
    split_by_prompt,
    training_labels,
)


def encoded(number: int, *, prompt: str | None = None, **fields: Any) -> EncodedPair:
    pair = PreferencePair(
        pair_id=f"p{number}", prompt=prompt or f"prompt {number}", chosen="yes indeed", rejected="no", **fields
    )
    return EncodedPair(pair, pair, stable_prompt_id(pair.prompt), [1, 2, 3], [1, 4], (2, 1))


def config(**rm: Any) -> RunConfig:
    return RunConfig(name="x", data=DataSection(world=WorldSource(factory="x:y")), rm=RmSection(**rm))


def prompts(pairs: Sequence[EncodedPair]) -> set[str]:
    return {pair.prompt_id for pair in pairs}


def test_no_prompt_is_on_both_sides_and_more_pairs_move_nothing() -> None:
    pairs = [encoded(number, prompt=f"prompt {number // 3}") for number in range(300)]
    train, held_out = split_by_prompt(pairs, held_out_fraction=0.15, seed=1)
    assert prompts(train).isdisjoint(prompts(held_out))
    assert len(held_out) == pytest.approx(45, abs=3)
    assert prompts(split_by_prompt(pairs[::-1], held_out_fraction=0.15, seed=1)[1]) == prompts(held_out)
    # The lowest places are held out, so a stricter fraction holds out some of the same.
    assert prompts(split_by_prompt(pairs, held_out_fraction=0.05, seed=1)[1]) < prompts(held_out)
    worst = max(held_out_position(prompt_id, seed=1) for prompt_id in prompts(held_out))
    assert all(held_out_position(prompt_id, seed=1) > worst for prompt_id in prompts(train))
    with pytest.raises(DataError, match="cannot be split"):
        split_by_prompt(pairs[:3], held_out_fraction=0.15, seed=1)


def test_members_leave_out_shares_that_lie_apart() -> None:
    pairs = [encoded(number) for number in range(3000)]
    shares = [set(member_share(pairs, member=m, fits=3, leaves_out=0.33, seed=2)) for m in range(3)]
    everything = set(range(len(pairs)))
    for share in shares:
        assert len(everything - share) == pytest.approx(990, abs=100)
    left_out = [everything - share for share in shares]
    assert left_out[0].isdisjoint(left_out[1])
    assert left_out[1].isdisjoint(left_out[2])
    assert left_out[0].isdisjoint(left_out[2])


def test_what_a_member_leaves_out_does_not_depend_on_what_else_there_is() -> None:
    pairs = [encoded(number) for number in range(200)]
    all_of_them = member_share(pairs, member=1, fits=2, leaves_out=0.5, seed=2)
    half = member_share(pairs[::2], member=1, fits=2, leaves_out=0.5, seed=2)
    assert [index // 2 for index in all_of_them if index % 2 == 0] == half


def test_a_single_model_sees_everything() -> None:
    pairs = [encoded(number) for number in range(10)]
    assert member_share(pairs, member=0, fits=1, leaves_out=0.9, seed=0) == list(range(10))
    assert member_share(pairs[:1], member=0, fits=2, leaves_out=1.0, seed=0) == [0]  # nothing would teach nothing


def test_the_margin_follows_the_share_of_annotators() -> None:
    assert [encoded(0, confidence=c).margin(2.0) for c in (1.0, 0.8, 0.6, None)] == pytest.approx([2.0, 1.2, 0.4, 2.0])


def test_labels_are_made_without_the_held_out_annotators() -> None:
    who = ("a", "b", "c", "d", "e")
    pair = encoded(0, votes=(True, True, False, False, True), annotators=who, confidence=0.6).pair
    assert training_labels([pair], held_out=()) == [pair]
    (turned,) = training_labels([pair], held_out=("a", "e"))
    assert (turned.chosen, turned.rejected) == (pair.rejected, pair.chosen)
    assert turned.confidence == pytest.approx(2 / 3)
    assert training_labels([pair], held_out=("a",)) == []  # two against two


def test_rebalancing_weighs_or_draws_the_rare_kind_more() -> None:
    long = [encoded(number, prompt=f"how do i reset router {number}") for number in range(90)]
    short = [
        replace(pair, pair=PreferencePair(pair_id=pair.pair.pair_id, prompt=pair.pair.prompt,
                                          chosen="no", rejected="yes indeed"))
        for pair in (encoded(number, prompt=f"how do i reset router {number}") for number in range(90, 100))
    ]  # fmt: skip
    pairs = [*long, *short]
    assert rebalanced(pairs, config=config()) == pairs
    weighed = rebalanced(pairs, config=config(rebalance="inverse_frequency"))
    assert min(pair.weight for pair in weighed[90:]) > max(pair.weight for pair in weighed[:90])
    drawn = rebalanced(pairs, config=config(rebalance="stratified"))
    share = sum(pair.pair.chosen == "no" for pair in drawn) / len(drawn)
    assert share > 0.25


def test_weights_average_one_and_weights_of_zero_alone_are_an_error() -> None:
    def job(*weights: float) -> FitJob:
        pairs = [replace(encoded(number), weight=weight) for number, weight in enumerate(weights)]
        settings = FitSettings(examples=len(pairs), epochs=1, batch_size=2, learning_rate=1e-3, seed=0)
        nowhere = Path("nowhere")
        return FitJob(nowhere, False, nowhere, nowhere, pairs, settings, LossSettings(), 0.0, False, {})

    assert [record["weight"] for record in records_of(job(0.0, 1.0, 3.0))] == pytest.approx([0.0, 0.75, 2.25])
    with pytest.raises(DataError, match="has a weight"):
        records_of(job(0.0, 0.0))
