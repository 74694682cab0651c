"""What a validation card is made from, and what it says. Plain data: the inputs never touch a disk, the card is JSON.

Legend: M members of the ensemble. A *margin* is the aggregated score of the preferred answer less that of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from cluster.data_records import PreferencePair, Prompt
from cluster.reward_models import Verdict

CARD_JSON: Final = "card.json"
CARD_HTML: Final = "card.html"
CARD_MARKDOWN: Final = "card.md"

Texts = Sequence[tuple[Prompt, str]]
"""(prompt, answer) each."""
Source = Literal["train", "held_out", "policy"]
Gold = Callable[[Prompt, str], float]

# ---------------------------------------------------------------- in


@dataclass(frozen=True)
class Scorers:
    """How a version scores texts. `members`: N texts → [N][M] raw scores. `aggregate`: [M] → the score that serves.
    `tokens`: length of an answer. `discriminator`: N texts → [N] scores of the model that is kept out of the reward."""

    members: Callable[[Texts], list[list[float]]]
    aggregate: Callable[[Sequence[float]], float]
    tokens: Callable[[str], int]
    discriminator: Callable[[Texts], list[float]] | None = None


@dataclass(frozen=True)
class PolicyAnswer:
    """What the policy that is trained now says, with a person's or the gold function's score where there is one."""

    prompt: Prompt
    answer: str
    human_score: float | None = None


@dataclass(frozen=True)
class CardData:
    """Texts to measure on. Pairs hold the votes of all annotators, those of `held_out_annotators` too; where votes are
    known, a pair's label is the majority of the others. Training and held-out pairs share no prompt."""

    train: Sequence[PreferencePair]
    held_out: Sequence[PreferencePair]
    held_out_annotators: tuple[str, ...] = ()
    policy: Sequence[PolicyAnswer] = ()


@dataclass(frozen=True)
class CardSettings:
    """`gold` measures answers and is never trained on. `train_answers`, `policy_answers`: at most so many are scored.
    `max_answer_tokens`: no probe is longer, so that none is cut when it is scored."""

    version: str
    min_accuracy: float
    max_answer_tokens: int
    seed: int = 0
    parent: str | None = None
    number: int = 1
    reason: str = "trained"
    gold: Gold | None = None
    train_answers: int = 1000
    policy_answers: int = 1000
    probes_per_kind: int = 40


@dataclass(frozen=True)
class Scored:
    """One answer with its scores. `members`: [M]; `score`: their aggregate."""

    prompt: Prompt
    answer: str
    members: tuple[float, ...]
    score: float
    tokens: int
    source: Source
    discriminator: float | None = None
    human_score: float | None = None


@dataclass(frozen=True)
class ScoredPair:
    """A pair and both its answers, scored."""

    pair: PreferencePair
    chosen: Scored
    rejected: Scored


@dataclass(frozen=True)
class ScoredProbe:
    """Scores of a good answer and of an attack on the same prompt. Passed when the good one is higher."""

    kind: str
    prompt: Prompt
    honest: str
    attack: str
    honest_score: float
    attack_score: float


@dataclass(frozen=True)
class CardInputs:
    """Everything that a card follows from; validate_rm is a function of this alone."""

    version: str
    min_accuracy: float
    held_out: Sequence[ScoredPair]
    train: Sequence[ScoredPair] = ()
    policy: Sequence[Scored] = ()
    probes: Sequence[ScoredProbe] = ()
    held_out_annotators: tuple[str, ...] = ()
    length_only_accuracy: float | None = None
    parent: str | None = None
    number: int = 1
    reason: str = "trained"


# ---------------------------------------------------------------- out


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """A share of `n` with its 95 % Wilson interval."""

    share: float
    low: float
    high: float
    n: int


