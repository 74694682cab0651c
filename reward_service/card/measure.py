"""From scored answers to the validation card: every measurement, and the findings over them. Pure.

A pair's label is the majority vote of the annotators that training may see; where votes or their authors are not known,
it is the label as given. Pairs without such a majority measure annotators alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Final

import msgspec

from cluster.errors import DataError
from cluster.labels import majority
from cluster.text import prompt_text
from reward_service.card.findings import findings_of, verdict_of
from reward_service.card.labels import judged_pairs, margins_of, named_rates, scores_of, shown
from reward_service.card.parts import discriminator_part, length_part, members_part
from reward_service.card.probes import PROBE_KINDS
from reward_service.card.records import (
    AnnotatorRate,
    Card,
    CardInputs,
    Distribution,
    KsDistance,
    NamedRate,
    ProbePart,
    RankCorrelation,
    Rate,
    Scored,
    ScoredProbe,
    ShownProbe,
    Source,
)
from reward_service.card.statistics import (
    histogram,
    histogram_edges,
    ks_distance,
    rank_correlation,
    rate,
    rate_or_none,
    reliability,
)

SHOWN: Final = 10
"""Highest, and lowest, answers on the card."""
SHOWN_FAILURES: Final = 3
DRAWN_POINTS: Final = 300
_MIN_VOTES: Final = 3
"""Of a pair whose share of votes is worth ranking."""


def validate_rm(inputs: CardInputs) -> Card:
    """The card. Raises DataError when no held-out pair has a clear label."""
    held_out = judged_pairs(inputs.held_out, left_out=inputs.held_out_annotators)
    if not held_out:
        raise DataError(
            "no pairs to validate the reward model on",
            got=f"{len(inputs.held_out)} held-out pairs, none with a clear label",
            do="raise rm.held_out_fraction or give more pairs",
        )
    train = judged_pairs(inputs.train, left_out=inputs.held_out_annotators)
    answers = _by_source(inputs)
    edges = histogram_edges([scores_of(found) for found in answers.values()])
    ranked = sorted(answers.get("policy") or answers["held_out"], key=lambda answer: -answer.score)
    training, kept_out, each = _annotators(inputs)
    card = Card(
        version=inputs.version,
        verdict="green",
        reasons=(),
        findings=(),
        parent=inputs.parent,
        number=inputs.number,
        reason=inputs.reason,
        members=len(held_out[0].preferred.members),
        min_accuracy=inputs.min_accuracy,
        accuracy=rate(margins_of(held_out)),
        length_only_accuracy=inputs.length_only_accuracy,
        train_accuracy=rate_or_none(margins_of(train)),
        by_source=_rates_by_source(inputs),
        training_annotators=training,
        held_out_annotators=kept_out,
        annotators=each,
        reliability=reliability(margins_of(held_out)),
        edges=edges,
        distributions=tuple(_distribution(source, found, edges=edges) for source, found in answers.items()),
        ks=tuple(_ks(answers, first, second) for first, second in combinations(answers, 2)),
        rank=_ranks(inputs, answers),
        length=length_part(held_out),
        ensemble=members_part(held_out, answers),
        discriminator=discriminator_part(held_out, answers),
        probes=tuple(_probe_parts(inputs.probes)),
        highest=tuple(shown(answer) for answer in ranked[:SHOWN]),
        lowest=tuple(shown(answer) for answer in ranked[::-1][:SHOWN]),
    )
    findings = findings_of(card)
    verdict, reasons = verdict_of(findings)
    return msgspec.structs.replace(card, verdict=verdict, reasons=reasons, findings=findings)


def _by_source(inputs: CardInputs) -> dict[Source, list[Scored]]:
    """Answers of each source that there is. The policy's come last."""
    found: dict[Source, list[Scored]] = {}
    if inputs.train:
        found["train"] = [answer for pair in inputs.train for answer in (pair.chosen, pair.rejected)]
    found["held_out"] = [answer for pair in inputs.held_out for answer in (pair.chosen, pair.rejected)]
    if inputs.policy:
        found["policy"] = list(inputs.policy)
    return found


# ---------------------------------------------------------------- annotators


