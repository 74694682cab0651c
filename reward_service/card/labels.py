"""Scored pairs with their labels, and the small shares over them that every part of the card uses. Pure.

A pair's label is the majority vote of the annotators that training may see; where votes or their authors are not known,
it is the label as given.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.data_records import PreferencePair
from cluster.labels import majority
from cluster.text import prompt_text
from reward_service.card.records import NamedRate, Scored, ScoredPair, ShownAnswer
from reward_service.card.statistics import rate


@dataclass(frozen=True)
class Judged:
    """A pair with a clear label: the preferred answer and the other one."""

    preferred: Scored
    other: Scored

    @property
    def margin(self) -> float:
        return self.preferred.score - self.other.score

    @property
    def token_difference(self) -> int:
        return self.preferred.tokens - self.other.tokens

    @property
    def relative_difference(self) -> float:
        """In [−1, 1], of the longer answer."""
        return self.token_difference / max(self.preferred.tokens, self.other.tokens, 1)


def label_of(pair: PreferencePair, *, left_out: Sequence[str]) -> int:
    """1: the pair as it stands; −1: the other way round; 0: no clear majority. By the votes of all but `left_out`."""
    if not left_out or pair.votes is None or pair.annotators is None:
        return 1
    votes = [vote for vote, who in zip(pair.votes, pair.annotators, strict=True) if who not in left_out]
    label = majority(votes) if votes else None
    return 0 if label is None else 1 if label.prefers_a else -1


def judged_pairs(pairs: Iterable[ScoredPair], *, left_out: Sequence[str]) -> list[Judged]:
    """The pairs with a clear label, preferred answer first."""
    found: list[Judged] = []
    for scored in pairs:
        label = label_of(scored.pair, left_out=left_out)
        if label:
            chosen, rejected = scored.chosen, scored.rejected
            found.append(Judged(chosen, rejected) if label > 0 else Judged(rejected, chosen))
    return found


def margins_of(pairs: Sequence[Judged]) -> list[float]:
    return [pair.margin for pair in pairs]


def scores_of(answers: Sequence[Scored]) -> list[float]:
    return [answer.score for answer in answers]


def named_rates(margins: Mapping[str, list[float]]) -> tuple[NamedRate, ...]:
    return tuple(NamedRate(name=name, rate=rate(found)) for name, found in margins.items() if found)


def shown(answer: Scored) -> ShownAnswer:
    return ShownAnswer(
        prompt=prompt_text(answer.prompt),
        answer=answer.answer,
        score=answer.score,
        spread=statistics.pstdev(answer.members),
        source=answer.source,
        discriminator=answer.discriminator,
        human_score=answer.human_score,
    )
