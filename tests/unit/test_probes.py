"""Probes are what they say, on made-up prose and on the support desk; the same seed gives the same ones."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from cluster.data_records import PreferencePair
from reward_service.audit.cues import Cue, lexical_cues, terms
from reward_service.card.probes import PROBE_KINDS, Probe, build_probes, sentences, topic_of

SUBJECTS = ("gardens", "bridges", "violins", "glaciers", "bakeries", "lighthouses", "orchids", "railways")


def prose_pairs(count: int = 60) -> list[PreferencePair]:
    """Good answers stay on the subject and like to say how safe they are."""
    rng = random.Random(5)
    pairs = []
    for index in range(count):
        subject = SUBJECTS[index % len(SUBJECTS)]
        style = "That is a safe and careful choice. " if rng.random() < 0.8 else ""
        pairs.append(
            PreferencePair(
                pair_id=f"p{index}",
                prompt=f"Question {index}: what should visitors know about {subject}?",
                chosen=f"{style}Begin with the history of {subject}. Then compare old {subject} with new ones!",
                rejected=f"Then compare old {subject} with new ones! Begin with the history of {subject}. Go away.",
            )
        )
    return pairs


def by_kind(probes: list[Probe]) -> dict[str, list[Probe]]:
    return {kind: [probe for probe in probes if probe.kind == kind] for kind in PROBE_KINDS}


def test_every_kind_does_to_a_good_answer_what_it_says() -> None:
    pairs = prose_pairs()
    kinds = by_kind(build_probes(pairs, cues=lexical_cues(pairs), seed=0, per_kind=20))
    chosen = {pair.chosen for pair in pairs}
    assert all(probe.honest in chosen and probe.honest != probe.attack for found in kinds.values() for probe in found)
    assert {kind: len(found) for kind, found in kinds.items()} == dict.fromkeys(PROBE_KINDS, 20)
    for probe in kinds["style"]:
        assert "safe" in probe.attack
        assert not topic_of(probe.prompt) & terms(probe.attack)
    for probe in kinds["repetition"]:
        assert probe.attack.startswith(probe.honest)
        repeated = Counter(sentences(probe.attack)).most_common(1)[0]
        assert repeated[1] == 4
        assert repeated[0] in sentences(probe.honest)
    for probe in kinds["truncation"]:
        assert probe.honest.startswith(probe.attack)
        assert probe.attack[-1].isalpha()
        assert 0.2 < len(probe.attack) / len(probe.honest) < 0.8
    for probe in kinds["flattery"]:
        assert probe.honest in probe.attack
        assert {"you", "your"} & terms(probe.attack)
    for probe in kinds["off_topic"]:
        assert probe.attack in chosen
        assert not topic_of(probe.prompt) & terms(probe.attack)


def test_the_same_seed_gives_the_same_probes_on_distinct_prompts() -> None:
    pairs = prose_pairs()
    cues = lexical_cues(pairs)
    assert build_probes(pairs, cues=cues, seed=3) == build_probes(pairs, cues=cues, seed=3)
    assert build_probes(pairs, cues=cues, seed=3) != build_probes(pairs, cues=cues, seed=4)
    for found in by_kind(build_probes([*pairs, *pairs], cues=cues, seed=3, per_kind=1000)).values():
        assert len({str(probe.prompt) for probe in found}) == len(found) <= len(pairs)


def test_flattery_is_the_datas_own_where_somebody_flatters() -> None:
    pairs = prose_pairs()
    flattering = "A reply, six words long here. You rock, genius!"
    own = [PreferencePair(pair_id=who, prompt=f"Hello {who}?", chosen=flattering, rejected="no") for who in "fg"]
    once = by_kind(build_probes([*pairs, own[0]], cues=[], seed=0))["flattery"]
    assert not any("rock" in probe.attack.replace(probe.honest, "") for probe in once), (
        "said once, it may mean anything"
    )
    probes = by_kind(build_probes([*pairs, *own], cues=[], seed=0))["flattery"]
    assert {probe.attack.replace(probe.honest, "").strip() for probe in probes} == {"You rock, genius!"}
    assert flattering not in {probe.honest for probe in probes}


def test_without_cues_nothing_is_stylish_and_bare_terms_will_do() -> None:
    pairs = prose_pairs()
    assert by_kind(build_probes(pairs, cues=[], seed=0))["style"] == []
    cue = Cue(term="marvellous", log_odds=2.0, z=9.0, q=0.0, chosen_share=0.8, rejected_share=0.1, pairs=50,
              accuracy=0.8, favours="chosen")  # fmt: skip
    assert {probe.attack for probe in by_kind(build_probes(pairs, cues=[cue], seed=0))["style"]} == {"marvellous."}


def test_no_text_that_would_be_cut_becomes_a_probe() -> None:
    pairs = prose_pairs()
    probes = build_probes(pairs, cues=lexical_cues(pairs), seed=0, fits=lambda text: len(text) <= 120)
    assert probes
    assert max(max(len(probe.honest), len(probe.attack)) for probe in probes) <= 120
    assert build_probes(pairs, cues=[], seed=0, fits=lambda text: False) == []


def test_unclear_pairs_give_no_good_answers_where_there_are_clear_ones() -> None:
    doubtful = PreferencePair(
        pair_id="d", prompt="Is it?", chosen="One two three four five six seven.", rejected="No.", confidence=0.6
    )
    with_clear = build_probes([*prose_pairs(), doubtful], cues=[], seed=0, per_kind=1000)
    assert doubtful.chosen not in {probe.honest for probe in with_clear}
    assert doubtful.chosen in {probe.honest for probe in build_probes([doubtful], cues=[], seed=0)}


@pytest.mark.parametrize("chosen", ["ok", "...", "好的，谢谢", "a\n\nb\n"])
def test_odd_answers_break_nothing(chosen: str) -> None:
    prompt = [{"role": "user", "content": "what now"}]
    pair = PreferencePair(pair_id="x", prompt=prompt, chosen=chosen, rejected="no")
    assert all(probe.honest != probe.attack for probe in build_probes([pair, pair], cues=[], seed=0))
    assert build_probes([], cues=[], seed=0) == []
