"""A diagnosis as JSON, Markdown, and for the terminal. The same sentences in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keel.diagnose.match import Match, Recommendation
from keel.diagnose.story import Diagnosis, GuardAction

if TYPE_CHECKING:
    from rich.console import Console

_AT_MOST = 24
"""Lines of the story that are shown; diagnosis.json has all."""


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Plain values. `pattern` is the best match's name; `matches` has it and the others, the best first."""
    return {
        "run": diagnosis.run,
        "state": diagnosis.state,
        "pattern": diagnosis.best.name,
        "strength": round(diagnosis.best.strength, 3),
        "headline": diagnosis.headline,
        "first_sign": (
            {"step": diagnosis.first_sign.step, "what": diagnosis.first_sign.text} if diagnosis.first_sign else None
        ),
        "matches": [_match_json(match) for match in diagnosis.matches],
        "weaker": [_match_json(match) for match in diagnosis.weaker],
        "story": [{"step": finding.step, "what": finding.text} for finding in diagnosis.story],
        "numbers": list(diagnosis.numbers),
        "guard": [
            {"step": one.step, "action": one.action, "detail": one.detail, "helped": one.helped, "effect": one.effect}
            for one in diagnosis.guard
        ],
        "recommendations": [
            {"change": one.change, "trade_off": one.trade_off, "set": list(one.lines), "for": list(names)}
            for one, names in diagnosis.recommendations
        ],
        "gaps": list(diagnosis.gaps),
    }


def _match_json(match: Match) -> dict[str, Any]:
    return {
        "name": match.name,
        "title": match.title,
        "kind": match.kind.value,
        "strength": round(match.strength, 3),
        "first_step": match.first_step,
        "evidence": list(match.evidence),
        "words": list(match.words),
    }


def markdown(diagnosis: Diagnosis) -> str:
    parts = [f"# Diagnosis of {diagnosis.run}", diagnosis.headline]
    if diagnosis.first_sign is not None:
        parts.append(f"**First sign:** step {diagnosis.first_sign.step}: {diagnosis.first_sign.text}.")
    parts.append("## What it matches\n\n" + "\n\n".join(_match_text(match) for match in diagnosis.matches))
    if diagnosis.story:
        shown = diagnosis.story[:_AT_MOST]
        lines = [f"- step {finding.step}: {finding.text}" for finding in shown]
        if len(diagnosis.story) > len(shown):
            lines.append(f"- … and {len(diagnosis.story) - len(shown)} more in diagnosis.json")
        parts.append("## How it went\n\n" + "\n".join(lines))
    if diagnosis.numbers:
        parts.append("## Numbers\n\n" + "\n".join(f"- {sentence}" for sentence in diagnosis.numbers))
    if diagnosis.guard:
        parts.append("## What the guard did\n\n" + "\n".join(_guard_text(one) for one in diagnosis.guard))
    if diagnosis.recommendations:
        parts.append(
            "## What to change\n\n"
            + "\n\n".join(
                _recommendation_text(number, one) for number, (one, _) in enumerate(diagnosis.recommendations, start=1)
            )
        )
    if diagnosis.gaps:
        parts.append("## Gaps in the record\n\n" + "\n".join(f"- {gap}" for gap in diagnosis.gaps))
    return "\n\n".join(parts) + "\n"


def _match_text(match: Match) -> str:
    since = f", since step {match.first_step}" if match.first_step is not None else ""
    lines = [f"**{match.title}** — {match.strength:.0%}{since}", ""]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in match.evidence)]).rstrip()


def _guard_text(one: GuardAction) -> str:
    verdict = {True: "it helped", False: "it did not help", None: "effect unknown"}[one.helped]
    detail = f" ({one.detail})" if one.detail else ""
    return f"- step {one.step}: {one.action}{detail}: {verdict}; {one.effect}"


def _recommendation_text(number: int, one: Recommendation) -> str:
    lines = "\n".join(f"   --set '{line}'" for line in one.lines)
    return f"{number}. {one.change}. *Costs:* {one.trade_off}\n\n   ```\n{lines}\n   ```"


def show(diagnosis: Diagnosis, *, console: Console) -> None:
    """Rendered in a terminal; as it is where the output is piped, to be read on as Markdown."""
    text = markdown(diagnosis)
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(text))
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
