"""The constitution: hard rules that flag an answer, take something off its reward, or put another in its place.

Consumes: samples as text. Produces: for each, in order, the rules that it hits, or a ScoringError when a rule cannot be
applied to it. Waits for: a thread that looks for patterns, and users' functions. Who unblocks it: they end, or their
time limits: a regex that would take for ever on a text is stopped.
Always holds: every rule is applied to every sample; rules are read and compiled once, and do not change.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import regex  # type: ignore[import-untyped,unused-ignore]  # as `re`, and its searches take a time limit

from cluster.errors import ConfigError, ScoringError
from cluster.plugin import resolve
from cluster.records import RuleVerdict
from reward_service.forward_thread import ForwardThread
from reward_service.rewards.constitution_file import ReadRules, RuleText, raise_problems, read_rules
from reward_service.rewards.sources import TextSample, shortened
from reward_service.rewards.text_function import TextFunction

PATTERN_LIMIT_S: Final = 1.0
"""Of processor time, for all regexes together on one sample: on a busy machine a good one is not stopped."""
FUNCTION_LIMIT_S: Final = 10.0
_DETAIL: Final = 200
"""Characters of a verdict's detail."""

Find = Callable[[str, float], str | None]
"""(text, seconds) → what was found, or None. Raises TimeoutError."""


@dataclass(frozen=True)
class Hit:
    """A rule that an answer hits, and what that does; neither amount for a flag. In units of the reward's scale."""

    verdict: RuleVerdict
    penalty: float = 0.0
    override: float | None = None


@dataclass(frozen=True)
class _Rule:
    """A rule made ready. `finds` are its patterns, `function` its function, both in the text that it is `on`."""

    text: RuleText
    finds: tuple[Find, ...]
    function: TextFunction | None

    def hit(self, detail: str) -> Hit:
        then, name, detail = self.text.then, self.text.name, detail[:_DETAIL]
        if then.penalise is not None:
            return Hit(RuleVerdict(name, "penalise", detail), penalty=then.penalise.std)
        if then.override is not None:
            return Hit(RuleVerdict(name, "override", detail), override=then.override.std)
        return Hit(RuleVerdict(name, "flag", detail))

    def found(self, sample: TextSample, until_s: float) -> str | None:
        """What a pattern or a length has found. Raises TimeoutError."""
        text = sample.answer if self.text.on == "answer" else sample.prompt
        when, words = self.text.when, len(text.split())
        if when.max_words is not None and words > when.max_words:
            return f"{words} words, at most {when.max_words}"
        if when.min_words is not None and words < when.min_words:
            return f"{words} words, at least {when.min_words}"
        if when.max_tokens is not None and sample.response_tokens > when.max_tokens:
            return f"{sample.response_tokens} tokens, at most {when.max_tokens}"
        for find in self.finds:
            detail = find(text, until_s - time.thread_time())
            if detail is not None:
                return detail
        return None


class Constitution:
    """The rules of one file, for callers on one event loop; `close` lets its threads end."""

    def __init__(self, rules: Sequence[_Rule]) -> None:
        self._rules = tuple(rules)
        self._thread = ForwardThread(name="constitution")

    @property
    def rules(self) -> tuple[RuleText, ...]:
        """As written, in order."""
        return tuple(rule.text for rule in self._rules)

    async def judge(self, samples: Sequence[TextSample]) -> list[list[Hit] | ScoringError]:
        """Each sample's hits, in the file's order. Raises StuckError when a function will not end."""
        if not samples:
            return []
        limit_s = 10.0 * (
            1 + PATTERN_LIMIT_S * len(samples)
        )  # each stops itself; this is for a machine that stands still
        found = await self._thread.call(lambda: [self._found(sample) for sample in samples], timeout_s=limit_s)
        for place, rule in enumerate(self._rules):
            if rule.function is not None:
                await self._ask(rule, rule.function, place=place, samples=samples, found=found)
        return [
            details
            if isinstance(details, ScoringError)
            else [rule.hit(detail) for rule, detail in zip(self._rules, details, strict=True) if detail is not None]
            for details in found
        ]

    def close(self) -> None:
        """Repeatable."""
        self._thread.close()
        for rule in self._rules:
            if rule.function is not None:
                rule.function.close()

    def _found(self, sample: TextSample) -> list[str | None] | ScoringError:
        """What each rule's patterns find. In the thread."""
        until_s = time.thread_time() + PATTERN_LIMIT_S
        details: list[str | None] = []
        for rule in self._rules:
            try:
                details.append(rule.found(sample, until_s))
            except TimeoutError:
                return ScoringError(
                    f"rule {rule.text.name} takes too long on an answer",
                    got=f"no result after {PATTERN_LIMIT_S:g} s of work: {shortened(sample.answer)}",
                    do="write its regex without a repetition inside a repetition, such as (a+)+",
                )
        return details

    @staticmethod
    async def _ask(
        rule: _Rule,
        function: TextFunction,
        *,
        place: int,
        samples: Sequence[TextSample],
        found: list[list[str | None] | ScoringError],
    ) -> None:
        """Put what the rule's function says of each sample into `found`; where a pattern has hit it is not asked."""
        asked = [
            (number, details)
            for number, details in enumerate(found)
            if not isinstance(details, ScoringError) and details[place] is None
        ]
        outcomes = await function.outcomes([(samples[number].prompt, samples[number].answer) for number, _ in asked])
        for (number, details), outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, ScoringError):
                found[number] = outcome
            elif isinstance(outcome, str):
                details[place] = outcome or None
            elif isinstance(outcome, bool):
                details[place] = "" if outcome else None
            elif outcome is not None:
                found[number] = ScoringError(
                    f"the function of rule {rule.text.name} gave neither a bool nor a text", got=shortened(outcome)
                )


