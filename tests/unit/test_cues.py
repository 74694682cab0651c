"""Cues: planted words are found, chance finds nothing, and the figures are the hand-worked ones."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data_records import PreferencePair
from reward_service.audit.cues import TermCounts, contrast, false_discovery_rates, lexical_cues, terms, two_sided_p

WORDS = [f"word{number}" for number in range(300)]


def sentence(rng: random.Random, *, words: int = 20) -> list[str]:
    return rng.choices(WORDS, weights=[1 / (place + 2) for place in range(len(WORDS))], k=words)


def planted(rng: random.Random, *, pairs: int, in_chosen: float, in_rejected: float) -> list[PreferencePair]:
    """Texts of chance words; "safe" at a random place in the given shares of answers."""

    def answer(share: float) -> str:
        text = sentence(rng)
        if rng.random() < share:
            text.insert(rng.randrange(len(text)), "Safe")
        return " ".join(text)

    return [
        PreferencePair(pair_id=str(number), prompt="p", chosen=answer(in_chosen), rejected=answer(in_rejected))
        for number in range(pairs)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_word_in_most_preferred_answers_is_found_and_is_the_first(seed: int) -> None:
    cues = lexical_cues(planted(random.Random(seed), pairs=600, in_chosen=0.8, in_rejected=0.4))
    assert cues[0].term == "safe"
    assert cues[0].favours == "chosen"
    assert cues[0].log_odds > 0
    assert cues[0].q < 1e-6
    assert cues[0].chosen_share == pytest.approx(0.8, abs=0.06)
    assert cues[0].rejected_share == pytest.approx(0.4, abs=0.06)
    # Right where chosen alone has it (0.8 × 0.6), wrong where rejected alone has it (0.2 × 0.4), else half.
    assert cues[0].accuracy == pytest.approx(0.5 + (0.48 - 0.08) / 2, abs=0.04)
    assert len(cues) <= 2


def test_the_side_that_a_word_favours() -> None:
    cues = lexical_cues(planted(random.Random(0), pairs=600, in_chosen=0.1, in_rejected=0.3))
    assert [(cue.term, cue.favours) for cue in cues[:1]] == [("safe", "rejected")]
    assert cues[0].log_odds < 0


def test_labels_by_chance_have_hardly_any_cue() -> None:
    found = 0
    for seed in range(8):
        rng = random.Random(seed)
        pairs = planted(rng, pairs=400, in_chosen=0.5, in_rejected=0.5)
        found += len(lexical_cues(pairs))
    assert found <= 1


def test_longer_preferred_answers_do_not_make_every_word_a_cue() -> None:
    rng = random.Random(0)
    texts = [(" ".join(sentence(rng, words=40)), " ".join(sentence(rng, words=20))) for _ in range(500)]
    cues = contrast(texts)
    assert len(cues) < 0.05 * len(WORDS)


def test_words_that_always_come_together_are_one_cue() -> None:
    rng = random.Random(0)
    texts = [(" ".join(sentence(rng)) + ". You are amazing!", " ".join(sentence(rng))) for _ in range(200)]
    (cue,) = contrast(texts)
    assert cue.term == "amazing"
    assert set(cue.also) == {"you", "are"}  # "you are" and "are amazing" tell no more than their words


def test_rare_words_are_not_judged() -> None:
    texts = [("certainly", "no")] * 7
    assert contrast(texts, max_q=1.0) == []


def test_no_pairs_no_cues() -> None:
    assert lexical_cues([]) == []
    assert contrast([("", "")]) == []


def test_terms_are_words_and_neighbours_without_regard_to_case() -> None:
    assert terms("Don't panic, STAY calm.") == {"don't", "panic", "stay", "calm", "don't panic", "stay calm"}
    assert terms("…!? — ") == frozenset()
    assert terms("é_x 漢字") == {"é_x", "漢字", "é_x 漢字"}


def test_log_odds_by_hand() -> None:
    # 20 pairs: "a" in each chosen answer alone, "b" in each rejected one alone.
    counts = TermCounts.of([("a", "b")] * 20)
    ratio, error = counts.log_odds("a")
    # Prior of "a": 0.05 × 20 + 0.5 = 1.5; of all: 0.05 × 40 + 2 × 0.5 = 3. So 21.5 to 1.5, against 1.5 to 21.5.
    assert ratio == pytest.approx(2 * math.log(21.5 / 1.5))
    assert error == pytest.approx(math.sqrt(1 / 21.5 + 1 / 1.5))
    assert counts.log_odds("b")[0] == pytest.approx(-ratio)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_false_discovery_rates_are_benjamini_and_hochbergs(p_values: list[float]) -> None:
    from scipy.stats import false_discovery_control

    assert false_discovery_rates(p_values) == pytest.approx(list(false_discovery_control(p_values)), abs=1e-12)


def test_two_sided_p() -> None:
    assert two_sided_p(1.959964) == pytest.approx(0.05, abs=1e-6)
    assert two_sided_p(-1.959964) == two_sided_p(1.959964)
