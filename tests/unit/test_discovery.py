"""Service discovery as Prometheus reads it, from announcements to the lists served and written; and the address under
which a process is found."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import cluster.discovery
from cluster.discovery import Discovery, TargetGroup, announce_forever, target_group, write_file_sd
from cluster.errors import StreamError
from cluster.process import node_address, silence_limit_s
from cluster.stores import Member, MemoryDirectory
from configs.load import load_config
from configs.reward import FunctionReward, HttpReward
from keel.ray_targets import node_targets, nodes_alive
from tests.metrics_support import get

EXPECTED = [
    {"targets": ["h:1"], "labels": {"run": "demo", "role": "learner", "instance": "l", "node": "h"}},
    {"targets": ["h:2"], "labels": {"run": "demo", "role": "rollout", "instance": "r0", "node": "h"}},
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
    assert json.loads(path.read_text()) == [], "a run that is over has no targets"
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


async def test_a_replaced_process_leaves_no_target_behind() -> None:
    """Whoever dies withdraws nothing: the dead incarnation's entry runs out by itself."""
    now_s = [0.0]
    directory = MemoryDirectory(clock=lambda: now_s[0])
    with Discovery(directory, run="demo") as discovery:
        await directory.announce("rollout", instance="0.0", address="h:1", ttl_s=15)
        now_s[0] = 10.0
        await directory.announce("rollout", instance="0.1", address="h:2", ttl_s=15)
        now_s[0] = 15.5
        await discovery.refresh()
        groups = json.loads((await asyncio.to_thread(get, discovery.url))[2])
    assert groups == [target_group("h:2", run="demo", role="rollout", instance="0.1")]


async def test_other_targets_come_and_go_and_stay_while_they_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    directory = MemoryDirectory()
    await directory.announce("learner", instance="l", address="h:1", ttl_s=60)
    ray_nodes = [target_group("n1:9", run="demo", role="ray", instance="node-1")]
    failing = False

    def extra() -> list[TargetGroup]:
        assert threading.current_thread() is not threading.main_thread()
        if failing:
            raise ConnectionError("the head node is gone")
        return list(ray_nodes)

    with Discovery(directory, run="demo", extra_targets=extra) as discovery:

        async def served() -> list[str]:
            await discovery.refresh()
            groups = json.loads((await asyncio.to_thread(get, discovery.url))[2])
            return [group["targets"][0] for group in groups]

        assert await served() == ["h:1", "n1:9"]
        ray_nodes.append(target_group("n2:9", run="demo", role="ray", instance="node-2"))
        assert await served() == ["h:1", "n1:9", "n2:9"]
        del ray_nodes[0]
        assert await served() == ["h:1", "n2:9"]
        failing = True
        await directory.announce("reward", instance="w", address="h:3", ttl_s=60)
        assert await served() == ["h:1", "h:3", "n2:9"]
    assert "the head node is gone" in caplog.text


async def test_other_targets_that_hang_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.discovery, "EXTRA_TIMEOUT_S", 0.05)
    directory, release = MemoryDirectory(), threading.Event()
    await directory.announce("learner", instance="l", address="h:1", ttl_s=60)

    def hangs() -> list[TargetGroup]:
        release.wait(30)
        return []

    try:
        with Discovery(directory, run="demo", extra_targets=hangs) as discovery:
            await asyncio.wait_for(discovery.refresh(), 10)
            assert json.loads((await asyncio.to_thread(get, discovery.url))[2]) == EXPECTED[:1]
    finally:
        release.set()


# ---------------------------------------------------------------- Ray's own exporters


def ray_node(node_id: str, *, host: str, port: int = 8080, alive: bool = True) -> dict[str, object]:
    return {"NodeID": node_id * 8, "Alive": alive, "NodeManagerAddress": host, "MetricsExportPort": port}


def test_each_living_ray_node_with_an_exporter_is_a_target() -> None:
    nodes = [
        ray_node("abcdefg", host="10.0.0.2"),
        ray_node("1234567", host="10.0.0.1", port=9090),
        ray_node("dead000", host="10.0.0.3", alive=False),
        ray_node("silent0", host="10.0.0.4", port=0),
        ray_node("six0000", host="fd00::6"),
    ]
    assert node_targets(nodes, run="demo") == [
        {
            "targets": ["10.0.0.1:9090"],
            "labels": {"run": "demo", "role": "ray", "instance": "node-123456712345", "node": "10.0.0.1"},
        },
        {
            "targets": ["10.0.0.2:8080"],
            "labels": {"run": "demo", "role": "ray", "instance": "node-abcdefgabcde", "node": "10.0.0.2"},
        },
        {
            "targets": ["[fd00::6]:8080"],
            "labels": {"run": "demo", "role": "ray", "instance": "node-six0000six00", "node": "fd00::6"},
        },
    ]
    assert nodes_alive(nodes) == 4


# ---------------------------------------------------------------- the own address


FakeRay = Callable[[bool], None]


@pytest.fixture
def ray_process(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Whether this process looks like one of Ray's, on node 10.9.8.7."""

    def be(connected: bool) -> None:
        util = SimpleNamespace(get_node_ip_address=lambda: "10.9.8.7")
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: connected, util=util))

    return be


def test_on_a_cluster_a_process_is_found_where_ray_knows_its_node(ray_process: FakeRay) -> None:
    ray_process(True)
    on_cluster = load_config("demo_ci", overrides=["ray.address=auto"])
    assert node_address(on_cluster, redis_url="redis://192.0.2.1:1") == "10.9.8.7"
    assert node_address(load_config("demo_ci"), redis_url="redis://192.0.2.1:1") == "127.0.0.1"


def test_outside_ray_a_process_is_found_where_it_reaches_the_server_from(ray_process: FakeRay) -> None:
    ray_process(False)
    config = load_config("demo_ci", overrides=["ray.address=auto"])
    assert node_address(config, redis_url="redis://:secret@localhost:6390/0") == "127.0.0.1"
    assert node_address(config, redis_url="redis://[::1]:6390/0") == "::1"
    assert node_address(config, redis_url="unix:///run/redis.sock") == "127.0.0.1"
    assert node_address(config, redis_url="redis://nowhere.invalid:1") == "127.0.0.1"
    assert node_address(config) == "127.0.0.1"


def test_a_long_step_or_answer_is_no_silence() -> None:
    config = load_config("ppo_7b_8gpu")
    assert silence_limit_s(config, role="learner") >= config.learner.stall_timeout_s
    assert silence_limit_s(config, role="rollout") >= config.rollout.generate_timeout_s
    assert silence_limit_s(config, role="reward") >= config.reward.score_timeout_s
    assert silence_limit_s(config, role="driver") == 120.0


def test_a_batch_at_slow_reward_sources_is_no_silence() -> None:
    def limit_s(*sources: FunctionReward | HttpReward) -> float:
        config = load_config("demo_ci")
        reward = config.reward.model_copy(update={"sources": sources, "batch_size": 64, "score_timeout_s": 30.0})
        return silence_limit_s(config.model_copy(update={"reward": reward}), role="reward")

    http = HttpReward(url="http://rm.example", batch_size=8, timeout_s=60.0, retries=2)
    assert limit_s(FunctionReward(path="m:f", timeout_s=0.1)) == 120.0
    assert limit_s(FunctionReward(path="m:f", timeout_s=5.0)) == 320.0  # one call after another
    assert limit_s(http) == 2 * (3 * 60.0 + 2 * 8.0)  # eight requests, four at a time
    assert limit_s(http, FunctionReward(path="m:f", timeout_s=10.0)) == 640.0  # side by side
