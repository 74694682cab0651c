"""The queue server's manifest and the scaling by lag, with the real server."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis

from cluster.keys import GROUP, Keys
from cluster.redis_server import EmbeddedServer, find_server_binary
from cluster.run_redis import RunRedis
from cluster.streams import StreamName
from tests.deploy_support import of_kind
from tests.integration.ray_head import free_ports

ROLLOUTS, SCORED = StreamName.ROLLOUTS, StreamName.SCORED


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[tuple[RunRedis, redis.Redis]]:
    with EmbeddedServer(tmp_path / "redis") as server:
        async with RunRedis(server.url, run="ppo-7b") as run_redis:
            with redis.Redis.from_url(server.url, decode_responses=True) as admin:
                yield run_redis, admin


def lag(admin: Any) -> int | None:
    """What KEDA's lagCount is compared with."""
    (group,) = admin.xinfo_groups(Keys("ppo-7b").stream(ROLLOUTS))
    assert group["name"] == GROUP
    waiting: int | None = group["lag"]
    return waiting


async def test_the_lag_counts_what_waits_for_a_scorer(run: tuple[RunRedis, redis.Redis]) -> None:
    """Also after entries were deleted, which is how every hop ends, and which can make a group's lag unknown."""
    streams, admin = run[0].streams, run[1]
    await streams.publish(ROLLOUTS, [b"1", b"2", b"3", b"4"])
    taken = await streams.claim(ROLLOUTS, consumer="a", max_count=3, wait_s=0.0)
    assert lag(admin) == 1
    for delivery in reversed(taken):
        await streams.advance(ROLLOUTS, delivery.entry_id, target=SCORED, payload=b"")
    assert lag(admin) == 1
    await streams.publish(ROLLOUTS, [b"5", b"6"])
    assert lag(admin) == 3
    await streams.claim(ROLLOUTS, consumer="b", max_count=10, wait_s=0.0)
    assert lag(admin) == 0


def test_the_manifests_server_starts_and_wants_the_password(tmp_path: Path) -> None:
    """The container's own command, with the two folders moved."""
    (deployment,) = of_kind("Deployment")
    (container,) = deployment.doc["spec"]["template"]["spec"]["containers"]
    data, memory, tools = tmp_path / "data", tmp_path / "memory", tmp_path / "bin"
    for folder in (data, memory, tools):
        folder.mkdir()
    (tools / "valkey-server").symlink_to(find_server_binary().path)
    (port,) = free_ports(1)
    (script,) = container["args"]
    script = script.replace("/data", str(data)).replace("/run/valkey", str(memory))
    server = subprocess.Popen(
        [*container["command"], script.rstrip() + f" --port {port} --bind 127.0.0.1"],
        env={"PATH": f"{tools}:{os.environ['PATH']}", "KEEL_REDIS_PASSWORD": "s3cret"},
        stdout=subprocess.DEVNULL,
    )
    try:
        client = redis.Redis(port=port, password="s3cret", decode_responses=True)
        deadline_s = time.monotonic() + 20
        while True:
            try:
                assert client.ping()
                break
            except redis.ConnectionError:
                assert server.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("save") == {"save": ""}
        assert b"s3cret" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert (memory / "password.conf").stat().st_mode & 0o777 == 0o600
    finally:
        server.terminate()
        server.wait(10)
