"""What came out: table.md for people, table.json for programs, and gold against √KL of the four arms as a figure.

The figure has the axes of Gao et al. 2022: gold that falls while the distance grows is over-optimisation.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cluster.charts import empty_chart, svg_base64
from cluster.files import atomic_write_bytes, atomic_write_text
from examples.guard_experiment.arms import ARMS
from examples.guard_experiment.bars import Bar, bars_of, clean_runs
from examples.guard_experiment.records import RunRecord, value

TABLE: Final = "table.md"
FIGURE: Final = "gold_against_distance.svg"
_MARK: Final = {True: "pass", False: "FAIL", None: "open"}
_COLOURS: Final = dict(zip((arm.name for arm in ARMS), ("#cf222e", "#9a6700", "#0969da", "#1a7f37"), strict=True))
_COLUMNS: Final = (
    "run", "steps", "gold: SFT", "lowest (step)", "end", "KL, end", "effect from", "warned", "to act", "rolled back",
    "diagnosis", "bars",
)  # fmt: skip


def write_table(out: Path, records: Sequence[RunRecord]) -> list[Bar]:
    """table.md, table.json and the figure. Returns all bars, those over several runs last."""
    shown = [record for record in records if record.steps]
    overall = clean_runs(shown)
    all_bars = [bar for record in shown for bar in bars_of(record)] + [overall]
    atomic_write_text(out / TABLE, markdown(shown, overall))
    rows = {"runs": [_row(record) for record in shown], "clean_runs": _bar(overall)}
    atomic_write_text(out / "table.json", json.dumps(rows, indent=1))
    figure = gold_figure(shown)
    if figure is not None:
        atomic_write_bytes(out / FIGURE, figure)
    return all_bars


def markdown(records: Sequence[RunRecord], overall: Bar) -> str:
    """The table and, run by run, what was asked and what was found."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    lines += [f"| {' | '.join(_cells(record))} |" for record in records]
    lines += ["", f"Clean runs: {overall.asked}: **{_MARK[overall.passed]}** ({overall.found})", ""]
    lines += ["| run | asked | found | |", "|---|---|---|---|"]
    for record in records:
        for bar in bars_of(record):
            lines.append(f"| {_name(record)} | {bar.asked} | {bar.found} | {_MARK[bar.passed]} |")
    return "\n".join(lines) + "\n"


def gold_figure(records: Sequence[RunRecord]) -> bytes | None:
    """SVG: a line a run of the four arms, its end marked; None without a point."""
    figure, axes = empty_chart("Gold against distance", "√KL, √nats per answer", "gold", size_inches=(7.0, 4.5))
    named: set[str] = set()
    for record in sorted(records, key=lambda record: record.arm.title):
        colour = _COLOURS.get(record.arm.name)
        points = _points(record)
        if colour is None or not points:
            continue
        distance_x, gold_y = zip(*points, strict=True)
        label = None if record.arm.name in named else record.arm.title
        named.add(record.arm.name)
        axes.plot(distance_x, gold_y, color=colour, linewidth=1.2, alpha=0.8, label=label)
        axes.plot(distance_x[-1], gold_y[-1], "o", color=colour, markersize=5)
    if not named:
        return None
    golds = [record.gold_sft for record in records if record.gold_sft is not None]
    if golds:
        axes.axhline(sum(golds) / len(golds), color="#57606a", linestyle=":", linewidth=1.2, label="before training")
    axes.legend(frameon=False, fontsize=8)
    return base64.b64decode(svg_base64(figure))


def counted(bars: Sequence[Bar]) -> str:
    """'12 pass, 1 FAIL, 3 open'."""
    count = Counter(_MARK[bar.passed] for bar in bars)
    return ", ".join(f"{count[mark]} {mark}" for mark in _MARK.values() if count[mark])


def _points(record: RunRecord) -> list[tuple[float, float]]:
    found = [(value(step, "kl_nats_per_sequence"), value(step, "gold_mean")) for step in record.steps]
    return [(math.sqrt(max(0.0, kl)), gold) for kl, gold in found if kl is not None and gold is not None]


def _cells(record: RunRecord) -> list[str]:
    lowest = record.gold_lowest
    effect = record.effect_begins if record.arm.named else None
    act = "–" if record.detected is None else f"{record.detected}: {', '.join(record.detected_by)}"
    bars = bars_of(record)
    marks = ", ".join(f"{bar.name}: {_MARK[bar.passed]}" for bar in bars)
    return [
        _name(record),
        f"{record.last_step}" + (" (halted)" if record.halted else "" if record.complete else " (unfinished)"),
        _number(record.gold_sft),
        "–" if lowest is None else f"{lowest[1]:.2f} ({lowest[0]})",
        _number(record.gold_end),
        _number(record.kl_end),
        _number(effect),
        _number(record.first_warning),
        act,
        ", ".join(map(str, record.rollbacks)) or "–",
        ", ".join((record.diagnosis or ())[:2]) or "–",
        marks or "–",
    ]


def _row(record: RunRecord) -> dict[str, Any]:
    lowest = record.gold_lowest
    return {
        "arm": record.arm.name,
        "seed": record.seed,
        "title": record.arm.title,
        "complete": record.complete,
        "halted": record.halted,
        "steps": record.last_step,
        "seconds": record.seconds,
        "gold_sft": record.gold_sft,
        "gold_lowest": None if lowest is None else lowest[1],
        "gold_lowest_step": None if lowest is None else lowest[0],
        "gold_end": record.gold_end,
        "kl_end_nats_per_sequence": record.kl_end,
        "effect_from_step": record.effect_begins,
        "first_warning_step": record.first_warning,
        "detected_step": record.detected,
        "detected_by": list(record.detected_by),
        "rollbacks_after_steps": list(record.rollbacks),
        "diagnosis": None if record.diagnosis is None else list(record.diagnosis),
        "bars": [_bar(bar) for bar in bars_of(record)],
    }


def _bar(bar: Bar) -> dict[str, Any]:
    return {"name": bar.name, "asked": bar.asked, "passed": bar.passed, "found": bar.found}


def _name(record: RunRecord) -> str:
    return f"{record.arm.title}, seed {record.seed}"


def _number(found: float | None) -> str:
    if found is None:
        return "–"
    return str(found) if isinstance(found, int) else f"{found:.2f}"
