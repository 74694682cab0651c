"""Words and pairs of neighbouring words, counted by the answers that they stand in.

A word is a run of letters and digits, apostrophes inside it included, case folded; in scripts without spaces that is a
clause. A pair has nothing but white space between its two. Words become numbers first and pairs of them one number
each, so that half a million words are counted in numpy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

MAX_CHARACTERS: Final = 20_000
"""Of an answer that are looked at."""

_BREAK: Final = 0
"""The number of what stands between words: no term."""
_UNKNOWN: Final = -1
_STOPS: Final = re.compile(r"[^\w\s'’]+")


class Vocabulary:
    """Words by number. A pair's key is first · 2³² + second, a word's the number itself."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {"": _BREAK, ".": _BREAK}
        self._names: list[str] = [""]

    def copy(self) -> Vocabulary:
        made = Vocabulary()
        made._numbers, made._names = self._numbers.copy(), self._names.copy()
        return made

    def read(self, text: str) -> Int64s:
        """A text's words in order, new ones taken in."""
        tokens = _STOPS.sub(" . ", text[:MAX_CHARACTERS].casefold()).split()
        numbers = self._numbers
        return np.array(
            [numbers[token] if token in numbers else self._number(token) for token in tokens], dtype=np.int64
        )

    def term(self, key: int) -> str:
        first, second = divmod(key, 2**32)
        return f"{self._names[first]} {self._names[second]}" if first else self._names[second]

    def keys(self, names: Sequence[str]) -> Int64s:
        """Of terms, _UNKNOWN for those with a word that is not known."""
        return np.array([self._key(name) for name in names], dtype=np.int64)

    def _key(self, name: str) -> int:
        numbers = [self._numbers.get(word, _UNKNOWN) for word in name.split()]
        if _UNKNOWN in numbers:
            return _UNKNOWN
        return numbers[0] if len(numbers) == 1 else numbers[0] * 2**32 + numbers[1]

    def _number(self, token: str) -> int:
        """Of one that is new. Quotation marks come off here: once for each token, not each time it occurs."""
        word = token.strip("'’")
        if word not in self._numbers:
            self._numbers[word] = len(self._names)
            self._names.append(word)
        self._numbers[token] = self._numbers[word]
        return self._numbers[token]


@dataclass(frozen=True)
class TermCounts:
    """`keys` in rising order; `counts`: answers that have the term, of `answers`; `squares`: Σx² over prompts, x being
    a prompt's answers with it."""

    answers: int
    keys: Int64s
    counts: Int64s
    squares: Int64s

    def of(self, keys: Int64s) -> tuple[Int64s, Int64s]:
        """(counts, squares) of these terms; 0 for those that do not occur."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=np.int64)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        there = self.keys[places] == keys
        return np.where(there, self.counts[places], 0), np.where(there, self.squares[places], 0)


def terms_of(text: str, vocabulary: Vocabulary) -> Int64s:
    """Keys of a text's words and pairs, each once.

    >>> words = Vocabulary()
    >>> sorted(map(words.term, terms_of("You ARE safe. 'Safe'!", words).tolist()))
    ['are', 'are safe', 'safe', 'you', 'you are']
    """
    numbers = vocabulary.read(text)
    first, second = numbers[:-1], numbers[1:]
    pairs = (first << 32 | second)[(first != _BREAK) & (second != _BREAK)]
    keys = np.sort(np.concatenate([numbers[numbers != _BREAK], pairs]))
    different: Int64s = keys[np.diff(keys, prepend=-1) != 0]
    return different


def count_terms(texts: Sequence[str], *, prompts: Sequence[str], vocabulary: Vocabulary) -> TermCounts:
    """`prompts`: what each text answers, by any name."""
    by_prompt: dict[str, list[Int64s]] = {}
    for text, prompt in zip(texts, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(terms_of(text, vocabulary))
    parts, times = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for group in by_prompt.values():
        keys, together = group[0], np.ones(len(group[0]), dtype=np.int64)
        if len(group) > 1:
            keys, together = np.unique(np.concatenate(group), return_counts=True)
        parts.append(keys)
        times.append(together)
    x = np.concatenate(times)
    keys, places = np.unique(np.concatenate(parts), return_inverse=True)
    counts, squares = (np.bincount(places, weights=w, minlength=len(keys)).astype(np.int64) for w in (x, x * x))
    return TermCounts(answers=len(texts), keys=keys, counts=counts, squares=squares)
