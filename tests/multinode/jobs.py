"""A `keel train` job inside a cluster of test hosts, and what can be read of it from the shared run directory."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.runs import Run, settings
from tests.multinode.hosts import Hosts

SCRIPTED = ("rollout.engine=scripted", "rollout.probe_tolerance=1000")


def start_job(hosts: Hosts, runs_dir: Path, *, name: str, changes: Sequence[str]) -> Run:
    """`keel train demo_ci --resume` on the head."""
    values = [f"runs_dir={runs_dir}", f"name={name}", "ray.address=auto", *changes]
    command = [sys.executable, "-m", "keel.cli", "train", "demo_ci", "--resume", *settings(values)]
    return Run(hosts.run(0, command), runs_dir / name)


@dataclass(frozen=True)
class Place:
    """A process of a role, and the host that it runs on."""

    host: int
    pid: int


def places(hosts: Hosts, actor_class: str) -> list[Place]:
    """Where the living processes of a Ray actor's class are. Ray titles a process by what it runs."""
    found = []
    for host in hosts.all:
        for pid in hosts.pids(host.number):
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
            except FileNotFoundError:
                continue
            if title.startswith(f"ray::{actor_class}".encode()):
                found.append(Place(host.number, pid))
    return found


def wait_until(condition: Callable[[], bool], *, what: str, timeout_s: float) -> None:
    """For events in other processes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {timeout_s:.0f} s"
        time.sleep(0.1)


def assert_nothing_counted_twice(metrics: Sequence[dict[str, Any]], *, batch_size: int) -> None:
    """Each line of metrics.jsonl: one step and one version more, a batch more trained, never more than was issued."""
    for number, record in enumerate(metrics, start=1):
        assert record["step"] == record["version"] == number
        assert record["samples_trained"] == number * batch_size
        settled = record["samples_trained"] + record["samples_stale_dropped"] + record["samples_dead"]
        assert settled <= record["samples_issued"]


def assert_nothing_lost(run: Run) -> None:
    """Of a finished run: issued = trained + dropped + dead, with none outstanding; each task trained at most once."""
    last = run.metrics()[-1]
    assert last["samples_issued"] == last["samples_trained"] + last["samples_stale_dropped"] + last["samples_dead"]


def notes(run: Run) -> list[str]:
    """What progress.jsonl and the driver's log say, a line each."""
    lines: list[str] = []
    for name in ("progress.jsonl", "logs/driver-0.log"):
        path = run.path / name
        lines += path.read_text().splitlines() if path.exists() else []
    return lines


def discovery_url(run: Run) -> str:
    """Where Prometheus finds the processes, as the run announced it last."""
    announced: list[str] = re.findall(r"http://[0-9.:]+/targets", "\n".join(notes(run)))
    return announced[-1]


def targets(hosts: Hosts, discovery_url: str) -> list[dict[str, Any]]:
    """What HTTP service discovery lists, as seen from the head."""
    listed: list[dict[str, Any]] = json.loads(hosts.http(0, discovery_url))
    return listed
