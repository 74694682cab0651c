"""Which rows of a batch each rank works on, and in which micro-batches.

Every rank computes the same shares from the same lengths, so nothing has to be agreed on. All ranks get the same number
of micro-batches, because sharded models gather their weights in every forward and backward, all ranks together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from learner.batch import micro_batches, padding_share

Rows = list[int]


@dataclass(frozen=True)
class Share:
    """One rank's part of a batch."""

    slots: tuple[Rows, ...]
    """Rows of each micro-batch. Equally many on every rank; an empty one is idle: see `idle_rows`."""
    idle_rows: Rows
    """What an idle slot runs, with weight zero: the batch's shortest row."""
    padding_share: float
    """Of all ranks' micro-batches together."""


def share_out(sequence_tokens: Sequence[int], *, ranks: int) -> list[Rows]:
    """Rows for each rank, their tokens as even as can be: the longest row left goes to the rank with the least, the
    lower rank where they are equal (longest processing time first, Graham 1969: at most 4/3 of the best).

    Example: lengths (5, 1, 4, 2) over 2 ranks: [[0, 1], [2, 3]], 6 tokens each.
    """
    heap = [(0, rank) for rank in range(ranks)]
    shares: list[Rows] = [[] for _ in range(ranks)]
    for row in sorted(range(len(sequence_tokens)), key=lambda row: (-sequence_tokens[row], row)):
        tokens, rank = heapq.heappop(heap)
        shares[rank].append(row)
        heapq.heappush(heap, (tokens + sequence_tokens[row], rank))
    return shares


def rank_share(
    sequence_tokens: Sequence[int], *, rank: int, ranks: int, token_budget: int, overhead_tokens: int
) -> Share:
    """The share of `rank`, cut into micro-batches as by `learner.batch.micro_batches`. With one rank: just those."""

    def cut(rows: Rows) -> list[Rows]:
        lengths = [sequence_tokens[row] for row in rows]
        groups = micro_batches(lengths, token_budget=token_budget, overhead_tokens=overhead_tokens)
        return [[rows[index] for index in group] for group in groups]

    shares = [list(range(len(sequence_tokens)))] if ranks == 1 else share_out(sequence_tokens, ranks=ranks)
    cuts = [cut(rows) for rows in shares]
    count = max(len(groups) for groups in cuts)
    slots = [_stretched(groups, count=count) for groups in cuts]
    shortest = min(range(len(sequence_tokens)), key=lambda row: (sequence_tokens[row], row))
    return Share(
        slots=tuple(slots[rank]),
        idle_rows=[shortest],
        padding_share=padding_share(sequence_tokens, groups=[rows for groups in slots for rows in groups if rows]),
    )


def _stretched(groups: list[Rows], *, count: int) -> list[Rows]:
    """`count` groups: the one with the most rows is halved until there are as many, or no more rows to part; the rest
    are empty. A rank that must run as many forwards as the others may as well spread its rows over them."""
    groups = list(groups)
    while len(groups) < count:
        most = max(range(len(groups)), key=lambda index: len(groups[index]), default=None)
        if most is None or len(groups[most]) < 2:
            groups.append([])
            continue
        rows = groups[most]
        groups[most : most + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return groups
