"""The audit of preferences: each planted fault is found, labels by chance and clean data are not blamed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest

from cluster.data_records import PreferencePair, Prompt
from cluster.errors import DataError
from examples.support_desk.annotators import judge
from examples.support_desk.phrases import CITIES, DAYS, ISSUES, OPENINGS, prompt_of
from examples.support_desk.world import mediocre_answer
from reward_service.audit.agreement import votes_of
from reward_service.audit.audit import Around, Records, audit, confidence, size
from reward_service.audit.duplicates import duplicates, prompt_overlap
from reward_service.audit.leakage import leakage, order_only
from reward_service.audit.lengths import correlations, histogram, length_unit, lengths_of, longer_preferred
from reward_service.audit.rebalance import How
from reward_service.audit.records import Audit, Finding, decode_audit, encode_audit
from reward_service.audit.words import drawing_words
from reward_service.preferences import Candidate, collect_pairs

WORDS = [f"word{number}" for number in range(400)]


def text(rng: random.Random, *, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def pair(number: int, chosen: str, rejected: str, *, prompt: Prompt = "") -> PreferencePair:
    return PreferencePair(
        pair_id=f"pair-{number}", prompt=prompt or f"question {number}", chosen=chosen, rejected=rejected
    )


def clean(count: int = 400, *, seed: int = 0) -> list[PreferencePair]:
    """Labels by chance."""
    rng = random.Random(seed)
    return [
        pair(number, *(text(rng, words=rng.randint(5, 25)) for _ in range(2)), prompt=text(rng, words=8))
        for number in range(count)
    ]


def desk(seed: int, *, pairs: int = 2000) -> list[PreferencePair]:
    """The example's own preferences: mediocre answers, judged by its five annotators."""
    rng = random.Random(f"audit {seed}")
    candidates = []
    for _ in range(pairs):
        issue = rng.choice(list(ISSUES))
        prompt = prompt_of(issue, opening=rng.choice(OPENINGS), city=rng.choice(CITIES), day=rng.choice(DAYS))
        candidates.append(Candidate(prompt, mediocre_answer(issue, rng), mediocre_answer(issue, rng)))
    return collect_pairs(candidates, judge=judge, seed=seed).pairs


def found(audited: Audit, name: str) -> Finding:
    finding = audited.finding(name)
    assert finding is not None, f"no {name} among {[one.name for one in audited.findings]}"
    return finding


# ---------------------------------------------------------------- the whole


def test_labels_by_chance_leak_nothing() -> None:
    audited = audit(clean())
    for name in ("length_bias", "cues", "length_only", "words_only", "prompt_only", "duplicates", "contradictions"):
        assert found(audited, name).level == "ok", found(audited, name)
    assert audited.cues == ()
    assert found(audited, "agreement").level == "warn"  # nobody knows who judged


@pytest.mark.parametrize("seed", range(3))
def test_the_support_desks_biased_annotators_and_their_words_are_named(seed: int) -> None:
    audited = audit(desk(seed))
    leanings = {one.annotator: {lean.feature for lean in one.leanings} for one in audited.annotators}
    assert leanings == {
        "annotator_1": {"length"}, "annotator_2": {"length"}, "annotator_3": {"amazing", "love"},
        "annotator_4": set(), "annotator_5": set(),
    }  # fmt: skip
    said = found(audited, "annotator_leanings").value
    assert "annotator_1 likes longer answers" in said
    assert "annotator_3 likes answers that say" in said
    assert {cue.annotator for cue in audited.annotator_cues} == {"annotator_3"}
    words = {word for cue in audited.annotator_cues for word in (cue.term, *cue.also)}
    assert {"amazing", "love", "you are", "i love"} <= words
    assert found(audited, "against_the_rest").level == "ok"


def test_every_finding_says_what_it_means_and_a_bad_one_what_to_do() -> None:
    rng = random.Random(0)
    pairs = [pair(0, "a b c", "d"), *(pair(n, text(rng, words=9) + " safe", text(rng, words=4)) for n in range(200))]
    audited = audit([*pairs, *pairs])
    assert {finding.level for finding in audited.findings} == {"ok", "warn", "bad"}
    for finding in audited.findings:
        assert finding.meaning
        assert bool(finding.advice) == (finding.level != "ok"), finding
    assert audited.worst == "bad"
    assert decode_audit(encode_audit(audited)) == audited


