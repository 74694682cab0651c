"""What the answers themselves say: words that came up, spans that repeat, and what the reward goes with."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from keel.diagnose.evidence import correlation
from keel.diagnose.record import Answer, RunRecord
from learner.guard.reward_signals import partial_correlation

_WORD: Final = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_ALPHA: Final = 0.001
_COMMON: Final = 0.25
"""A word in more of the first answers than this is the language's, or the task's."""
_MIN_ANSWERS: Final = 8


@dataclass(frozen=True)
class Words:
    """A word's share of answers, at the start and later. `paid`: mean reward of the later answers with it less that of
    those without, in standard deviations; None where all or none have it. `gold`: the same of gold."""

    word: str
    before: float
    after: float
    paid: float | None
    gold: float | None = None


def words_of(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def repeated_fraction(text: str) -> float:
    """1 − distinct bigrams / bigrams, of words. 0 for fewer than three words."""
    words = words_of(text)
    if len(words) < 3:
        return 0.0
    pairs = list(itertools.pairwise(words))
    return 1.0 - len(set(pairs)) / len(pairs)


def first_answers(record: RunRecord) -> list[Answer]:
    return [answer for answer in record.answers if answer.moment == "start"]


def worst_answers(record: RunRecord) -> list[Answer]:
    """Those of the alarms; without any, those of the end."""
    alarms = [answer for answer in record.answers if answer.moment == "alarm"]
    return alarms or [answer for answer in record.answers if answer.moment == "end"]


def rising_words(record: RunRecord, *, at_most: int = 5) -> list[Words]:
    """Words in significantly more answers than at the start, the largest gain first; rare ones at the start alone. Two
    proportions' z at α = 0.001, divided among all words (Bonferroni)."""
    before, after = first_answers(record), worst_answers(record)
    if min(len(before), len(after)) < _MIN_ANSWERS:
        return []
    counts = [Counter(word for answer in group for word in set(words_of(answer.text))) for group in (before, after)]
    n, m = len(before), len(after)
    least = _normal_quantile(_ALPHA / max(len(counts[1]), 1))
    found = []
    for word, count in counts[1].items():
        p, q = counts[0][word] / n, count / m
        pooled = (counts[0][word] + count) / (n + m)
        error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
        if p <= _COMMON and q - p > 0.05 and error > 0 and (q - p) / error > least:
            found.append(Words(word, p, q, _paid(after, word), _worth(after, word)))
    return sorted(found, key=lambda one: one.after - one.before, reverse=True)[:at_most]


def _paid(answers: Sequence[Answer], term: str) -> float | None:
    """Mean reward with the term less without it, in standard deviations within the two groups; None without three of
    either."""
    return _apart([(answer.reward, _says(answer.text, term)) for answer in answers if answer.reward is not None])


def _worth(answers: Sequence[Answer], term: str) -> float | None:
    """As `_paid`, of gold."""
    return _apart([(answer.gold, _says(answer.text, term)) for answer in answers if answer.gold is not None])


def _apart(valued: Sequence[tuple[float, bool]]) -> float | None:
    groups = [np.array([value for value, has in valued if has is side]) for side in (True, False)]
    if min(map(len, groups)) < 3:
        return None
    within = math.sqrt(sum(len(group) * float(group.var()) for group in groups) / len(valued))
    difference = float(groups[0].mean() - groups[1].mean())
    return difference / max(within, 1e-6 + 0.05 * abs(difference))


def _says(text: str, term: str) -> bool:
    return f" {term.lower()} " in f" {' '.join(words_of(text))} "


def _normal_quantile(tail: float) -> float:
    """z with this upper tail: √(−2 ln 2p) bounds it from above closely enough for a test (Chernoff)."""
    return math.sqrt(-2.0 * math.log(max(min(2.0 * tail, 1.0), 1e-300)))


def reward_goes_with(record: RunRecord) -> dict[str, float]:
    """Spearman's correlation of the reward with an answer's length, and with how many word pairs it says again, over
    the answers of one step; the mean over steps, weighed by their degrees of freedom (Fisher's z). Empty without
    rewards."""
    links = _links(record)
    return {name: links[name] for name in ("length", "repetition") if name in links}


def reward_goes_with_alone(record: RunRecord) -> dict[str, float]:
    """The same with the other of the two held fixed: partial rank correlations. Long answers repeat more, so that each
    goes with the reward when one is paid. Empty where it cannot be told."""
    links = _links(record)
    if len(links) < 3:
        return {}
    length, repetition, both = links["length"], links["repetition"], links["length and repetition"]
    return {
        "length": partial_correlation(length, first=repetition, second=both),
        "repetition": partial_correlation(repetition, first=length, second=both),
    }


def _links(record: RunRecord) -> dict[str, float]:
    pooled: dict[str, list[tuple[float, float]]] = {"length": [], "repetition": [], "length and repetition": []}
    for step in sorted({answer.step for answer in record.answers}):
        answers = [answer for answer in record.answers if answer.step == step and answer.reward is not None]
        rewards = np.array([answer.reward for answer in answers], dtype=np.float64)
        lengths = np.array([len(words_of(answer.text)) for answer in answers], dtype=np.float64)
        repeats = np.array([repeated_pairs(answer.text) for answer in answers], dtype=np.float64)
        pairs = ((lengths, rewards), (repeats, rewards), (lengths, repeats))
        for name, (first, second) in zip(pooled, pairs, strict=True):
            rho = correlation(first, second)
            if not math.isnan(rho):
                pooled[name].append((math.atanh(min(max(rho, -0.999), 0.999)), len(answers) - 3.0))
    return {
        name: math.tanh(sum(z * weight for z, weight in found) / sum(weight for _, weight in found))
        for name, found in pooled.items()
        if found
    }


def word_pays(record: RunRecord, words: Sequence[str]) -> float | None:
    """Of these words and phrases, the strongest link of the reward with one's presence in the worst answers, as a
    correlation: d / √(d² + 4) of the difference d of means in standard deviations. None where it cannot be told."""
    worst = [answer for answer in record.answers if answer.moment in ("steady", "alarm", "after_rollback", "end")]
    links = [d / math.sqrt(d * d + 4.0) for word in words if (d := _paid(worst, word)) is not None]
    return max(links, default=None)


def repeated_pairs(text: str) -> int:
    """Pairs of neighbouring words that stand there before already."""
    words = words_of(text)
    pairs = list(itertools.pairwise(words))
    return len(pairs) - len(set(pairs))


def identical_share(answers: Sequence[Answer]) -> float:
    """The most frequent answer's share. NaN for fewer than 8."""
    if len(answers) < _MIN_ANSWERS:
        return float("nan")
    return Counter(answer.text.strip() for answer in answers).most_common(1)[0][1] / len(answers)
