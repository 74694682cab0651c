"""`keel rules`: what a constitution would say of some answers. Reads, prints, changes nothing.

A file of answers may hold, in JSON Lines (also .gz) or Parquet: answer (or response), with or without prompt; pairs
(prompt, chosen, rejected), or whole dialogues as chosen and rejected; a run's samples.jsonl (prompt, before, after).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.data_records import Prompt
from cluster.data_tables import Unreadable, scan_table
from cluster.dialogues import Rejection, check_answer, check_prompt, compare_dialogues
from cluster.errors import ConfigError, DataError, ScoringError
from configs.run import FileSource
from reward_service.rewards.constitution import Constitution, Hit, load_constitution
from reward_service.rewards.constitution_file import RuleText
from reward_service.rewards.sources import TextSample

_GIVEN = "given"
"""The kind of answers that stand in no file."""
_AT_A_TIME = 256
_SHOWN = 160
"""Characters of an answer."""
_KINDS = ("chosen", "rejected", "answer", "response", "before", "after")
_NO_TOKENS = 0
"""Token counts are the policy's, and there is no policy here: rules with max_tokens are never hit."""


@dataclass
class Tally:
    """What became of the answers of one kind (chosen, rejected, answer…)."""

    answers: int = 0
    hit: int = 0
    failed: int = 0
    by_rule: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Trial:
    """An answer to try, its kind, and where it stands."""

    where: str
    kind: str
    sample: TextSample


def try_rules(
    constitution: Path,
    *,
    answers: Sequence[str] = (),
    prompt: str = "",
    file: Path | None = None,
    show: int = 10,
    say: Callable[[str], None] = print,
) -> dict[str, Tally]:
    """Try the rules on `answers` to `prompt` and on those in `file`; of the file's, the first `show` that are hit are
    shown. Returns the counts by kind of answer. Raises ConfigError for the rules, DataError for the file."""
    rules = load_constitution(constitution)
    given = [Trial("", _GIVEN, _sample(prompt, answer)) for answer in answers]
    try:
        _say_rules(rules, constitution, say=say)
        tallies: dict[str, Tally] = {}
        asyncio.run(_try(rules, given, tallies=tallies, show=len(given), say=say))
        if file is not None:
            asyncio.run(_try(rules, _trials(file, say=say), tallies=tallies, show=show, say=say))
            of_file = {kind: tally for kind, tally in tallies.items() if kind != _GIVEN}
            if of_file:
                _say_tallies(of_file, rules.rules, say=say)
    finally:
        rules.close()
    if not tallies:
        raise ConfigError("nothing to try the rules on", got="no answer", do="give --try TEXT, or --file with answers")
    return tallies


async def _try(
    rules: Constitution,
    trials: Iterable[Trial],
    *,
    tallies: dict[str, Tally],
    show: int,
    say: Callable[[str], None],
) -> None:
    """What was typed in (it stands nowhere) is shown whether it is hit or not."""
    waiting, shown = iter(trials), 0
    while piece := list(itertools.islice(waiting, _AT_A_TIME)):
        for trial, hits in zip(piece, await rules.judge([trial.sample for trial in piece]), strict=True):
            tally = tallies.setdefault(trial.kind, Tally())
            tally.answers += 1
            if isinstance(hits, ScoringError):
                tally.failed += 1
            else:
                tally.hit += bool(hits)
                tally.by_rule.update(hit.verdict.rule for hit in hits)
            if shown < show and (hits or not trial.where):
                shown += 1
                _say_trial(trial, hits, say=say)


# ---------------------------------------------------------------- answers out of a file


def _trials(path: Path, *, say: Callable[[str], None]) -> Iterator[Trial]:
    left_out = 0
    for row in scan_table(FileSource(path=path)):
        if isinstance(row, Unreadable):
            raise row.error()
        texts = _texts(row.values, where=row.where)
        left_out += not texts
        for kind, prompt, answer in texts:
            yield Trial(row.where, kind, _sample(_plain(prompt), answer))
    if left_out:
        say(f"\n{left_out:,} rows left out: their two dialogues do not differ in the last answer alone")


