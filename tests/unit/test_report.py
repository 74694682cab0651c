"""The report stands on its own, escapes what models and users wrote, and is written for half-finished runs too."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import DataError
from configs.guard import GuardSection, Thresholds
from keel import plots
from keel.plots import ChartData, Rollback, Series, abandoned
from keel.report import write_report
from keel.report_charts import OVEROPTIMISATION_TITLE
from keel.report_records import RunRecords, read_records, rollbacks
from keel.report_samples import Marker
from keel.signal_levels import GROUPS, guard_of, limits
from tests.guarded_run import ALARM_STEP, BACK_TO_STEP, STEPS, write_guarded_run, write_lines

HOSTILE = '<script>alert("x")</script><img src=x onerror=y> & </td></table>'
ABSENT = ("gold_mean", "entropy_nats_per_token")
ALL_TITLES = (
    "Reward against what is wanted",
    "KL to the SFT policy",
    "KL coefficient β",
    "Entropy",
    "Answer length",
    "Staleness",
    "Throughput",
    OVEROPTIMISATION_TITLE,
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
    records = [{key: value for key, value in step(number).items() if key not in ABSENT} for number in (1, 2)]
    records[1]["beta"] = None
    write_lines(run_dir / "metrics.jsonl", records)
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    titles = {image["alt"] for image in page.images}
    assert OVEROPTIMISATION_TITLE not in titles
    assert "KL coefficient β" in titles
    assert "Entropy" not in titles
    assert "Not recorded:" in " ".join(page.text)
    assert "Entropy" in " ".join(page.text).partition("Not recorded:")[2]


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
    write_lines(run_dir / "metrics.jsonl", [step(1), step(2, beta=1.0), step(3), step(2, beta=2.0), {"beta": 9}])
    records = read_records(run_dir, GuardSection()).steps
    assert [(record["step"], record["beta"]) for record in records] == [(1, 0.15), (2, 2.0), (3, 0.15)]


def test_the_same_records_give_the_same_page(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_no_run_directory_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        write_report(tmp_path / "none")


# ---------------------------------------------------------------- the guard's part


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went back once, with its report."""
    path = write_guarded_run(tmp_path_factory.mktemp("runs") / "guarded")
    write_report(path)
    return path