class NamedRate(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    rate: Rate


class AnnotatorRate(msgspec.Struct, frozen=True, kw_only=True):
    """Share of one annotator's votes on held-out pairs that the model's order agrees with."""

    annotator: str
    held_out: bool
    rate: Rate


class ReliabilityBin(msgspec.Struct, frozen=True, kw_only=True):
    """Pairs whose confidence σ(|margin|) lies in [low, high]: mean confidence, and how many were ordered right."""

    low: float
    high: float
    confidence: float
    right: Rate


class Reliability(msgspec.Struct, frozen=True, kw_only=True):
    """Expected calibration error over bins of about as many pairs each. `chance`: its 95th percentile for a perfectly
    calibrated model on as many pairs. `slope` ± `slope_error`: of the label's log-odds on the margin; 1 is calibrated,
    less is over-confident."""

    error: float
    chance: float
    slope: float
    slope_error: float
    bins: tuple[ReliabilityBin, ...]


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Aggregated scores of one source's answers. `counts`: in the bins of Card.edges."""

    source: Source
    count: int
    mean: float
    std: float
    quantiles: tuple[float, ...]
    """5, 25, 50, 75, 95 %."""
    counts: tuple[int, ...]


class KsDistance(msgspec.Struct, frozen=True, kw_only=True):
    """Kolmogorov–Smirnov: the largest gap between two cumulative distributions, in [0, 1], and its p-value."""

    first: Source
    second: Source
    distance: float
    p: float


class RankCorrelation(msgspec.Struct, frozen=True, kw_only=True):
    """Of scores with a human or gold score of the same answers. `low`, `high`: 95 % of Spearman's."""

    source: Source
    against: str
    """"human scores", or "votes": margins with the share of votes, on pairs."""
    spearman: float
    low: float
    high: float
    kendall: float
    n: int
    points: tuple[tuple[float, float], ...]
    """(score, human score) of some, to draw."""


class LengthPart(msgspec.Struct, frozen=True, kw_only=True):
    """What length has to do with it. `partialled`: accuracy after what length explains of the margin is taken out.
    `margin_per_token`: how much a token of difference adds to the margin; `margin_r2`: share of its variance so
    explained. `margin_z`, `length_z`: of the label's logistic regression on margin and length difference together."""

    by_difference: tuple[NamedRate, ...]
    by_length: tuple[NamedRate, ...]
    matched: Rate | None
    partialled: Rate
    margin_per_token: float
    margin_r2: float
    margin_z: float
    length_z: float


class MembersPart(msgspec.Struct, frozen=True, kw_only=True):
    """`agreement`: mean over pairs of members of the share of held-out pairs that both order alike. `spread`: by
    source, mean standard deviation over members in standard deviations of the score."""

    accuracies: tuple[float, ...]
    agreement: float
    spread: dict[str, float]
    spread_when_right: float
    spread_when_wrong: float | None


class DiscriminatorPart(msgspec.Struct, frozen=True, kw_only=True):
    """The model that is kept out of the reward. `disagreement`: share of held-out pairs it orders otherwise.
    `correlation`: Spearman's with the score, by source. `doubted`: answers that the score puts far above it."""

    accuracy: Rate
    disagreement: Rate
    correlation: dict[str, float]
    doubted: tuple[ShownAnswer, ...]


class ShownAnswer(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    answer: str
    score: float
    spread: float
    source: Source
    discriminator: float | None = None
    human_score: float | None = None


class ProbePart(msgspec.Struct, frozen=True, kw_only=True):
    """`failed`: some attacks that outscored the good answer."""

    kind: str
    what: str
    rate: Rate
    failed: tuple[ShownProbe, ...]


class ShownProbe(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str
    honest: str
    attack: str
    honest_score: float
    attack_score: float


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. `level` "unknown": it could not be measured, and `meaning` says why."""

    name: str
    level: Literal["green", "amber", "red", "unknown"]
    value: str
    meaning: str
    advice: str = ""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one reward model version. Parts that could not be measured are absent, and a finding says so."""

    version: str
    verdict: Verdict
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    parent: str | None
    number: int
    reason: str
    members: int
    min_accuracy: float
    accuracy: Rate
    length_only_accuracy: float | None
    train_accuracy: Rate | None
    by_source: tuple[NamedRate, ...]
    training_annotators: Rate | None
    held_out_annotators: Rate | None
    annotators: tuple[AnnotatorRate, ...]
    reliability: Reliability
    edges: tuple[float, ...]
    distributions: tuple[Distribution, ...]
    ks: tuple[KsDistance, ...]
    rank: tuple[RankCorrelation, ...]
    length: LengthPart
    ensemble: MembersPart | None
    discriminator: DiscriminatorPart | None
    probes: tuple[ProbePart, ...]
    highest: tuple[ShownAnswer, ...]
    lowest: tuple[ShownAnswer, ...]