def _texts(row: Mapping[str, Any], *, where: str) -> list[tuple[str, Prompt, str]]:
    """(kind, prompt, answer) of each answer; none for two dialogues that cannot be compared. Raises DataError for a row
    without an answer."""
    there = {column for column, value in row.items() if value is not None}  # Parquet has every column in every row
    if "prompt" not in there and {"chosen", "rejected"} <= there:
        two = compare_dialogues(row["chosen"], row["rejected"])
        if isinstance(two, Rejection):
            return []
        return [("chosen", two.prompt, two.chosen), ("rejected", two.prompt, two.rejected)]
    prompt = check_prompt(row["prompt"]) if row.get("prompt") else ""
    found = [(kind, _text(row[kind])) for kind in _KINDS if kind in there]
    if not found or isinstance(prompt, Rejection) or any(text is None for _, text in found):
        raise DataError(
            f"{where}: no answer as text",
            got=f"columns {', '.join(sorted(row))}",
            do="name the columns answer, or prompt and answer, or prompt, chosen and rejected",
        )
    return [(kind, prompt, text) for kind, text in found if text is not None]


def _text(value: Any) -> str | None:
    """An answer, which may be empty, or messages that end with it."""
    answer = value if isinstance(value, str) else check_answer(value)
    return answer if isinstance(answer, str) else None


def _plain(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _sample(prompt: str, answer: str) -> TextSample:
    return TextSample("", prompt, answer, finish_reason="stop", response_tokens=_NO_TOKENS)


# ---------------------------------------------------------------- in words


def effect(hits: Sequence[Hit]) -> str:
    """What the hits together do to a reward.

    >>> from cluster.records import RuleVerdict
    >>> effect([Hit(RuleVerdict("a", "penalise"), penalty=1.0), Hit(RuleVerdict("b", "flag"))])
    'reward − 1 std'
    """
    overrides = [hit.override for hit in hits if hit.override is not None]
    if overrides:
        return f"reward becomes the mean {_signed(min(overrides))} std"
    penalty = sum(hit.penalty for hit in hits)
    return f"reward {_signed(-penalty)} std" if penalty else "reward as it is"


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'} {abs(value):g}"


def _say_rules(rules: Constitution, path: Path, *, say: Callable[[str], None]) -> None:
    say(f"{path}: {len(rules.rules)} rule{'s' if len(rules.rules) > 1 else ''}")
    by_tokens = [rule.name for rule in rules.rules if rule.when.max_tokens is not None]
    if by_tokens:
        say(f"max_tokens is not tried here, where nothing counts tokens: {', '.join(by_tokens)}")


def _say_trial(trial: Trial, hits: Sequence[Hit] | ScoringError, *, say: Callable[[str], None]) -> None:
    say("\n" + (f"{trial.where} {trial.kind}: " if trial.where else "") + (_line(trial.sample.answer) or "(empty)"))
    if isinstance(hits, ScoringError):
        say(f"  could not be judged: {hits.what}; {hits.got}")
    elif not hits:
        say("  no rule is hit")
    else:
        for hit in hits:
            verdict = hit.verdict
            say(f"  {verdict.action:<9} {verdict.rule}{f': {verdict.detail}' if verdict.detail else ''}")
        say(f"  → {effect(hits)}")


def _say_tallies(tallies: Mapping[str, Tally], rules: Sequence[RuleText], *, say: Callable[[str], None]) -> None:
    width = max(len("any rule"), *(len(rule.name) for rule in rules))
    say("\n" + " " * width + "".join(f"  {f'{kind} ({tally.answers:,})':>18}" for kind, tally in tallies.items()))
    for name in [rule.name for rule in rules]:
        say(f"{name:<{width}}" + "".join(_share(tally.by_rule[name], tally.answers) for tally in tallies.values()))
    say(f"{'any rule':<{width}}" + "".join(_share(tally.hit, tally.answers) for tally in tallies.values()))
    for kind, tally in tallies.items():
        if tally.failed:
            say(f"{tally.failed:,} of {kind} could not be judged; such an answer has no reward and comes again")


def _share(count: int, of: int) -> str:
    return f"  {f'{count:,}  {count / of:6.1%}':>18}"


def _line(text: str) -> str:
    """One line for a terminal, without what could command it."""
    line = "".join(character if character.isprintable() else "�" for character in " ".join(text.split()))
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