def without_curves(run: Path) -> Path:
    """Drawing takes long: steps that have their signals and the verdict alone."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "version", "branch", "guard", "signals")
    for record in records:
        record["signals"] = {"proxy_z": record["signals"]["proxy_z"]}
    write_lines(run / "metrics.jsonl", [{key: one[key] for key in kept} for one in records])
    (run / "evaluations.jsonl").unlink()
    return run


def text_of(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_the_verdict_comes_first_and_names_the_first_sign(guarded: Path) -> None:
    visible = " ".join(" ".join(Page(text_of(guarded)).text).split())
    first = "First sign at step 17: overused_words_share"
    assert first in visible
    assert f"Rollbacks: 1 of at most 2 (steps {ALARM_STEP} → {BACK_TO_STEP})" in visible
    assert visible.index(first) < visible.index("Is it better, or only better scored?")


def test_a_guarded_run_has_every_chart(guarded: Path) -> None:
    page = Page(text_of(guarded))
    titles = {image["alt"] for image in page.images}
    assert {"Win rate against the start", "Reward model against judge", "Length and reward", "Canary"} <= titles
    assert "Not recorded:" not in " ".join(page.text)


def test_each_recorded_signal_has_a_strip_and_the_others_are_named(guarded: Path) -> None:
    text = text_of(guarded)
    strips, _, silent = text.partition("Not told in this run:")
    for name in ("proxy_z", "kl_nats_per_sequence", "overused_words_share", "win_rate"):
        assert f"<tr><td><code>{name}</code></td>" in strips
    assert "<code>uncertainty_ratio</code>" in silent.partition("</p>")[0]


def test_a_strip_tells_what_the_verdict_said(guarded: Path) -> None:
    row = text_of(guarded).partition("<code>overused_words_share</code></td>")[2].partition("</tr>")[0]
    told = re.findall(r"<title>(.*?)</title>", row)
    # Nothing until step 13, past the act threshold before patience ran out, warned, acted on; and quiet on the branch.
    assert [re.sub(r": (\w+) .*", r": \1", one) for one in told] == [
        "steps 1–13: ok", "steps 14–16: past", "steps 17–23: warn", "step 24: act", "steps 25–48: ok",
    ]  # fmt: skip


def test_actions_stand_with_their_reasons(guarded: Path) -> None:
    visible = " ".join(Page(text_of(guarded)).text)
    for part in ("raise_beta", "(factor 2, beta 0.1)", "(to_step 10, rm_version rm-a)", "KL over 10 nats"):
        assert part in visible


def test_over_used_words_are_marked_and_hostile_ones_stay_text(guarded: Path) -> None:
    text = text_of(guarded)
    page = Page(text)
    assert "<mark>Fantastic</mark> question!" in text
    assert "<mark>&lt;b&gt;</mark>Fantastically" in text
    assert "script" not in page.tags
    assert "".join(page.text).count('<script>alert("x")</script>') > 8
    assert "marked words in 8 of 8" in " ".join(page.text)


def test_the_moments_shown_are_those_around_the_alarm(guarded: Path) -> None:
    text = text_of(guarded)
    shown = text[text.index("Answers at the guard") : text.index("2 more moments")]
    assert re.findall(r"<h3>([^<]*)</h3>", shown) == [
        "At the start, step 0", "At a checkpoint, step 10", "At the alarm, step 24", "After the rollback, step 25",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["guard.jsonl", "evaluations.jsonl", "guard_samples.jsonl", "refreshes.jsonl", "diagnosis.json"]
)
@pytest.mark.parametrize("content", ["", '{"step": 3, "sig', '[1]\n{"step": "x"}\n{}\n', "\x00\xff"])
def test_damaged_guard_files_leave_the_rest(tmp_path: Path, name: str, content: str) -> None:
    run = without_curves(write_guarded_run(tmp_path / "run", steps=3))
    (run / name).write_text(content, encoding="latin-1")
    assert "Signals" in " ".join(Page(write_report(run).read_text(encoding="utf-8")).text)


def test_a_guard_of_odd_types_is_no_error(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"step": 1, "guard": 3, "signals": [1]},
        {"step": 2, "guard": {"level": "odd", "warn": "x", "act": None, "words": [3, ""]}, "signals": {"proxy_z": "x"}},
        {"step": 3, "guard": {}, "signals": {"proxy_z": None, "unknown": 1.0, HOSTILE: 2}, "branch": "x"},
    ]
    write_lines(tmp_path / "metrics.jsonl", odd)
    events: list[dict[str, Any]] = [{"event": 3, "signals": 3}, {"event": "action"}, {"step": None, "event": "warn"}]
    write_lines(tmp_path / "guard.jsonl", events)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "script" not in page.tags


def test_the_diagnosis_stands_in_short(tmp_path: Path) -> None:
    run = without_curves(write_guarded_run(tmp_path / "run", steps=3))
    match = {"title": f"Over-used phrase {HOSTILE}", "strength": 0.9, "first_step": 14, "evidence": ["in 8 of 8"]}
    advice = {"change": "Raise β", "trade_off": "slower", "set": ["learner.kl.beta=0.1"]}
    found = {"headline": "It was fooled.", "matches": [match, 3], "recommendations": [advice], "story": None}
    (run / "diagnosis.json").write_text(json.dumps(found))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    visible = " ".join(page.text)
    for part in ("It was fooled.", "90%", "since step 14", "in 8 of 8", "Raise β", "--set 'learner.kl.beta=0.1'"):
        assert part in visible
    assert "script" not in page.tags


def test_a_halt_is_the_headline(tmp_path: Path) -> None:
    run = without_curves(write_guarded_run(tmp_path / "run", steps=STEPS))
    with (run / "guard.jsonl").open("a") as file:
        halt = {"step": 48, "event": "action", "action": "halt", "reason": "a fourth rollback would be due"}
        file.write(json.dumps(halt) + "\n")
    visible = " ".join(Page(write_report(run).read_text(encoding="utf-8")).text)
    assert "The guard halted the run" in visible
    assert "a fourth rollback would be due" in visible
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 49, "guard": {"level": "ok"}}) + "\n")
    assert "The guard halted" not in " ".join(Page(write_report(run).read_text(encoding="utf-8")).text)


def test_a_long_run_has_few_cells_and_loses_no_alarm(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"step": number, "signals": {"proxy_z": 9.0 if number == 777 else 0.1}} for number in range(1, 2001)
    ]
    write_lines(tmp_path / "metrics.jsonl", steps)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    row = text.partition("<code>proxy_z</code></td>")[2].partition("</tr>")[0]
    assert len(re.findall("<rect", row)) == 3
    assert "<title>steps 775–783: past 9</title>" in row
    assert ">9<" in row


def test_a_step_axis_has_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def keep(figure: Any) -> str:
        drawn.append(figure)
        return ""

    monkeypatch.setattr(plots, "svg_base64", keep)
    points = [{"step": step, "win_rate": 0.5} for step in (3, 6)]
    series = (Series("win_rate", "win rate", of="evaluations"),)
    plots.chart_svg(plots.Chart("title", "share", series, "caption"), ChartData(steps=[], evaluations=points))
    ticks = drawn[0].axes[0].get_xticks()
    assert [tick % 1 for tick in ticks] == [0.0] * len(ticks)


def test_a_rollback_without_a_journal_is_seen_by_the_branch() -> None:
    steps = [{"step": 1, "branch": 0}, {"step": 2, "branch": 0}, {"step": 3, "branch": 1}, {"step": 4}]
    assert rollbacks(steps, []) == [Rollback(2.0, None)]
    told = [{"step": 2, "event": "action", "action": "roll_back", "to_step": 1}]
    assert rollbacks(steps, told) == [Rollback(2.0, 1.0)]


def test_abandoned_steps_are_shaded_once() -> None:
    told = [Rollback(24, 10), Rollback(36, 5), Rollback(60, 50), Rollback(70, None)]
    assert abandoned(told) == [(5, 36), (50, 60)]


def test_a_signal_inside_a_record_is_found() -> None:
    data = ChartData(steps=[{"step": 1, "signals": {"a": 2.0}}, {"step": 2, "signals": None}, {"step": 3}])
    assert data.points(Series("signals.a", "a")) == [(1.0, 2.0)]


@pytest.mark.parametrize(
    ("words", "plain", "html"),
    [
        (["great"], "Great, greater", "<mark>Great</mark>, greater"),
        (["!"], "a! b", "a<mark>!</mark> b"),
        (["a", "a b"], "a b a", "<mark>a b</mark> <mark>a</mark>"),
        (["<i>"], "<i>&", "<mark>&lt;i&gt;</mark>&amp;"),
        (["amp"], "& amp", "&amp; <mark>amp</mark>"),
        ([], "<", "&lt;"),
        (["(", "[a-z]"], "([a-z]", "<mark>(</mark><mark>[a-z]</mark>"),
    ],
)
def test_marked_words(words: list[str], plain: str, html: str) -> None:
    assert Marker(words).html(plain) == html


def test_every_signal_has_its_place_in_the_groups() -> None:
    assert sorted(name for _, names in GROUPS for name in names) == sorted(Thresholds.model_fields)
    assert set(limits(Thresholds())) == set(Thresholds.model_fields)


def test_thresholds_are_the_runs_own(tmp_path: Path) -> None:
    assert guard_of(tmp_path) == GuardSection()
    (tmp_path / "config.yaml").write_text("guard: {thresholds: {proxy_z: {warn: 1.0, act: 1.5}}}\n")
    assert limits(guard_of(tmp_path).thresholds)["proxy_z"].act == 1.5
    (tmp_path / "config.yaml").write_text("guard: {no_such_key: 1}\n")
    assert guard_of(tmp_path) == GuardSection()


def test_words_are_those_of_most_steps_first() -> None:
    steps: list[dict[str, Any]] = [{"step": at, "guard": {"words": words}} for at, words in
                                   enumerate((["b"], ["a", "b"], None, ["b", "a"]))]  # fmt: skip
    assert RunRecords(steps=steps, summary={}, samples=[], stage_seconds={}, gaps=[]).words == ["b", "a"]