def settled(reward: float, hits: Sequence[Hit], *, mean: float, std: float) -> float:
    """The reward after the rules: the lowest override alone; without one, less all penalties.

    >>> flattery = Hit(RuleVerdict("flattery", "penalise"), penalty=1.0)
    >>> leak = Hit(RuleVerdict("leak", "override"), override=-3.0)
    >>> settled(2.0, [flattery], mean=0.5, std=2.0), settled(2.0, [flattery, leak], mean=0.5, std=2.0)
    (0.0, -5.5)
    """
    overrides = [hit.override for hit in hits if hit.override is not None]
    if overrides:
        return mean + std * min(overrides)
    return reward - std * math.fsum(hit.penalty for hit in hits)


def load_constitution(path: Path) -> Constitution:
    """Raises ConfigError naming every rule and line that is wrong: form, regexes, functions that are not there."""
    read = read_rules(path)
    problems: list[str] = []
    rules = [_ready(read, index, problems=problems) for index in range(len(read.rules))]
    raise_problems(path, problems)
    return Constitution(rules)


# ---------------------------------------------------------------- making rules ready


def _ready(read: ReadRules, index: int, *, problems: list[str]) -> _Rule:
    text = read.rules[index]
    when, finds, function = text.when, list[Find](), None
    if when.phrases is not None:
        finds.append(_phrases(when.phrases, ignore_case=when.ignore_case is not False))
    if when.regex is not None:
        try:
            finds.append(_regex(when.regex, ignore_case=when.ignore_case is True))
        except regex.error as error:
            problems.append(f"{read.place(index, 'when', 'regex')}: when.regex: got {when.regex!r}; {error}")
    if when.function is not None:
        try:
            target = resolve(when.function, key="when.function")
            function = TextFunction(target, name=f"rule {text.name}", timeout_s=FUNCTION_LIMIT_S)
        except ConfigError as error:
            problems.append(f"{read.place(index, 'when', 'function')}: {error.what}; got {error.got}; {error.do}")
    return _Rule(text, tuple(finds), function)


def _phrases(phrases: Sequence[str], *, ignore_case: bool) -> Find:
    """Whole words, white space of any kind between them. Alternatives of fixed texts need no time limit."""
    words = ("\\s+".join(map(re.escape, phrase.split())) for phrase in sorted(phrases, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE if ignore_case else 0)

    def find(text: str, limit_s: float) -> str | None:
        match = pattern.search(text)
        return None if match is None else shortened(match.group())

    return find


def _regex(source: str, *, ignore_case: bool) -> Find:
    """Raises regex.error. The search lets other threads run, and stops at its time limit."""
    pattern = regex.compile(source, regex.IGNORECASE if ignore_case else 0)

    def find(text: str, limit_s: float) -> str | None:
        match = pattern.search(text, timeout=max(limit_s, 1e-3), concurrent=True)
        return None if match is None else shortened(match.group())

    return find
