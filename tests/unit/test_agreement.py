"""Agreement against worked numbers and the reference package; biased annotators found, fair ones left alone."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from functools import cache

import pytest

from cluster.data_records import PreferencePair
from cluster.preference_table import Vote
from cluster.ratings import Rating
from examples.support_desk.annotators import judge
from examples.support_desk.phrases import CITIES, DAYS, ISSUES, OPENINGS, prompt_of
from examples.support_desk.world import mediocre_answer
from reward_service.audit.agreement import LENGTH, agreement, alpha_interval, biases, votes_of
from reward_service.preferences import Candidate, Judge, collect_pairs


def _votes(*ballots: str) -> list[Vote]:
    """One string a pair: the vote of annotators a, b, c … ("+" for chosen, "-" against, "." none)."""
    return [
        Vote(f"pair {number}", name, sign == "+")
        for number, ballot in enumerate(ballots)
        for name, sign in zip("abcdefgh", ballot, strict=False)
        if sign != "."
    ]


# ---------------------------------------------------------------- alpha and per cent


def test_perfect_and_chance_agreement() -> None:
    assert agreement(_votes("++", "--", "++")).alpha_votes == pytest.approx(1.0)
    half = agreement(_votes("++", "+-", "--", "-+"))
    assert half.pairwise == 0.5
    # Both orders of every pair: 8 units of two votes, half of them split. Observed disagreement 1/2; expected, of 16
    # votes half for each, 2·8·8/(16·15) = 8/15.
    assert half.alpha_votes == pytest.approx(1 - (1 / 2) / (8 / 15))


def test_alpha_does_not_depend_on_which_answer_is_written_first() -> None:
    rng = random.Random(0)
    ballots = ["".join(rng.choice("+-.") for _ in range(4)) for _ in range(60)]
    ballots = [ballot for ballot in ballots if ballot.count(".") < 3]
    turned = ["".join({"+": "-", "-": "+", ".": "."}[sign] for sign in ballot) for ballot in ballots]
    some = [new if number % 3 else old for number, (old, new) in enumerate(zip(ballots, turned, strict=True))]
    assert agreement(_votes(*some)).alpha_votes == pytest.approx(agreement(_votes(*ballots)).alpha_votes)


def test_alpha_of_five_annotators_by_hand() -> None:
    measured = agreement(_votes("+++++", "+++--"))
    # Couples of votes: 10 agree of 10; 3 + 1 of 10.
    assert (measured.pairwise, measured.pairwise_count) == (14 / 20, 20)
    # Disagreement within units (n·(n−1) ordered couples over n − 1): 0, 12/4; in both orders 6 of 20 votes.
    # Expected, 10 votes each way: 2·10·10/19.
    assert measured.alpha_votes == pytest.approx(1 - 6 / (200 / 19))


def test_single_votes_say_nothing_about_agreement() -> None:
    measured = agreement(_votes("+.", ".-", "+."))
    assert (measured.alpha_votes, measured.pairwise, measured.pairwise_count) == (None, None, 0)
    assert [(one.annotator, one.votes, one.share) for one in measured.annotators] == [("a", 2, None), ("b", 1, None)]


def test_interval_alpha_matches_the_reference_package() -> None:
    import krippendorff
    import numpy as np

    rng = random.Random(1)
    table = [[rng.gauss(answer, 2.0) if rng.random() < 0.7 else math.nan for answer in range(12)] for _ in range(4)]
    ratings = [
        Rating(f"answer {column}", f"annotator {row}", value, None)
        for (row, values) in enumerate(table)
        for column, value in enumerate(values)
        if not math.isnan(value)
    ]
    expected = krippendorff.alpha(reliability_data=np.array(table), level_of_measurement="interval")
    assert alpha_interval(ratings) == pytest.approx(expected)
    assert alpha_interval(ratings[:1]) is None
    assert alpha_interval([Rating("x", "a", 3.0, None), Rating("x", "b", 3.0, None)]) is None


# ---------------------------------------------------------------- against the rest


def _random_ballots(count: int, wrong: Sequence[float], *, seed: int = 0) -> list[str]:
    """Annotators who are wrong about a pair's truth with the chances in `wrong`."""
    rng = random.Random(seed)
    ballots = []
    for _ in range(count):
        truth = rng.random() < 0.5
        ballots.append("".join("+" if truth != (rng.random() < error) else "-" for error in wrong))
    return ballots


def test_who_runs_against_the_rest_is_named() -> None:
    named = {
        one.annotator: one.against
        for one in agreement(_votes(*_random_ballots(300, (0.1, 0.1, 0.1, 0.9, 0.45)))).annotators
        if one.against
    }
    assert named.keys() == {"d", "e"}
    assert "more often than not" in named["d"]
    assert "among themselves" in named["e"]


def test_fair_annotators_and_small_numbers_are_not_named() -> None:
    for seed in range(10):
        fair = agreement(_votes(*_random_ballots(300, (0.2, 0.25, 0.3, 0.2, 0.25), seed=seed)))
        assert [one.annotator for one in fair.annotators if one.against] == []
    few = agreement(_votes(*_random_ballots(15, (0.0, 0.0, 1.0))))
    assert [one.against for one in few.annotators] == ["", "", ""]


def test_each_is_compared_with_the_majority_of_the_others() -> None:
    # Pair 1: the others of a are split, so a is not compared; pair 0: 3 of 3 agree.
    a, b, c = agreement(_votes("+++", "+-+")).annotators
    assert (a.compared, a.share) == (1, 1.0)
    assert (b.compared, b.share) == (2, 0.5)
    assert (c.compared, c.share) == (1, 1.0)
    assert b.low is not None
    assert b.high is not None
    assert 0.0 < b.low < 0.5 < b.high < 1.0


