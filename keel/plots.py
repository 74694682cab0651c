"""How the report's charts are drawn, as base64 of SVG. Which ones there are: keel/report_charts.py.

Legend: a *step record* is one line of metrics.jsonl, an *evaluation* one of evaluations.jsonl; a value that is absent,
null or not finite is a gap in its curve. Every chart over steps marks where the policy was rolled back (red line, with
the step that it went back to), shades the steps that were abandoned by that, and dots where another version of the
reward model took over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from cluster.charts import empty_chart, second_scale, svg_base64
from cluster.files import Json
from keel.display import number
from keel.signal_levels import Limit

if TYPE_CHECKING:
    from cluster.charts import Axes, Line2D

_SIZE_INCHES: Final = (4.9, 3.0)
_SMALL_INCHES: Final = (3.9, 2.6)
_COLOURS: Final = ("#0969da", "#8250df", "#1b7c83", "#6e7781")
_GOLD, _AMBER, _RED, _GREY = "#1a7f37", "#bf8700", "#cf222e", "#57606a"
_NEAR: Final = 0.75
"""A threshold is drawn where it lies no further from the values than this, in units of their range."""
_LABEL_WIDTH: Final = 0.09
"""Of a rollback's label, as a share of the axis."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve: the record's key (`signals.name` looks inside), its name in the legend, its line style. `low`, `high`:
    keys of its interval."""

    key: str
    name: str
    style: str = "-"
    of: Literal["steps", "evaluations"] = "steps"
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Chart:
    """`right`: on a scale of its own; of these the first that was recorded. `limit`: the signal whose thresholds are
    drawn. `even`: a value to compare with, drawn as a line."""

    title: str
    unit: str
    series: tuple[Series, ...]
    caption: str
    right: tuple[Series, ...] = ()
    right_unit: str = ""
    limit: str | None = None
    even: float | None = None


@dataclass(frozen=True)
class Rollback:
    """After `at_step` the policy went back to what it was at `to_step`, and went on as branch `branch`."""

    at_step: float
    to_step: float | None


@dataclass(frozen=True)
class ChartData:
    """What charts are drawn from."""

    steps: Sequence[Json]
    evaluations: Sequence[Json] = ()
    rollbacks: Sequence[Rollback] = ()
    limits: Mapping[str, Limit] = field(default_factory=dict)

    def points(self, series: Series) -> list[Point]:
        records = self.steps if series.of == "steps" else self.evaluations
        pairs = [(number(record, "step"), _value(record, series.key)) for record in records]
        return [(x, y) for x, y in pairs if x is not None and y is not None]


def chart_svg(chart: Chart, data: ChartData, *, small: bool = False) -> str | None:
    """The chart, base64 of SVG; None when nothing has any of its values. `small`: for two thirds of the width."""
    curves = [(series, points) for series in chart.series if (points := data.points(series))]
    other = next(((series, points) for series in chart.right if (points := data.points(series))), None)
    if not curves and other is None:
        return None
    figure, axes = empty_chart(chart.title, "step", chart.unit, size_inches=_SMALL_INCHES if small else _SIZE_INCHES)
    axes.locator_params(axis="x", integer=True)
    handles = [
        _curve(axes, series, points, data, colour=colour)
        for colour, (series, points) in zip(_COLOURS, curves, strict=False)
    ]
    if other is not None:
        series, points = other
        second = second_scale(axes, f"{series.name}, {chart.right_unit}" if chart.right_unit else series.name,
                              colour=_GOLD, first_colour=_COLOURS[0])  # fmt: skip
        handles.append(_curve(second, series, points, data, colour=_GOLD))
    if curves:
        _thresholds(axes, chart, data.limits, [y for _, points in curves for _, y in points])
    else:
        axes.set_yticks([])
    if chart.even is not None:
        axes.axhline(chart.even, color=_GREY, linewidth=0.9, zorder=0)
    _marks(axes, data)
    if len(handles) > 1:
        names = [series.name for series, _ in (*curves, *([other] if other is not None else []))]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return svg_base64(figure)


def _curve(axes: Axes, series: Series, points: list[Point], data: ChartData, *, colour: str) -> Line2D:
    """Broken where the policy was rolled back: the two ends are different policies."""
    x, y = zip(*_broken(points, data.rollbacks), strict=True)
    marked = len(points) == 1 or series.of == "evaluations"
    (line,) = axes.plot(x, y, series.style, color=colour, linewidth=1.6, marker="o" if marked else "", markersize=4)
    if series.low is not None and series.high is not None:
        records = data.steps if series.of == "steps" else data.evaluations
        bars = [
            (step, low, high)
            for record in records
            if (step := number(record, "step")) is not None
            and (low := _value(record, series.low)) is not None
            and (high := _value(record, series.high)) is not None
        ]
        for step, low, high in bars:
            axes.vlines(step, low, high, color=colour, linewidth=1.2, alpha=0.6)
    return line


def _broken(points: Sequence[Point], rollbacks: Sequence[Rollback]) -> list[Point]:
    gaps = [(rollback.at_step + 0.5, math.nan) for rollback in rollbacks]
    return sorted([*points, *gaps], key=lambda point: point[0])


def _thresholds(axes: Axes, chart: Chart, limits: Mapping[str, Limit], values: Sequence[float]) -> None:
    """Those of the chart's signal that lie near enough to the values not to squash them."""
    limit = limits.get(chart.limit) if chart.limit is not None else None
    if limit is None:
        return
    span = max(max(values) - min(values), abs(max(values)) * 0.25, 1e-9) * _NEAR
    # The labels lie on the lines' far sides, so that two lines close by do not write over each other.
    below, above = (-2, "top"), (2, "bottom")
    pairs = ((limit.warn, _AMBER, "warn", below if limit.over else above),
             (limit.act, _RED, "act", above if limit.over else below))  # fmt: skip
    for threshold, colour, name, (offset, align) in pairs:
        if threshold is not None and min(values) - span <= threshold <= max(values) + span:
            axes.axhline(threshold, color=colour, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
            axes.annotate(name, (0, threshold), xycoords=("axes fraction", "data"), xytext=(2, offset),
                          textcoords="offset points", fontsize=7, color=colour, va=align)  # fmt: skip


def _marks(axes: Axes, data: ChartData) -> None:
    """Rollbacks, abandoned steps, and other versions of the reward model."""
    for start, end in abandoned(data.rollbacks):
        axes.axvspan(start + 0.5, end + 0.5, color=_RED, alpha=0.07, linewidth=0, zorder=0)
    low, high = axes.get_xlim()
    labelled = -math.inf
    for rollback in data.rollbacks:
        axes.axvline(rollback.at_step + 0.5, color=_RED, linewidth=1.2, zorder=1)
        if rollback.to_step is not None and rollback.at_step - labelled > _LABEL_WIDTH * (high - low):
            labelled = rollback.at_step
            axes.annotate(f"→{rollback.to_step:.0f}", (rollback.at_step + 0.5, 1.0), va="top", fontsize=7, color=_RED,
                          xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points", zorder=6,
                          bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.8})  # fmt: skip
    for step in reward_model_changes(data.steps):
        axes.axvline(step, color=_GREY, linestyle=":", linewidth=1.2, zorder=0)


