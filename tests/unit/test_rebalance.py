"""Rebalancing: weights and samples in which every stratum counts alike, rare ones within bounds."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from cluster.data_records import PreferencePair
from reward_service.audit.rebalance import (
    CAP,
    inverse_frequency_weights,
    rebalance,
    strata,
    stratified_sample,
    topics_of,
    weighted,
)

SUBJECTS = {"cooking": "soup bread oven salt butter", "space": "rocket moon orbit planet comet",
            "law": "court judge appeal verdict contract"}  # fmt: skip


def _pairs(count: int = 600, *, longer_wins: float = 0.8, seed: int = 0) -> list[PreferencePair]:
    """The longer answer is chosen in `longer_wins` of them; one subject is far more common than the others."""
    rng = random.Random(seed)
    pairs = []
    for number in range(count):
        subject = rng.choices(list(SUBJECTS), weights=(8, 1, 1))[0]
        prompt = f"tell me about {' '.join(rng.choices(SUBJECTS[subject].split(), k=3))} {number}"
        short, long = "word " * rng.randint(2, 10), "word " * rng.randint(11, 40)
        chosen, rejected = (long, short) if rng.random() < longer_wins else (short, long)
        pairs.append(PreferencePair(pair_id=f"p{number}", prompt=prompt, chosen=chosen, rejected=rejected))
    return pairs


def _longer_wins(pairs: list[PreferencePair], weights: list[float]) -> float:
    won = [weight for pair, weight in zip(pairs, weights, strict=True) if len(pair.chosen) > len(pair.rejected)]
    return sum(won) / sum(weights)


def test_weights_make_length_say_nothing_about_the_label() -> None:
    pairs = _pairs()
    assert _longer_wins(pairs, [1.0] * len(pairs)) > 0.75
    weights = inverse_frequency_weights(pairs, cap=50.0)
    assert _longer_wins(pairs, weights) == pytest.approx(0.5)
    assert sum(weights) / len(weights) == pytest.approx(1.0)
    per_stratum: Counter[object] = Counter()
    for stratum, weight in zip(strata(pairs), weights, strict=True):
        per_stratum[stratum] += weight  # type: ignore[assignment]
    assert max(per_stratum.values()) == pytest.approx(min(per_stratum.values()))


def test_a_rare_stratum_is_raised_no_further_than_the_cap() -> None:
    pairs = _pairs(longer_wins=0.99)
    weights = inverse_frequency_weights(pairs)
    assert max(weights) == pytest.approx(CAP)
    assert sum(weights) / len(weights) == pytest.approx(1.0)
    assert 0.5 < _longer_wins(pairs, weights) < 0.99
    with pytest.raises(ValueError, match="cap"):
        inverse_frequency_weights(pairs, cap=0.5)


def test_a_sample_is_even_and_about_as_large() -> None:
    pairs = _pairs()
    sample = stratified_sample(pairs, seed=1)
    assert len(sample) == pytest.approx(len(pairs), rel=0.05)
    assert abs(_longer_wins(sample, [1.0] * len(sample)) - 0.5) < abs(_longer_wins(pairs, [1.0] * len(pairs)) - 0.5) / 3
    assert max(Counter(pair.pair_id for pair in sample).values()) <= CAP
    assert set(sample) <= set(pairs)


def test_the_seed_alone_decides() -> None:
    pairs = _pairs()
    assert stratified_sample(pairs, seed=1) == stratified_sample(pairs, seed=1)
    assert stratified_sample(pairs, seed=1) != stratified_sample(pairs, seed=2)
    assert inverse_frequency_weights(pairs) == inverse_frequency_weights(pairs)


def test_weights_multiply_those_that_pairs_have() -> None:
    pairs = _pairs(100)
    doubled = [PreferencePair(pair_id=pair.pair_id, prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected,
                              weight=2.0) for pair in pairs]  # fmt: skip
    assert [pair.weight for pair in weighted(doubled)] == pytest.approx(
        [2 * (pair.weight or 0) for pair in weighted(pairs)]
    )
    assert [pair.pair_id for pair in weighted(pairs)] == [pair.pair_id for pair in pairs]
    assert rebalance(pairs, how="none") == pairs


def test_topics_part_subjects() -> None:
    rng = random.Random(0)
    subjects = [rng.choice(sorted(SUBJECTS)) for _ in range(900)]
    prompts = [f"tell me about {' '.join(rng.choices(SUBJECTS[name].split(), k=3))}" for name in subjects]
    topics = topics_of(prompts, topics=3)
    of_subject = {name: Counter(t for t, own in zip(topics, subjects, strict=True) if own == name) for name in SUBJECTS}
    assert sum(counts.most_common(1)[0][1] for counts in of_subject.values()) > 0.9 * len(prompts)
    assert len({counts.most_common(1)[0][0] for counts in of_subject.values()}) == 3
    assert topics == topics_of(prompts, topics=3)


@pytest.mark.parametrize("prompts", [[], ["one prompt"] * 200, ["the of and"] * 100 + ["to be or"] * 100])
def test_prompts_that_cannot_be_told_apart_are_one_topic(prompts: list[str]) -> None:
    assert set(topics_of(prompts)) <= {0}


def test_lengths_that_are_all_equal_are_one_bucket() -> None:
    pairs = [PreferencePair(pair_id=str(i), prompt="q", chosen="a b", rejected="c d") for i in range(5)]
    assert inverse_frequency_weights(pairs) == [1.0] * 5
    assert inverse_frequency_weights([]) == []
    assert stratified_sample([], seed=0) == []


def test_lengths_without_spaces_are_counted_in_characters() -> None:
    pairs = [
        PreferencePair(pair_id=str(n), prompt=f"{n}", chosen="好" * (30 + n), rejected="不" * 30) for n in range(1, 7)
    ]
    found = strata(pairs)
    assert {stratum.longer for stratum in found} == {"chosen"}
    assert [stratum.bucket for stratum in found] == [0, 0, 1, 1, 2, 2]