def _annotators(inputs: CardInputs) -> tuple[Rate | None, Rate | None, tuple[AnnotatorRate, ...]]:
    """(against the training annotators' majority, against the held-out ones', each annotator), on held-out pairs."""
    majorities: dict[bool, list[float]] = {False: [], True: []}
    own: dict[str, list[float]] = {}
    for scored in inputs.held_out:
        votes = list(zip(scored.pair.annotators or (), scored.pair.votes or (), strict=False))
        margin = scored.chosen.score - scored.rejected.score
        for annotator, for_chosen in votes:
            if annotator:  # "": not known who, and maybe more than one
                own.setdefault(annotator, []).append(margin if for_chosen else -margin)
        for held_out, margins in majorities.items():
            ballots = [vote for who, vote in votes if (who in inputs.held_out_annotators) == held_out]
            label = majority(ballots) if ballots else None
            if label is not None:
                margins.append(margin if label.prefers_a else -margin)
    each = tuple(
        AnnotatorRate(annotator=name, held_out=name in inputs.held_out_annotators, rate=rate(margins))
        for name, margins in sorted(own.items())
    )
    return rate_or_none(majorities[False]), rate_or_none(majorities[True]), each


def _rates_by_source(inputs: CardInputs) -> tuple[NamedRate, ...]:
    """Accuracy on the pairs of each `source`, where there is more than one."""
    margins: dict[str, list[float]] = {}
    for scored in inputs.held_out:
        for pair in judged_pairs([scored], left_out=inputs.held_out_annotators):
            margins.setdefault(scored.pair.source or "given", []).append(pair.margin)
    return named_rates(margins) if len(margins) > 1 else ()


# ---------------------------------------------------------------- distributions and ranks


def _distribution(source: Source, answers: Sequence[Scored], *, edges: tuple[float, ...]) -> Distribution:
    scores = sorted(scores_of(answers))
    return Distribution(
        source=source,
        count=len(scores),
        mean=statistics.fmean(scores),
        std=statistics.pstdev(scores),
        quantiles=tuple(scores[round(share * (len(scores) - 1))] for share in (0.05, 0.25, 0.5, 0.75, 0.95)),
        counts=histogram(scores, edges),
    )


def _ks(answers: dict[Source, list[Scored]], first: Source, second: Source) -> KsDistance:
    distance, p = ks_distance(scores_of(answers[first]), scores_of(answers[second]))
    return KsDistance(first=first, second=second, distance=distance, p=p)


def _ranks(inputs: CardInputs, answers: dict[Source, list[Scored]]) -> tuple[RankCorrelation, ...]:
    """With human or gold scores, for each source that has them; and margins with the share of votes."""
    found: list[RankCorrelation] = []
    for source, members in answers.items():
        points = [(answer.score, answer.human_score) for answer in members if answer.human_score is not None]
        found += _ranking(points, source=source, against="human scores")
    voted: list[tuple[float, float]] = []
    for scored in inputs.held_out:
        votes = scored.pair.votes or ()
        if len(votes) >= _MIN_VOTES:
            voted.append((scored.chosen.score - scored.rejected.score, sum(votes) / len(votes) - 0.5))
    # Which answer stands first is arbitrary, so each pair counts both ways round.
    both = [point for margin, share in voted for point in ((margin, share), (-margin, -share))]
    return (*found, *_ranking(both, source="held_out", against="votes", n=len(voted)))


def _ranking(
    points: Sequence[tuple[float, float]], *, source: Source, against: str, n: int | None = None
) -> list[RankCorrelation]:
    ranks = rank_correlation([x for x, _ in points], [y for _, y in points], n=n)
    if ranks is None:
        return []
    return [
        RankCorrelation(
            source=source,
            against=against,
            spearman=ranks.spearman,
            low=ranks.low,
            high=ranks.high,
            kendall=ranks.kendall,
            n=len(points) if n is None else n,
            points=tuple(points[:: max(1, -(-len(points) // DRAWN_POINTS))]),
        )
    ]


# ---------------------------------------------------------------- texts


def _probe_parts(probes: Sequence[ScoredProbe]) -> Iterable[ProbePart]:
    for kind, what in PROBE_KINDS.items():
        found = [probe for probe in probes if probe.kind == kind]
        if found:
            failed = [probe for probe in found if probe.honest_score <= probe.attack_score]
            failed.sort(key=lambda probe: probe.honest_score - probe.attack_score)
            yield ProbePart(
                kind=kind,
                what=what,
                rate=rate([1.0 if probe.honest_score > probe.attack_score else -1.0 for probe in found]),
                failed=tuple(_shown_probe(probe) for probe in failed[:SHOWN_FAILURES]),
            )


def _shown_probe(probe: ScoredProbe) -> ShownProbe:
    return ShownProbe(
        prompt=prompt_text(probe.prompt),
        honest=probe.honest,
        attack=probe.attack,
        honest_score=probe.honest_score,
        attack_score=probe.attack_score,
    )
