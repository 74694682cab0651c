"""The report's answers: side by side before and after training, and at the guard's alarms, with the words that were
over-used marked. Every text is escaped, piece by piece: what a model wrote shows as text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from cluster.files import Json
from keel.display import GAP, number
from keel.report_html import folded, text

_SHOWN: Final = 4
"""Moments that stand side by side; the others are folded away."""
_ANSWERS_SHOWN: Final = 4
_MAX_WORDS: Final = 24
_TITLES: Final = {
    "start": "At the start", "steady": "At a checkpoint", "alarm": "At the alarm",
    "after_rollback": "After the rollback",
}  # fmt: skip


class Marker:
    """Marks words in a text. `words`: the over-used ones, most frequent first."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words: Final = tuple(word.strip() for word in words[:_MAX_WORDS])
        parts = "|".join(_whole(word) for word in sorted(self.words, key=len, reverse=True))
        self._pattern = re.compile(parts, re.IGNORECASE) if parts else None

    def html(self, plain: str) -> str:
        """`plain` escaped, its over-used words in <mark>."""
        if self._pattern is None:
            return html.escape(plain)
        pieces: list[str] = []
        end = 0
        for found in self._pattern.finditer(plain):
            pieces += [html.escape(plain[end : found.start()]), f"<mark>{html.escape(found.group())}</mark>"]
            end = found.end()
        return "".join([*pieces, html.escape(plain[end:])])

    def hits(self, plain: str) -> bool:
        return self._pattern is not None and self._pattern.search(plain) is not None


def _whole(word: str) -> str:
    """A pattern that finds `word`, not parts of longer ones."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return f"{before}{re.escape(word)}{after}"


# ---------------------------------------------------------------- at the guard's moments


def moments(answers: Iterable[Json], marker: Marker, *, first_sign: float | None) -> str:
    """What the policy said when; the moments that tell most stand side by side. `first_sign`: step of the first
    warning."""
    groups: dict[tuple[str, float], list[Json]] = {}
    for answer in answers:
        step = number(answer, "step")
        if step is not None and isinstance(answer.get("answer"), str):
            groups.setdefault((str(answer.get("moment")), step), []).append(answer)
    if not groups:
        return ""
    chosen = _telling(list(groups), first_sign)
    side_by_side = "".join(_moment(key, groups[key], marker) for key in chosen)
    rest = "".join(_moment(key, found, marker) for key, found in groups.items() if key not in chosen)
    words = ", ".join(f"<mark>{html.escape(word)}</mark>" for word in marker.words)
    note = f'<p class="note">Marked: words that were over-used at some step: {words}.</p>' if words else ""
    more = len(groups) - len(chosen)
    folded_away = folded(f"{more} more moments", f'<div class="moments">{rest}</div>') if more else ""
    return f'<h2>Answers at the guard\'s moments</h2>\n{note}<div class="moments">{side_by_side}</div>{folded_away}'


def _telling(keys: Sequence[tuple[str, float]], first_sign: float | None) -> list[tuple[str, float]]:
    """The start, the last steady moment before the first sign, the first alarm, and the first rollback; without one
    the start and the last moment."""
    alarm = min((key for key in keys if key[0] == "alarm"), key=lambda key: key[1], default=None)
    start = [key for key in keys if key[0] == "start"][:1]
    if alarm is None:
        return list(dict.fromkeys([*start, *sorted(keys, key=lambda key: key[1])[-1:]]))
    until = alarm[1] if first_sign is None else min(first_sign, alarm[1])
    steady = sorted((key for key in keys if key[0] == "steady" and key[1] <= until), key=lambda key: key[1])[-1:]
    after = sorted((key for key in keys if key[0] == "after_rollback"), key=lambda key: key[1])[:1]
    return list(dict.fromkeys([*start, *steady, alarm, *after]))[:_SHOWN]


def _moment(key: tuple[str, float], answers: Sequence[Json], marker: Marker) -> str:
    moment, step = key
    texts = [str(answer["answer"]) for answer in answers]
    hit = sum(marker.hits(plain) for plain in texts)
    marked = f" · marked words in {hit} of {len(texts)}" if marker.words else ""
    rewards = [reward for answer in answers if (reward := number(answer, "reward")) is not None]
    mean = f" · mean reward {sum(rewards) / len(rewards):+.2f}" if rewards else ""
    shown = [
        f'<p>{_reward(answer)}<span class="prompt">{prompt_html(answer.get("prompt"))}</span>\n{marker.html(plain)}</p>'
        for answer, plain in zip(answers, texts, strict=True)
    ]
    css = ' class="alarm"' if moment == "alarm" else ""
    title = html.escape(_TITLES.get(moment, moment))
    head = f'<h3>{title}, step {step:.0f}</h3><div class="score">{len(texts)} answers{mean}{marked}</div>'
    more = len(shown) - _ANSWERS_SHOWN
    rest = folded(f"{more} more answers", "".join(shown[_ANSWERS_SHOWN:])) if more > 0 else ""
    return f"<section{css}>{head}{''.join(shown[:_ANSWERS_SHOWN])}{rest}</section>"


def _reward(answer: Json) -> str:
    reward = number(answer, "reward")
    return f'<span class="score right">{reward:+.2f}</span>' if reward is not None else ""


# ---------------------------------------------------------------- before and after


def before_and_after(samples: Sequence[Json], marker: Marker) -> str:
    if not samples:
        return ""
    rows = "".join(
        f'<tr><td class="text">{prompt_html(sample.get("prompt"))}</td>'
        f"{_answer_cell(sample, 'before', marker)}{_answer_cell(sample, 'after', marker)}</tr>"
        for sample in samples
    )
    return (
        "<h2>Samples</h2>\n<table><tr><th>prompt</th><th>before (SFT policy)</th><th>after (final policy)</th></tr>"
        f"{rows}</table>"
    )


def prompt_html(prompt: object) -> str:
    """A text, or chat messages, one a line with their role."""
    if isinstance(prompt, list):
        messages = [message for message in prompt if isinstance(message, Mapping)]
        return "<br>".join(f"<b>{text(message.get('role', '?'))}</b> {text(message.get('content', ''))}"
                           for message in messages)  # fmt: skip
    return html.escape(prompt if isinstance(prompt, str) else GAP)


def _answer_cell(sample: Json, which: str, marker: Marker) -> str:
    answer = sample.get(which)
    scores = [
        f"{label} {value:+.2f}"
        for label, key in (("gold", f"gold_{which}"), ("reward", f"reward_{which}"))
        if (value := number(sample, key)) is not None
    ]
    score = f'<div class="score">{" · ".join(scores)}</div>' if scores else ""
    return f'<td class="text">{marker.html(answer) if isinstance(answer, str) else GAP}{score}</td>'
