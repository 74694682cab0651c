"""The report's charts, as base64 of SVG.

Legend: a *step record* is one line of metrics.jsonl; a value that is absent, null or not finite is a gap in its curve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.charts import empty_chart, svg_base64
from cluster.files import Json
from keel.display import number

if TYPE_CHECKING:
    pass

_SIZE_INCHES = (4.6, 2.7)
_COLOURS = ("#0969da", "#cf222e", "#1a7f37")


@dataclass(frozen=True)
class Series:
    """One curve: the record's key, its name in the legend, its line style."""

    key: str
    name: str
    style: str = "-"


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    series: tuple[Series, ...]


CHARTS: tuple[Chart, ...] = (
    Chart("Reward", "z against the SFT policy", (Series("proxy_z", "reward"),)),
    Chart("Gold reward", "points", (Series("gold_mean", "gold"),)),
    Chart(
        "KL to the SFT policy",
        "nats per sequence",
        (Series("kl_nats_per_sequence", "KL"), Series("kl_target_nats_per_sequence", "target", "--")),
    ),
    Chart("KL coefficient β", "reward per nat", (Series("beta", "β"),)),
    Chart("Entropy", "nats per token", (Series("entropy_nats_per_token", "entropy"),)),
    Chart("Answer length", "tokens", (Series("response_tokens_mean", "mean"),)),
    Chart("Staleness", "versions", (Series("staleness_mean", "mean"),)),
    Chart("Throughput", "tokens per second", (Series("tokens_per_second_rollout", "rollout"),)),
    Chart("Time of a step", "seconds", (Series("step_seconds", "step"), Series("idle_seconds", "waiting", "--"))),
    Chart("Shares", "fraction", (Series("clip_fraction", "clipped"), Series("truncated_fraction", "truncated", "--"))),
)


def chart_svg(chart: Chart, steps: Sequence[Json]) -> str | None:
    """The chart over `steps`, base64 of SVG; None when no step has any of its values."""
    curves = [(series, points) for series in chart.series if (points := _points(steps, "step", series.key))]
    if not curves:
        return None
    figure, axes = empty_chart(chart.title, "step", chart.unit, size_inches=_SIZE_INCHES)
    for colour, (series, points) in zip(_COLOURS, curves, strict=False):
        steps_x, values_y = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else ""
        axes.plot(steps_x, values_y, series.style, color=colour, label=series.name, marker=marker, linewidth=1.6)
    for step in reward_model_changes(steps):
        axes.axvline(step, color="#57606a", linestyle=":", linewidth=1.2, zorder=0)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    return svg_base64(figure)


def reward_model_changes(steps: Sequence[Json]) -> list[float]:
    """The steps at which another version of the reward model's scores began."""
    seen = [(step, str(record["rm_version"])) for record in steps
            if record.get("rm_version") and (step := number(record, "step")) is not None]  # fmt: skip
    return [step for (_, before), (step, version) in itertools.pairwise(seen) if version != before]


def gold_against_distance_svg(steps: Sequence[Json]) -> str | None:
    """Gold reward against √KL, the axes of Gao et al. 2022, "Scaling laws for reward model overoptimization".

    Gold that falls while the distance grows is over-optimisation. None without both values in some step.
    """
    points = [(math.sqrt(max(0.0, kl)), gold) for kl, gold in _points(steps, "kl_nats_per_sequence", "gold_mean")]
    if not points:
        return None
    figure, axes = empty_chart(
        "Gold reward against distance", "√KL, √(nats per sequence)", "points", size_inches=_SIZE_INCHES
    )
    distance_x, gold_y = zip(*points, strict=True)
    axes.plot(distance_x, gold_y, color="#d0d7de", linewidth=1)
    marks = axes.scatter(distance_x, gold_y, c=range(len(points)), cmap="viridis", s=14, zorder=3)
    figure.colorbar(marks, ax=axes, ticks=[]).set_label("order of steps", fontsize=8)
    return svg_base64(figure)


def _points(steps: Sequence[Json], x_key: str, y_key: str) -> list[tuple[float, float]]:
    pairs = [(number(record, x_key), number(record, y_key)) for record in steps]
    return [(x, y) for x, y in pairs if x is not None and y is not None]
