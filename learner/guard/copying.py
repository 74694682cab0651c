"""Which answers copy the SFT data word for word: an index of its runs of n tokens, built once.

Memory is bounded: of more than `max_runs` different runs, those with the smallest hashes are kept (a bottom-k sample,
Broder 1997). Every text is then looked up in the same sample, so that shares stay comparable; a copied span is missed
only where none of its runs is in the sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from learner.guard.spans import Hashes, Spans, TokenIds

COPY_TOKENS: Final = 8
"""Tokens in a row that make a copy."""
MAX_RUNS: Final = 4_000_000
"""8 bytes each."""
_PENDING_RUNS: Final = 1_000_000


class RunIndex:
    """The runs of `n` tokens of some texts. `runs`: how many different ones are known."""

    def __init__(self, texts: Iterable[TokenIds], *, n: int = COPY_TOKENS, max_runs: int = MAX_RUNS) -> None:
        self._n, self._max_runs = n, max_runs
        self._known = np.zeros(0, dtype=np.uint64)
        pending: list[Hashes] = []
        waiting = 0
        for ids in texts:
            pending.append(Spans(ids).hashes(n))
            waiting += len(pending[-1])
            if waiting >= _PENDING_RUNS:
                self._take_in(pending)
                pending, waiting = [], 0
        self._take_in(pending)

    @property
    def runs(self) -> int:
        return len(self._known)

    def copied_share(self, answers: Sequence[TokenIds]) -> float | None:
        """Share of the answers of at least n tokens that have a run of n in common with the texts. None without."""
        if not self.runs:
            return None
        hashes = [found for ids in answers if len(found := Spans(ids).hashes(self._n))]
        if not hashes:
            return None
        whole = np.concatenate(hashes)
        # In rising order, so that a large index is read once from end to end and not at random.
        order = np.argsort(whole)
        places = np.minimum(np.searchsorted(self._known, whole[order]), self.runs - 1)
        known = np.zeros(len(whole), dtype=bool)
        known[order] = self._known[places] == whole[order]
        starts = np.cumsum([0, *(len(one) for one in hashes[:-1])])
        return float(np.logical_or.reduceat(known, starts).mean())

    def _take_in(self, pending: Sequence[Hashes]) -> None:
        self._known = np.unique(np.concatenate([self._known, *pending]))[: self._max_runs]
