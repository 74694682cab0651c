"""The run's report: one HTML file with its verdict, curves, signals, tables and answers, that opens anywhere without a
network.

Read from the run directory (keel/report_records.py); each file may be missing or cut short, and the report then says
so. Every text that a model, prompt or user wrote is escaped, and the page's policy forbids scripts and foreign content
besides.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster.errors import DataError
from cluster.files import Json, atomic_write_text
from keel.display import number, seconds_text
from keel.plots import ChartData, chart_svg, overoptimisation_svg, reward_model_changes
from keel.report_charts import GROUPS, OVEROPTIMISATION_CAPTION, OVEROPTIMISATION_TITLE
from keel.report_diagnosis import diagnosis
from keel.report_guard import banner, event_table, signal_strips
from keel.report_html import figure, page, table, text
from keel.report_records import RunRecords, read_records
from keel.report_samples import Marker, before_and_after, moments
from keel.signal_levels import guard_of

_HEADLINES = (
    ("gold before", "gold_sft", "{:+.2f}"),
    ("gold after", "gold_final", "{:+.2f}"),
    ("win rate after", "win_rate_final", "{:.0%}"),
    ("reward after (z)", "proxy_final", "{:+.2f}"),
    ("KL, nats per sequence", "kl_nats_per_sequence", "{:.2f}"),
    ("KL target", "kl_target_nats_per_sequence", "{:.2f}"),
    ("samples trained", "samples_trained", "{:,.0f}"),
    ("rollout tokens/s", "tokens_per_second_rollout", "{:,.0f}"),
)
_SO_FAR = (
    ("steps so far", "step", "{:,.0f}"),
    ("reward (z)", "proxy_z", "{:+.2f}"),
    ("gold of the batch", "gold_mean", "{:+.2f}"),
    ("KL, nats per sequence", "kl_nats_per_sequence", "{:.2f}"),
    ("KL target", "kl_target_nats_per_sequence", "{:.2f}"),
    ("samples trained", "samples_trained", "{:,.0f}"),
)
"""Of a run without a summary: its last step's."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from whatever the run has recorded so far. Returns its path.

    Raises DataError when `run_dir` does not exist, OSError when the report cannot be written.
    """
    if not run_dir.is_dir():
        raise DataError(f"no run directory {run_dir}", got="nothing there", do="give the directory of a run: runs/NAME")
    path = run_dir / "report.html"
    atomic_write_text(path, render(run_dir.name, read_records(run_dir, guard_of(run_dir))))
    return path


def render(name: str, records: RunRecords) -> str:
    """The whole page: what the run came to first, then why, then the evidence."""
    title, marker = f"Keel run {name}", Marker(records.words)
    telling, others = _curves(records.chart_data)
    parts = (
        f"<h1>{html.escape(title)}</h1>",
        banner(records),
        _headlines(records),
        _gaps(records.gaps),
        diagnosis(records.diagnosis),
        telling,
        signal_strips(records),
        event_table(records),
        moments(records.alarm_answers, marker, first_sign=_first_sign(records)),
        others,
        _refreshes(records.refreshes),
        before_and_after(records.samples, marker),
        _stages(records.stage_seconds),
        _summary_table(records.summary),
    )
    return page(title, parts)


def _first_sign(records: RunRecords) -> float | None:
    """The step of the guard's first warning."""
    return next((number(event, "step") for event in records.events if event.get("event") in ("warn", "act")), None)


def _gaps(gaps: Sequence[str]) -> str:
    if not gaps:
        return ""
    return '<div class="missing">' + "<br>".join(html.escape(gap) for gap in gaps) + "</div>"


def _headlines(records: RunRecords) -> str:
    known = any(number(records.summary, key) is not None for _, key, _ in _HEADLINES)
    source = records.summary if known else records.steps[-1] if records.steps else {}
    cells = [
        f"<div>{label}<b>{template.format(value)}</b></div>"
        for label, key, template in (_HEADLINES if known else _SO_FAR)
        if (value := number(source, key)) is not None
    ]
    return f'<div class="headline">{"".join(cells)}</div>' if cells else ""


def _curves(data: ChartData) -> tuple[str, str]:
    """The curves that tell most, and the others."""
    if not data.steps:
        return "", ""
    parts: list[str] = []
    absent: list[str] = []
    for at, group in enumerate(GROUPS):
        drawn = [(chart, chart_svg(chart, data, small=at > 0)) for chart in group.charts]
        absent += [chart.title for chart, svg in drawn if svg is None]
        figures = [figure(chart.title, svg, chart.caption) for chart, svg in drawn if svg is not None]
        if at == 0:
            figures[1:1] = _overoptimisation(data)
        wide = " wide" if at == 0 else ""
        if figures:
            parts.append(f'<h2>{html.escape(group.name)}</h2>\n<div class="curves{wide}">{"".join(figures)}</div>')
        else:
            parts.append("")
    first, *others = parts
    left_out = f'<p class="note">Not recorded: {html.escape(", ".join(absent))}.</p>' if absent else ""
    return _how_to_read(data) + first, "".join(others) + left_out


def _how_to_read(data: ChartData) -> str:
    notes = []
    if data.rollbacks:
        notes.append("Red line: the guard rolled the policy back (→ to which step); shaded: abandoned steps.")
    if reward_model_changes(data.steps):
        notes.append("Dotted lines: another version of the reward model took over.")
    return f'<p class="note">{" ".join(notes)}</p>' if notes else ""


def _overoptimisation(data: ChartData) -> list[str]:
    svg = overoptimisation_svg(data)
    return [] if svg is None else [figure(OVEROPTIMISATION_TITLE, svg, OVEROPTIMISATION_CAPTION)]


def _refreshes(refreshes: Sequence[Json]) -> str:
    """What each refresh of the reward model came to."""
    if not refreshes:
        return ""
    rows = [
        tuple(
            text(value)
            for value in (
                one.get("number"), one.get("last_version"), one.get("reason", one.get("kind")), one.get("outcome"),
                one.get("why", ""), one.get("pairs_judged"), seconds_text(number(one, "total_seconds")),
            )
        )
        for one in refreshes
    ]  # fmt: skip
    titles = ("", "policy version", "why then", "outcome", "why so", "pairs judged so far", "took")
    return f"<h2>Refreshes of the reward model</h2>\n{table(titles, rows, numbers=(0, 1, 5, 6))}"


def _stages(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    rows = [(html.escape(name), seconds_text(value)) for name, value in _with_total(seconds).items()]
    return f"<h2>Time</h2>\n{table(('stage', 'took'), rows, numbers=(1,), css='narrow')}"


def _with_total(seconds: Mapping[str, float]) -> dict[str, float]:
    return {**seconds, "all stages": sum(seconds.values())}


def _summary_table(summary: Json) -> str:
    rows = [
        (html.escape(key), text(value)) for key, value in _flat(summary, "") if not key.startswith("stage_seconds.")
    ]
    return f"<h2>Summary</h2>\n{table(('key', 'value'), rows, numbers=(1,), css='narrow')}" if rows else ""


def _flat(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    """Nested sections as dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