def abandoned(rollbacks: Sequence[Rollback]) -> list[tuple[float, float]]:
    """(step that was kept, last step that was not), overlapping ones as one."""
    spans: list[tuple[float, float]] = []
    told = [(rollback.to_step, rollback.at_step) for rollback in rollbacks if rollback.to_step is not None]
    for start, end in sorted(told):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def reward_model_changes(steps: Iterable[Json]) -> list[float]:
    """The steps at which another version of the reward model's scores began."""
    seen = [(step, str(record["rm_version"])) for record in steps
            if record.get("rm_version") and (step := number(record, "step")) is not None]  # fmt: skip
    return [step for (_, before), (step, version) in itertools.pairwise(seen) if version != before]


def _value(record: Json, key: str) -> float | None:
    outer, dot, inner = key.partition(".")
    if not dot:
        return number(record, key)
    section = record.get(outer)
    return number(section, inner) if isinstance(section, dict) else None


# ---------------------------------------------------------------- over-optimisation


def overoptimisation_svg(data: ChartData) -> str | None:
    """Gold reward, else the judge's win rate, against √KL: the axes of Gao et al. 2022, "Scaling laws for reward model
    overoptimization". None without both values in some step."""
    gold = data.points(Series("gold_mean", "gold"))
    unit = "gold, points"
    if not gold:
        gold, unit = data.points(Series("win_rate", "win rate", of="evaluations")), "win rate"
    distance = dict(data.points(Series("kl_nats_per_sequence", "KL")))
    points = [(step, math.sqrt(max(0.0, distance[step])), y) for step, y in gold if step in distance]
    if not points:
        return None
    title = "Over-optimisation: what is wanted against distance"
    figure, axes = empty_chart(title, "√KL, √(nats per sequence)", unit, size_inches=_SIZE_INCHES)
    for branch in _branches(points, data.rollbacks):
        axes.plot([x for _, x, _ in branch], [y for *_, y in branch], color="#afb8c1", linewidth=1, zorder=1)
    steps, distance_x, gold_y = zip(*points, strict=True)
    dots = axes.scatter(distance_x, gold_y, c=steps, cmap="viridis", s=20, zorder=3)
    for before, after in itertools.pairwise(_branches(points, data.rollbacks)):
        (_, *start), (_, *end) = before[-1], after[0]
        axes.annotate("", xy=(end[0], end[1]), xytext=(start[0], start[1]), zorder=4,
                      arrowprops={"arrowstyle": "-|>", "color": _RED, "linewidth": 1.3, "linestyle": "--",
                                  "connectionstyle": "arc3,rad=0.25"})  # fmt: skip
        axes.plot(*start, marker="X", color=_RED, markersize=8, zorder=5)
    if len(points) > 1:
        bar = figure.colorbar(dots, ax=axes)
        bar.set_label("step", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return svg_base64(figure)


def _branches(
    points: Sequence[tuple[float, float, float]], rollbacks: Sequence[Rollback]
) -> list[list[tuple[float, float, float]]]:
    """(step, x, y) in runs between rollbacks, none of them empty."""
    ends = sorted(rollback.at_step for rollback in rollbacks)
    groups = itertools.groupby(points, key=lambda point: sum(end < point[0] for end in ends))
    return [list(group) for _, group in groups]
