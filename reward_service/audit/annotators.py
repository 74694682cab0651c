"""The annotators in an audit: how far they agree, whose votes run against the rest, and what draws each of them.

Two steps find what draws an annotator: a screen over all words (reward_service/audit/words.py) names candidates, and
reward_service/audit/agreement.py tests those and length together, so that one is not taken for the other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.data_records import PreferencePair
from cluster.preference_table import Vote
from cluster.ratings import Rating
from reward_service.audit.agreement import LENGTH, Agreement, AnnotatorAgreement, AnnotatorBias, agreement, biases
from reward_service.audit.lengths import lengths_of
from reward_service.audit.records import AnnotatorFacts, Draw, Finding, Leaning, Level, Number, Share
from reward_service.audit.words import drawing_words, independent_words

BAD_AGREEMENT: Final = 0.60
"""Share of couples of votes on one pair that agree under which the votes are mostly noise,"""
WARN_AGREEMENT: Final = 0.70
"""and under which many are."""
FEW_COUPLES: Final = 100
"""Fewer couples say too little."""
MAX_PAIRS: Final = 10_000
"""What draws annotators is sought in a random sample of so many pairs."""
_MOST_WORDS: Final = 12


@dataclass(frozen=True)
class About:
    """What is said about annotators."""

    findings: tuple[Finding, ...]
    facts: tuple[AnnotatorFacts, ...] = ()
    cues: tuple[Draw, ...] = ()


def annotators_of(
    pairs: Sequence[PreferencePair], *, votes: Sequence[Vote], ratings: Sequence[Rating] = (), unit: str
) -> About:
    """`pairs`: unclear ones too. Where nobody is named, a finding says so, and there is nothing else.

    A word counts as an annotator's own where both steps find it."""
    measured = agreement(votes, ratings=ratings)
    if not measured.annotators:
        return About((_unknown(),))
    some = pairs if len(pairs) <= MAX_PAIRS else random.Random("annotators").sample(pairs, MAX_PAIRS)
    known = {pair.pair_id for pair in some}
    votes = [vote for vote in votes if vote.pair_id in known]
    drawings = drawing_words(some, lengths_of(some, unit=unit), votes=votes)
    draws = [one.draw for one in drawings]
    words = independent_words(drawings)[:_MOST_WORDS]
    screened = {(draw.annotator, draw.term) for draw in draws}
    leanings = [
        one
        for one in biases(votes, some, words)
        if one.feature == LENGTH or (one.coefficient > 0 and (one.annotator, one.feature) in screened)
    ]
    facts = [_facts(one, leanings) for one in measured.annotators]
    return About((_agreement(measured), _against(measured.annotators), _drawn(facts)), tuple(facts), tuple(draws))


def _unknown() -> Finding:
    return Finding(
        name="agreement",
        level="warn",
        value="who judged what is not known",
        meaning="Nobody can say how far annotators agree, so neither how good a reward model could be.",
        advice="Keep annotators' ids, and have some pairs judged by several: columns `annotator`, or `votes` and "
        "`annotators`.",
    )


def _agreement(measured: Agreement) -> Finding:
    pairwise = measured.pairwise
    numbers: dict[str, Number] = {
        "pairwise": pairwise, "couples": measured.pairwise_count, "alpha": measured.alpha_votes,
        "alpha_ratings": measured.alpha_ratings, "annotators": len(measured.annotators),
    }  # fmt: skip
    if pairwise is None or measured.alpha_votes is None or measured.pairwise_count < FEW_COUPLES:
        return Finding(
            name="agreement",
            level="warn",
            value=f"{len(measured.annotators)} annotators, {measured.pairwise_count} couples of votes on one pair",
            numbers=numbers,
            meaning="Too few pairs were judged by more than one to say how far annotators agree.",
            advice="Have a few hundred pairs judged by three or more.",
        )
    level: Level = "bad" if pairwise < BAD_AGREEMENT else "warn" if pairwise < WARN_AGREEMENT else "ok"
    return Finding(
        name="agreement",
        level=level,
        value=f"two annotators agree on {pairwise:.1%} of pairs; Krippendorff's alpha {measured.alpha_votes:.2f}"
        + ("" if measured.alpha_ratings is None else f", of ratings {measured.alpha_ratings:.2f}"),
        numbers=numbers,
        meaning="Annotators see the task alike." if level == "ok" else
        "Half is chance: much of what a reward model would learn is noise, or annotators want different things.",
        advice="" if level == "ok" else
        "Look at pairs on which they part, write guidelines for those, and ask more annotators a pair. "
        "`keel advise` weighs other methods.",
    )  # fmt: skip


def _against(annotators: Sequence[AnnotatorAgreement]) -> Finding:
    named = [one for one in annotators if one.against]
    return Finding(
        name="against_the_rest",
        level="bad" if named else "ok",
        value="; ".join(f"{one.annotator} {one.against}" for one in named) or "nobody's votes run against the rest",
        numbers={"annotators": len(named)},
        meaning="Such votes are mixed up, careless, or follow another idea of the task." if named else
        "Every annotator agrees with the others about as much as these do among themselves.",
        advice="Read some of their judgements with them; until then leave those votes out." if named else "",
    )  # fmt: skip


def _drawn(facts: Sequence[AnnotatorFacts]) -> Finding:
    drawn = [one for one in facts if one.leanings]
    return Finding(
        name="annotator_leanings",
        level="warn" if drawn else "ok",
        value="; ".join(f"{one.annotator} {_in_words(one)}" for one in drawn) or "no annotator stands out",
        numbers={"annotators": len(drawn)},
        meaning="These annotators vote for something that the others do not, apart from quality. On answers that a "
        "policy makes to please them, they outvote the rest." if drawn else
        "Neither length nor a word draws one annotator more than the others.",
        advice="Tell them, weigh their votes less or ask others; watch these words and length in the policy's answers."
        if drawn else "",
    )  # fmt: skip


def _in_words(one: AnnotatorFacts) -> str:
    words = [f"“{lean.feature}”" for lean in one.leanings if lean.feature != LENGTH]
    said = [
        f"likes {'longer' if lean.coefficient > 0 else 'shorter'} answers"
        for lean in one.leanings
        if lean.feature == LENGTH
    ]
    if words:
        said.append(f"likes answers that say {', '.join(words)}")
    return " and ".join(said)


def _facts(one: AnnotatorAgreement, leanings: Sequence[AnnotatorBias]) -> AnnotatorFacts:
    share = None
    if one.share is not None and one.low is not None and one.high is not None:
        share = Share(share=one.share, low=one.low, high=one.high, count=one.compared)
    return AnnotatorFacts(
        annotator=one.annotator,
        votes=one.votes,
        agreement=share,
        against=bool(one.against),
        leanings=tuple(
            Leaning(feature=lean.feature, coefficient=lean.coefficient, z=lean.z, q=lean.q)
            for lean in leanings
            if lean.annotator == one.annotator
        ),
    )
