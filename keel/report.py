"""The run's report: one HTML file with its curves, tables and sample answers, that opens anywhere without a network.

Read from the run directory: metrics.jsonl, summary.json, samples.jsonl, progress.jsonl; each may be missing or cut
short, and the report then says so. Every text that a model, prompt or user wrote is escaped, and the page's policy
forbids scripts and foreign content besides.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import DataError
from cluster.files import Json, atomic_write_text, read_jsonl
from keel.display import GAP, RunView, number, seconds_text
from keel.plots import CHARTS, chart_svg, gold_against_distance_svg, reward_model_changes

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.note { color: #59636e; } .missing { background: #fff8c5; border-left: 4px solid #d4a72c; padding: .5rem .8rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; }
.curves figure { margin: 0; border: 1px solid #d1d9e0; border-radius: 6px; padding: .5rem; }
.curves img { width: 100%; display: block; }
.headline { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.headline div { border: 1px solid #d1d9e0; border-radius: 6px; padding: .5rem .9rem; min-width: 8rem; }
.headline b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; } td, th { border: 1px solid #d1d9e0; padding: .35rem .6rem;
  text-align: left; vertical-align: top; } th { background: #f6f8fa; }
table.narrow { width: auto; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; width: 33%; } .score { color: #59636e; font-size: .85rem; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_HEADLINES = (
    ("gold before", "gold_sft", "{:+.2f}"),
    ("gold after", "gold_final", "{:+.2f}"),
    ("reward after (z)", "proxy_final", "{:+.2f}"),
    ("KL, nats per sequence", "kl_nats_per_sequence", "{:.2f}"),
    ("KL target", "kl_target_nats_per_sequence", "{:.2f}"),
    ("samples trained", "samples_trained", "{:,.0f}"),
    ("rollout tokens/s", "tokens_per_second_rollout", "{:,.0f}"),
)


@dataclass(frozen=True)
class RunRecords:
    """What the run directory holds. `gaps` says in words what it does not."""

    steps: list[Json]
    summary: Json
    samples: list[Json]
    stage_seconds: dict[str, float]
    gaps: list[str]
    refreshes: list[Json] = field(default_factory=list)


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from whatever the run has recorded so far. Returns its path.

    Raises DataError when `run_dir` does not exist, OSError when the report cannot be written.
    """
    if not run_dir.is_dir():
        raise DataError(f"no run directory {run_dir}", got="nothing there", do="give the directory of a run: runs/NAME")
    path = run_dir / "report.html"
    atomic_write_text(path, render(run_dir.name, read_records(run_dir)))
    return path


def read_records(run_dir: Path) -> RunRecords:
    """The records of a run, finished or not. Damaged files become gaps."""
    gaps: list[str] = []
    steps = _last_of_each_step(_lines(run_dir / "metrics.jsonl", gaps))
    if not steps:
        gaps.append("No PPO step is recorded yet: there are no curves.")
    summary = _summary(run_dir / "summary.json", gaps)
    samples = _lines(run_dir / "samples.jsonl", gaps)
    seconds = summary.get("stage_seconds")
    if not isinstance(seconds, dict):
        seconds = _seconds_from_progress(_lines(run_dir / "progress.jsonl", []))
    timed = {str(name): value for name in seconds if (value := number(seconds, name)) is not None}
    path = run_dir / "refreshes.jsonl"
    refreshes = _lines(path, gaps) if path.exists() else []
    return RunRecords(
        steps=steps, summary=summary, samples=samples, stage_seconds=timed, gaps=gaps, refreshes=refreshes
    )


def _lines(path: Path, gaps: list[str]) -> list[Json]:
    if not path.exists():
        gaps.append(f"{path.name} is not there: the run has not come so far.")
        return []
    try:
        return read_jsonl(path)
    except DataError as error:
        gaps.append(f"{path.name} is damaged and left out: {error.what} {error.got}")
        return []


def _summary(path: Path, gaps: list[str]) -> Json:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        gaps.append("summary.json is not there: the run has not finished.")
        return {}
    except (OSError, ValueError) as error:
        gaps.append(f"summary.json is damaged and left out: {error}")
        return {}
    return summary if isinstance(summary, dict) else {}


def _last_of_each_step(records: Iterable[Json]) -> list[Json]:
    """By step; a resumed run records again the steps after its checkpoint, and the later record is the true one."""
    by_step = {step: record for record in records if (step := number(record, "step")) is not None}
    return [by_step[step] for step in sorted(by_step)]


def _seconds_from_progress(records: Iterable[Json]) -> dict[str, float | None]:
    view, now_s = RunView.of(()), 0.0
    for record in records:
        now_s = max(now_s, number(record, "t") or 0.0)
        view.apply_progress(record)
    return {name: stage.seconds(now_s) for name, stage in view.stages.items()}


