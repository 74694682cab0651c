"""The guard's signals as the report and the live view show them: in groups, each held against the run's own thresholds.

The names are the fields of configs.guard.Thresholds, so that what a person reads is what they can set. A run from
before the guard has no such section: its values are held against the defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from cluster.errors import ConfigError
from configs.guard import Above, Below, GuardSection, Thresholds
from configs.yaml_text import parse_yaml
from learner.guard.record import Level

GROUPS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("reward", ("proxy_z", "reward_jump", "reward_std_ratio", "score_ceiling_fraction", "reward_ks",
                "uncertainty_ratio")),
    ("movement", ("kl_nats_per_sequence", "kl_slope_nats_per_step", "kl_budget_share", "entropy_nats_per_token")),
    ("length", ("response_tokens_ratio", "length_reward_correlation", "length_reward_correlation_within_prompt",
                "truncated_fraction")),
    ("text", ("distinct_bigrams_ratio", "repetition_reward_correlation", "longest_repeat_fraction", "compression_ratio",
              "overused_words_share", "overused_words_cusum", "rare_token_fraction", "copied_fraction")),
    ("update", ("clip_fraction", "ratio_tail_fraction", "behaviour_gap_max_nats", "value_error_ratio",
                "grad_norm_ratio")),
    ("measured", ("win_rate", "win_rate_length_controlled", "rm_judge_agreement", "anchor_perplexity_ratio",
                  "canary_ks", "canary_z")),
)  # fmt: skip
"""By what they are about; one that is named nowhere here is shown under "other"."""
_STEPS_OWN: Final = ("proxy_z", "kl_nats_per_sequence", "kl_budget_share", "entropy_nats_per_token",
                     "truncated_fraction", "clip_fraction", "behaviour_gap_max_nats")  # fmt: skip
"""Signals that a step's record has under the same name anyway."""
BY_INTERVAL: Final = frozenset({"win_rate"})
"""Not the value is held against the thresholds but the end of its interval, which a step's record does not have: of
these the verdict alone says how they stand."""
_SEVERITY: Final = {Level.OK: 0, Level.WARN: 1, Level.ACT: 2}


@dataclass(frozen=True)
class Limit:
    """`over`: values over the thresholds are bad; else those under them. None: no such threshold."""

    warn: float | None
    act: float | None
    over: bool

    def level(self, value: float) -> Level:
        """Of this one value. The guard's own verdict has patience and hysteresis besides."""
        if self._past(value, self.act):
            return Level.ACT
        return Level.WARN if self._past(value, self.warn) else Level.OK

    def worst(self, values: Iterable[float]) -> float:
        """Of one value or more."""
        return max(values) if self.over else min(values)

    @property
    def sign(self) -> str:
        return ">" if self.over else "<"

    def _past(self, value: float, threshold: float | None) -> bool:
        return threshold is not None and (value > threshold if self.over else value < threshold)


def severity(level: Level) -> int:
    """0 ok, 1 warn, 2 act."""
    return _SEVERITY[level]


def level_of(text: object) -> Level:
    """Of a record; what is no level is ok."""
    return Level(text) if isinstance(text, str) and text in tuple(Level) else Level.OK


def guard_of(run_dir: Path) -> GuardSection:
    """The `guard` section of the run's configuration; the default where there is none, or one that no longer fits."""
    try:
        raw = parse_yaml((run_dir / "config.yaml").read_text(encoding="utf-8"), where="config.yaml")
        return GuardSection.model_validate(raw.get("guard") or {})
    except (OSError, UnicodeDecodeError, ConfigError, ValidationError, AttributeError):
        return GuardSection()


def limits(thresholds: Thresholds) -> dict[str, Limit]:
    """By the signal's name."""
    found: dict[str, Limit] = {}
    for name in Thresholds.model_fields:
        threshold = getattr(thresholds, name)
        if isinstance(threshold, Above | Below):
            found[name] = Limit(threshold.warn, threshold.act, isinstance(threshold, Above))
    return found


def signals_of(record: Mapping[str, object]) -> dict[str, float]:
    """The finite signals of one step's record; of a run from before the guard, those that the record has anyway."""
    signals = record.get("signals")
    source = signals if isinstance(signals, Mapping) else {name: record.get(name) for name in _STEPS_OWN}
    return {
        str(name): float(value)
        for name, value in source.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    }


def grouped(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(group, its names), in the order of GROUPS; empty groups left out."""
    left = dict.fromkeys(names)
    found: list[tuple[str, list[str]]] = []
    for group, members in GROUPS:
        here = [name for name in members if name in left]
        for name in here:
            del left[name]
        if here:
            found.append((group, here))
    return [*found, ("other", list(left))] if left else found
