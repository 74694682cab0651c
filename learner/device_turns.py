"""The learner's side of a shared GPU: on it, with weights and moments, for its turn, and in host memory otherwise.

Consumes: turns. Produces: weights and moments on the device, inside `held`. Waits: for the engine to sleep, for
`timeout_s` at most. Who unblocks it: actors/engine_turns.py, by giving; or the supervisor, when the engine is gone.
Always holds: the turn is given only after the device's memory; a failure inside keeps the turn, since the memory may
still be taken, until the supervisor has ended this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch

from cluster.turns import Turns


class DeviceTurns:
    """One a learner."""

    def __init__(
        self, turns: Turns, move_to: Callable[[torch.device], None], *, device: torch.device, timeout_s: float
    ) -> None:
        """`move_to`: brings everything that the learner keeps to a device."""
        self._turns, self._move_to = turns, move_to
        self._device, self._timeout_s = device, timeout_s

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Raises DeadlineError when the engine does not give its turn up in time."""
        await self._turns.take("learner", self._timeout_s)
        await asyncio.to_thread(self._move_to, self._device)
        yield
        await asyncio.to_thread(self._move_to, torch.device("cpu"))
        await self._turns.give("learner")
