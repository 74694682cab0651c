"""The validation card as files: card.json for programs, card.md for terminals and repositories, card.html for people.

The HTML stands on its own, plots embedded, and its policy forbids scripts and anything from elsewhere. What models,
prompts and annotators wrote is escaped in both; control characters, which a terminal would obey, are shown as such.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from cluster.errors import DataError
from cluster.files import atomic_write_bytes
from reward_service.card.findings import rate_text
from reward_service.card.plots import charts
from reward_service.card.records import (
    CARD_HTML,
    CARD_JSON,
    CARD_MARKDOWN,
    Card,
    NamedRate,
    Rate,
    ShownAnswer,
    ShownProbe,
)

SHOWN_CHARACTERS: Final = 600
"""Of a text, in Markdown and HTML; card.json has all of it."""

Rows = list[list[str]]
Table = tuple[str, list[str], Rows]
"""(title, header, rows of plain text)."""


def write_card(card: Card, directory: Path) -> Path:
    """Write card.json, card.md and card.html. Returns the latter's path. Raises OSError."""
    payload = msgspec.json.format(msgspec.json.encode(card), indent=1)
    atomic_write_bytes(directory / CARD_JSON, payload)
    atomic_write_bytes(directory / CARD_MARKDOWN, markdown(card).encode())
    atomic_write_bytes(directory / CARD_HTML, html_page(card).encode())
    return directory / CARD_HTML


def read_card(directory: Path) -> Card:
    """Raises DataError for none, or one that is damaged."""
    path = directory / CARD_JSON
    try:
        return msgspec.json.decode(path.read_bytes(), type=Card)
    except FileNotFoundError as error:
        raise DataError(
            "no validation card", got=f"{path} does not exist", do="run the rm stage: keel rm CONFIG"
        ) from error
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError("damaged validation card", got=f"{path}: {error}", do="run the rm stage again") from error


# ---------------------------------------------------------------- content, as plain text


def headline(card: Card) -> list[tuple[str, str]]:
    """The figures that come first."""
    found = [
        ("held-out accuracy", f"{card.accuracy.share:.3f}"),
        ("95 % interval", f"{card.accuracy.low:.2f}–{card.accuracy.high:.2f}"),
        ("length alone", "–" if card.length_only_accuracy is None else f"{card.length_only_accuracy:.3f}"),
        ("calibration error", f"{card.reliability.error:.3f}"),
        ("held-out pairs", f"{card.accuracy.n:,}"),
        ("members", str(card.members)),
    ]
    human = [rank for rank in card.rank if rank.against == "human scores"]
    return [*found, ("Spearman, human or gold", f"{human[-1].spearman:.2f}")] if human else found


def _tables(card: Card) -> Iterable[Table]:
    yield ("Findings", ["", "what", "value", "what it means", "what to do"], [
        [finding.level, finding.name, finding.value, finding.meaning, finding.advice] for finding in card.findings
    ])  # fmt: skip
    yield "Accuracy", ["on", "share", "95 %", "pairs"], _accuracies(card)
    yield "Score distributions", ["answers", "count", "mean", "std", "5 %", "25 %", "50 %", "75 %", "95 %"], [
        [found.source.replace("_", " "), f"{found.count:,}", f"{found.mean:+.3f}", f"{found.std:.3f}"]
        + [f"{value:+.2f}" for value in found.quantiles]
        for found in card.distributions
    ]  # fmt: skip
    if card.ks:
        yield "Kolmogorov–Smirnov distances", ["between", "distance", "p"], [
            [f"{each.first} and {each.second}".replace("_", " "), f"{each.distance:.3f}", f"{each.p:.2g}"]
            for each in card.ks
        ]  # fmt: skip
    if card.rank:
        yield "Rank correlation", ["answers", "against", "Spearman", "95 %", "Kendall", "n"], [
            [rank.source.replace("_", " "), rank.against, f"{rank.spearman:.3f}", f"{rank.low:.2f}–{rank.high:.2f}",
             f"{rank.kendall:.3f}", str(rank.n)]
            for rank in card.rank
        ]  # fmt: skip
    yield from _model_tables(card)


