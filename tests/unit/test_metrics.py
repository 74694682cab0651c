"""Metric names and values as Prometheus would read them, several registries in one scrape, and health."""

from __future__ import annotations

import math
import re
import socket
import threading

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.core import Metric

from cluster.errors import ConfigError
from cluster.http_serve import HttpServer, Page
from cluster.metrics import Heartbeat, LearnerMetrics, MetricsServer, RewardMetrics, RolloutMetrics, RunMetrics
from cluster.streams import Depth, StreamName
from reward_service.worker_metrics import ExportedMetrics
from tests.metrics_support import HOST, all_registries, get, scrape
from tests.prometheus_tools import check_metrics

# What dashboards and alerts are written against.
MUST_HAVE = {
    "keel_rollout_samples_total",
    "keel_rollout_tokens_total",
    "keel_rollout_generate_seconds",
    "keel_policy_version",
    "keel_weight_sync_seconds",
    "keel_weight_sync_failures_total",
    "keel_reward_samples_total",
    "keel_reward_batch_size",
    "keel_reward_score_seconds",
    "keel_reward_cache_hits_total",
    "keel_reward_failures_total",
    "keel_reward_paused_total",
    "keel_redeliveries_total",
    "keel_dead_letters_total",
    "keel_duplicates_dropped_total",
    "keel_stale_dropped_total",
    "keel_samples_trained_total",
    "keel_step_seconds",
    "keel_idle_seconds_total",
    "keel_staleness_versions",
    "keel_kl_nats_per_sequence",
    "keel_beta",
    "keel_entropy_nats_per_token",
    "keel_clip_fraction",
    "keel_reward_mean",
    "keel_reward_normalised_mean",
    "keel_gold_mean",
    "keel_grad_norm",
    "keel_response_tokens_mean",
    "keel_queue_depth",
    "keel_queue_in_flight",
    "keel_queue_oldest_seconds",
    "keel_workers",
    "keel_workers_wanted",
    "keel_worker_restarts_total",
    "keel_nodes_alive",
    "keel_autoscale_decisions_total",
    "keel_learner_ranks",
    "keel_weight_sync_bytes_total",
    "keel_weight_publish_bytes_total",
    "keel_weight_publish_failures_total",
    "keel_reward_z",
    "keel_samples_issued_total",
    "keel_samples_abandoned_total",
    "keel_guard_level",
    "keel_guard_signal",
    "keel_guard_signal_level",
    "keel_guard_threshold",
    "keel_guard_actions_total",
    "keel_guard_rollbacks_total",
    "keel_guard_seconds",
    "keel_guard_webhook_failures_total",
    "keel_evaluation_win_rate",
    "keel_evaluation_win_rate_low",
    "keel_evaluation_win_rate_high",
    "keel_rm_judge_agreement",
    "keel_anchor_perplexity_ratio",
    "keel_canary_ks",
    "keel_canary_z",
}


LABELS = {
    "worker",
    "state",
    "stream",
    "stage",
    "layer",
    "phase",
    "model",
    "transport",
    "decision",
    "le",
    "outcome",
    "version",
    "signal",
    "level",
    "action",
}


def test_all_names_are_there_and_follow_the_rules() -> None:
    names: set[str] = set()
    for registry in all_registries():
        for family in registry.collect():
            names.add(family.name + ("_total" if family.type == "counter" else ""))
            assert family.documentation
            assert all(set(sample.labels) <= LABELS for sample in family.samples)
    assert names >= MUST_HAVE
    assert all(re.fullmatch(r"keel_[a-z0-9_]+", name) for name in names)
    assert not [name for name in names if re.search(r"_(ms|milliseconds|minutes|percent|mb)(_|$)", name)]


def test_promtool_has_nothing_against_what_each_role_serves() -> None:
    for registry in all_registries():
        ProcessCollector(registry=registry)
        with MetricsServer(registry, host=HOST, extra=(REGISTRY,)) as server:
            assert check_metrics(get(f"http://{server.address}/metrics")[2]) == []


def test_labelled_series_exist_before_anything_happens() -> None:
    registry = CollectorRegistry()
    LearnerMetrics(registry)
    RunMetrics(registry)
    found = scrape(registry)
    assert found["keel_idle_seconds_total", (("phase", "wait_samples"),)] == 0
    assert found["keel_workers", (("state", "running"), ("worker", "rollout"))] == 0
    assert math.isnan(found["keel_grad_norm", (("model", "critic"),)])


