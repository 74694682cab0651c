"""The report's part about the guard: its verdict in a sentence, the signals over time as strips, what it did and why.

A strip is one signal, a cell one step, coloured by where the value lies against the run's thresholds; pale cells are
past a threshold that the verdict, with its patience, had not taken up at that step.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from cluster.files import Json
from keel.display import number
from keel.plots import Rollback
from keel.report_html import folded, table, text
from keel.report_records import RunRecords, guard_of_step
from keel.signal_levels import BY_INTERVAL, Limit, grouped, level_of, limits, severity, signals_of
from learner.guard.record import Level

_EVENTS_SHOWN: Final = 20
_NAMED: Final = 4
"""Rollbacks that the banner names."""
_MAX_CELLS: Final = 240
"""Longer runs have several steps in a cell, which is as bad as the worst of them."""
_COLOURS: Final = {"ok": "#b4e3be", "over": "#f9e2a0", "warn": "#e3a008", "past": "#ffc4bd", "act": "#cf222e"}
_ORDER: Final = ("ok", "over", "warn", "past", "act")
_HEAD: Final = frozenset({"time_s", "step", "version", "branch", "event", "action", "signals", "why", "reason"})
"""Of every event; the rest are an action's own fields."""


def banner(records: RunRecords) -> str:
    """What the guard has to say about the run, in a sentence or two; nothing for a run without one."""
    if not records.guarded:
        return ""
    actions, events = records.actions, records.events
    last = guard_of_step(records.steps[-1]) if records.steps else {}
    now = level_of(last.get("level"))
    halt = next((action for action in reversed(actions) if action.get("action") == "halt"), None)
    if halt is not None and records.steps and _step(records.steps[-1]) > _step(halt):
        halt = None  # It went on, with other settings.
    went_back = [action for action in actions if action.get("action") == "roll_back"]
    first = next((event for event in events if event.get("event") in ("warn", "act")), None)
    sentences = []
    if halt is not None:
        state = "act"
        sentences.append(f"<b>The guard halted the run</b> at step {text(halt.get('step'))}: {_reason(halt)}.")
    elif now is not Level.OK:
        state = now.value
        over = [*_names(last.get("act")), *_names(last.get("warn"))]
        sentences.append(
            f"<b>The guard's level at the last step is {now.value}</b>: {_codes(over) or 'no signal named'}."
        )
    else:
        state = "ok"
        quiet = not any(event.get("event") in ("warn", "act") for event in events)
        sentences.append(
            "<b>The guard had nothing to say.</b>" if quiet else "<b>At the last step the guard is at ease.</b>"
        )
    if first is not None:
        signals = first.get("signals")
        names = list(signals) if isinstance(signals, dict) else []
        sentences.append(f"First sign at step {text(first.get('step'))}: {_codes(names) or _reason(first)}.")
    if went_back:
        places = ", ".join(f"{text(one.get('step'))} → {text(one.get('to_step'))}" for one in went_back[:_NAMED])
        places += ", …" if len(went_back) > _NAMED else ""
        sentences.append(f"Rollbacks: {len(went_back)} of at most {records.guard.max_rollbacks} (steps {places}).")
    return f'<div class="state {state}">{" ".join(sentences)}</div>'


def _step(record: Json) -> float:
    return number(record, "step") or 0.0


