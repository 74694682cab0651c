"""What a pattern hands over: a match with its evidence, and changes that would help, with the lines to set."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from keel.diagnose.record import RunRecord


class Kind(StrEnum):
    CAUSE = "cause"
    """Why the run went wrong: what the reward paid for, or what did not hold the policy back."""
    SYMPTOM = "symptom"
    """What it came to; causes that match come before it."""
    MACHINERY = "machinery"
    """The learner or the pipeline is not in order."""
    END = "end"
    """How the run ended."""


@dataclass(frozen=True)
class Recommendation:
    """`change`: what to do. `trade_off`: what it costs. `lines`: KEY=VALUE for `--set`, all of them together."""

    change: str
    trade_off: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """`strength`: 0–1, how well the record fits the pattern; from 0.5 on it counts as found."""

    name: str
    title: str
    kind: Kind
    strength: float
    first_step: int | None
    evidence: tuple[str, ...]
    recommendations: tuple[Recommendation, ...] = ()
    words: tuple[str, ...] = field(default=())


class Pattern(Protocol):
    def match(self, record: RunRecord) -> Match | None:
        """None when nothing in the record speaks for it."""
        ...
