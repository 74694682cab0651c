"""`keel advise`: which method fits a task, from its preferences and a few answers. On a terminal it asks for what was
not given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from cluster.errors import ConfigError, DataError
from keel.preferences.audit import AuditInput, Say, load_audit
from reward_service.audit.advise import Advice, Answers, advise
from reward_service.audit.records import AUDIT_FILE, Audit, decode_audit

Ask = Callable[[str], str]

_QUESTIONS: Final[tuple[tuple[str, str], ...]] = (
    ("factual", "Is the task factual: are answers right or wrong, to be looked up? [y/n, Enter: don't know] "),
    ("verifiable", "Can a program check an answer? [y/n, Enter: don't know] "),
    ("baseline", "How many of the answers are good already, in per cent? [Enter: don't know] "),
    ("latency_ms", "Most milliseconds for an answer? [Enter: no limit] "),
)
_WIDTH: Final = 100


def advise_command(
    preferences: Path | None,
    *,
    answers: Answers,
    ask: Ask | None = None,
    as_json: bool = False,
    say: Say = print,
) -> Advice:
    """Print advice, and return it. `preferences`: a file, a run's directory, an audit.json or the directory it is in;
    None: there are none yet. `ask`: how to ask for answers that are None; left out, on a terminal only.

    Raises DataError for preferences that cannot be read, ConfigError for a baseline or latency out of range.
    """
    if ask is None and sys.stdin.isatty() and sys.stdout.isatty() and not as_json:
        ask = input
    audit = None if preferences is None else _audit(preferences)
    answers = _checked(answers)
    if ask is not None:
        answers = _asked(answers, ask=ask, say=say)
    advice = advise(audit, answers)
    if as_json:
        say(msgspec.json.format(msgspec.json.encode(advice), indent=2).decode())
    else:
        say(_text(advice))
    return advice


def _audit(path: Path) -> Audit:
    """An audit made earlier, or a new one; it is not written."""
    stored = path / AUDIT_FILE if path.is_dir() else path
    if stored.name != AUDIT_FILE or not stored.is_file():
        return load_audit(AuditInput(path))
    try:
        return decode_audit(stored.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError("cannot read the audit", got=f"{stored}: {error}", do="run keel data audit again") from error


def _checked(answers: Answers) -> Answers:
    if answers.baseline is not None and not 0.0 <= answers.baseline <= 1.0:
        raise ConfigError("the baseline is a share", got=f"{answers.baseline:g}", do="give it in [0, 1], e.g. 0.8")
    if answers.latency_ms is not None and not answers.latency_ms > 0:
        raise ConfigError("the latency limit is not positive", got=f"{answers.latency_ms:g}", do="give milliseconds")
    return answers


def _asked(answers: Answers, *, ask: Ask, say: Say) -> Answers:
    """Ask for what is None, until each reply can be read. The end of input leaves the rest unknown."""
    known = msgspec.structs.asdict(answers)
    found: dict[str, bool | float | None] = {}
    try:
        for name, question in _QUESTIONS:
            if known[name] is None:
                found[name] = _reply(name, question, ask=ask, say=say)
    except EOFError:
        pass
    return msgspec.structs.replace(answers, **found)


def _reply(name: str, question: str, *, ask: Ask, say: Say) -> bool | float | None:
    while True:
        reply = ask(question).strip().lower().removesuffix("%").removesuffix("ms").strip()
        if not reply:
            return None
        if name in ("factual", "verifiable"):
            if reply in ("y", "yes", "n", "no"):
                return reply.startswith("y")
            say("Please answer y or n.")
            continue
        try:
            value = float(reply)
            _checked(Answers(baseline=value / 100) if name == "baseline" else Answers(latency_ms=value))
        except (ValueError, ConfigError):
            say("Please give a number from 0 to 100." if name == "baseline" else "Please give milliseconds.")
            continue
        return value / 100 if name == "baseline" else value


def _text(advice: Advice) -> str:
    """The decision first, then its reasons."""
    from textwrap import fill

    lines = [advice.title, ""]
    for heading, entries in (
        ("Why", advice.reasons), ("Also", advice.also), ("What would change this", advice.would_change),
    ):  # fmt: skip
        if entries:
            lines.append(f"{heading}:")
            lines += [fill(entry[0].upper() + entry[1:], _WIDTH, initial_indent="  - ", subsequent_indent="    ")
                      for entry in entries]  # fmt: skip
    lines.append("Go on with:")
    lines += [f"    {step}" for step in advice.next_steps]
    return "\n".join(lines)
