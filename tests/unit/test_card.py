"""The validation card: every verdict from data made to deserve it, and pages that hold hostile text as text."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cluster.data_records import PreferencePair, Prompt
from cluster.errors import DataError, ScoringError
from configs.load import load_config
from examples.support_desk.annotators import PANEL, SHARPNESS
from examples.support_desk.gold import gold_reward
from examples.support_desk.phrases import CITIES, DAYS, FLATTERY, ISSUES, prompt_of
from examples.support_desk.world import mediocre_answer
from reward_service.card.card import card_settings, make_card, validate_rm, write_card
from reward_service.card.records import (
    Card,
    CardData,
    CardInputs,
    CardSettings,
    Finding,
    PolicyAnswer,
    Scored,
    ScoredPair,
    Scorers,
    Texts,
)
from reward_service.card.render import html_page, markdown, read_card

NAMES = ("ann", "bob", "cyd", "dee", "eve")


def scored(score: float, *, tokens: int = 10, members: Sequence[float] = (), **fields: object) -> Scored:
    made = Scored(prompt="why?", answer=f"answer {score}", members=tuple(members) or (score,), score=score,
                  tokens=tokens, source="held_out")  # fmt: skip
    return replace(made, **fields)  # type: ignore[arg-type]


def pair_of(index: int, **fields: object) -> PreferencePair:
    made = PreferencePair(pair_id=str(index), prompt="why?", chosen="because", rejected="no")
    return msgspec.structs.replace(made, **fields)


def scored_pairs(margins: Sequence[float], *, tokens: tuple[int, int] = (10, 10)) -> list[ScoredPair]:
    """Pairs with these margins, at random places of a scale."""
    rng = random.Random(2)
    found = []
    for index, margin in enumerate(margins):
        low = rng.gauss(0, 1)
        chosen, rejected = scored(low + margin, tokens=tokens[0]), scored(low, tokens=tokens[1])
        found.append(ScoredPair(pair_of(index), chosen, rejected))
    return found


def card_of(held_out: Sequence[ScoredPair], **fields: object) -> Card:
    return validate_rm(replace(CardInputs(version="rm-1", min_accuracy=0.6, held_out=held_out), **fields))  # type: ignore[arg-type]


def finding(card: Card, name: str) -> Finding:
    return next(found for found in card.findings if found.name.startswith(name))


def right(share: float, *, count: int = 400) -> list[float]:
    """Margins of ±1.1: σ(1.1) = 0.75, so that three in four right is calibrated."""
    return [1.1 if index < share * count else -1.1 for index in range(count)]


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("share", "count", "verdict"), [(0.75, 400, "green"), (0.62, 400, "amber"), (0.59, 400, "red"), (0.75, 40, "amber")]
)
def test_accuracy_decides_the_verdict(share: float, count: int, verdict: str) -> None:
    card = card_of(scored_pairs(right(share, count=count)))
    accuracy = finding(card, "held-out accuracy")
    assert accuracy.level == verdict
    if share == 0.75:
        assert card.verdict == verdict
    assert (card.verdict == "red") == (share < 0.6)
    if verdict == "red":
        assert card.reasons[0].startswith(
            "held-out accuracy: 0.590 (0.54–0.64, n = 400). Under rm.min_accuracy, 0.60: a policy"
        )


def test_nothing_held_out_is_an_error() -> None:
    with pytest.raises(DataError, match="no pairs to validate"):
        card_of([])


def test_a_model_that_looks_at_length_alone_is_found_out() -> None:
    """It scores length; the longer answer is preferred in 70 %, and nothing else is known of it."""
    rng = random.Random(3)
    held_out = []
    for index in range(600):
        sizes = rng.randint(10, 40), rng.randint(10, 40)
        longer_first = rng.random() < 0.7
        chosen, rejected = (max(sizes), min(sizes)) if longer_first else (min(sizes), max(sizes))
        held_out.append(
            ScoredPair(pair_of(index), scored(0.1 * chosen, tokens=chosen), scored(0.1 * rejected, tokens=rejected))
        )
    card = card_of(held_out, length_only_accuracy=0.7)
    assert card.accuracy.share > 0.6
    assert finding(card, "against length alone").level == "amber"
    assert finding(card, "share of margins that length explains").level == "amber"
    assert card.length.margin_r2 == pytest.approx(1.0)
    assert card.length.margin_per_token == pytest.approx(0.1)
    assert finding(card, "accuracy by length difference").level == "amber", "the shorter one preferred: always wrong"
    assert sum(bucket.rate.n for bucket in card.length.by_difference) == 600
    assert sum(bucket.rate.n for bucket in card.length.by_length) == 600


def test_labels_are_those_of_the_annotators_that_training_may_see() -> None:
    """Three of five prefer the other answer once `eve` and `dee` are held out; a 2:1 pair ties, and counts no more."""
    flipped = pair_of(0, votes=(False, False, True, True, True), annotators=NAMES, confidence=0.6)
    kept = pair_of(1, votes=(True, True, True, False, False), annotators=NAMES, confidence=0.6)
    tied = pair_of(2, votes=(True, False, True), annotators=("ann", "bob", "eve"), confidence=2 / 3)
    chosen, rejected = scored(2.0), scored(1.0)
    held_out = [ScoredPair(pair, chosen, rejected) for pair in (flipped, kept, tied)]
    card = card_of(held_out, held_out_annotators=("dee", "eve"))
    assert (card.accuracy.share, card.accuracy.n) == (0.5, 2)
    by_name = {each.annotator: (each.held_out, each.rate.share, each.rate.n) for each in card.annotators}
    assert by_name == {
        "ann": (False, 2 / 3, 3), "bob": (False, 1 / 3, 3), "cyd": (False, 1.0, 2),
        "dee": (True, 0.5, 2), "eve": (True, 2 / 3, 3),
    }  # fmt: skip
    assert card.training_annotators is not None
    assert (card.training_annotators.share, card.training_annotators.n) == (0.5, 2)
    assert card.held_out_annotators is not None
    assert card.held_out_annotators.share == pytest.approx(2 / 3)
    everybody = card_of(held_out)
    assert (everybody.accuracy.share, everybody.accuracy.n) == (1.0, 3)
    assert everybody.held_out_annotators is None
    assert finding(everybody, "held-out annotators").level == "unknown"


def test_length_alone_is_measured_on_the_same_labels_as_the_model() -> None:
    """`dee` and `eve`, who like the longer answer, outvote `ann`; held out, they do not."""
    pairs = [
        pair_of(n, prompt=f"ask {n}", chosen="one two three four", rejected="one",
                votes=(False, True, True), annotators=("ann", "dee", "eve"), confidence=2 / 3)
        for n in range(40)
    ]  # fmt: skip
    # By `ann`'s votes training says "the shorter one", and every other held-out pair otherwise.
    held_out = [msgspec.structs.replace(one, votes=(n % 2 == 0, True, True)) for n, one in enumerate(pairs[20:])]
    card = make_card(
        scorers_of(lambda prompt, answer: -float(words(answer))),
        data=CardData(train=pairs[:20], held_out=held_out, held_out_annotators=("dee", "eve")),
        settings=CardSettings(version="rm-1", min_accuracy=0.6, max_answer_tokens=64),
    )
    assert (card.accuracy.share, card.length_only_accuracy) == (0.5, 0.5)


def test_votes_of_unnamed_annotators_count_each() -> None:
    pair = pair_of(0, votes=(False, False, True), annotators=("", "", "ann"), confidence=2 / 3)
    card = card_of([ScoredPair(pair, scored(1.0), scored(2.0))])
    assert [each.annotator for each in card.annotators] == ["ann"]
    assert card.training_annotators is not None
    assert card.training_annotators.share == 1.0


def test_a_model_that_takes_sides_against_somebody_says_so() -> None:
    pairs = [pair_of(index, votes=(True, True, False), annotators=("ann", "bob", "cyd")) for index in range(50)]
    card = card_of([ScoredPair(pair, scored(1.0), scored(0.0)) for pair in pairs])
    assert "cyd" in finding(card, "each annotator").meaning
    assert finding(card, "each annotator").level == "amber"


def test_members_and_the_discriminator() -> None:
    rng = random.Random(4)
    held_out = []
    for index in range(300):
        chosen = [rng.gauss(0.8, 1) for _ in range(3)]
        rejected = [rng.gauss(0, 1) for _ in range(3)]
        held_out.append(
            ScoredPair(
                pair_of(index),
                scored(sum(chosen) / 3, members=chosen, discriminator=-sum(chosen)),
                scored(sum(rejected) / 3, members=rejected, discriminator=-sum(rejected)),
            )
        )
    card = card_of(held_out)
    assert card.ensemble is not None
    assert len(card.ensemble.accuracies) == card.members == 3
    assert card.accuracy.share > max(card.ensemble.accuracies), "the mean of independent members is better than any"
    assert finding(card, "agreement of members").level == "amber"
    assert card.discriminator is not None
    assert card.discriminator.disagreement.share == 1.0
    assert card.discriminator.correlation["held_out"] == pytest.approx(-1.0)
    assert finding(card, "the discriminator's disagreement").level == "amber"
    best = max((answer for pair in held_out for answer in (pair.chosen, pair.rejected)), key=lambda one: one.score)
    assert card.discriminator.doubted[0].answer == best.answer
    assert card_of(scored_pairs(right(0.75))).ensemble is None


def test_scores_of_training_and_of_the_policy_are_compared() -> None:
    held_out = scored_pairs(right(0.75))
    remembered = [
        ScoredPair(pair.pair, replace(pair.chosen, score=pair.rejected.score + 5, source="train"), pair.rejected)
        for pair in held_out
    ]
    policy = [scored(9.0 + index / 100, source="policy", human_score=-float(index)) for index in range(50)]
    card = card_of(held_out, train=remembered, policy=policy)
    assert finding(card, "overfitting").level == "amber"
    assert finding(card, "scores of held-out").level == "amber"
    assert finding(card, "scores of the policy's against").level == "amber"
    assert {(each.first, each.second) for each in card.ks} == {
        ("train", "held_out"), ("train", "policy"), ("held_out", "policy")}  # fmt: skip
    rank = next(rank for rank in card.rank if rank.source == "policy")
    assert rank.spearman == pytest.approx(-1.0)
    assert finding(card, "rank correlation").level == "amber"
    assert [answer.score for answer in card.highest] == sorted((one.score for one in policy), reverse=True)[:10]
    assert [answer.score for answer in card.lowest] == sorted(one.score for one in policy)[:10]
    same = card_of(held_out, train=held_out)
    assert finding(same, "overfitting").level == finding(same, "scores of held-out").level == "green"
    assert all(sum(found.counts) == found.count for found in (*card.distributions, *same.distributions))


def test_margins_are_ranked_with_votes_where_nobody_scored_answers() -> None:
    """More votes, larger margin: ρ is 1 whichever answer stands first."""
    pairs = [
        ScoredPair(pair_of(index, votes=(True,) * ayes + (False,) * (5 - ayes)), scored(float(ayes)), scored(2.5))
        for index, ayes in enumerate([3, 4, 5] * 10)
    ]
    (rank,) = card_of(pairs).rank
    assert (rank.against, rank.n) == ("votes", 30)
    assert rank.spearman == pytest.approx(1.0)
    assert "With the share of votes" in finding(card_of(pairs), "rank correlation").meaning


def test_sources_are_told_apart_where_there_are_several() -> None:
    held_out = scored_pairs(right(0.75))
    fresh = [ScoredPair(pair_of(index, source="refresh"), scored(0.0), scored(1.0)) for index in range(20)]
    card = card_of([*held_out, *fresh])
    assert {found.name: found.rate.share for found in card.by_source} == {"given": 0.75, "refresh": 0.0}
    assert card_of(held_out).by_source == ()


# ---------------------------------------------------------------- with a model's scores


def support_desk_pairs(count: int, *, seed: int) -> list[PreferencePair]:
    """Judged by the example's panel, with their votes."""
    rng = random.Random(seed)
    pairs = []
    for index in range(count):
        issue = rng.choice(list(ISSUES))
        prompt = prompt_of(issue, opening="my", city=rng.choice(CITIES), day=rng.choice(DAYS))
        a, b = mediocre_answer(issue, rng), mediocre_answer(issue, rng)
        margins = [SHARPNESS * (one.utility(prompt, a) - one.utility(prompt, b)) for one in PANEL]
        votes = [rng.random() < 1 / (1 + math.exp(-margin)) for margin in margins]
        if sum(votes) < 3:
            a, b, votes = b, a, [not vote for vote in votes]
        if a != b:
            pairs.append(
                PreferencePair(pair_id=f"{seed}-{index}", prompt=prompt, chosen=a, rejected=b, votes=tuple(votes),
                               annotators=NAMES, confidence=sum(votes) / 5)
            )  # fmt: skip
    return pairs