@pytest.mark.parametrize(
    "pairs",
    [
        [pair(0, "yes", "no")],
        [pair(number, "same length", "no spaces") for number in range(30)],
        [pair(number, "汉字" * 30, "漢字" * 40, prompt="你好") for number in range(30)],
        [pair(number, "!!!", "???", prompt="…") for number in range(30)],
        [pair(number, "a", "b", prompt=[{"role": "user", "content": f"{number}"}]) for number in range(60)],
    ],
)
def test_odd_data_is_audited_all_the_same(pairs: list[PreferencePair]) -> None:
    audited = audit(pairs)
    assert audited.pairs == len(pairs)
    assert decode_audit(encode_audit(audited)) == audited


def test_nothing_to_audit() -> None:
    with pytest.raises(DataError, match="nothing to audit"):
        audit([])


# ---------------------------------------------------------------- length


def test_longer_answers_that_win_are_found_thrice() -> None:
    rng = random.Random(1)
    pairs = []
    for number in range(400):
        texts = sorted((text(rng, words=rng.randint(5, 15)), text(rng, words=rng.randint(16, 30))), key=len)
        longer_wins = rng.random() < 0.8
        pairs.append(pair(number, texts[longer_wins], texts[not longer_wins]))
    audited = audit(pairs)
    assert audited.number("length_bias", "longer_preferred") == pytest.approx(0.8, abs=0.05)
    assert found(audited, "length_bias").level == "bad"
    assert audited.number("length_only", "accuracy") == pytest.approx(0.8, abs=0.05)
    assert found(audited, "length_only").level == "bad"
    assert found(audited, "length_balance").level == "warn"


def test_pairs_without_weight_count_for_nothing_in_what_rebalancing_would_make() -> None:
    pairs = [msgspec.structs.replace(one, weight=0.0 if n % 2 else 1.0) for n, one in enumerate(
        pair(n, text(random.Random(n), words=20 if n % 2 else 10), "fifteen " * 15) for n in range(40)
    )]  # fmt: skip
    audited = audit(pairs, around=Around(rebalance="inverse_frequency"))
    assert audited.number("length_bias", "longer_preferred") == 0.5
    assert audited.number("rebalanced", "longer_preferred") == 0.0


def test_few_pairs_leak_without_an_error_whatever_the_folds() -> None:
    """With ten prompts a fold of the other eight must still show both labels to the predictor."""
    for seed in range(40, 50):
        pairs = [pair(n, "a b " * (n % 3 + 1), "c d e " * (n % 2 + 1)) for n in range(10)]
        assert {finding.name for finding in leakage(pairs, lengths_of(pairs, unit="words"), seed=seed)} >= {
            "length_only", "words_only",
        }  # fmt: skip


def test_rebalancing_is_tried_out() -> None:
    rng = random.Random(1)
    pairs = [pair(n, text(rng, words=20 if n % 4 else 10), text(rng, words=15)) for n in range(400)]
    both: tuple[How, ...] = ("stratified", "inverse_frequency")
    for how in both:
        audited = audit(pairs, around=Around(rebalance=how))
        assert audited.number("length_bias", "longer_preferred") == pytest.approx(0.75)
        assert audited.number("rebalanced", "longer_preferred") == pytest.approx(0.5, abs=0.02)


def test_correlations_by_hand() -> None:
    # Differences +3 and −1, each from both sides: Σ d·label / √(Σ d² · Σ label²) = 4 / √(20 · 4).
    point_biserial, spearman = correlations([(4, 1), (1, 2)])
    assert point_biserial == pytest.approx(4 / 80**0.5)
    assert spearman == pytest.approx(0.4472136, abs=1e-6)  # ranks 4, 2, 1, 3 with labels 1, 1, 0, 0
    assert correlations([(2, 2)]) == (None, None)


def test_ties_in_length_count_for_neither() -> None:
    share = longer_preferred([(3, 1), (1, 3), (3, 1), (2, 2)])
    assert share is not None
    assert share.count == 3
    assert share.share == pytest.approx(2 / 3)


def test_lengths_are_words_or_characters() -> None:
    spaced, unspaced = [pair(0, "one two  three", "four")], [pair(0, "今天天气很好" * 9, "是" * 30)]
    assert (length_unit(spaced), lengths_of(spaced, unit="words")) == ("words", [(3, 1)])
    assert (length_unit(unspaced), lengths_of(unspaced, unit="characters")) == ("characters", [(54, 30)])


def test_histograms_count_every_answer_once() -> None:
    lengths = [(random.Random(n).randint(0, 300), n) for n in range(200)] + [(10_000, 0)]
    counted = histogram(lengths, unit="words")
    assert sum(counted.chosen) == sum(counted.rejected) == 201
    assert counted.chosen[-1] >= 1, "the longest is in the last bin"
    assert len(counted.edges) == len(counted.chosen) + 1


# ---------------------------------------------------------------- leakage