# ---------------------------------------------------------------- what drives annotators

FLATTERY = ("amazing", "love")


@cache
def _desk(seed: int, judge_: Judge = judge, pairs: int = 2000) -> list[PreferencePair]:
    """Pairs of mediocre answers, judged by the support desk's panel."""
    rng = random.Random(f"desk {seed}")
    candidates = []
    for _ in range(pairs):
        issue = rng.choice(sorted(ISSUES))
        prompt = prompt_of(issue, opening=rng.choice(OPENINGS), city=rng.choice(CITIES), day=rng.choice(DAYS))
        candidates.append(Candidate(prompt, mediocre_answer(issue, rng), mediocre_answer(issue, rng)))
    return collect_pairs(candidates, judge=judge_, seed=seed).pairs


@pytest.mark.parametrize("seed", range(5))
def test_the_support_desks_length_lovers_and_flattery_lover_are_named_and_nobody_else(seed: int) -> None:
    pairs = _desk(seed)
    found = biases(votes_of(pairs), pairs, FLATTERY)
    assert {(one.annotator, one.feature) for one in found} == {
        ("annotator_1", LENGTH), ("annotator_2", LENGTH), ("annotator_3", "amazing"), ("annotator_3", "love"),
    }  # fmt: skip
    assert all(one.coefficient > 0 and one.q < 0.001 for one in found)
    assert {one.says for one in found} >= {"prefers longer answers", "prefers answers that say 'love'"}


def _fair_panel() -> Judge:
    def fair(prompt: object, a: str, b: str, rng: random.Random) -> dict[str, bool]:
        # The same draws as the panel's, but all by the two fair annotators' taste.
        verdicts = [judge(prompt, a, b, rng) for _ in range(3)]  # type: ignore[arg-type]
        taste = [verdict[name] for verdict in verdicts for name in ("annotator_4", "annotator_5")]
        return {f"annotator_{number}": vote for number, vote in enumerate(taste[:5], start=1)}

    return fair


def test_fair_annotators_have_no_bias_of_their_own() -> None:
    words = ("amazing", "love", "please", "sorry", "anything", "detail", "know", "again", "restart")
    for seed in range(3):
        pairs = _desk(seed, _fair_panel(), 1000)
        assert biases(votes_of(pairs), pairs, words) == []


def test_biases_do_not_depend_on_which_answer_is_written_first() -> None:
    from cluster.labels import turned

    pairs = _desk(0)
    some = [turned(pair) if number % 3 else pair for number, pair in enumerate(pairs)]
    before, after = biases(votes_of(pairs), pairs, FLATTERY), biases(votes_of(some), some, FLATTERY)
    assert [(one.annotator, one.feature) for one in before] == [(one.annotator, one.feature) for one in after]
    for one, other in itertools.zip_longest(before, after):
        assert one.coefficient == pytest.approx(other.coefficient, abs=1e-6)


def test_two_annotators_or_few_votes_name_nobody() -> None:
    pairs = _desk(0)
    votes = votes_of(pairs)
    two = [vote for vote in votes if vote.annotator in ("annotator_1", "annotator_4")]
    assert biases(two, pairs, FLATTERY) == []
    assert biases(votes_of(pairs[:40]), pairs, FLATTERY) == []


def test_annotators_who_follow_one_thing_always_are_named() -> None:
    """Votes that a feature decides entirely have no finite log-odds."""

    def panel(prompt: object, a: str, b: str, rng: random.Random) -> dict[str, bool]:
        fair = {f"fair_{number}": rng.random() < 0.5 for number in range(4)}
        return fair | {"length": len(a) > len(b), "love": ("love" in a) > ("love" in b) or rng.random() < 0.5}

    pairs = _desk(3, panel, 600)
    found = biases(votes_of(pairs), pairs, FLATTERY)
    assert {(one.annotator, one.feature) for one in found} == {("length", LENGTH), ("love", "love")}
    clones = [Vote(vote.pair_id, name, vote.prefers_chosen) for vote in votes_of(pairs) if vote.annotator == "length"
              for name in ("x", "y", "z")]  # fmt: skip
    assert biases(clones, pairs, FLATTERY) == []


def test_words_that_tell_the_same_are_tested_once() -> None:
    pairs = _desk(1)
    found = biases(votes_of(pairs), pairs, ("Amazing", "are", "amazing", "you are", "love", "absent"))
    assert [one.feature for one in found if one.annotator == "annotator_3"].count("amazing") == 1
    assert {one.feature for one in found} == {LENGTH, "amazing", "love"}


def test_annotators_may_judge_different_pairs() -> None:
    """Each pair by three of five, as real panels work."""
    pairs = _desk(2)
    rng = random.Random(0)
    votes = [
        vote
        for _, ballot in itertools.groupby(votes_of(pairs), key=lambda vote: vote.pair_id)
        for vote in rng.sample(list(ballot), 3)
    ]
    found = {(one.annotator, one.feature) for one in biases(votes, pairs, FLATTERY)}
    assert found >= {("annotator_1", LENGTH), ("annotator_2", LENGTH)}
    assert {name for name, feature in found if feature in FLATTERY} == {"annotator_3"}
    assert {name for name, _ in found} == {"annotator_1", "annotator_2", "annotator_3"}