TRAIN, HELD_OUT = support_desk_pairs(1000, seed=1), support_desk_pairs(300, seed=2)
SETTINGS = CardSettings(version="rm-1", min_accuracy=0.6, max_answer_tokens=64, gold=gold_reward)


def words(answer: str) -> int:
    return len(answer.replace(".", " .").split()) + 1


def scorers_of(score: Callable[[Prompt, str], float]) -> Scorers:
    return Scorers(
        members=lambda texts: [[score(prompt, answer)] for prompt, answer in texts],
        aggregate=lambda members: members[0],
        tokens=words,
    )


def passed(card: Card) -> dict[str, float]:
    return {probe.kind: probe.rate.share for probe in card.probes}


def test_a_model_as_good_as_gold_passes_every_probe() -> None:
    policy = [PolicyAnswer(pair.prompt, pair.chosen) for pair in HELD_OUT]
    card = make_card(scorers_of(gold_reward), data=CardData(TRAIN, HELD_OUT, policy=policy), settings=SETTINGS)
    assert set(passed(card).values()) == {1.0}
    assert len(passed(card)) == 5
    assert all(rank.spearman == pytest.approx(1.0) for rank in card.rank if rank.against == "human scores")
    assert card.verdict != "red"
    assert card.accuracy.share > 0.7
    assert card.length_only_accuracy is not None
    assert finding(card, "probe: flattery").level == "green"


