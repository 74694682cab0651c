"""What the reward worker reports, as a seam: Prometheus behind it in a run, nothing in tests."""

from __future__ import annotations

from typing import Protocol


class WorkerMetrics(Protocol):
    """All calls are cheap and never raise."""

    def count(self, what: str) -> None:
        """One more of: scored, dead, duplicates, failures, redelivered, poison, stream_errors."""
        ...

    def cache_hit(self, layer: str) -> None:
        """A score came from "process" or "store"."""
        ...

    def forward(self, *, rollouts: int, seconds: float) -> None:
        """A forward pass over so many rollouts took so long."""
        ...

    def progress(self) -> None:
        """The worker is alive: it scored, or has nothing to score."""
        ...


class NoMetrics:
    """Reports nothing."""

    def count(self, what: str) -> None:
        pass

    def cache_hit(self, layer: str) -> None:
        pass

    def forward(self, *, rollouts: int, seconds: float) -> None:
        pass

    def progress(self) -> None:
        pass