def test_what_was_not_measured_yet_is_no_number() -> None:
    registry = CollectorRegistry()
    learner = LearnerMetrics(registry)
    learner.entropy_nats_per_token.set(0.0)
    found = scrape(registry)
    assert math.isnan(found["keel_kl_nats_per_sequence", ()])
    assert math.isnan(found["keel_gold_mean", ()])
    assert found["keel_entropy_nats_per_token", ()] == 0.0


def test_values_arrive() -> None:
    registry = CollectorRegistry()
    learner, run = LearnerMetrics(registry), RunMetrics(registry)
    learner.samples_trained.inc(128)
    learner.policy_version.set(7)
    learner.step_seconds.observe(100.0)
    learner.idle_seconds["checkpoint"].inc(2.5)
    run.set_depth(StreamName.SCORED, depth=Depth(3, 2, 1.5))
    run.set_workers("reward", counts={"running": 2, "dead": 1})
    run.set_workers("reward", counts={"running": 3})
    found = scrape(registry)
    assert found["keel_samples_trained_total", ()] == 128
    assert found["keel_policy_version", ()] == 7
    assert found["keel_step_seconds_sum", ()] == 100
    assert found["keel_step_seconds_bucket", (("le", "80.0"),)] == 0
    assert found["keel_step_seconds_bucket", (("le", "160.0"),)] == 1
    assert found["keel_idle_seconds_total", (("phase", "checkpoint"),)] == 2.5
    assert found["keel_queue_depth", (("stream", "scored"),)] == 3
    assert found["keel_queue_in_flight", (("stream", "scored"),)] == 2
    assert found["keel_queue_oldest_seconds", (("stream", "scored"),)] == 1.5
    assert found["keel_workers", (("state", "running"), ("worker", "reward"))] == 3
    assert found["keel_workers", (("state", "dead"), ("worker", "reward"))] == 0


@pytest.mark.parametrize(
    ("what", "series"),
    [
        ("scored", "keel_reward_samples_total"),
        ("failures", "keel_reward_failures_total"),
        ("paused", "keel_reward_paused_total"),
        ("stream_errors", "keel_reward_stream_errors_total"),
        ("rejected", "keel_reward_rejected_total"),
        ("down_weighted", "keel_reward_down_weighted_total"),
        ("swaps", "keel_reward_model_swaps_total"),
        ("swap_failures", "keel_reward_model_swap_failures_total"),
        ("review_left_out", "keel_review_left_out_total"),
    ],
)
def test_what_a_reward_worker_counts_is_served(what: str, series: str) -> None:
    registry = CollectorRegistry()
    metrics = ExportedMetrics(RewardMetrics(registry), beat=lambda: None)
    metrics.count(what)
    metrics.count(what)
    assert scrape(registry)[series, ()] == 2


def test_restarts_are_counted_from_totals() -> None:
    registry = CollectorRegistry()
    run = RunMetrics(registry)
    for total in (0, 2, 2, 3):
        run.set_restarts("learner", total=total)
    run.set_restarts("reward", total=1)
    found = scrape(registry)
    assert found["keel_worker_restarts_total", (("worker", "learner"),)] == 3
    assert found["keel_worker_restarts_total", (("worker", "reward"),)] == 1


def test_what_was_published_is_counted_from_totals() -> None:
    registry = CollectorRegistry()
    learner = LearnerMetrics(registry)
    learner.set_published("collective", total_bytes=100.0, total_failures=0)
    learner.set_published("collective", total_bytes=250.0, total_failures=2)
    learner.set_published("object_store", total_bytes=7.0, total_failures=0)
    found = scrape(registry)
    assert found["keel_weight_publish_bytes_total", (("transport", "collective"),)] == 250
    assert found["keel_weight_publish_failures_total", (("transport", "collective"),)] == 2
    assert found["keel_weight_publish_bytes_total", (("transport", "object_store"),)] == 7