@pytest.mark.parametrize(
    ("score", "fails", "passes"),
    [
        (lambda prompt, answer: float(words(answer)), ("repetition", "flattery"), ("truncation",)),
        (lambda prompt, answer: gold_reward(prompt, answer) + 3 * any(f in answer for f in FLATTERY), ("flattery",),
         ("truncation",)),
        (lambda prompt, answer: -float(words(answer)), ("truncation",), ("repetition", "flattery")),
    ],
    ids=["loves length", "loves flattery", "loves brevity"],
)  # fmt: skip
def test_what_a_model_falls_for_shows_in_the_probes(
    score: Callable[[Prompt, str], float], fails: tuple[str, ...], passes: tuple[str, ...]
) -> None:
    card = make_card(scorers_of(score), data=CardData(TRAIN, HELD_OUT), settings=SETTINGS)
    for kind in fails:
        assert passed(card)[kind] < 0.3
        assert finding(card, f"probe: {kind}").level == "amber"
    for kind in passes:
        assert passed(card)[kind] > 0.8


def test_a_model_that_does_not_read_the_prompt_fails_off_topic() -> None:
    steps = {step for found in ISSUES.values() for step in found}
    card = make_card(
        scorers_of(lambda prompt, answer: float(sum(step in answer for step in steps))),
        data=CardData(TRAIN, HELD_OUT),
        settings=SETTINGS,
    )
    assert finding(card, "probe: off topic").level == "amber"
    assert finding(card, "probe: style").level == "amber"


