"""The patterns that a run's record is held against, one small class each."""

from __future__ import annotations

from typing import Final

from keel.diagnose.match import Pattern
from keel.diagnose.patterns.answers import LengthBias, ModeCollapse, OverUsedPhrase, Repetition, Truncation
from keel.diagnose.patterns.control import BetaTooLow, KlRunaway
from keel.diagnose.patterns.ends import Crashed, DeadLetters, HaltedByGuard, OutOfMemory, Stalled
from keel.diagnose.patterns.machinery import CriticFailure, EngineMismatch, Staleness
from keel.diagnose.patterns.reward import ConstantReward, RewardScaleJump, RmDrift, RmJudgeDisagreement

PATTERNS: Final[tuple[Pattern, ...]] = (
    LengthBias(), OverUsedPhrase(), Repetition(), ModeCollapse(), Truncation(),
    BetaTooLow(), KlRunaway(),
    ConstantReward(), RewardScaleJump(), RmDrift(), RmJudgeDisagreement(),
    CriticFailure(), Staleness(), EngineMismatch(),
    OutOfMemory(), Stalled(), Crashed(), HaltedByGuard(), DeadLetters(),
)  # fmt: skip
