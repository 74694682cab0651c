"""Metrics as Prometheus would read them, for tests."""

from __future__ import annotations

import urllib.error
import urllib.request

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.guard_metrics import GuardMetrics, WatchMetrics
from cluster.metrics import LearnerMetrics, MetricsServer, RewardMetrics, RolloutMetrics, RunMetrics
from cluster.streams import Depth, StreamName
from configs.guard import Thresholds

HOST = "127.0.0.1"


def get(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.headers["Content-Type"], reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def scrape(
    registry: CollectorRegistry, *extra: CollectorRegistry
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with MetricsServer(registry, host=HOST, extra=extra) as server:
        status, content_type, text = get(f"http://{server.address}/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def all_registries() -> list[CollectorRegistry]:
    rollout, reward, driver = CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
    RolloutMetrics(rollout)
    RewardMetrics(reward)
    LearnerMetrics(driver)
    GuardMetrics(driver, thresholds=Thresholds())
    WatchMetrics(driver)
    RunMetrics(driver).set_depth(StreamName.PROMPTS, depth=Depth(0, 0, 0.0))
    return [rollout, reward, driver]
