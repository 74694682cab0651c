"""Hashes of all runs of n tokens in a sequence: what repeats inside an answer, and what stands in other texts.

A polynomial hash modulo 2⁶⁴ over mixed token ids (Karp & Rabin 1987), taken from prefix sums so that every n costs one
pass over the sequence. Equal runs have equal hashes; unequal ones share one with a chance of about 2⁻⁶⁴ a pair.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

TokenIds = NDArray[np.int32]
Hashes = NDArray[np.uint64]

MAX_TOKENS: Final = 4096
"""Tokens of a sequence that are looked at; what comes after them is not."""

_BASE: Final = 0x9E3779B97F4A7C15  # odd, so it has an inverse
_MULTIPLIER: Final = 0xD6E8FEB86659FD93


def _powers(base: int) -> Hashes:
    factors = np.full(MAX_TOKENS + 1, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


_POWERS: Final = _powers(_BASE)
_INVERSES: Final = _powers(pow(_BASE, -1, 2**64))


class Spans:
    """One sequence of token ids. `tokens`: how many of them are looked at, at most MAX_TOKENS."""

    def __init__(self, token_ids: ArrayLike) -> None:
        ids = np.asarray(token_ids, dtype=np.int64)[:MAX_TOKENS].astype(np.uint64)
        self.tokens = len(ids)
        mixed = (ids + np.uint64(1)) * np.uint64(_MULTIPLIER)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(_MULTIPLIER)
        self._sums = np.zeros(self.tokens + 1, dtype=np.uint64)
        np.cumsum(mixed * _POWERS[: self.tokens], out=self._sums[1:])

    def hashes(self, n: int) -> Hashes:
        """[tokens − n + 1] one for each run of n tokens, in order; empty where the sequence is shorter."""
        if n < 1:
            raise ValueError(f"runs have at least one token, got n={n}")
        count = max(self.tokens - n + 1, 0)
        if not count:
            return np.zeros(0, dtype=np.uint64)
        hashes = (self._sums[n:] - self._sums[:count]) * _INVERSES[:count]
        # The low bits of a polynomial hash depend on the low bits of the tokens alone: mix them with the others.
        mixed: Hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(_MULTIPLIER)
        return mixed

    def longest_repeat(self) -> int:
        """Tokens of the longest run that occurs at least twice; the two may overlap. 0 where no token comes twice.

        Where a run of n + 1 tokens repeats, one of n does, so the length is found by doubling and then halving:
        O(T log² T).
        """
        repeated, unique = 0, 1
        while self._repeats(unique):
            repeated, unique = unique, unique * 2
        while unique - repeated > 1:
            middle = (repeated + unique) // 2
            if self._repeats(middle):
                repeated = middle
            else:
                unique = middle
        return repeated

    def _repeats(self, n: int) -> bool:
        ordered = np.sort(self.hashes(n))
        return bool((ordered[1:] == ordered[:-1]).any())
