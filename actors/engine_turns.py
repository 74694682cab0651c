"""An engine's side of a shared GPU: sleep when the learner wants the device, wake when it comes back.

Consumes: the learner's wish. Produces: a sleeping engine, and the device's release.
Waits for: a wish (in polls); requests in flight and the device's return, for `settle_timeout_s` and `turn_timeout_s`
at most. Who unblocks it: the learner, by taking and giving; the requests, by ending.
Always holds: the device is given only after the engine sleeps, and the engine wakes only after the device is taken
again; weights are loaded only while awake (`awake`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from cluster.errors import DeadlineError
from cluster.turns import Turns

_log = logging.getLogger(__name__)


class Sleeper(Protocol):
    """The part of an engine that this needs."""

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...


class EngineTurns:
    """`run` for as long as the engine lives."""

    def __init__(
        self,
        engine: Sleeper,
        turns: Turns,
        *,
        settled: Callable[[], Awaitable[None]],
        turn_timeout_s: float,
        settle_timeout_s: float,
        poll_s: float = 10.0,
    ) -> None:
        """`settled` returns when the engine has nothing in flight."""
        self._engine, self._turns, self._settled = engine, turns, settled
        self._turn_timeout_s, self._settle_timeout_s, self._poll_s = turn_timeout_s, settle_timeout_s, poll_s
        self._at_device = asyncio.Lock()
        """Held while asleep, and by whoever needs the engine awake."""
        self.rounds = 0

    def awake(self) -> asyncio.Lock:
        """Enter it to use the engine: it stays awake meanwhile."""
        return self._at_device

    async def run(self) -> None:
        """Take turns until cancelled. Raises DeadlineError when the learner does not give the device back."""
        while True:
            if await self._turns.wanted("engine", self._poll_s):
                await self.round()

    async def round(self) -> None:
        """Once: settle, sleep, give, take, wake."""
        try:
            async with asyncio.timeout(self._settle_timeout_s):
                await self._settled()
        except TimeoutError:
            _log.warning("requests were still in flight when the learner took the GPU: they wait for its return")
        async with self._at_device:
            await self._engine.sleep()
            await self._turns.give("engine")
            try:
                await self._turns.take("engine", self._turn_timeout_s)
            except DeadlineError:
                _log.error("the learner kept the GPU; this engine cannot wake and ends")
                raise
            await self._engine.wake()
        self.rounds += 1
