"""The validation card of a reward model: has it score what the card needs, and judges what comes out.

    card = make_card(scorers, data=CardData(...), settings=card_settings(config, version=version_of(draft)))
    write_card(card, draft)            # card.json, card.html, card.md
    if card.verdict == "red": …

make_card asks the model; validate_rm is a pure function of the scores.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, TypeVar

from cluster.data_records import PreferencePair, Prompt
from cluster.errors import ScoringError
from cluster.labels import without_annotators
from cluster.plugin import resolve
from configs.run import RunConfig
from reward_service.audit.cues import lexical_cues
from reward_service.card.labels import judged_pairs
from reward_service.card.measure import validate_rm
from reward_service.card.probes import Probe, build_probes
from reward_service.card.records import (
    Card,
    CardData,
    CardInputs,
    CardSettings,
    Gold,
    PolicyAnswer,
    Scored,
    ScoredPair,
    ScoredProbe,
    Scorers,
    Source,
    Texts,
)
from reward_service.card.render import write_card
from reward_service.preferences import length_only_accuracy

__all__ = [
    "CardData",
    "CardSettings",
    "PolicyAnswer",
    "Scorers",
    "card_settings",
    "make_card",
    "validate_rm",
    "write_card",
]

TRAIN_PAIRS_READ: Final = 20_000
"""At most so many training pairs are looked through for probes and lengths; more would say the same."""

_T = TypeVar("_T")


def card_settings(
    config: RunConfig, *, version: str, parent: str | None = None, number: int = 1, reason: str = "trained"
) -> CardSettings:
    """As the run's configuration says; evaluation.gold, where set, is the ranking to correlate with."""
    gold = config.evaluation.gold
    return CardSettings(
        version=version,
        min_accuracy=config.rm.min_accuracy,
        max_answer_tokens=config.data.max_response_tokens,
        seed=config.seed,
        parent=parent,
        number=number,
        reason=reason,
        gold=None if gold is None else resolve(gold, key="evaluation.gold"),
    )


def make_card(scorers: Scorers, *, data: CardData, settings: CardSettings) -> Card:
    """Score what the card needs and make it. Asks `scorers.members` once for each of: held-out pairs, some training
    pairs, some of the policy's answers, the probes.

    Raises DataError when no held-out pair has a clear label, ScoringError for a wrong count, and as scorers do.
    """
    rng = random.Random(f"card {settings.seed}")
    held_out = _scored_pairs(scorers, data.held_out, source="held_out", gold=settings.gold)
    train = _scored_pairs(scorers, _some(data.train, settings.train_answers // 2, rng), source="train", gold=None)
    policy = _some(data.policy, settings.policy_answers, rng)
    read = without_annotators(_some(data.train, TRAIN_PAIRS_READ, rng), data.held_out_annotators).pairs
    scored_policy = _scored(scorers, [(one.prompt, one.answer) for one in policy], source="policy", gold=settings.gold)
    return validate_rm(
        CardInputs(
            version=settings.version,
            min_accuracy=settings.min_accuracy,
            held_out=held_out,
            train=train,
            policy=[_with_human_score(answer, given) for answer, given in zip(scored_policy, policy, strict=True)],
            probes=_scored_probes(scorers, _probes(read, scorers=scorers, settings=settings)),
            held_out_annotators=data.held_out_annotators,
            length_only_accuracy=_length_only_accuracy(scorers, read, held_out, left_out=data.held_out_annotators),
            parent=settings.parent,
            number=settings.number,
            reason=settings.reason,
        )
    )


def _some(items: Sequence[_T], count: int, rng: random.Random) -> list[_T]:
    """At most `count` of them, drawn at random, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in sorted(rng.sample(range(len(items)), count))]


def _scored(scorers: Scorers, texts: Texts, *, source: Source, gold: Gold | None) -> list[Scored]:
    if not texts:
        return []
    members = scorers.members(texts)
    _check_count(members, texts, what="members")
    others: Sequence[float | None] = [None] * len(texts)
    if scorers.discriminator is not None:
        others = scorers.discriminator(texts)
        _check_count(others, texts, what="the discriminator")
    return [
        Scored(
            prompt=prompt,
            answer=answer,
            members=tuple(scores),
            score=scorers.aggregate(scores),
            tokens=scorers.tokens(answer),
            source=source,
            discriminator=other,
            human_score=None if gold is None else float(gold(prompt, answer)),
        )
        for (prompt, answer), scores, other in zip(texts, members, others, strict=True)
    ]


def _check_count(scores: Sequence[object], texts: Texts, *, what: str) -> None:
    if len(scores) != len(texts):
        raise ScoringError(f"{what}: wrong number of scores", got=f"{len(scores)} for {len(texts)} texts")


def _scored_pairs(
    scorers: Scorers, pairs: Sequence[PreferencePair], *, source: Source, gold: Gold | None
) -> list[ScoredPair]:
    texts = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    answers = _scored(scorers, texts, source=source, gold=gold)
    return [
        ScoredPair(pair, chosen, rejected)
        for pair, chosen, rejected in zip(pairs, answers[::2], answers[1::2], strict=True)
    ]


def _with_human_score(answer: Scored, given: PolicyAnswer) -> Scored:
    """A person's score where there is one, else gold's."""
    return answer if given.human_score is None else replace(answer, human_score=given.human_score)


def _probes(train: Sequence[PreferencePair], *, scorers: Scorers, settings: CardSettings) -> list[Probe]:
    """On training pairs, whose good answers the model should know best. With gold, only attacks that it finds worse."""
    limit = settings.max_answer_tokens

    def fits(text: str) -> bool:
        return scorers.tokens(text) <= limit

    probes = build_probes(
        train, cues=lexical_cues(train), seed=settings.seed, per_kind=settings.probes_per_kind, fits=fits
    )
    return [probe for probe in probes if settings.gold is None or _is_worse(probe, settings.gold)]


def _is_worse(probe: Probe, gold: Gold) -> bool:
    return float(gold(probe.prompt, probe.attack)) < float(gold(probe.prompt, probe.honest))


def _scored_probes(scorers: Scorers, probes: Sequence[Probe]) -> list[ScoredProbe]:
    texts: list[tuple[Prompt, str]] = [
        (probe.prompt, answer) for probe in probes for answer in (probe.honest, probe.attack)
    ]
    members = scorers.members(texts) if texts else []
    _check_count(members, texts, what="members")
    scores = [scorers.aggregate(each) for each in members]
    return [
        ScoredProbe(probe.kind, probe.prompt, probe.honest, probe.attack, honest, attack)
        for probe, honest, attack in zip(probes, scores[::2], scores[1::2], strict=True)
    ]


def _length_only_accuracy(
    scorers: Scorers, train: Sequence[PreferencePair], held_out: Sequence[ScoredPair], *, left_out: Sequence[str]
) -> float | None:
    """By the labels that accuracy is measured on. `train`: in their order already."""
    judged = judged_pairs(held_out, left_out=left_out)
    if not train or not judged:
        return None
    return length_only_accuracy(
        [(scorers.tokens(pair.chosen), scorers.tokens(pair.rejected)) for pair in train],
        [(pair.preferred.tokens, pair.other.tokens) for pair in judged],
    )
