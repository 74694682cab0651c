"""What the guard's parts hand to each other: a reading of the signals, a verdict on it, the actions that follow.

signals (learner/guard/reading.py) → verdict (verdict.py) → actions (actions.py); guard.py holds them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    ACT = "act"


@dataclass(frozen=True)
class Reading:
    """`values`: by the name of the signal, a field of configs.guard.Thresholds; a signal that cannot be told is absent.
    `words`: over-used ones, the worst first."""

    values: Mapping[str, float] = field(default_factory=dict)
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """`warn`, `act`: signals at that level by now, patience and hysteresis applied. `why`: one sentence, for people."""

    level: Level = Level.OK
    warn: tuple[str, ...] = ()
    act: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Alert:
    text: str


@dataclass(frozen=True)
class RaiseBeta:
    """β becomes max(β · factor, floor)."""

    factor: float
    floor: float


@dataclass(frozen=True)
class LowerLearningRate:
    factor: float


@dataclass(frozen=True)
class FreezeRm:
    """No refresh of the reward model before this policy version."""

    until_version: int


@dataclass(frozen=True)
class RefreshRm:
    """A refresh of the reward model is due now."""

    reason: str


@dataclass(frozen=True)
class RollBack:
    """To the good checkpoint of this step."""

    to_step: int


@dataclass(frozen=True)
class Halt:
    reason: str


Action = Alert | RaiseBeta | LowerLearningRate | FreezeRm | RefreshRm | RollBack | Halt


@dataclass(frozen=True)
class Decision:
    """Of one step. `good`: a checkpoint of this step may be rolled back to."""

    reading: Reading
    verdict: Verdict
    actions: tuple[Action, ...]
    good: bool
