"""What an audit of preference data says: findings, each with what it means and what to do, and the figures behind them.

Plain records; as JSON they are audit.json. A figure that could not be had is null, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from reward_service.audit.cues import Cue

AUDIT_FILE: Final = "audit.json"

Level = Literal["ok", "warn", "bad"]
LEVELS: Final[tuple[Level, ...]] = ("ok", "warn", "bad")

Number = float | int | None


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. `name`: stable, for programs. `value`: the figure in words."""

    name: str
    level: Level
    value: str
    numbers: dict[str, Number] = {}
    meaning: str
    advice: str = ""


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A proportion with its 95 % Wilson interval."""

    share: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.low:.1%}–{self.high:.1%})"


class Stratum(msgspec.Struct, frozen=True, kw_only=True):
    """Some of the pairs, by length or by topic. `longer_chosen`: among those of unequal length; None without any."""

    name: str
    pairs: int
    longer_chosen: float | None = None


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """How many answers are how long. Bin i holds edges[i] ≤ length < edges[i + 1]; the last one also what is longer."""

    unit: str
    edges: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


class Leaning(msgspec.Struct, frozen=True, kw_only=True):
    """What moves an annotator more than the others. `feature`: "length", or a word. `coefficient`: log-odds of the vote
    for one standard deviation of length, or for the word's presence."""

    feature: str
    coefficient: float
    z: float
    q: float


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """A word, or two in a row, that draws one annotator more than the others. `effect`: in votes (2 from one answer to
    the other) for the answer that has it, where the other has not. `also`: terms that always come with it."""

    annotator: str
    term: str
    effect: float
    z: float
    q: float
    also: tuple[str, ...] = ()


class AnnotatorFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One annotator. `agreement`: with the majority of the others, where they have one; None where they never do."""

    annotator: str
    votes: int
    agreement: Share | None = None
    against: bool = False
    """The votes run against the rest."""
    leanings: tuple[Leaning, ...] = ()


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found in one set of preferences."""

    source: str = ""
    pairs: int
    unclear: int = 0
    """Judged, without a clear majority."""
    refused: dict[str, int] = {}
    """Records that could not be used, by reason."""
    findings: tuple[Finding, ...]
    cues: tuple[Cue, ...] = ()
    annotators: tuple[AnnotatorFacts, ...] = ()
    annotator_cues: tuple[Draw, ...] = ()
    lengths: Lengths | None = None
    length_strata: tuple[Stratum, ...] = ()
    topics: tuple[Stratum, ...] = ()

    @property
    def worst(self) -> Level:
        """The gravest level of any finding."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default="ok")

    def finding(self, name: str) -> Finding | None:
        """The finding of that name."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def number(self, name: str, key: str) -> float | None:
        """A figure of a finding; None where it is not known."""
        finding = self.finding(name)
        value = None if finding is None else finding.numbers.get(key)
        return None if value is None else float(value)


def encode_audit(audit: Audit) -> bytes:
    """As indented JSON."""
    return msgspec.json.format(msgspec.json.encode(audit), indent=2) + b"\n"


def decode_audit(data: bytes) -> Audit:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(data, type=Audit)


def share_of(successes: float, count: int) -> Share:
    """`successes` of `count` > 0; a tie may count as half."""
    from reward_service.preferences import wilson_interval

    low, high = wilson_interval(successes / count, n=count)
    return Share(share=successes / count, low=low, high=high, count=count)


def worst_of(levels: Sequence[Level]) -> Level:
    """The gravest; "ok" of none."""
    return max(levels, key=LEVELS.index, default="ok")
