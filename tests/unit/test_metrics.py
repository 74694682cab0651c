"""Metric names and values as Prometheus would read them, health, and service discovery."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.discovery import Discovery, announce_forever, write_file_sd
from cluster.errors import ConfigError, StreamError
from cluster.http_serve import HttpServer, Page
from cluster.metrics import Heartbeat, LearnerMetrics, MetricsServer, RewardMetrics, RolloutMetrics, RunMetrics
from cluster.stores import Member, MemoryDirectory
from cluster.streams import Depth, StreamName

HOST = "127.0.0.1"

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
}


def get(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.headers["Content-Type"], reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def scrape(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with MetricsServer(registry, host=HOST) as server:
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
    RunMetrics(driver).set_depth(StreamName.PROMPTS, depth=Depth(0, 0, 0.0))
    return [rollout, reward, driver]


def test_all_names_are_there_and_follow_the_rules() -> None:
    names: set[str] = set()
    for registry in all_registries():
        for family in registry.collect():
            names.add(family.name + ("_total" if family.type == "counter" else ""))
            assert family.documentation
            assert all(
                set(sample.labels) <= {"role", "state", "stream", "stage", "layer", "phase", "model", "le"}
                for sample in family.samples
            )
    assert names >= MUST_HAVE
    assert all(re.fullmatch(r"keel_[a-z0-9_]+", name) for name in names)
    assert not [name for name in names if re.search(r"_(ms|milliseconds|minutes|percent|mb)(_|$)", name)]


def test_labelled_series_exist_before_anything_happens() -> None:
    registry = CollectorRegistry()
    LearnerMetrics(registry)
    RunMetrics(registry)
    found = scrape(registry)
    assert found["keel_idle_seconds_total", (("phase", "wait_samples"),)] == 0
    assert found["keel_workers", (("role", "rollout"), ("state", "running"))] == 0
    assert found["keel_grad_norm", (("model", "critic"),)] == 0


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
    assert found["keel_policy_version", (("role", "learner"),)] == 7
    assert found["keel_step_seconds_sum", ()] == 100
    assert found["keel_step_seconds_bucket", (("le", "80.0"),)] == 0
    assert found["keel_step_seconds_bucket", (("le", "160.0"),)] == 1
    assert found["keel_idle_seconds_total", (("phase", "checkpoint"),)] == 2.5
    assert found["keel_queue_depth", (("stream", "scored"),)] == 3
    assert found["keel_queue_in_flight", (("stream", "scored"),)] == 2
    assert found["keel_queue_oldest_seconds", (("stream", "scored"),)] == 1.5
    assert found["keel_workers", (("role", "reward"), ("state", "running"))] == 3
    assert found["keel_workers", (("role", "reward"), ("state", "dead"))] == 0


def test_an_unknown_worker_state_is_refused() -> None:
    with pytest.raises(ValueError, match="sleeping"):
        RunMetrics(CollectorRegistry()).set_workers("reward", counts={"sleeping": 1})


def test_health_fails_when_progress_stops_and_comes_back() -> None:
    now_s = [0.0]
    heartbeat = Heartbeat(silence_limit_s=30.0, clock=lambda: now_s[0])
    with MetricsServer(CollectorRegistry(), host=HOST, heartbeat=heartbeat) as server:
        url = f"http://{server.address}/healthz"
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


# ---------------------------------------------------------------- discovery


EXPECTED = [
    {"targets": ["h:1"], "labels": {"run": "demo", "role": "learner", "instance": "l"}},
    {"targets": ["h:2"], "labels": {"run": "demo", "role": "rollout", "instance": "r0"}},
]


async def test_discovery_serves_what_was_announced_and_writes_it(tmp_path: Path) -> None:
    directory = MemoryDirectory()
    path = tmp_path / "sd" / "targets.json"
    with Discovery(directory, run="demo", file_sd=path) as discovery:
        assert await asyncio.to_thread(get, discovery.url) == (200, "application/json", "[]")
        await discovery.refresh()
        assert json.loads(path.read_text()) == []
        await directory.announce("rollout", instance="r0", address="h:2", ttl_s=60)
        await directory.announce("learner", instance="l", address="h:1", ttl_s=60)
        await discovery.refresh()
        assert json.loads((await asyncio.to_thread(get, discovery.url))[2]) == EXPECTED
    assert json.loads(path.read_text()) == EXPECTED
    assert [found.name for found in path.parent.iterdir()] == ["targets.json"]


def test_file_sd_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    write_file_sd(path, groups=[{"targets": ["h:1"], "labels": {}}])
    with path.open() as reader:
        write_file_sd(path, groups=[])
        assert json.load(reader) == [{"targets": ["h:1"], "labels": {}}]
    assert json.loads(path.read_text()) == []


class FlakyDirectory(MemoryDirectory):
    """Fails while told to."""

    failing = False

    async def announce(self, role: str, *, instance: str, address: str, ttl_s: float) -> None:
        if self.failing:
            raise StreamError("Redis cannot be reached")
        await super().announce(role, instance=instance, address=address, ttl_s=ttl_s)

    async def members(self) -> list[Member]:
        if self.failing:
            raise StreamError("Redis cannot be reached")
        return await super().members()


class Steps:
    """A sleep that returns when the test says so, and tells when it was entered."""

    def __init__(self) -> None:
        self.slept_s: list[float] = []
        self._entered: asyncio.Queue[None] = asyncio.Queue()
        self._go: asyncio.Queue[None] = asyncio.Queue()

    async def __call__(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self._entered.put_nowait(None)
        await self._go.get()

    async def entered(self) -> None:
        await asyncio.wait_for(self._entered.get(), 10)

    def go_on(self) -> None:
        self._go.put_nowait(None)


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_last_targets_stay_while_the_directory_fails() -> None:
    directory, steps = FlakyDirectory(), Steps()
    await directory.announce("learner", instance="l", address="h:1", ttl_s=60)
    with Discovery(directory, run="demo") as discovery:
        task = asyncio.create_task(discovery.run_forever(every_s=5.0, sleep=steps))
        await steps.entered()
        directory.failing = True
        steps.go_on()
        await steps.entered()
        assert json.loads((await asyncio.to_thread(get, discovery.url))[2]) == EXPECTED[:1]
        assert steps.slept_s == [5.0, 5.0]
        await stop(task)


async def test_announcing_goes_on_through_failures_and_withdraws_at_the_end() -> None:
    directory, steps = FlakyDirectory(), Steps()
    member = Member("rollout", "r0", "h:2")
    directory.failing = True
    task = asyncio.create_task(announce_forever(directory, member=member, ttl_s=15.0, sleep=steps))
    await steps.entered()
    directory.failing = False
    assert await directory.members() == []
    steps.go_on()
    await steps.entered()
    assert await directory.members() == [member]
    assert steps.slept_s == [5.0, 5.0]
    await stop(task)
    assert await directory.members() == []
