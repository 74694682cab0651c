"""The diagnosis in short, where `keel diagnose` has written one: what it is, by which evidence, what to change."""

from __future__ import annotations

import html

from cluster.files import Json
from keel.display import number
from keel.report_html import folded, text

_MATCHES_SHOWN = 3


def diagnosis(found: Json) -> str:
    """Of diagnosis.json; empty without one."""
    headline = found.get("headline")
    if not isinstance(headline, str):
        return ""
    parts = [f"<p><b>{text(headline)}</b></p>"]
    sign = found.get("first_sign")
    if isinstance(sign, dict):
        parts.append(f"<p>First sign, step {text(sign.get('step'))}: {text(sign.get('what'))}.</p>")
    matches = _objects(found.get("matches"))
    parts += [_match(match) for match in matches[:_MATCHES_SHOWN]]
    advice = "".join(f"<li>{_recommendation(one)}</li>" for one in _objects(found.get("recommendations")))
    if advice:
        parts.append(folded("What to change", f"<ol>{advice}</ol>"))
    story = "".join(f"<li>step {text(one.get('step'))}: {text(one.get('what'))}</li>" for one in
                    _objects(found.get("story")))  # fmt: skip
    if story:
        parts.append(folded("How it went", f"<ul>{story}</ul>"))
    return f"<h2>Diagnosis</h2>\n{''.join(parts)}"


def _match(match: Json) -> str:
    strength, first = number(match, "strength"), number(match, "first_step")
    sure = f" — {strength:.0%}" if strength is not None else ""
    since = f", since step {first:.0f}" if first is not None else ""
    evidence = "".join(f"<li>{text(sentence)}</li>" for sentence in _list(match.get("evidence")))
    return f"<h3>{text(match.get('title'))}{sure}{since}</h3><ul>{evidence}</ul>"


def _recommendation(one: Json) -> str:
    lines = "\n".join(f"--set '{html.escape(str(line))}'" for line in _list(one.get("set")))
    code = f"<pre>{lines}</pre>" if lines else ""
    return f'{text(one.get("change"))}. <span class="note">Costs: {text(one.get("trade_off"))}</span>{code}'


def _objects(value: object) -> list[Json]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