def signal_strips(records: RunRecords) -> str:
    """Every recorded signal over the steps, by group, below the verdict."""
    if not records.guarded or not records.steps:
        return ""
    known = limits(records.guard.thresholds)
    columns = _columns(records.steps)
    rollbacks = records.chart_data.rollbacks
    by_step = [signals_of(step) for step in records.steps]
    names = list(dict.fromkeys(name for signals in by_step for name in signals))
    rows = [_axis(columns), _row("<b>verdict</b>", _verdict_runs(columns), columns, rollbacks, ("", "", ""))]
    for group, members in grouped(names):
        rows.append(f'<tr class="group"><td colspan="5">{html.escape(group)}</td></tr>')
        rows.extend(_signal_row(name, known.get(name), columns, rollbacks) for name in members)
    silent = [name for name in known if name not in names]
    note = f'<p class="note">Not told in this run: {_codes(silent)}.</p>' if silent else ""
    head = "<tr><th>signal</th><th></th><th>worst</th><th>last</th><th>warn / act</th></tr>"
    return (
        f"<h2>Signals</h2>\n{_legend()}\n"
        f'<table class="strips">{head}{"".join(rows)}</table>{note}'
    )  # fmt: skip


def _legend() -> str:
    keys = (
        ("ok", "within"), ("over", "past warn, for less than the guard's patience"), ("warn", "warned"),
        ("past", "past act, for less than its patience"), ("act", "acted on"),
    )  # fmt: skip
    shown = "".join(f'<span class="key" style="background:{_COLOURS[key]}"></span> {name}' for key, name in keys)
    return (
        '<p class="note">One row a signal, time from left to right; names are keys of guard.thresholds. Rest the '
        f"pointer on a stretch for its values. Dark line: rolled back. Blank: not told at that step.<br>{shown}</p>"
    )