def test_prompts_that_decide_which_kind_of_answer_wins_are_found() -> None:
    rng = random.Random(0)
    pairs = []
    for number in range(400):
        brief = number % 2 == 0
        texts = text(rng, words=10), text(rng, words=20)
        prompt = f"{'in brief' if brief else 'in detail'}: {text(rng, words=5)}"
        pairs.append(pair(number, texts[not brief], texts[brief], prompt=prompt))
    audited = audit(pairs)
    assert found(audited, "prompt_only").level == "bad"
    assert audited.number("prompt_only", "accuracy") == pytest.approx(1.0, abs=0.02)
    assert audited.number("prompt_only", "base") == pytest.approx(0.5)
    assert found(audited, "length_only").level == "ok", "over all prompts length says nothing"


def test_words_that_decide_are_found_and_prompts_are_not_split_over_folds() -> None:
    rng = random.Random(0)
    sides = [(text(rng, words=12), text(rng, words=12)) for _ in range(40)]
    # Ten times the same forty pairs: learned by heart, unless a prompt stays in one fold.
    repeated = [pair(n, *sides[n % 40], prompt=f"question {n % 40}") for n in range(400)]
    assert found(audit(repeated), "words_only").level == "ok"
    polite = [pair(n, f"{text(rng, words=8)} please", f"{text(rng, words=8)} now") for n in range(400)]
    audited = audit(polite)
    assert found(audited, "words_only").level == "bad"
    assert found(audited, "cues").level == "bad"
    assert next(cue.term for cue in audited.cues if cue.favours == "chosen") == "please"


@pytest.mark.parametrize(("first_wins", "level"), [(0.5, "ok"), (0.56, "warn"), (0.8, "bad"), (1.0, "bad")])
def test_the_place_in_the_record_may_give_the_label_away(first_wins: float, level: str) -> None:
    finding = order_only([(f"question {number}", number < 2000 * first_wins) for number in range(2000)])
    assert finding is not None
    assert finding.level == level
    assert finding.numbers["accuracy"] == pytest.approx(first_wins)


def test_the_prompt_may_tell_the_place() -> None:
    rng = random.Random(0)
    shown = [(f"{'left' if n % 2 else 'right'} {text(rng, words=6)}", bool(n % 2)) for n in range(400)]
    finding = order_only(shown)
    assert finding is not None
    assert finding.level == "bad"
    assert finding.numbers["prompt_accuracy"] == pytest.approx(1.0, abs=0.02)
    assert order_only(shown[:5]) is None


# ---------------------------------------------------------------- repetition


def repeated(*, same: int, opposed: int, near: int, near_opposed: int) -> list[PreferencePair]:
    rng = random.Random(0)
    pairs = [
        pair(number, text(rng, words=30), text(rng, words=30), prompt=text(rng, words=20)) for number in range(100)
    ]
    more: list[PreferencePair] = []
    for original in pairs[:same]:
        more.append(pair(0, original.chosen.upper() + " !", f" {original.rejected}", prompt=original.prompt))
    for original in pairs[20 : 20 + opposed]:
        more.append(pair(0, original.rejected, original.chosen, prompt=original.prompt))
    for original in pairs[40 : 40 + near]:
        more.append(pair(0, f"{original.chosen} indeed", original.rejected, prompt=original.prompt))
    for original in pairs[60 : 60 + near_opposed]:
        more.append(pair(0, f"{original.rejected} indeed", original.chosen, prompt=original.prompt))
    return pairs + more


def test_repetitions_and_contradictions_are_told_apart() -> None:
    twice, opposite = duplicates(repeated(same=5, opposed=4, near=3, near_opposed=2))
    assert (twice.numbers["exact"], twice.numbers["near"]) == (5, 3)
    assert (opposite.numbers["exact"], opposite.numbers["near"]) == (4, 2)
    assert (twice.level, opposite.level) == ("warn", "warn")
    twice, opposite = duplicates(repeated(same=0, opposed=0, near=0, near_opposed=0))
    assert (twice.level, opposite.level) == ("ok", "ok")
    assert duplicates([pair(0, "a", "b", prompt="q")] * 10)[0].level == "bad"


def test_other_answers_to_one_long_prompt_are_no_repetition() -> None:
    rng = random.Random(0)
    prompt = text(rng, words=300)
    pairs = [pair(number, text(rng, words=6), text(rng, words=6), prompt=prompt) for number in range(20)]
    twice, opposite = duplicates(pairs)
    assert twice.numbers["share"] == opposite.numbers["share"] == 0