def _accuracies(card: Card) -> Rows:
    rows = [_rate_row("held-out pairs", card.accuracy)]
    optional = [
        ("training pairs", card.train_accuracy),
        ("training annotators' majority", card.training_annotators),
        ("held-out annotators' majority", card.held_out_annotators),
        ("pairs of like length", card.length.matched),
        ("length partialled out", card.length.partialled),
    ]
    rows += [_rate_row(name, rate) for name, rate in optional if rate is not None]
    for found in card.by_source:
        rows.append(_rate_row(f"source: {found.name}", found.rate))
    for each in card.annotators:
        rows.append(_rate_row(f"{each.annotator}'s votes" + (" (held out)" if each.held_out else ""), each.rate))
    buckets: Sequence[NamedRate] = (*card.length.by_difference, *card.length.by_length)
    return [*rows, *(_rate_row(found.name, found.rate) for found in buckets)]


def _rate_row(name: str, rate: Rate) -> list[str]:
    return [name, f"{rate.share:.3f}", f"{rate.low:.2f}–{rate.high:.2f}", f"{rate.n:,}"]


def _model_tables(card: Card) -> Iterable[Table]:
    part, other = card.ensemble, card.discriminator
    if part is not None:
        wrong = "–" if part.spread_when_wrong is None else f"{part.spread_when_wrong:.3f}"
        rows = [[f"accuracy of member {place}", f"{share:.3f}"] for place, share in enumerate(part.accuracies)]
        rows += [["pairs ordered alike", f"{part.agreement:.3f}"]]
        rows += [[f"spread on {name.replace('_', ' ')} answers (std)", f"{v:.3f}"] for name, v in part.spread.items()]
        rows += [["spread of margins where right / wrong (std)", f"{part.spread_when_right:.3f} / {wrong}"]]
        yield "Members", ["", ""], rows
    if other is not None:
        rows = [["its accuracy", rate_text(other.accuracy)], ["orders otherwise", rate_text(other.disagreement)]]
        for name, value in other.correlation.items():
            rows.append([f"correlation on {name.replace('_', ' ')} answers", f"{value:.3f}"])
        yield "Discriminator (kept out of the reward)", ["", ""], rows
    if card.probes:
        yield "Adversarial probes", ["kind", "attack", "passed", "95 %", "probes"], [
            [probe.kind.replace("_", " "), probe.what, *_rate_row("", probe.rate)[1:]] for probe in card.probes
        ]  # fmt: skip


def _text_tables(card: Card) -> Iterable[Table]:
    whose = "the policy's" if any(each.source == "policy" for each in card.highest) else "held-out"
    yield _answers(f"Highest scores of {whose} answers", card.highest)
    yield _answers(f"Lowest scores of {whose} answers", card.lowest)
    if card.discriminator is not None:
        yield _answers("Scored far above the discriminator", card.discriminator.doubted)
    failed = [(probe.kind, each) for probe in card.probes for each in probe.failed]
    if failed:
        header = ["probe", "prompt", "good answer", "attack that scored higher"]
        yield "Probes that it failed", header, [_probe_row(kind, each) for kind, each in failed]


def _answers(title: str, answers: Sequence[ShownAnswer]) -> Table:
    optional = [
        (name, values)
        for name, values in (
            ("discriminator", [each.discriminator for each in answers]),
            ("human or gold", [each.human_score for each in answers]),
        )
        if any(value is not None for value in values)
    ]
    header = ["score", "spread", *(name for name, _ in optional), "prompt", "answer"]
    return title, header, [
        [f"{each.score:+.2f}", f"{each.spread:.2f}"]
        + ["–" if (value := values[row]) is None else f"{value:+.2f}" for _, values in optional]
        + [visible(each.prompt), visible(each.answer)]
        for row, each in enumerate(answers)
    ]  # fmt: skip


def _probe_row(kind: str, probe: ShownProbe) -> list[str]:
    return [
        kind.replace("_", " "),
        visible(probe.prompt),
        f"{probe.honest_score:+.2f}  {visible(probe.honest)}",
        f"{probe.attack_score:+.2f}  {visible(probe.attack)}",
    ]


def visible(text: str) -> str:
    """A text without control and direction characters, cut at SHOWN_CHARACTERS."""
    cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in cut)


def _subtitle(card: Card) -> str:
    parent = f", from {card.parent}" if card.parent else ""
    return visible(f"version {card.number}, {card.reason}{parent}")


