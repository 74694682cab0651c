"""When a batch of waiting items is worth a forward pass, and how to cut it into passes with little padding.

Pure: no queue, no model, no thread; time comes from the injected clock, in seconds.

`Batcher` decides *when*: a batch is due when it is full (by count or by tokens) or when its oldest item has waited
long enough. `forward_groups` decides *how*: items of similar length share a pass, so that little of it is padding.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class BatchLimits:
    """count: most items in a batch. tokens: most tokens in a batch. wait_s: how long an item waits for company."""

    count: int
    tokens: int
    wait_s: float

    def __post_init__(self) -> None:
        if self.count < 1 or self.tokens < 1 or self.wait_s < 0:
            raise ValueError(f"batch limits must be positive, got {self}")


@dataclass(frozen=True)
class _Waiting(Generic[T]):
    item: T
    tokens: int
    since_s: float


class Batcher(Generic[T]):
    """A first-in, first-out queue that hands out batches within `limits`.

    Always holds: items leave in the order they came, each once; a batch is never empty; it passes the token limit only
    when it is a single item that does so by itself.
    """

    def __init__(self, limits: BatchLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._waiting: deque[_Waiting[T]] = deque()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T, *, tokens: int) -> None:
        """Append an item of `tokens` tokens (at least 1)."""
        if tokens < 1:
            raise ValueError(f"an item has at least one token, got {tokens}")
        self._waiting.append(_Waiting(item, tokens, self._clock()))
        self._tokens += tokens

    def due_in_s(self) -> float | None:
        """Seconds until the next batch is due: 0.0 when one is due now, None when nothing waits."""
        if not self._waiting:
            return None
        if len(self._waiting) >= self._limits.count or self._tokens >= self._limits.tokens:
            return 0.0
        return max(0.0, self._waiting[0].since_s + self._limits.wait_s - self._clock())

    def take(self, *, flush: bool = False) -> list[T]:
        """The oldest items that fit one batch, removed; [] when no batch is due. `flush`: do not wait for company."""
        if not self._waiting or not (flush or self.due_in_s() == 0.0):
            return []
        batch: list[T] = []
        tokens = 0
        while self._waiting and len(batch) < self._limits.count:
            following = self._waiting[0]
            if batch and tokens + following.tokens > self._limits.tokens:
                break
            self._waiting.popleft()
            batch.append(following.item)
            tokens += following.tokens
        self._tokens -= tokens
        return batch


def forward_groups(lengths: Sequence[int], *, count: int, token_budget: int) -> list[list[int]]:
    """Cut items into forward passes: indices into `lengths`, shortest items first.

    A group of n items is padded to its longest, so it costs n × longest tokens; that stays within `token_budget`, and n
    within `count`. An item longer than the whole budget goes alone. Every index is in exactly one group.

    >>> forward_groups([7, 2, 3], count=8, token_budget=8)
    [[1, 2], [0]]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda position: (lengths[position], position)):
        # Ascending order: the newcomer is the longest, so it alone sets the padded width of the group.
        if groups and len(groups[-1]) < count and (len(groups[-1]) + 1) * lengths[index] <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
