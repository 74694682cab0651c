"""What the dashboard is made of: panels, the expressions that many of them share, and their form in Grafana's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

SCHEMA_VERSION: Final = 39
COLUMNS: Final = 24
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
RUN: Final = 'run=~"$run"'


@dataclass(frozen=True)
class Panel:
    """A diagram, or with `stat` the last value in large. Each of `series` is (expression, legend), where RUN stands for
    the selector of the chosen runs."""

    title: str
    series: Sequence[tuple[str, str]]
    unit: str = "short"
    help: str = ""
    limit: float | None = None
    """A line at the value that an alert rule has."""
    stat: bool = False
    width: int = 8
    height: int = 7
    fraction: bool = False
    """Values from 0 to 1."""
    levels: bool = False
    """Values are 0 ok, 1 warn, 2 act: a strip of colours for each series, or with `stat` one in its colour."""


@dataclass(frozen=True)
class Annotation:
    """Marks in every diagram where `expr` has a value; `title` may name its labels."""

    name: str
    expr: str
    title: str
    colour: str = "purple"


def rate(name: str, *, by: str = "run", where: str = "") -> str:
    return f"sum by ({by}) (rate({name}{{RUN{where}}}[$__rate_interval]))"


def gauge(name: str, *, by: str = "run", where: str = "") -> str:
    return f"max by ({by}) ({name}{{RUN{where}}})"


def quantile(q: float, name: str, *, by: str = "run") -> str:
    return f"histogram_quantile({q}, sum by ({by}, le) (rate({name}_bucket{{RUN}}[$__rate_interval])))"


def mean(name: str, *, by: str = "run") -> str:
    return f"{rate(f'{name}_sum', by=by)} / {rate(f'{name}_count', by=by)}"


def spread(name: str, legend: str = "{{run}}", *, by: str = "run") -> list[tuple[str, str]]:
    """Median and 95th percentile."""
    return [(quantile(0.5, name, by=by), f"{legend} p50"), (quantile(0.95, name, by=by), f"{legend} p95")]


def stat(title: str, expr: str, *, unit: str = "short", help: str = "") -> Panel:
    return Panel(title, [(expr, "{{run}}")], unit=unit, help=help, stat=True, width=4, height=4)


def dashboard(rows: Mapping[str, Sequence[Panel]], *, annotations: Sequence[Annotation]) -> dict[str, Any]:
    return {
        "uid": "keel-runs",
        "title": "Keel runs",
        "tags": ["keel"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_annotation(each) for each in annotations]},
        "links": [],
        "templating": {"list": _variables()},
        "panels": _panels(rows),
    }


def _variables() -> list[dict[str, Any]]:
    source = {
        "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1,
        "hide": 0, "multi": False, "includeAll": False, "options": [], "current": {},
    }  # fmt: skip
    query = 'label_values(up{run!=""}, run)'
    run = {
        "name": "run", "label": "Run", "type": "query", "datasource": SOURCE, "definition": query,
        "query": {"query": query, "refId": "run"}, "refresh": 2, "sort": 1, "hide": 0, "multi": True,
        "includeAll": True, "allValue": ".+", "options": [], "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip
    return [source, run]


def _panels(rows: Mapping[str, Sequence[Panel]]) -> list[dict[str, Any]]:
    """Rows one under another; in a row, panels from left to right, with a new line where the next one does not fit."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows.items():
        made.append({
            "id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
        })  # fmt: skip
        x, y, line = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, line = 0, y + line, 0
            position = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            made.append(_panel(panel, number=len(made) + 1, position=position))
            x, line = x + panel.width, max(line, panel.height)
        y += line
    return made


def _annotation(annotation: Annotation) -> dict[str, Any]:
    return {
        "name": annotation.name,
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": annotation.colour,
        "target": {"refId": "Anno", "expr": annotation.expr.replace("RUN", RUN), "interval": "30s"},
        "titleFormat": annotation.title,
        "textFormat": "{{run}}",
        "tagKeys": "run",
    }


def _panel(panel: Panel, *, number: int, position: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "stat" if panel.stat else "state-timeline" if panel.levels else "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "gridPos": position,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": expr.replace("RUN", RUN),
                "legendFormat": legend,
                "instant": panel.stat,
                "range": not panel.stat,
            }
            for index, (expr, legend) in enumerate(panel.series)
        ],
        "fieldConfig": {"defaults": _field_defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _field_defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.levels:
        return defaults | _level_colours()
    if panel.stat:
        return defaults
    custom: dict[str, Any] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 5, "showPoints": "never"}
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
        custom["thresholdsStyle"] = {"mode": "line"}
    if panel.fraction:
        defaults |= {"min": 0, "max": 1}
    return defaults | {"color": {"mode": "palette-classic"}, "custom": custom}


def _level_colours() -> dict[str, Any]:
    levels = (("0", "ok", "green"), ("1", "warn", "orange"), ("2", "act", "red"))
    return {
        "color": {"mode": "thresholds"},
        "custom": {"fillOpacity": 80, "lineWidth": 0},
        "noValue": "ok",
        "mappings": [{
            "type": "value",
            "options": {
                value: {"text": text, "color": colour, "index": index}
                for index, (value, text, colour) in enumerate(levels)
            },
        }],
    }  # fmt: skip


def _options(panel: Panel) -> dict[str, Any]:
    if panel.stat:
        return _stat_options() | ({"colorMode": "value"} if panel.levels else {})
    if panel.levels:
        return _graph_options() | {"mergeValues": True, "showValue": "never", "alignValue": "left", "rowHeight": 0.9}
    return _graph_options()


def _graph_options() -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _stat_options() -> dict[str, Any]:
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "none",
        "graphMode": "none",
        "textMode": "auto",
        "orientation": "auto",
    }