def test_few_texts_are_scored_and_never_one_that_would_be_cut() -> None:
    asked: list[Texts] = []

    def members(texts: Texts) -> list[list[float]]:
        asked.append(texts)
        return [[float(len(answer))] for _, answer in texts]

    settings = replace(SETTINGS, train_answers=100, policy_answers=30, probes_per_kind=5, max_answer_tokens=40)
    policy = [PolicyAnswer(pair.prompt, pair.chosen) for pair in HELD_OUT]
    make_card(
        Scorers(members, aggregate=lambda found: found[0], tokens=words),
        data=CardData(TRAIN, HELD_OUT, policy=policy),
        settings=settings,
    )
    assert [len(texts) for texts in asked[:3]] == [2 * len(HELD_OUT), 100, 30]
    assert 0 < len(asked[3]) <= 50
    assert max(words(answer) for _, answer in asked[3]) <= 40


def test_a_scorer_that_loses_a_text_is_an_error() -> None:
    broken = Scorers(members=lambda texts: [[0.0]], aggregate=lambda found: found[0], tokens=len)
    with pytest.raises(ScoringError, match="wrong number"):
        make_card(broken, data=CardData(TRAIN, HELD_OUT), settings=SETTINGS)


def test_settings_follow_the_configuration() -> None:
    config = load_config("demo", overrides=["rm.min_accuracy=0.7"])
    settings = card_settings(config, version="rm-9", parent="rm-8", number=2, reason="every 8 versions")
    assert (settings.min_accuracy, settings.max_answer_tokens, settings.parent) == (0.7, 64, "rm-8")
    assert settings.gold is gold_reward


