"""From the signals' values to a verdict: ok, warn or act. Pure; its state is plain data for the checkpoint.

Each signal has two latches, one a threshold. A latch closes when `patience` values in a row lie over its threshold
(under it, where low is bad), and opens when as many in a row lie back within it by `hysteresis` of the threshold. A
value in between keeps it as it is. A signal is at `act` while its act latch is closed, else at `warn` while its warn
latch is; the level is that of the worst signal.

- A signal that is absent keeps its latches as they are, their counts too: nothing was seen. After `cool_down_steps` of
  it the signal starts anew: what can be told no more (a new reward model has no calibration) must not count for ever.
- NaN counts as over every threshold that the signal has: a number that cannot be computed is no good news. One is as
  little as any other single value; a run that makes nothing else acts when patience ends.
- What is measured beside training (MEASURED) is handed in when it is new, so one measurement is one value. Their
  patience is their own: a measurement stands for many answers and comes seldom.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from configs.guard import Above, Below, GuardSection, Thresholds
from learner.guard.record import Level, Verdict

SIGNALS: Final = tuple(Thresholds.model_fields)
"""All names, in the order in which verdicts list them."""
MEASURED: Final = frozenset(
    (
        "win_rate", "win_rate_length_controlled", "rm_judge_agreement", "anchor_perplexity_ratio", "canary_ks",
        "canary_z",
    )
)  # fmt: skip
"""Signals measured beside training, at intervals."""
_NOTES: Final = {"win_rate": ", the upper end of its interval"}


@dataclass(frozen=True)
class Latch:
    """`streak`: values in a row that speak for the other position."""

    closed: bool = False
    streak: int = 0

    def after(self, *, over: bool, within: bool, patience: int) -> Latch:
        """The latch after one more value.

        >>> Latch().after(over=True, within=False, patience=2).after(over=True, within=False, patience=2)
        Latch(closed=True, streak=0)
        """
        streak = self.streak + 1 if (within if self.closed else over) else 0
        return Latch(not self.closed) if streak >= patience else Latch(self.closed, streak)


@dataclass(frozen=True)
class SignalState:
    warn: Latch = Latch()
    act: Latch = Latch()
    absent_steps: int = 0
    """In a row, up to now."""

    @property
    def level(self) -> Level:
        if self.act.closed:
            return Level.ACT
        return Level.WARN if self.warn.closed else Level.OK


@dataclass(frozen=True)
class VerdictState:
    """`steps`: judged since the start, or since a rollback. `signals`: those that are not as at the start."""

    steps: int = 0
    signals: Mapping[str, SignalState] = field(default_factory=lambda: MappingProxyType({}))

    def to_state(self) -> dict[str, Any]:
        """Plain JSON."""
        signals = {name: [*_plain(one.warn), *_plain(one.act), one.absent_steps] for name, one in self.signals.items()}
        return {"steps": self.steps, "signals": signals}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> VerdictState:
        """Inverse of to_state. Signals that this build does not know are left out."""
        signals = {
            name: SignalState(
                Latch(bool(latches[0]), int(latches[1])), Latch(bool(latches[2]), int(latches[3])), int(latches[4])
            )
            for name, latches in saved["signals"].items()
            if name in SIGNALS
        }
        return cls(int(saved["steps"]), MappingProxyType(signals))

    def without(self, names: Collection[str]) -> VerdictState:
        """These signals as they were at the start."""
        kept = {name: one for name, one in self.signals.items() if name not in names}
        return VerdictState(self.steps, MappingProxyType(kept))


def judge(state: VerdictState, values: Mapping[str, float], *, section: GuardSection) -> tuple[VerdictState, Verdict]:
    """The state after a step with these values, and the verdict. The first `warmup_steps` are ok and count for nothing.

    Raises KeyError for a name that is no signal's.
    """
    if state.steps < section.warmup_steps:
        return VerdictState(state.steps + 1, state.signals), Verdict()
    # A threshold that was taken away since is nobody's any more, whether its signal is there or not.
    signals = {name: _with_thresholds(one, _limits(section, name)) for name, one in state.signals.items()}
    for name in signals.keys() - values.keys() - MEASURED:
        signals[name] = _one_more_absent(signals[name], most=section.cool_down_steps)
    for name, value in values.items():
        patience = section.patience_measurements if name in MEASURED else section.patience_steps
        signals[name] = _after(
            signals.get(name, SignalState()),
            value,
            limits=_limits(section, name),
            patience=patience,
            hysteresis=section.hysteresis,
        )
    moved = {name: signals[name] for name in SIGNALS if replace(signals.get(name, _CALM), absent_steps=0) != _CALM}
    after = VerdictState(state.steps + 1, MappingProxyType(moved))
    return after, _verdict(after, values, section=section)


def over_threshold(values: Mapping[str, float], *, section: GuardSection) -> tuple[str, ...]:
    """Signals whose value lies over a threshold now, without patience. Raises KeyError as `judge` does."""
    return tuple(name for name in SIGNALS if name in values and _is_over_any(values[name], _limits(section, name)))


def is_leaving(verdict: Verdict, values: Mapping[str, float], *, section: GuardSection) -> bool:
    """Everything that is at act has a value that is not past that threshold any more. `values`: of this step, and the
    last of what is measured; a signal that is absent is not leaving."""

    def is_back(name: str) -> bool:
        limits = _limits(section, name)
        return name in values and limits.act is not None and not _is_over(values[name], limits, limits.act)

    return bool(verdict.act) and all(is_back(name) for name in verdict.act)


def describe(name: str, value: float | None, *, level: Level, section: GuardSection) -> str:
    """For people: the signal, its value, and the threshold that it passed.

    >>> describe("kl_nats_per_sequence", 12.34, level=Level.ACT, section=GuardSection())
    'kl_nats_per_sequence 12.3 (act over 10)'
    """
    limits = _limits(section, name)
    threshold = limits.act if level is Level.ACT else limits.warn
    side = "over" if isinstance(limits, Above) else "under"
    shown = "" if value is None else f" {value:.3g}"
    return f"{name}{shown} ({level} {side} {threshold:g}{_NOTES.get(name, '')})"


_CALM: Final = SignalState()


def _verdict(state: VerdictState, values: Mapping[str, float], *, section: GuardSection) -> Verdict:
    levels = {name: one.level for name, one in state.signals.items()}
    act = tuple(name for name in SIGNALS if levels.get(name) is Level.ACT)
    warn = tuple(name for name in SIGNALS if levels.get(name) is Level.WARN)
    level = Level.ACT if act else Level.WARN if warn else Level.OK
    why = "; ".join(describe(name, values.get(name), level=levels[name], section=section) for name in (*act, *warn))
    return Verdict(level=level, warn=warn, act=act, why=why)


def _with_thresholds(state: SignalState, limits: Above | Below) -> SignalState:
    """Without latches that have no threshold."""
    return SignalState(
        warn=Latch() if limits.warn is None else state.warn,
        act=Latch() if limits.act is None else state.act,
        absent_steps=state.absent_steps,
    )


def _one_more_absent(state: SignalState, *, most: int) -> SignalState:
    """Calm again when it is one too many."""
    return _CALM if state.absent_steps >= most else replace(state, absent_steps=state.absent_steps + 1)


def _after(state: SignalState, value: float, *, limits: Above | Below, patience: int, hysteresis: float) -> SignalState:
    def moved(latch: Latch, threshold: float | None) -> Latch:
        if threshold is None:
            return Latch()
        return latch.after(
            over=_is_over(value, limits, threshold),
            within=_is_within(value, limits, threshold, hysteresis=hysteresis),
            patience=patience,
        )

    return SignalState(warn=moved(state.warn, limits.warn), act=moved(state.act, limits.act))


def _is_over(value: float, limits: Above | Below, threshold: float) -> bool:
    return math.isnan(value) or (value > threshold if isinstance(limits, Above) else value < threshold)


def _is_within(value: float, limits: Above | Below, threshold: float, *, hysteresis: float) -> bool:
    """False for NaN."""
    margin = hysteresis * abs(threshold)
    return value <= threshold - margin if isinstance(limits, Above) else value >= threshold + margin


def _is_over_any(value: float, limits: Above | Below) -> bool:
    thresholds = [threshold for threshold in (limits.warn, limits.act) if threshold is not None]
    return any(_is_over(value, limits, threshold) for threshold in thresholds)


def _limits(section: GuardSection, name: str) -> Above | Below:
    if name not in SIGNALS:
        raise KeyError(f"no signal of configs.guard.Thresholds: {name}")
    limits: Above | Below = getattr(section.thresholds, name)
    return limits


def _plain(latch: Latch) -> tuple[bool, int]:
    return latch.closed, latch.streak