# ---------------------------------------------------------------- page


def render(name: str, records: RunRecords) -> str:
    """The whole page."""
    title = html.escape(f"Keel run {name}")
    parts = [
        f"<h1>{title}</h1>",
        _gaps(records.gaps),
        _headlines(records.summary),
        _curves(records.steps),
        _refreshes(records.refreshes),
        _stages(records.stage_seconds),
        _samples(records.samples),
        _summary_table(records.summary),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _gaps(gaps: Sequence[str]) -> str:
    if not gaps:
        return ""
    return '<div class="missing">' + "<br>".join(html.escape(gap) for gap in gaps) + "</div>"


def _headlines(summary: Json) -> str:
    cells = [
        f"<div>{label}<b>{template.format(value)}</b></div>"
        for label, key, template in _HEADLINES
        if (value := number(summary, key)) is not None
    ]
    return f'<div class="headline">{"".join(cells)}</div>' if cells else ""


def _curves(steps: Sequence[Json]) -> str:
    if not steps:
        return ""
    figures: list[str] = []
    absent: list[str] = []
    for chart in CHARTS:
        svg = chart_svg(chart, steps)
        if svg is None:
            absent.append(chart.title)
        else:
            figures.append(_figure(chart.title, svg))
    distance = gold_against_distance_svg(steps)
    if distance is not None:
        figures.append(_figure("Gold reward against distance from the SFT policy", distance))
    note = f'<p class="note">Not recorded: {html.escape(", ".join(absent))}.</p>' if absent else ""
    if reward_model_changes(steps):
        note = f'<p class="note">Dotted lines: another version of the reward model took over.</p>{note}'
    return f'<h2>Curves</h2>\n<div class="curves">{"".join(figures)}</div>{note}'


def _figure(title: str, svg_base64: str) -> str:
    return f'<figure><img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{svg_base64}"></figure>'


def _refreshes(refreshes: Sequence[Json]) -> str:
    """What each refresh of the reward model came to."""
    if not refreshes:
        return ""
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(_value_text(value))}</td>"
            for value in (
                one.get("number"), one.get("last_version"), one.get("reason", one.get("kind")), one.get("outcome"),
                one.get("why", ""), one.get("pairs_judged"), seconds_text(number(one, "total_seconds")),
            )
        )
        + "</tr>"
        for one in refreshes
    )  # fmt: skip
    titles = ("", "policy version", "why then", "outcome", "why so", "pairs judged so far", "took")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<h2>Refreshes of the reward model</h2>\n<table><tr>{head}</tr>{rows}</table>"


def _stages(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{seconds_text(value)}</td></tr>'
        for name, value in {**seconds, "all stages": sum(seconds.values())}.items()
    )
    return f'<h2>Time</h2>\n<table class="narrow"><tr><th>stage</th><th>took</th></tr>{rows}</table>'


def _summary_table(summary: Json) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(key)}</td><td class="number">{html.escape(_value_text(value))}</td></tr>'
        for key, value in _flat(summary, "")
        if not key.startswith("stage_seconds.")
    )
    return f'<h2>Summary</h2>\n<table class="narrow">{rows}</table>' if rows else ""


def _flat(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    """Nested sections as dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value_text(value: object) -> str:
    if value is None:
        return GAP
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _samples(samples: Sequence[Json]) -> str:
    if not samples:
        return ""
    rows = "".join(
        f'<tr><td class="text">{_prompt_html(sample.get("prompt"))}</td>'
        f"{_answer_cell(sample, 'before')}{_answer_cell(sample, 'after')}</tr>"
        for sample in samples
    )
    return (
        "<h2>Samples</h2>\n<table><tr><th>prompt</th><th>before (SFT policy)</th><th>after (final policy)</th></tr>"
        f"{rows}</table>"
    )


def _prompt_html(prompt: object) -> str:
    """A text, or chat messages, one a line with their role."""
    if isinstance(prompt, list):
        messages = [message for message in prompt if isinstance(message, dict)]
        return "<br>".join(
            f"<b>{html.escape(str(message.get('role', '?')))}</b> {html.escape(str(message.get('content', '')))}"
            for message in messages
        )
    return html.escape(prompt if isinstance(prompt, str) else GAP)


def _answer_cell(sample: Json, which: str) -> str:
    answer = sample.get(which)
    scores = [
        f"{label} {value:+.2f}"
        for label, key in (("gold", f"gold_{which}"), ("reward", f"reward_{which}"))
        if (value := number(sample, key)) is not None
    ]
    score = f'<div class="score">{" · ".join(scores)}</div>' if scores else ""
    return f'<td class="text">{html.escape(answer) if isinstance(answer, str) else GAP}{score}</td>'
