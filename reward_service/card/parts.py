"""Parts of the validation card that look at pairs: length, the members, the discriminator. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Final

from reward_service.card.labels import Judged, margins_of, named_rates, scores_of, shown
from reward_service.card.records import DiscriminatorPart, LengthPart, MembersPart, NamedRate, Scored, Source
from reward_service.card.statistics import logistic, partial_out, rank_correlation, rate, rate_or_none

SHOWN_DOUBTED: Final = 5
MATCHED_DIFFERENCE: Final = 0.1
"""Two lengths within this share of the longer one count as equal."""
_DIFFERENCES: Final = (
    ("preferred is over 30 % shorter", -1.0, -0.3),
    ("preferred is 10–30 % shorter", -0.3, -MATCHED_DIFFERENCE),
    ("preferred is as long (±10 %)", -MATCHED_DIFFERENCE, MATCHED_DIFFERENCE),
    ("preferred is 10–30 % longer", MATCHED_DIFFERENCE, 0.3),
    ("preferred is over 30 % longer", 0.3, 1.0),
)


# ---------------------------------------------------------------- length


def length_part(pairs: Sequence[Judged]) -> LengthPart:
    margins, differences = margins_of(pairs), [float(pair.token_difference) for pair in pairs]
    partial = partial_out(margins, differences)
    fit = logistic([margins, differences])
    matched = [pair.margin for pair in pairs if abs(pair.relative_difference) <= MATCHED_DIFFERENCE]
    return LengthPart(
        by_difference=named_rates({name: _between(pairs, low, high) for name, low, high in _DIFFERENCES}),
        by_length=_by_length(pairs),
        matched=rate_or_none(matched),
        partialled=rate(partial.residuals),
        margin_per_token=partial.slope,
        margin_r2=partial.r2,
        margin_z=fit.z(0),
        length_z=fit.z(1),
    )


def _between(pairs: Sequence[Judged], low: float, high: float) -> list[float]:
    """Margins of pairs whose relative difference lies there; the middle bucket has both its ends."""

    def inside(difference: float) -> bool:
        above = difference > low if low > 0 else difference >= low
        below = difference < high if high < 0 else difference <= high
        return above and below

    return [pair.margin for pair in pairs if inside(pair.relative_difference)]


def _by_length(pairs: Sequence[Judged]) -> tuple[NamedRate, ...]:
    """By the longer answer's length, in three buckets of about as many pairs; fewer where lengths repeat much."""

    def longer(pair: Judged) -> int:
        return max(pair.preferred.tokens, pair.other.tokens)

    lengths = sorted(map(longer, pairs))
    bounds = sorted({lengths[-1], *(lengths[len(lengths) * part // 3] for part in (1, 2))})
    margins: dict[str, list[float]] = {}
    low = 0
    for high in bounds:
        margins[f"{low + 1}–{high} tokens"] = [pair.margin for pair in pairs if low < longer(pair) <= high]
        low = high
    return named_rates(margins)


# ---------------------------------------------------------------- members and discriminator


def members_part(pairs: Sequence[Judged], answers: dict[Source, list[Scored]]) -> MembersPart | None:
    members = len(pairs[0].preferred.members)
    if members < 2:
        return None
    columns = [[pair.preferred.members[m] - pair.other.members[m] for pair in pairs] for m in range(members)]
    scale = statistics.pstdev(scores_of(answers["held_out"])) or 1.0
    spreads: dict[bool, list[float]] = {True: [], False: []}
    for pair, margins in zip(pairs, zip(*columns, strict=True), strict=True):
        spreads[pair.margin > 0].append(statistics.pstdev(margins) / scale)
    alike = [
        statistics.fmean((a > 0) == (b > 0) for a, b in zip(first, second, strict=True))
        for first, second in combinations(columns, 2)
    ]
    return MembersPart(
        accuracies=tuple(rate(column).share for column in columns),
        agreement=statistics.fmean(alike),
        spread={
            source: statistics.fmean(statistics.pstdev(answer.members) for answer in found) / scale
            for source, found in answers.items()
        },
        spread_when_right=statistics.fmean(spreads[True]) if spreads[True] else 0.0,
        spread_when_wrong=statistics.fmean(spreads[False]) if spreads[False] else None,
    )


def discriminator_part(pairs: Sequence[Judged], answers: dict[Source, list[Scored]]) -> DiscriminatorPart | None:
    """What the model that is kept out says. None without one."""
    both = [(pair.margin, _other_margin(pair)) for pair in pairs]
    own = [margin for _, margin in both if margin is not None]
    if len(own) < len(both):
        return None
    correlation: dict[str, float] = {}
    for source, found in answers.items():
        points = [(answer.score, answer.discriminator) for answer in found if answer.discriminator is not None]
        ranks = rank_correlation([x for x, _ in points], [y for _, y in points])
        if ranks is not None:
            correlation[source] = ranks.spearman
    above = _above_discriminator(answers["held_out"])
    doubted = sorted(answers.get("policy") or answers["held_out"], key=lambda answer: -above(answer))
    return DiscriminatorPart(
        accuracy=rate(own),
        disagreement=rate([-a * b for a, b in zip(margins_of(pairs), own, strict=True)]),
        correlation=correlation,
        doubted=tuple(shown(answer) for answer in doubted[:SHOWN_DOUBTED]),
    )


def _other_margin(pair: Judged) -> float | None:
    preferred, other = pair.preferred.discriminator, pair.other.discriminator
    return None if preferred is None or other is None else preferred - other


def _above_discriminator(answers: Sequence[Scored]) -> Callable[[Scored], float]:
    """By how many standard deviations an answer's score lies above the discriminator's; both scales from `answers`."""
    own = scores_of(answers)
    others = [answer.discriminator or 0.0 for answer in answers]
    own_mean, own_std = statistics.fmean(own), statistics.pstdev(own) or 1.0
    other_mean, other_std = statistics.fmean(others), statistics.pstdev(others) or 1.0

    def above(answer: Scored) -> float:
        return (answer.score - own_mean) / own_std - ((answer.discriminator or 0.0) - other_mean) / other_std

    return above
