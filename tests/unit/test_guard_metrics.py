"""What the guard and its watch measure, as Prometheus would read it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cluster.guard_metrics import SIGNALS, GuardMetrics, WatchMetrics
from configs.guard import Above, Below, GuardSection, Thresholds
from keel.winrate import versus_fields
from learner.guard.guard import Guard
from learner.guard.journal import Journal
from learner.guard.reading import SignalReader
from learner.guard.reference import Reference
from tests.metrics_support import scrape


def guard_metrics(thresholds: Thresholds | None = None) -> tuple[CollectorRegistry, GuardMetrics]:
    registry = CollectorRegistry()
    return registry, GuardMetrics(registry, thresholds=thresholds or Thresholds())


def signal(name: str) -> tuple[tuple[str, str], ...]:
    return (("signal", name),)


def test_the_guards_series_are_there_before_it_says_anything() -> None:
    registry, _ = guard_metrics()
    found = scrape(registry)
    assert math.isnan(found["keel_guard_level", ()])
    for name in Thresholds.model_fields:
        assert math.isnan(found["keel_guard_signal", signal(name)])
        assert math.isnan(found["keel_guard_signal_level", signal(name)])
    assert found["keel_guard_actions_total", (("action", "halt"),)] == 0
    assert found["keel_guard_rollbacks_total", ()] == 0


def test_a_steps_record_becomes_the_guards_series() -> None:
    registry, guard = guard_metrics()
    guard.set_step({
        "signals": {"kl_nats_per_sequence": 12.0, "win_rate": 0.4},
        "guard": {"level": "act", "warn": ["win_rate"], "act": ["kl_nats_per_sequence"],
                  "actions": ["alert", "raise_beta", "roll_back"], "words": ["fantastic"]},
        "branch": 0, "guard_seconds": 0.02,
    })  # fmt: skip
    found = scrape(registry)
    assert found["keel_guard_level", ()] == 2
    assert found["keel_guard_signal", signal("kl_nats_per_sequence")] == 12.0
    levels = {name: found["keel_guard_signal_level", signal(name)] for name in SIGNALS}
    assert {name: level for name, level in levels.items() if level} == {"kl_nats_per_sequence": 2, "win_rate": 1}
    assert found["keel_guard_actions_total", (("action", "roll_back"),)] == 1
    assert found["keel_guard_actions_total", (("action", "halt"),)] == 0
    assert found["keel_guard_seconds_count", ()] == 1
    assert found["keel_guard_seconds_sum", ()] == 0.02
    assert found["keel_guard_rollbacks_total", ()] == 0


def test_a_signal_that_cannot_be_told_any_more_is_no_number() -> None:
    registry, guard = guard_metrics()
    guard.set_reading({"proxy_z": 2.0, "copied_fraction": 0.1})
    guard.set_reading({"proxy_z": 2.5})
    found = scrape(registry)
    assert found["keel_guard_signal", signal("proxy_z")] == 2.5
    assert math.isnan(found["keel_guard_signal", signal("copied_fraction")])


def test_the_guards_own_record_is_understood(tmp_path: Path) -> None:
    registry, metrics = guard_metrics()
    reader = SignalReader(Reference(), scales=lambda _: None, ceiling=0.8)
    guard = Guard(GuardSection(), reader=reader, journal=Journal(tmp_path, step=0))
    metrics.set_step(guard.record())
    assert scrape(registry)["keel_guard_level", ()] == 0


def test_what_an_evaluation_says_is_exported() -> None:
    registry = CollectorRegistry()
    fields = versus_fields([1.0, 0.0] * 20, token_differences=[3.0, -2.0] * 20, reward_margins=[1.0, 1.0] * 20)
    WatchMetrics(registry).set_measurement({"version": 3, **fields})
    told = {name for (name, _), value in scrape(registry).items() if not math.isnan(value)}
    assert {"keel_evaluation_win_rate_high", "keel_evaluation_win_rate_length_controlled"} <= told
    assert "keel_rm_judge_agreement" in told


def test_rollbacks_count_those_of_this_process() -> None:
    registry, guard = guard_metrics()
    for branch in (2, 2, 3, 3, 5):  # Resumed in the run's third branch.
        guard.set_branch(branch)
    assert scrape(registry)["keel_guard_rollbacks_total", ()] == 3


def test_records_from_before_the_guard_change_nothing() -> None:
    registry, guard = guard_metrics()
    guard.set_step({"step": 1, "reward_mean": 0.2})
    assert math.isnan(scrape(registry)["keel_guard_level", ()])


@pytest.mark.parametrize("record", [
    {"signals": {"charm": 1.0}},
    {"guard": {"level": "panic", "warn": [], "act": [], "actions": []}},
    {"guard": {"level": "warn", "warn": ["charm"], "act": [], "actions": []}},
    {"guard": {"level": "ok", "warn": [], "act": [], "actions": ["shout"]}},
])  # fmt: skip
def test_no_label_comes_from_outside(record: dict[str, object]) -> None:
    _, guard = guard_metrics()
    with pytest.raises(ValueError, match=r"charm|panic|shout"):
        guard.set_step(record)


def test_thresholds_are_the_runs_own_and_none_is_never_passed() -> None:
    own = Thresholds(kl_nats_per_sequence=Above(warn=4.0, act=None), win_rate=Below(warn=None, act=None))
    found = scrape(guard_metrics(own)[0])
    limits = {(labels[1][1], labels[0][1]): value for (name, labels), value in found.items() if "threshold" in name}
    assert set(limits) == {(name, level) for name in Thresholds.model_fields for level in ("warn", "act")}
    assert limits["kl_nats_per_sequence", "warn"] == 4.0
    assert limits["kl_nats_per_sequence", "act"] == math.inf
    assert limits["win_rate", "act"] == -math.inf
    assert limits["entropy_nats_per_token", "act"] == 0.1


def test_a_measurement_replaces_the_one_before_it() -> None:
    registry = CollectorRegistry()
    watch = WatchMetrics(registry)
    assert math.isnan(scrape(registry)["keel_evaluation_win_rate", ()])
    watch.set_measurement({"version": 10, "win_rate": 0.6, "win_rate_high": 0.7, "canary_z": -1.5, "time_s": 3.0})
    watch.set_measurement({"version": 20, "win_rate": 0.5, "win_rate_high": None, "canary_ks": 0.25})
    found = scrape(registry)
    assert found["keel_evaluation_version", ()] == 20
    assert found["keel_evaluation_win_rate", ()] == 0.5
    assert math.isnan(found["keel_evaluation_win_rate_high", ()])
    assert math.isnan(found["keel_canary_z", ()])
    assert found["keel_canary_ks", ()] == 0.25


def test_what_the_driver_counts_for_the_guard_is_counted_from_totals() -> None:
    registry = CollectorRegistry()
    watch = WatchMetrics(registry)
    for sent, failed in ((1, 0), (1, 2), (4, 2)):
        watch.set_posts(sent=sent, failed=failed)
        watch.set_failed(failed)
    found = scrape(registry)
    assert found["keel_guard_webhook_posts_total", ()] == 4
    assert found["keel_guard_webhook_failures_total", ()] == 2
    assert found["keel_evaluation_failures_total", ()] == 2
