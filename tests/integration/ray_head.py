"""A Ray head node with a dashboard, as an operator starts it: `ray start --head`, on free ports, with a folder and a
token of its own. Stopped by process id; other clusters of this machine are left alone."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RayHead:
    """address: of the dashboard. env: what a client or another node needs to be let in."""

    address: str
    gcs_address: str
    env: dict[str, str]
    process: subprocess.Popen[bytes]
    folder: Path


@contextmanager
def ray_head(*, num_cpus: int = 4, env: dict[str, str] | None = None) -> Iterator[RayHead]:
    """Start a head node and wait until its dashboard answers; stop all of it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="keel-ray-", dir="/tmp"))  # Short: Unix socket paths are limited.
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    ports = free_ports(8)
    bin_dir = Path(sys.executable).parent
    command = [
        str(bin_dir / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}", f"--num-cpus={num_cpus}",
        f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}",
        f"--dashboard-agent-listen-port={ports[3]}", f"--dashboard-agent-grpc-port={ports[4]}",
        f"--runtime-env-agent-port={ports[5]}", f"--metrics-export-port={ports[6]}",
        f"--object-manager-port={ports[7]}", f"--object-store-memory={128 << 20}",
    ]  # fmt: skip
    environment = os.environ | own | {"PATH": f"{bin_dir}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | (env or {})
    environment.pop("RAY_ADDRESS", None)
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait_for(ports[1], process, folder / "head.log")
        yield RayHead(f"http://127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[0]}", own, process, folder)
    finally:
        stop_tree(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: asked first, then killed."""
    try:
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=10)
    for left in alive:
        left.kill()
    psutil.wait_procs(alive, timeout=10)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, f"ray ended: {log.read_text()[-2000:]}"
        assert time.monotonic() < deadline_s, f"no dashboard in {START_TIMEOUT_S:.0f} s: {log.read_text()[-2000:]}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
