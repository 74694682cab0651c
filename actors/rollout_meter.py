"""What one rollout worker has done: counted here for `status`, and passed on to Prometheus where that is on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from actors.engine import SyncTimings
from cluster.records import Rollout
from cluster.streams import Delivery
from cluster.weights import UNSYNCED, Transport

if TYPE_CHECKING:
    from cluster.metrics import Heartbeat, RolloutMetrics


@dataclass
class Tally:
    """Totals since the worker's start; times are those of the last weight update."""

    samples: int = 0
    tokens: int = 0
    truncated: int = 0
    """Samples cut at their token limit."""
    redelivered: int = 0
    failures: int = 0
    dead: int = 0
    poison: int = 0
    """Entries that were no prompt."""
    lost_leases: int = 0
    """Answers thrown away because another actor had moved the entry on."""
    stream_errors: int = 0
    handed_back: int = 0
    """Entries put back for others when this actor was drained."""
    sync_failures: int = 0
    syncs: int = 0
    group_syncs: int = 0
    """Of these, how many came through the weight group."""
    version: int = UNSYNCED
    pause_s: float = 0.0
    load_s: float = 0.0


class IdleTime:
    """How long there was nothing to do, between `begin` and `end`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before_s = 0.0
        self._since_s: float | None = None
        """When the present idle time began."""
        self._running = False

    @property
    def seconds(self) -> float:
        return self._before_s + (0.0 if self._since_s is None else self._clock() - self._since_s)

    def begin(self) -> None:
        self._running = True
        self.now(False)

    def end(self) -> None:
        self.now(True)
        self._running = False

    def now(self, busy: bool) -> None:
        if busy and self._since_s is not None:
            self._before_s, self._since_s = self.seconds, None
        elif not busy and self._running and self._since_s is None:
            self._since_s = self._clock()


class RolloutMeter:
    """Counts every event once. `heartbeat` beats when an answer moved on, or there was nothing to answer."""

    def __init__(self, metrics: RolloutMetrics | None = None, *, heartbeat: Heartbeat | None = None) -> None:
        self.tally = Tally()
        self._metrics, self._heartbeat = metrics, heartbeat

    def as_dict(self) -> dict[str, Any]:
        """The tally, for `status`."""
        return asdict(self.tally)

    def claimed(self, delivery: Delivery) -> None:
        if delivery.deliveries > 1:
            self.tally.redelivered += 1
            if self._metrics is not None:
                self._metrics.redeliveries.inc()

    def running(self, requests: int) -> None:
        if self._metrics is not None:
            self._metrics.running.set(requests)

    def answered(self, rollout: Rollout) -> None:
        tokens, truncated = len(rollout.response_ids), rollout.finish_reason == "length"
        self.tally.samples += 1
        self.tally.tokens += tokens
        self.tally.truncated += truncated
        self.beat()
        if self._metrics is not None:
            self._metrics.samples.inc()
            self._metrics.tokens.inc(tokens)
            self._metrics.truncated.inc(truncated)
            self._metrics.response_tokens.observe(tokens)
            self._metrics.generate_seconds.observe(rollout.generate_s)

    def beat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.beat()

    def synced(
        self, version: int, *, timings: SyncTimings, seconds: float, size_bytes: int, transport: Transport
    ) -> None:
        """`seconds`: from the arrival of the version to its use."""
        self.tally.syncs += 1
        self.tally.group_syncs += transport == "collective"
        self.tally.version, self.tally.pause_s, self.tally.load_s = version, timings.pause_s, timings.load_s
        if self._metrics is not None:
            self._metrics.syncs_by_transport[transport].observe(seconds)
            self._metrics.bytes_by_transport[transport].inc(size_bytes)
            self._metrics.policy_version.set(version)

    def sync_failed(self, transport: Transport) -> None:
        self.tally.sync_failures += 1
        if self._metrics is not None:
            self._metrics.failures_by_transport[transport].inc()

    def failed(self) -> None:
        self.tally.failures += 1

    def dead_lettered(self) -> None:
        self.tally.dead += 1
        if self._metrics is not None:
            self._metrics.dead_letters.inc()

    def poisoned(self) -> None:
        self.tally.poison += 1

    def handed_back(self) -> None:
        self.tally.handed_back += 1

    def lost_lease(self) -> None:
        self.tally.lost_leases += 1
        if self._metrics is not None:
            self._metrics.lost_leases.inc()

    def stream_failed(self) -> None:
        self.tally.stream_errors += 1
