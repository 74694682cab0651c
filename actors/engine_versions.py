"""Keeps one engine at the newest policy version, and says which version is fit for use.

Consumes: a feed of versions: whole from the store, or through the weight group. Produces: an engine that holds them.
Waits for: the next version, in polls; the engine, while it sleeps. Who unblocks `wait` and `first`: a version that was
loaded and found right.
Always holds: the first version that comes by either way is ready only after the engine's log-probs of the probe
sequence agreed with the learner's; a broadcast that fails harms nothing, the version is read from the store instead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np

from actors.engine import Engine, SyncTimings
from actors.rollout_meter import RolloutMeter
from cluster.errors import DeadlineError, KeelError, WeightSyncError
from cluster.weight_group import GroupBrokenError, GroupUpdate, WeightFeed
from cluster.weights import Transport, WeightBlob, WeightChannel

_log = logging.getLogger(__name__)


class EngineVersions:
    """For one event loop, the engine's. `awake` is entered while weights are loaded."""

    def __init__(
        self,
        engine: Engine,
        *,
        weights: WeightChannel,
        meter: RolloutMeter,
        probe_tolerance_nats: float,
        awake: Callable[[], AbstractAsyncContextManager[Any]],
    ) -> None:
        self._engine, self._weights, self._meter = engine, weights, meter
        self._tolerance_nats, self._awake = probe_tolerance_nats, awake
        self._probed: set[Transport] = set()
        """Ways that a version has come, and was found right by its probe."""
        self._changed = asyncio.Condition()
        self._ready = engine.version

    @property
    def ready(self) -> int:
        """The engine's version once it has been found right: behind the engine's while the probe is compared."""
        return self._ready

    def feed(self, name: str) -> WeightFeed:
        """The engine's updates, under the name of its process."""
        return self._weights.feed(name, self._engine)

    async def first(self) -> None:
        """Return when the engine holds what the channel had at this time, or something newer."""
        newest = await self._weights.newest_version()
        async with self._changed:
            wanted = 0 if newest is None else newest
            await self._changed.wait_for(lambda: self._ready >= wanted)

    async def wait(self, version: int, *, timeout_s: float) -> int:
        """Wait until the engine holds `version` or a later one, and return it. Needs `follow` to be running. Raises
        DeadlineError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._ready >= version)
        except TimeoutError as error:
            raise DeadlineError(
                f"weights of version {version} did not come",
                got=f"version {self._ready} after {timeout_s:g} s",
                do="see whether the learner still publishes",
            ) from error
        return self._ready

    async def follow(self, feed: WeightFeed, *, poll_s: float, unchanged: Callable[[], None]) -> None:
        """Take every version that comes, until cancelled. `unchanged` is called after a poll without one."""
        while True:
            update = await feed.next(self._engine.version, timeout_s=poll_s)
            if update is None:
                await self._engine.check_health()  # an idle engine's death shows in no request
                unchanged()
            elif isinstance(update, GroupUpdate):
                await self._receive(update, feed=feed)
            else:
                await self.load(update)
            del update  # it pins the version's bytes in shared memory until the next one comes

    async def _receive(self, update: GroupUpdate, *, feed: WeightFeed) -> None:
        """Take a version through the group. When the group breaks, the feed has the version from the store next."""
        try:
            await self.load(update)
        except GroupBrokenError as error:
            _log.warning("version %d did not come through the weight group: %s", update.version, error)
            await feed.report(update, error=error)
        except KeelError as error:
            await feed.report(update, error=WeightSyncError(str(error)))  # so that the others do not wait for this one
            raise
        else:
            await feed.report(update, error=None)

    async def load(self, update: WeightBlob | GroupUpdate) -> None:
        """Load a version, and the first time that one comes in this way compare the probe. For `follow`, and in its
        place while it is not running. Raises WeightSyncError."""
        started_s = time.perf_counter()
        transport: Transport = "collective" if isinstance(update, GroupUpdate) else update.transport
        try:
            async with self._awake():
                update = await self._still_there(update)
                timings = await self._take(update)
        except WeightSyncError:
            self._meter.sync_failed(transport)
            raise
        self._meter.synced(
            update.version,
            timings=timings,
            seconds=time.perf_counter() - started_s,
            size_bytes=update.size_bytes,
            transport=transport,
        )
        async with self._changed:
            self._ready = update.version
            self._changed.notify_all()

    async def _still_there(self, update: WeightBlob | GroupUpdate) -> WeightBlob | GroupUpdate:
        """`update`, or its successor where the learner has put that in its place while the engine slept. (While the
        engine is awake the learner writes nothing: it is not its turn.)"""
        if isinstance(update, GroupUpdate) or update.shared is None:
            return update
        newest = await self._weights.latest()
        return update if newest is None or newest.version <= update.version else newest

    async def _take(self, update: WeightBlob | GroupUpdate) -> SyncTimings:
        if isinstance(update, GroupUpdate):
            way: Transport = "collective"
            timings = await self._engine.receive_weights(update)
        else:
            way = update.transport
            timings = await self._engine.load_weights(update)
        if way not in self._probed:
            await self._compare(update)
            self._probed.add(way)
        return timings

    async def _compare(self, update: WeightBlob | GroupUpdate) -> None:
        """The engine's log-probs of the probe against the learner's: a wrong load shows here and nowhere else."""
        if update.probe is None:
            _log.warning("version %d came without a probe: the loaded weights are not checked", update.version)
            return
        logprobs = await self._engine.probe(update.probe.token_ids)
        error_nats = float(np.abs(logprobs - update.probe.logprobs).max())
        if not error_nats <= self._tolerance_nats:  # so written that NaN fails
            raise WeightSyncError(
                f"after loading version {update.version} the engine's log-probs are not the learner's",
                got=f"{error_nats:.3g} nats apart on the probe, {self._tolerance_nats:g} allowed",
                do="compare rollout.dtype with learner.dtype, or raise rollout.probe_tolerance for half precision",
            )
