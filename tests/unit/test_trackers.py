"""Trackers: missing packages, what they are given, failures."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cluster.errors import ConfigError
from keel.trackers import Trackers, open_trackers


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        open_trackers(["wandb"], run_dir=tmp_path, config={})
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        open_trackers(["tensorboard"], run_dir=tmp_path, config={})


class FakeWriter:
    """Stands in for TensorBoard's SummaryWriter."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_the_finite_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[FakeWriter] = []

    def open_writer(directory: str) -> FakeWriter:
        writers.append(FakeWriter(directory))
        return writers[-1]

    module = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(module, "SummaryWriter", open_writer, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trackers = open_trackers(["tensorboard"], run_dir=tmp_path, config={})
    trackers.log({"step": 4, "beta": 0.5, "gold_mean": None, "note": "x", "kl": float("nan"), "flag": True})
    trackers.log({"beta": 1.0})
    trackers.close()
    assert writers[0].directory == str(tmp_path / "tensorboard")
    assert writers[0].scalars == [("keel/beta", 0.5, 4)]
    assert writers[0].closed


def test_wandb_gets_config_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append(("log", (values, step))), finish=lambda: calls.append(("finish", None))
    )

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(("init", settings))
        return run

    module = ModuleType("wandb")
    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    trackers = open_trackers(["wandb"], run_dir=tmp_path, config={"seed": 1})
    trackers.log({"step": 2, "beta": 0.5})
    trackers.close()
    expected = {"project": "keel", "name": tmp_path.name, "dir": str(tmp_path), "config": {"seed": 1}}
    assert calls == [("init", expected), ("log", ({"beta": 0.5}, 2)), ("finish", None)]


class Failing:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("no route")

    def close(self) -> None:
        raise ConnectionError("no route")


def test_a_failing_tracker_is_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    failing, writer = Failing(), []

    class Working:
        def log(self, step: int, values: Mapping[str, float]) -> None:
            writer.append(step)

        def close(self) -> None:
            writer.append(-1)

    trackers = Trackers({"bad": failing, "good": Working()})
    with caplog.at_level(logging.WARNING):
        trackers.log({"step": 1, "beta": 1.0})
        trackers.log({"step": 2, "beta": 1.0})
        trackers.close()
    assert failing.calls == 1
    assert writer == [1, 2, -1]
    assert "tracker bad failed at step 1" in caplog.text
