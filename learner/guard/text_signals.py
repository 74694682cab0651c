"""What answers look like, whatever they say: repetition on token ids, compression of their text, rare tokens.

All functions are pure and take a batch. None: it cannot be told from this batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from learner.guard.reward_signals import Floats
from learner.guard.spans import MAX_TOKENS, Spans, TokenIds

MIN_TEXT_BYTES: Final = 32
"""A shorter text is all header once compressed."""
MAX_TEXT_BYTES: Final = 16384
MIN_REFERENCE_BYTES: Final = 1024
_PIECES: Final = 24
"""Of the reference, for each length."""
_OWN_ANSWERS: Final = 1024
RARE_SHARE: Final = 2e-5
"""Of the reference's tokens: one that makes up less is rare."""


def distinct_bigrams(answers: Sequence[TokenIds], *, repeated_B: Floats) -> float | None:
    """Mean over answers of (different pairs of neighbouring tokens) / (such pairs), in (0, 1].

    Distinct-2 of Li et al. 2016 ("A diversity-promoting objective function", arXiv:1510.03055), within each answer: an
    answer that says one thing over and over tends to 0. Answers of fewer than two tokens have no pairs and are left
    out. Looks at the first MAX_TOKENS of an answer. `repeated_B`: their `repeated_bigrams`.

    >>> answers = [np.array([1, 2, 1, 2, 3], dtype=np.int32)]  # 12 21 12 23: three of four
    >>> distinct_bigrams(answers, repeated_B=repeated_bigrams(answers))
    0.75
    """
    pairs_B = np.array([min(len(ids), MAX_TOKENS) - 1 for ids in answers], dtype=np.float64)
    some = pairs_B > 0
    return float(np.mean(1.0 - repeated_B[some] / pairs_B[some])) if some.any() else None


def repeated_bigrams(answers: Sequence[TokenIds]) -> Floats:
    """[B] How many pairs of neighbouring tokens of each answer stand in it before already. Looks at the first
    MAX_TOKENS of an answer.

    >>> repeated_bigrams([np.array([1, 2, 1, 2, 3], dtype=np.int32), np.array([], dtype=np.int32)]).tolist()
    [1.0, 0.0]
    """
    return np.array([_repeated(ids) for ids in answers], dtype=np.float64)


def _repeated(ids: TokenIds) -> int:
    if len(ids) < 2:
        return 0
    wide = ids[:MAX_TOKENS].astype(np.int64)
    pairs = np.sort((wide[:-1] << 32) | wide[1:])
    return int((pairs[1:] == pairs[:-1]).sum())


def longest_repeat_fraction(answers: Sequence[TokenIds]) -> float | None:
    """Mean over answers of (tokens of the longest span that occurs twice) / (tokens), in [0, 1).

    The two may overlap, so an answer of T tokens with period p scores (T − p)/T: near 1 for a loop. Exact substring
    duplication as in Lee et al. 2022 (arXiv:2107.06499), inside one answer. Empty answers are left out. Looks at the
    first MAX_TOKENS of an answer.

    >>> longest_repeat_fraction([np.array([5, 6, 7, 9, 5, 6], dtype=np.int32)])  # "5 6", of six tokens
    0.3333333333333333
    """
    shares = [spans.longest_repeat() / spans.tokens for ids in answers if (spans := Spans(ids)).tokens]
    return float(np.mean(shares)) if shares else None


class Compression:
    """How much better an answer compresses than as many bytes of the reference's answers in a row: Σ (mean compressed
    size of such pieces) / Σ (compressed size of the answers), over the same figure of the reference's own answers.

    1: as before training; above: answers repeat themselves. Each answer is compressed by itself (zlib, RFC 1950, level
    6), so a policy that gives the same good answer to each of many prompts is not accused. Short texts compress badly,
    which is why lengths have to be alike. Looks at the first MAX_TEXT_BYTES of an answer.
    """

    def __init__(self, reference: Sequence[str]) -> None:
        joined = _bytes("\n".join(reference))
        self._known = len(joined) >= MIN_REFERENCE_BYTES
        self._lengths = np.unique(
            np.geomspace(MIN_TEXT_BYTES, max(MIN_TEXT_BYTES, min(len(joined), MAX_TEXT_BYTES)), 20).astype(int)
        )
        self._sizes = [_mean_size(joined, length) for length in self._lengths.tolist()]
        step = max(len(reference) // _OWN_ANSWERS, 1)
        self._before = self._gain(reference[::step])

    def ratio(self, texts: Sequence[str]) -> float | None:
        """None where all answers are too short to tell, or the reference is."""
        gain = self._gain(texts)
        return gain / self._before if gain and self._before else None

    def _gain(self, texts: Sequence[str]) -> float | None:
        cut = [_bytes(text)[: self._lengths[-1]] for text in texts]
        long = [data for data in cut if len(data) >= MIN_TEXT_BYTES]
        if not long or not self._known:
            return None
        expected = np.interp([len(data) for data in long], self._lengths, self._sizes)
        return float(expected.sum()) / sum(len(zlib.compress(data)) for data in long)


def _mean_size(data: bytes, length: int) -> float:
    """Compressed size of pieces of `length` bytes, spread evenly."""
    starts = np.unique(np.linspace(0, max(len(data) - length, 0), _PIECES).astype(int)).tolist()
    return float(np.mean([len(zlib.compress(data[start : start + length])) for start in starts]))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


class RareTokens:
    """Share of tokens that the reference hardly ever uses: each makes up less than RARE_SHARE of its tokens.

    A small reference has not seen every token that its own policy would write. So each of its answers is judged by the
    others too, and that share (leave-one-out, as Good & Turing's estimate of what is unseen) is taken off.
    """

    def __init__(self, reference: Sequence[TokenIds]) -> None:
        whole = np.concatenate([ids[:MAX_TOKENS] for ids in reference]) if reference else np.zeros(0, dtype=np.int32)
        self._tokens = len(whole)
        self._counts = np.bincount(whole) if len(whole) else np.zeros(1, dtype=np.int64)
        # At least 1, so that a token which was never seen is always rare.
        self._floor = max(1.0, RARE_SHARE * self._tokens)
        self._expected = self._left_out(reference)

    def fraction(self, answers: Sequence[TokenIds]) -> float | None:
        """In excess of what the reference's own answers would have, at least 0. None without tokens on either side."""
        ids = np.concatenate([one[:MAX_TOKENS] for one in answers]) if answers else np.zeros(0, dtype=np.int32)
        if not len(ids) or not self._tokens:
            return None
        return max(0.0, float((self._count(ids) < self._floor).mean()) - self._expected)

    def _left_out(self, reference: Sequence[TokenIds]) -> float:
        rare = 0
        for ids in reference:
            tokens, own = np.unique(ids[:MAX_TOKENS], return_counts=True)
            rare += int(own[self._counts[tokens] - own < self._floor].sum())
        return rare / self._tokens if self._tokens else 0.0

    def _count(self, ids: TokenIds) -> NDArray[np.int64]:
        known = ids < len(self._counts)
        counts: NDArray[np.int64] = np.where(known, self._counts[np.where(known, ids, 0)], 0)
        return counts