# ---------------------------------------------------------------- files

HOSTILE = '<script>alert("x")</script><img src=x onerror=y>|`# & \x1b[31m\u202e$a_b$ </td></table>'


def hostile_card() -> Card:
    pairs = [
        ScoredPair(
            pair_of(index, prompt=HOSTILE, votes=(True, True, True), annotators=(HOSTILE, "b$_{", "c"), source=HOSTILE),
            scored(1.0 + index, prompt=HOSTILE, answer=HOSTILE, members=(1.0, 2.0), human_score=float(index)),
            scored(0.0 - index, prompt=HOSTILE, answer=HOSTILE * 40, members=(0.0, 1.0), human_score=0.5 - index),
        )
        for index in range(20)
    ]
    return card_of([*pairs, *scored_pairs([])], reason=HOSTILE, parent=HOSTILE)


def test_hostile_texts_stay_texts() -> None:
    page, text = html_page(hostile_card()), markdown(hostile_card())
    for hostile in ("<script", "<img src=x", "\x1b", "\u202e"):
        assert hostile not in page
        assert hostile not in text.replace("\\<", "")
    assert "&lt;script&gt;" in page
    assert page.count("<table") == page.count("</table>")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") >= 3 for line in rows)
    for row in rows:
        if "alert" in row and row.count("+") >= 3:
            assert row.replace("\\|", "").count("|") == 6, "five cells: score, spread, human, prompt, answer"


def test_the_page_needs_no_network_and_no_script() -> None:
    page = html_page(make_card(scorers_of(gold_reward), data=CardData(TRAIN, HELD_OUT), settings=SETTINGS))
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img") == 6
    assert "href=" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_inputs_give_the_same_files_and_json_comes_back(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    card = make_card(scorers_of(gold_reward), data=CardData(TRAIN, HELD_OUT), settings=SETTINGS)
    again = make_card(scorers_of(gold_reward), data=CardData(TRAIN, HELD_OUT), settings=SETTINGS)
    assert write_card(card, first).name == "card.html"
    write_card(again, second)
    assert {path.name for path in first.iterdir()} == {"card.json", "card.md", "card.html"}
    assert all((second / path.name).read_bytes() == path.read_bytes() for path in first.iterdir())
    assert read_card(first) == card


def test_no_card_and_a_damaged_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no validation card"):
        read_card(tmp_path)
    (tmp_path / "card.json").write_text('{"version": 3}')
    with pytest.raises(DataError, match="damaged"):
        read_card(tmp_path)
