"""Runs of the whole job as a user starts them: the `keel` command in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

KEEL = [sys.executable, "-m", "keel.cli"]
OFFLINE_STAGES = "data,sft,collect,rm"
DEADLINE_S = 240.0


@dataclass
class Run:
    """A started `keel` command and its run directory."""

    process: subprocess.Popen[str]
    path: Path

    def finish(self, *, timeout_s: float = DEADLINE_S) -> str:
        """Wait for the end; returns what it printed."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return output

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []

    def wait_for(self, condition: Callable[[], bool], *, what: str, timeout_s: float = DEADLINE_S) -> None:
        """Poll for an event in another process, up to a deadline."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"keel ended before {what}: {self.finish()}"
            assert time.monotonic() < deadline, f"no {what} in {timeout_s:.0f} s"
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: len(self.metrics()) >= step, what=f"step {step}")

    def descendants(self) -> list[psutil.Process]:
        """Living processes that the command started, directly or not."""
        started: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return started


def start(runs_dir: Path, *arguments: str, name: str = "demo-ci") -> Run:
    """`keel train demo_ci --set runs_dir=… ARGUMENTS` in the background."""
    command = [*KEEL, "train", "demo_ci", "--set", f"runs_dir={runs_dir}", "--set", f"name={name}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    return Run(process, runs_dir / name)


def adopt(prepared: Path, runs_dir: Path, *, name: str) -> None:
    """Copy the directory of a run whose offline stages are done; `start` it with --resume."""
    target = runs_dir / name
    shutil.copytree(prepared, target, ignore=shutil.ignore_patterns("redis", "logs", ".lock"))
    config = (target / "config.yaml").read_text()
    (target / "config.yaml").write_text(config.replace("name: demo-ci", f"name: {name}"))


def settings(values: Sequence[str]) -> list[str]:
    """["a=1"] → ["--set", "a=1"]."""
    return [part for value in values for part in ("--set", value)]


def assert_all_gone(processes: Sequence[psutil.Process], *, timeout_s: float = 20.0) -> None:
    """None of these processes lives on."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive, [(process.pid, process.cmdline()) for process in alive]