def _columns(steps: Sequence[Json]) -> list[list[Json]]:
    size = -(-len(steps) // _MAX_CELLS)
    return [list(steps[at : at + size]) for at in range(0, len(steps), size)]


def _axis(columns: Sequence[Sequence[Json]]) -> str:
    every = max(1, -(-len(columns) // 10))
    ticks = "".join(
        f'<span style="position:absolute;left:{100 * at / len(columns):.2f}%">{text(columns[at][0].get("step"))}</span>'
        for at in range(0, len(columns), every)
    )
    return (
        '<tr class="axis"><td class="note">step</td><td class="strip note">'
        f'<div style="position:relative;height:1.3em">{ticks}</div></td><td></td><td></td><td></td></tr>'
    )


def _verdict_runs(columns: Sequence[Sequence[Json]]) -> list[tuple[str, str]]:
    """(state, what the pointer tells) of each column."""
    cells: list[tuple[str, str]] = []
    for column in columns:
        sections = [section for step in column if (section := guard_of_step(step))]
        if not sections:
            cells.append(("", ""))
            continue
        worst = max(sections, key=lambda section: severity(level_of(section.get("level"))))
        named = ", ".join([*_names(worst.get("act")), *_names(worst.get("warn"))])
        cells.append((level_of(worst.get("level")).value, named))
    return cells


def _signal_row(
    name: str, limit: Limit | None, columns: Sequence[Sequence[Json]], rollbacks: Sequence[Rollback]
) -> str:
    cells: list[tuple[str, str]] = []
    values: list[float] = []
    for column in columns:
        here = [(value, step) for step in column if (value := signals_of(step).get(name)) is not None]
        values.extend(value for value, _ in here)
        cells.append(max((_cell(name, value, limit, step) for value, step in here),
                         key=lambda cell: _ORDER.index(cell[0]), default=("", "")))  # fmt: skip
    worst = text(limit.worst(values)) if limit is not None else text(max(values))
    bounds = f"{limit.sign} {text(limit.warn)} / {text(limit.act)}" if limit is not None else ""
    return _row(f"<code>{html.escape(name)}</code>", cells, columns, rollbacks, (worst, text(values[-1]), bounds))


def _cell(name: str, value: float, limit: Limit | None, step: Json) -> tuple[str, str]:
    """The state of one value, and the value."""
    section = guard_of_step(step)
    if name in _names(section.get("act")):
        state = "act"
    elif name in _names(section.get("warn")):
        state = "warn"
    elif name in BY_INTERVAL:
        state = "ok"
    else:
        state = {Level.OK: "ok", Level.WARN: "over", Level.ACT: "past"}[limit.level(value) if limit else Level.OK]
    return state, f"{value:.4g}"


def _row(
    label: str,
    cells: Sequence[tuple[str, str]],
    columns: Sequence[Sequence[Json]],
    rollbacks: Sequence[Rollback],
    figures: tuple[str, str, str],
) -> str:
    marks = "".join(
        f'<rect x="{at - 0.12:.2f}" y="0" width="0.24" height="1" fill="#24292f"/>'
        for rollback in rollbacks
        if (at := _column_after(columns, rollback.at_step)) is not None
    )
    strip = (
        f'<svg viewBox="0 0 {len(columns)} 1" preserveAspectRatio="none">{"".join(_runs(cells, columns))}{marks}</svg>'
    )
    right = "".join(f'<td class="number">{figure}</td>' for figure in figures)
    return f'<tr><td>{label}</td><td class="strip">{strip}</td>{right}</tr>'


def _runs(cells: Sequence[tuple[str, str]], columns: Sequence[Sequence[Json]]) -> Iterator[str]:
    """Neighbours of the same state are one rectangle, which tells its first and last value."""
    at = 0
    for state, group in itertools.groupby(cells, key=lambda cell: cell[0]):
        told = [what for _, what in group]
        if state:
            first, last = columns[at][0].get("step"), columns[at + len(told) - 1][-1].get("step")
            steps = f"step {text(first)}" if first == last else f"steps {text(first)}–{text(last)}"
            values = told[0] if len(set(told)) == 1 else f"{told[0]} … {told[-1]}"
            yield (
                f'<rect x="{at}" y="0" width="{len(told)}" height="1" fill="{_COLOURS[state]}">'
                f"<title>{steps}: {html.escape(state)} {html.escape(values)}</title></rect>"
            )
        at += len(told)


def _column_after(columns: Sequence[Sequence[Json]], step: float) -> int | None:
    """The left edge of the first column of later steps."""
    starts = [number(column[0], "step") or 0.0 for column in columns]
    return next((at for at, start in enumerate(starts) if start > step), len(columns) if columns else None)


# ---------------------------------------------------------------- events


def event_table(records: RunRecords) -> str:
    """What the guard said and did, in order."""
    if not records.events:
        return ""
    rows = [_event_row(event) for event in records.events]
    titles = ("step", "version", "branch", "what", "signals", "why")
    shown, more = table(titles, rows[:_EVENTS_SHOWN], numbers=(0, 1, 2)), rows[_EVENTS_SHOWN:]
    if more:
        shown += folded(f"{len(more)} later events", table(titles, more, numbers=(0, 1, 2)))
    return f"<h2>What the guard said and did</h2>\n{shown}"


def _event_row(event: Json) -> tuple[str, ...]:
    what = str(event.get("event", "?"))
    if what == "action":
        own = {key: value for key, value in event.items() if key not in _HEAD and value is not None}
        fields = ", ".join(f"{html.escape(key)} {text(value)}" for key, value in own.items())
        shown = f"<b>{text(event.get('action'))}</b>" + (f" ({fields})" if fields else "")
    else:
        shown = f'<span class="level {level_of(what).value}">{html.escape(what)}</span>'
    signals = event.get("signals")
    named = ", ".join(
        f"<code>{html.escape(str(name))}</code> {text(value)}" for name, value in signals.items()
    ) if isinstance(signals, Mapping) else ""  # fmt: skip
    return (
        text(event.get("step")),
        text(event.get("version")),
        text(event.get("branch")),
        shown,
        named,
        _reason(event),
    )


def _reason(event: Json) -> str:
    """Escaped."""
    why, reason = event.get("why"), event.get("reason")
    return text(reason if isinstance(reason, str) and reason else why if isinstance(why, str) else "")


def _names(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _codes(names: Sequence[str]) -> str:
    return ", ".join(f"<code>{html.escape(name)}</code>" for name in names)
