"""What the reward worker reports, as a seam: Prometheus behind it in a run, nothing in most tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cluster.metrics import RewardMetrics


class WorkerMetrics(Protocol):
    """All calls are cheap and never raise."""

    def count(self, what: str) -> None:
        """One more of: scored, dead, rejected, down_weighted, duplicates, failures, paused, redelivered, poison,
        stream_errors, swaps, swap_failures, review_taken, review_left_out."""
        ...

    def cache_lookup(self, layer: str | None) -> None:
        """A score was looked for and found in layer "process" or "store", or not found."""
        ...

    def forward(self, *, rollouts: int, tokens: int, seconds: float) -> None:
        """A forward pass over so many rollouts with so many tokens (without padding) took so long."""
        ...

    def model(self, version: str) -> None:
        """From now on this version of the reward model scores."""
        ...

    def progress(self) -> None:
        """The worker is alive: it scored, or has nothing to score."""
        ...


class NoMetrics:
    """Reports nothing."""

    def count(self, what: str) -> None:
        pass

    def cache_lookup(self, layer: str | None) -> None:
        pass

    def forward(self, *, rollouts: int, tokens: int, seconds: float) -> None:
        pass

    def model(self, version: str) -> None:
        pass

    def progress(self) -> None:
        pass


class ExportedMetrics:
    """Into Prometheus metrics, and `beat` for each sign of progress."""

    def __init__(self, exported: RewardMetrics, *, beat: Callable[[], None]) -> None:
        self._exported = exported
        self._beat = beat
        self._counters = {
            "scored": exported.samples,
            "dead": exported.dead_letters,
            "duplicates": exported.lost_leases,
            "failures": exported.failures,
            "paused": exported.paused,
            "stream_errors": exported.stream_errors,
            "poison": exported.failures,
            "redelivered": exported.redeliveries,
            "rejected": exported.rejected,
            "down_weighted": exported.down_weighted,
            "swaps": exported.swaps,
            "swap_failures": exported.swap_failures,
            "review_taken": exported.review_taken,
            "review_left_out": exported.review_left_out,
        }
        self._lookups = {
            "process": exported.memory_cache_hits,
            "store": exported.redis_cache_hits,
            None: exported.cache_misses,
        }

    def count(self, what: str) -> None:
        counter = self._counters.get(what)
        if counter is not None:
            counter.inc()

    def cache_lookup(self, layer: str | None) -> None:
        self._lookups[layer].inc()

    def forward(self, *, rollouts: int, tokens: int, seconds: float) -> None:
        self._exported.batch_size.observe(rollouts)
        self._exported.tokens.inc(tokens)
        self._exported.score_seconds.observe(seconds)

    def model(self, version: str) -> None:
        self._exported.model.info({"version": version})

    def progress(self) -> None:
        self._beat()
