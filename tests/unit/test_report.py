"""The report stands on its own, escapes what models and users wrote, and is written for half-finished runs too.
Trackers: missing packages, failures."""

from __future__ import annotations

import base64
import json
import logging
import re
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cluster.errors import ConfigError, DataError
from keel.report import write_report
from keel.trackers import Trackers, open_trackers

HOSTILE = '<script>alert("x")</script><img src=x onerror=y> & </td></table>'
ALL_TITLES = (
    "Reward",
    "Gold reward",
    "KL to the SFT policy",
    "KL coefficient β",
    "Entropy",
    "Answer length",
    "Staleness",
    "Throughput",
    "Gold reward against distance from the SFT policy",
)


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on a table or list that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag in ("table", "tr", "td", "th", "div", "figure", "body"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag in ("table", "tr", "td", "th", "div", "figure", "body"):
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def step(number: int, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "proxy_z": 0.1 * number,
        "gold_mean": 1.0 + 0.05 * number,
        "kl_nats_per_sequence": 0.2 * number,
        "kl_target_nats_per_sequence": 3.0,
        "beta": 0.15,
        "entropy_nats_per_token": 1.0,
        "response_tokens_mean": 20.0,
        "staleness_mean": 0.5,
        "tokens_per_second_rollout": 3000.0,
        **more,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    path.mkdir()
    write_lines(path / "metrics.jsonl", [step(number) for number in range(1, 13)])
    write_lines(
        path / "samples.jsonl",
        [{"prompt": "help", "before": "old", "after": "new", "gold_before": 0.5, "gold_after": 2.25}],
    )
    summary = {
        "seed": 3,
        "gold_sft": 0.92,
        "gold_final": 1.87,
        "stage_seconds": {"sft": 90.0, "ppo": 240.5},
        "rm": {"accuracy": 0.71},
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_a_finished_run_has_every_part(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    visible = " ".join(page.text)
    assert set(ALL_TITLES) <= {image["alt"] for image in page.images}
    for part in (
        "Keel run demo",
        "+0.92",
        "+1.87",
        "1 min 30 s",
        "4 min 00 s",
        "5 min 30 s",
        "old",
        "new",
        "gold +2.25",
        "rm.accuracy",
    ):
        assert part in visible


def test_it_needs_no_network_and_runs_no_script(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert re.findall(r'(?:src|href)="(?!data:image/svg\+xml;base64,)', text) == []
    assert "default-src 'none'" in text


def test_the_images_are_svg(run_dir: Path) -> None:
    for image in Page(write_report(run_dir).read_text(encoding="utf-8")).images:
        svg = base64.b64decode((image["src"] or "").partition(",")[2])
        assert b"<svg" in svg
        assert svg.rstrip().endswith(b"</svg>")


def test_hostile_text_stays_text(run_dir: Path) -> None:
    samples: list[dict[str, Any]] = [
        {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE},
        {"prompt": [{"role": HOSTILE, "content": HOSTILE}], "before": "b", "after": "a"},
    ]
    write_lines(run_dir / "samples.jsonl", samples)
    (run_dir / "summary.json").write_text(
        json.dumps({HOSTILE: HOSTILE, "list": [HOSTILE], "stage_seconds": {HOSTILE: 1}})
    )
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert all(image["src"] != "x" for image in page.images)
    assert "onerror" not in {name for image in page.images for name in image}
    assert "".join(page.text).count('<script>alert("x")</script>') >= 7


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    visible = " ".join(Page(write_report(tmp_path).read_text(encoding="utf-8")).text)
    for part in (
        "metrics.jsonl is not there",
        "No PPO step",
        "summary.json is not there",
        "samples.jsonl is not there",
    ):
        assert part in visible


def test_missing_keys_leave_their_curve_out(run_dir: Path) -> None:
    records = [{key: value for key, value in step(number).items() if key != "gold_mean"} for number in (1, 2)]
    records[1]["beta"] = None
    write_lines(run_dir / "metrics.jsonl", records)
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    titles = {image["alt"] for image in page.images}
    assert "Gold reward" not in titles
    assert "Gold reward against distance from the SFT policy" not in titles
    assert "KL coefficient β" in titles
    assert "Not recorded: Gold reward" in " ".join(page.text)


def test_a_run_cut_short_is_reported(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "pro')
    (run_dir / "summary.json").write_text('{"seed"')
    (run_dir / "samples.jsonl").write_text('{"prompt"\n{"prompt": 1}\n')
    progress = [
        {"t": 10.0, "stage": "sft", "event": "start"},
        {"t": 40.0, "stage": "sft", "event": "end"},
        {"t": 41.0, "stage": "ppo", "event": "start"},
        {"t": 61.0, "stage": "ppo", "event": "progress", "step": 13},
    ]
    write_lines(run_dir / "progress.jsonl", progress)
    visible = " ".join(Page(write_report(run_dir).read_text(encoding="utf-8")).text)
    assert "summary.json is damaged" in visible
    assert "samples.jsonl is damaged" in visible
    for part in ("30.0 s", "20.0 s", "50.0 s"):
        assert part in visible


def test_of_a_step_recorded_twice_the_later_counts(run_dir: Path) -> None:
    from keel.report import read_records

    write_lines(run_dir / "metrics.jsonl", [step(1), step(2, beta=1.0), step(3), step(2, beta=2.0), {"beta": 9}])
    records = read_records(run_dir).steps
    assert [(record["step"], record["beta"]) for record in records] == [(1, 0.15), (2, 2.0), (3, 0.15)]


def test_the_same_records_give_the_same_page(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_no_run_directory_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        write_report(tmp_path / "none")


# ---------------------------------------------------------------- trackers


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