# ---------------------------------------------------------------- Markdown


def markdown(card: Card) -> str:
    """The card as Markdown, without plots."""
    lines = [f"# Reward model {card.version}: {card.verdict}", "", _markdown_cell(_subtitle(card)), ""]
    lines += [f"- **{reason}**" for reason in map(_markdown_cell, card.reasons)] or ["- Nothing to object to."]
    lines += ["", *_markdown_table([name for name, _ in headline(card)], [[value for _, value in headline(card)]])]
    for title, header, rows in (*_tables(card), *_text_tables(card)):
        lines += ["", f"## {title}", "", *_markdown_table(header, rows)]
    return "\n".join(lines) + "\n"


def _markdown_table(header: Sequence[str], rows: Rows) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(_markdown_cell(cell) for cell in row)} |" for row in rows]


def _markdown_cell(text: str) -> str:
    """One line that is no markup: punctuation which Markdown or HTML would read is escaped."""
    flat = " ".join(visible(text).split())
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#!" else char for char in flat)


# ---------------------------------------------------------------- HTML

_STYLE: Final = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h1 code { font-size: 1.4rem; } .note { color: #59636e; margin: .2rem 0 1rem; }
.verdict { display: inline-block; padding: .1rem .8rem; border-radius: 2rem; color: #fff; font-weight: 600;
  margin-left: .6rem; font-size: 1.1rem; vertical-align: 2px; }
.green { background: #1a7f37; } .amber { background: #9a6700; } .red { background: #cf222e; }
.unknown { background: #6e7781; }
.reasons { border-left: 4px solid #d1d9e0; padding: .3rem 1rem .3rem 2rem; margin: 1rem 0; }
.headline { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.headline div { border: 1px solid #d1d9e0; border-radius: 6px; padding: .5rem .9rem; min-width: 7rem; }
.headline b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; }
.charts figure { margin: 0; border: 1px solid #d1d9e0; border-radius: 6px; padding: .5rem; }
.charts img { width: 100%; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } td, th { border: 1px solid #d1d9e0; padding: .35rem .6rem; text-align: left;
  vertical-align: top; } th { background: #f6f8fa; }
td { white-space: pre-wrap; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; unicode-bidi: isolate; }
.wide { width: 100%; } .badge { color: #fff; border-radius: 1rem; padding: 0 .6rem; font-size: .85rem; }
.badge { white-space: nowrap; } td.fixed { white-space: nowrap; }
"""
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WIDE: Final = 4
"""Tables with at least so many columns fill the page."""
_LEVELS: Final = ("green", "amber", "red", "unknown")


def html_page(card: Card) -> str:
    """The whole page."""
    title = html.escape(f"Reward model {card.version}: {card.verdict}")
    cells = "".join(f"<div>{html.escape(name)}<b>{html.escape(value)}</b></div>" for name, value in headline(card))
    reasons = "".join(f"<li>{html.escape(visible(reason))}</li>" for reason in card.reasons)
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/svg+xml;base64,{svg}"></figure>'
        for name, svg in charts(card)
    )
    findings, *tables = [*_tables(card), *_text_tables(card)]
    body = "\n".join(
        [
            f"<h1>Reward model <code>{html.escape(card.version)}</code>"
            f'<span class="verdict {card.verdict}">{card.verdict}</span></h1>',
            f'<p class="note">{html.escape(_subtitle(card))}</p>',
            f'<ul class="reasons">{reasons or "<li>Nothing to object to.</li>"}</ul>',
            f'<div class="headline">{cells}</div>',
            _html_table(findings),
            f'<h2>Figures</h2>\n<div class="charts">{figures}</div>',
            *map(_html_table, tables),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    title, header, rows = table
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    head = f"<tr>{head}</tr>" if any(header) else ""
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
    wide = ' class="wide"' if len(header) >= _WIDE else ""
    return f'<h2>{html.escape(title)}</h2>\n<div class="scroll"><table{wide}>{head}{body}</table></div>'


def _html_cell(text: str) -> str:
    if text in _LEVELS:
        return f'<td><span class="badge {text}">{text}</span></td>'
    escaped = html.escape(visible(text))
    return f"<td{' class=fixed' if len(text) < 16 else ''}>{escaped}</td>"
