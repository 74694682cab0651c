"""What the guard and the measurements beside training tell Prometheus.

GuardMetrics is the learner's: signals, verdict, actions. WatchMetrics is the driver's: evaluation, canary, webhook.
Always holds: the label `signal` has the names of configs.guard.Thresholds and no others, `action` those of GuardAction;
every series is there from the start, gauges as NaN, since what was not measured is no number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from configs.guard import Above, GuardAction, Thresholds

SIGNALS: Final = tuple(Thresholds.model_fields)
ACTIONS: Final[tuple[str, ...]] = get_args(GuardAction)
LEVELS: Final[Mapping[str, int]] = {"ok": 0, "warn": 1, "act": 2}
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class GuardMetrics:
    """The guard, in the learner. `set_step` takes a record of metrics.jsonl and does all that the other methods do."""

    def __init__(self, registry: CollectorRegistry, *, thresholds: Thresholds) -> None:
        self.level = Gauge("keel_guard_level", "The guard's verdict: 0 ok, 1 warn, 2 act", registry=registry)
        self.level.set(math.nan)
        values = Gauge("keel_guard_signal", "What the guard reads", ["signal"], registry=registry)
        levels = Gauge(
            "keel_guard_signal_level", "Verdict on one signal: 0 ok, 1 warn, 2 act", ["signal"], registry=registry
        )
        self._values = {signal: values.labels(signal) for signal in SIGNALS}
        self._levels = {signal: levels.labels(signal) for signal in SIGNALS}
        for gauge in (*self._values.values(), *self._levels.values()):
            gauge.set(math.nan)
        actions = Counter("keel_guard_actions", "What the guard has decided to do", ["action"], registry=registry)
        self._actions = {action: actions.labels(action) for action in ACTIONS}
        self.rollbacks = Counter("keel_guard_rollbacks", "Returns to an earlier checkpoint", registry=registry)
        self.seconds = Histogram(
            "keel_guard_seconds", "The guard's share of a step", registry=registry, buckets=_SECONDS
        )
        self._branch: int | None = None
        _export_thresholds(registry, thresholds)

    def set_reading(self, values: Mapping[str, float]) -> None:
        """A signal that is absent falls to NaN. An unknown name is a ValueError."""
        _refuse_unknown(values, known=SIGNALS, what="signals")
        for signal, gauge in self._values.items():
            gauge.set(values.get(signal, math.nan))

    def set_verdict(self, level: str, *, warn: Collection[str] = (), act: Collection[str] = ()) -> None:
        """`level`: of LEVELS; `warn`, `act`: the signals at these levels, others are ok."""
        _refuse_unknown((level,), known=LEVELS, what="levels")
        _refuse_unknown((*warn, *act), known=SIGNALS, what="signals")
        self.level.set(LEVELS[level])
        for signal, gauge in self._levels.items():
            gauge.set(2 if signal in act else 1 if signal in warn else 0)

    def count_action(self, action: str) -> None:
        _refuse_unknown((action,), known=ACTIONS, what="actions")
        self._actions[action].inc()

    def set_branch(self, branch: int) -> None:
        """Rollbacks since the run's start. The first call says where this process found it."""
        self.rollbacks.inc(max(0, branch - (branch if self._branch is None else self._branch)))
        self._branch = branch

    def set_step(self, record: Mapping[str, Any]) -> None:
        """From a step's record: signals, guard, branch and guard_seconds; what is not there is left as it is."""
        if "signals" in record:
            self.set_reading(record["signals"])
        if (guard := record.get("guard")) is not None:
            self.set_verdict(guard["level"], warn=guard.get("warn", ()), act=guard.get("act", ()))
            for action in guard.get("actions", ()):
                self.count_action(action)
        if "branch" in record:
            self.set_branch(record["branch"])
        if record.get("guard_seconds") is not None:
            self.seconds.observe(record["guard_seconds"])


class WatchMetrics:
    """Measured beside training, in the driver. May share a registry with RunMetrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            made = Gauge(f"keel_{name}", text, registry=registry)
            made.set(math.nan)
            return made

        self._gauges = {
            "win_rate": gauge("evaluation_win_rate", "Share of held-out prompts won against the reference"),
            "win_rate_low": gauge("evaluation_win_rate_low", "Lower end of its 95 % interval"),
            "win_rate_high": gauge("evaluation_win_rate_high", "Upper end of its 95 % interval"),
            "win_rate_length_controlled": gauge(
                "evaluation_win_rate_length_controlled", "Win rate at equal length of the answers"
            ),
            "win_rate_people": gauge("evaluation_win_rate_people", "Win rate by what people say"),
            "gold": gauge("evaluation_gold", "Gold reward of the answers to the held-out prompts"),
            "gold_reference": gauge("evaluation_gold_reference", "Gold reward of the reference's answers to them"),
            "rm_judge_agreement": gauge("rm_judge_agreement", "Share of pairs on which reward model and judge agree"),
            "anchor_perplexity_ratio": gauge(
                "anchor_perplexity_ratio", "Perplexity of held-out SFT texts over that before training"
            ),
            "canary_ks": gauge("canary_ks", "Kolmogorov–Smirnov distance of the canary's rewards from the baseline's"),
            "canary_z": gauge("canary_z", "Shift of the canary's mean reward, in the baseline's standard deviations"),
            "version": gauge("evaluation_version", "Policy version of the last measurement"),
            "seconds": gauge("evaluation_seconds", "How long the last measurement took"),
        }
        self._counters = {
            "failed": Counter(
                "keel_evaluation_failures",
                "Measurements beside training, or parts of them, that failed",
                registry=registry,
            ),
            "sent": Counter("keel_guard_webhook_posts", "Alerts that the webhook took", registry=registry),
            "lost": Counter("keel_guard_webhook_failures", "Alerts that did not reach the webhook", registry=registry),
        }
        self._seen = dict.fromkeys(self._counters, 0)

    def set_measurement(self, record: Mapping[str, Any]) -> None:
        """A line of evaluations.jsonl. What it cannot tell is NaN."""
        for name, gauge in self._gauges.items():
            value = record.get(name)
            gauge.set(math.nan if value is None else value)

    def set_failed(self, total: int) -> None:
        """Measurements and parts of them that failed since the driver's start."""
        self._count("failed", total)

    def set_posts(self, *, sent: int, failed: int) -> None:
        """To the webhook, since the driver's start."""
        self._count("sent", sent)
        self._count("lost", failed)

    def _count(self, name: str, total: int) -> None:
        self._counters[name].inc(max(0, total - self._seen[name]))
        self._seen[name] = total


def _export_thresholds(registry: CollectorRegistry, thresholds: Thresholds) -> None:
    """The run's own. One that is null can never be passed: it is infinite, on the side that is good."""
    family = Gauge("keel_guard_threshold", "Where the guard warns and acts", ["signal", "level"], registry=registry)
    for signal in SIGNALS:
        limits = getattr(thresholds, signal)
        never = math.inf if isinstance(limits, Above) else -math.inf
        for level, value in (("warn", limits.warn), ("act", limits.act)):
            family.labels(signal, level).set(never if value is None else value)


def _refuse_unknown(names: Collection[str], *, known: Collection[str], what: str) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{what} {unknown} are none of {sorted(known)}")