def test_weight_updates_are_told_apart_by_transport() -> None:
    registry = CollectorRegistry()
    rollout = RolloutMetrics(registry)
    rollout.syncs_by_transport["object_store"].observe(1.0)
    rollout.syncs_by_transport["collective"].observe(2.0)
    rollout.bytes_by_transport["collective"].inc(100)
    rollout.failures_by_transport["object_store"].inc()
    found = scrape(registry)
    assert found["keel_weight_sync_seconds_sum", (("transport", "object_store"),)] == 1
    assert found["keel_weight_sync_seconds_sum", (("transport", "collective"),)] == 2
    assert found["keel_weight_sync_bytes_total", (("transport", "collective"),)] == 100
    assert found["keel_weight_sync_failures_total", (("transport", "object_store"),)] == 1
    assert found["keel_weight_sync_failures_total", (("transport", "ipc"),)] == 0


def test_other_registries_are_served_beside_the_own_and_each_family_once() -> None:
    own, other = CollectorRegistry(), CollectorRegistry()
    Gauge("shared", "Ours", registry=own).set(1)
    Gauge("shared", "Theirs", registry=other).set(2)
    Counter("vllm:request_success", "Finished", ["model_name"], registry=other).labels("/a b").inc(3)
    found = scrape(own, other)
    assert found["shared", ()] == 1
    assert found["vllm:request_success_total", (("model_name", "/a b"),)] == 3


def test_the_process_is_measured_once_though_two_registries_do() -> None:
    own = CollectorRegistry()
    ProcessCollector(registry=own)
    with MetricsServer(own, host=HOST, extra=(REGISTRY,)) as server:
        text = get(f"http://{server.address}/metrics")[2]
    assert re.findall(r"^process_cpu_seconds_total .+$", text, re.MULTILINE) != []
    assert len(re.findall(r"^process_cpu_seconds_total ", text, re.MULTILINE)) == 1
    assert text.count("# TYPE process_cpu_seconds_total") == 1
    assert "python_info{" in text


def test_a_registry_of_others_that_fails_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def collect(self) -> list[Metric]:
            raise RuntimeError("no engine")

    own, broken, other = CollectorRegistry(), CollectorRegistry(auto_describe=False), CollectorRegistry()
    Gauge("keel_here", "Ours", registry=own).set(1)
    broken.register(Broken())
    Gauge("theirs", "Another's", registry=other).set(2)
    found = scrape(own, broken, other)
    assert (found["keel_here", ()], found["theirs", ()]) == (1, 2)
    assert "no engine" in caplog.text


def test_an_unknown_worker_state_is_refused() -> None:
    with pytest.raises(ValueError, match="sleeping"):
        RunMetrics(CollectorRegistry()).set_workers("reward", counts={"sleeping": 1})


def test_health_fails_when_progress_stops_and_comes_back() -> None:
    now_s = [0.0]
    heartbeat = Heartbeat(silence_limit_s=30.0, clock=lambda: now_s[0])
    with MetricsServer(CollectorRegistry(), host=HOST, heartbeat=heartbeat) as server:
        url = f"http://{server.address}/healthz"
        now_s[0] = 900.0
        assert get(url)[0] == 200, "a process that boots has not stopped"
        now_s[0] = 0.0
        heartbeat.beat()
        now_s[0] = 30.0
        assert get(url)[0] == 200
        now_s[0] = 31.5
        status, _, text = get(url)
        assert status == 503
        assert "31.5 s" in text
        heartbeat.beat()
        assert get(url)[0] == 200


def test_the_server_frees_its_port_and_thread() -> None:
    before = threading.active_count()
    server = MetricsServer(CollectorRegistry(), host=HOST)
    host, port = server.address.split(":")
    assert get(f"http://{server.address}/nothing")[0] == 404
    server.close()
    assert threading.active_count() == before
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))


def test_a_client_that_says_nothing_holds_up_nobody() -> None:
    with MetricsServer(CollectorRegistry(), host=HOST) as server:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port))):
            assert get(f"http://{server.address}/healthz")[0] == 200


def test_an_address_that_cannot_be_bound_is_named() -> None:
    with MetricsServer(CollectorRegistry(), host=HOST) as server:
        port = int(server.address.split(":")[1])
        with pytest.raises(ConfigError, match=str(port)):
            MetricsServer(CollectorRegistry(), host=HOST, port=port)


def test_a_route_that_fails_answers_500(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Page:
        raise RuntimeError("no page")

    with HttpServer({"/broken": broken}, host=HOST) as server:
        assert get(f"http://{server.address}/broken")[0] == 500
    assert "no page" in caplog.text
