"""An audit in a terminal: the findings, the words, the annotators."""

from __future__ import annotations

from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from reward_service.audit.cues import Cue
from reward_service.audit.records import AnnotatorFacts, Audit, Draw, Finding, Level

_WIDTH: Final = 118
_MOST_CUES: Final = 15
_MOST_ANNOTATORS: Final = 30
_STYLES: Final[dict[Level, str]] = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def print_audit(audit: Audit) -> None:
    """To the terminal; at a fixed width where the output is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(render(audit))


def render(audit: Audit) -> RenderableType:
    parts: list[RenderableType] = [_findings(audit)]
    if audit.cues:
        parts.append(_cues(audit.cues[:_MOST_CUES], all_of_them=len(audit.cues)))
    if audit.annotator_cues:
        parts.append(_annotator_cues(audit.annotator_cues[:_MOST_CUES]))
    if audit.annotators:
        parts.append(_annotators(audit.annotators[:_MOST_ANNOTATORS]))
    return Group(*parts)


def plain(text: str) -> str:
    """A user's text on one line, with nothing in it that a terminal would obey."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _findings(audit: Audit) -> Table:
    table = Table(title=Text(plain(f"{audit.source}: {audit.pairs:,} pairs")), title_justify="left", show_lines=True)
    table.add_column("")
    table.add_column("finding", no_wrap=True)
    table.add_column("what it is, what it means, what to do", ratio=1)
    for finding in audit.findings:
        table.add_row(
            Text(finding.level, style=_STYLES[finding.level]), finding.name.replace("_", " "), _story(finding)
        )
    return table


def _story(finding: Finding) -> Text:
    story = Text(plain(finding.value), style="bold" if finding.level != "ok" else "")
    story.append(f"\n{plain(finding.meaning)}", style="not bold")
    if finding.advice:
        story.append(f"\n→ {plain(finding.advice)}", style="not bold cyan")
    return story


def _cues(cues: tuple[Cue, ...], *, all_of_them: int) -> Table:
    title = f"words that go with the label: the strongest {len(cues)} of {all_of_them}"
    table = Table(title=title, title_justify="left")
    for heading in ("word", "favours", "of chosen", "of rejected", "log-odds", "z", "q", "alone right"):
        table.add_column(heading, justify="left" if heading in ("word", "favours") else "right")
    for cue in cues:
        table.add_row(
            _word(cue.term, cue.also), cue.favours, f"{cue.chosen_share:.1%}", f"{cue.rejected_share:.1%}",
            f"{cue.log_odds:+.2f}", f"{cue.z:+.1f}", f"{cue.q:.1g}", f"{cue.accuracy:.1%}",
        )  # fmt: skip
    return table


def _word(term: str, also: tuple[str, ...]) -> Text:
    return Text(plain(f"{term} (with {', '.join(also[:4])})" if also else term))


def _annotator_cues(draws: tuple[Draw, ...]) -> Table:
    table = Table(title="words that draw one annotator more than the others", title_justify="left")
    for heading in ("word", "annotator", "effect, votes", "z", "q"):
        table.add_column(heading, justify="left" if heading in ("word", "annotator") else "right")
    for draw in draws:
        table.add_row(
            _word(draw.term, draw.also),
            Text(plain(draw.annotator)),
            f"{draw.effect:+.2f}",
            f"{draw.z:+.1f}",
            f"{draw.q:.1g}",
        )
    return table


def _annotators(annotators: tuple[AnnotatorFacts, ...]) -> Table:
    table = Table(title="annotators", title_justify="left")
    table.add_column("annotator")
    table.add_column("votes", justify="right")
    table.add_column("with the majority of the others")
    table.add_column("drawn, more than the others, by", ratio=1)
    for one in annotators:
        leanings = ", ".join(f"{leaning.feature} (z {leaning.z:+.1f})" for leaning in one.leanings)
        agreement = Text("–" if one.agreement is None else str(one.agreement), style="red" if one.against else "")
        table.add_row(Text(plain(one.annotator)), f"{one.votes:,}", agreement, Text(plain(leanings) or "–"))
    return table