@pytest.mark.parametrize(("shared", "level"), [(30, "ok"), (31, "warn"), (100, "warn")])
def test_prompts_of_sft_and_rl(shared: int, level: str) -> None:
    rng = random.Random(0)
    prompts: list[Prompt] = [text(rng, words=12) for _ in range(170)]
    finding = prompt_overlap(prompts[:100], [*prompts[:shared], *prompts[100 : 200 - shared]])
    assert finding.level == level
    assert finding.numbers["exact"] == shared
    assert finding.numbers["prompts"] == 100


def test_near_prompts_count_as_shared_and_form_does_not_matter() -> None:
    question = "what should i do when the washer on the second floor leaks at night again"
    same: list[Prompt] = [[{"role": "user", "content": question.upper() + "?"}], f"{question} please"]
    finding = prompt_overlap([question], [*same, "tell me something about the moon"])
    assert (finding.numbers["exact"], finding.numbers["near"], finding.numbers["prompts"]) == (1, 1, 3)


# ---------------------------------------------------------------- amount, clarity, annotators


@pytest.mark.parametrize(("count", "level"), [(4_999, "bad"), (5_000, "warn"), (9_999, "warn"), (10_000, "ok")])
def test_size(count: int, level: str) -> None:
    assert size([pair(0, "a", "b")] * count).level == level


def test_confidence_spread() -> None:
    def judged(share: float) -> PreferencePair:
        return msgspec.structs.replace(pair(0, "a", "b"), confidence=share)

    (finding,) = confidence([judged(1.0), judged(0.8), judged(0.6), judged(0.6)], unclear=0)
    assert (finding.level, finding.numbers["bare"], finding.numbers["unanimous"]) == ("ok", 0.5, 0.25)
    assert confidence([judged(0.6)] * 3 + [judged(1.0)], unclear=0)[0].level == "warn"
    assert confidence([judged(1.0)] * 3, unclear=1)[0].level == "warn"
    assert confidence([pair(0, "a", "b")], unclear=0) == []


def voted(ballots: Sequence[str], *, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Each ballot: "+" for chosen, "-" for rejected, a sign an annotator a, b, c, …"""
    return [
        msgspec.structs.replace(
            one, votes=tuple(sign == "+" for sign in ballot), annotators=tuple("abcdefgh"[: len(ballot)])
        )
        for one, ballot in zip(pairs, ballots, strict=True)
    ]


def test_annotators_who_do_not_agree_and_one_who_runs_against_the_rest() -> None:
    rng = random.Random(0)
    pairs = clean(300)
    noise = audit(voted(["".join(rng.choice("+-") for _ in range(3)) for _ in pairs], pairs=pairs))
    assert found(noise, "agreement").level == "bad"
    against = audit(voted(["++++-" if rng.random() < 0.9 else "+++++" for _ in pairs], pairs=pairs))
    assert found(against, "agreement").level != "bad"
    assert found(against, "against_the_rest").level == "bad"
    assert found(against, "against_the_rest").value.startswith("e ")
    assert [one.annotator for one in against.annotators if one.against] == ["e"]


def test_one_annotator_says_nothing_about_agreement() -> None:
    audited = audit(voted(["+"] * 60, pairs=clean(60)))
    assert found(audited, "agreement").level == "warn"
    assert audited.number("agreement", "pairwise") is None


def test_votes_on_unclear_pairs_count_for_annotators() -> None:
    pairs = clean(100)
    unclear = voted(["+-"] * 50, pairs=pairs[50:])
    audited = audit(voted(["++"] * 50, pairs=pairs[:50]), around=Around(unclear=unclear))
    assert audited.number("agreement", "pairwise") == pytest.approx(0.5)
    assert audited.unclear == 50


@pytest.mark.parametrize("seed", range(3))
def test_fair_annotators_have_no_words_of_their_own(seed: int) -> None:
    """Everyone likes "please" and dislikes "now", and votes are noisy: nobody stands out."""
    rng = random.Random(seed)
    pairs, ballots = [], []
    for number in range(600):
        sides = [f"{text(rng, words=8)} {rng.choice(('please', 'now', ''))}" for _ in range(2)]
        merit = [side.endswith("please") - side.endswith("now") for side in sides]
        likely = 0.5 + 0.2 * (merit[0] - merit[1])
        pairs.append(pair(number, *sides))
        ballots.append("".join("+" if rng.random() < likely else "-" for _ in range(5)))
    judged = voted(ballots, pairs=pairs)
    assert drawing_words(judged, lengths_of(judged, unit="words"), votes=votes_of(judged)) == []


def test_malformed_records_are_named_with_their_lines() -> None:
    read = Records(read=62, refused={"tie": 1, "is not JSON": 1}, problems=["line 7: is not JSON"])
    finding = found(audit(clean(60), around=Around(records=read)), "records")
    assert finding.level == "warn"
    assert "line 7: is not JSON" in finding.value
    assert "tie: 1" in finding.value
