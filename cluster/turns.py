"""Whose turn it is on a shared GPU: the learner trains only while the engine sleeps, and the engine wakes only when the
learner has yielded.

Consumes: a wish for the device (`take`), and its return (`give`). Produces: at most one holder at any time.
Waits: in `take`, for the other side to give, and in `wanted`, for the other side to want; each for `timeout_s` at most.
Who unblocks a wait: the other side's `give` or `take`, or the time-out.
Always holds: the device changes hands only when its holder gives it; a side that times out has not got it, and does not
wait in line. A holder that died is replaced by `forget`, from whoever saw it die.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cluster.errors import DeadlineError, SupervisionError

Side = Literal["learner", "engine"]


class Turns(Protocol):
    """One device's turns. The engine has the first one."""

    async def take(self, side: Side, timeout_s: float) -> None:
        """Wait for the device and hold it. Raises DeadlineError."""
        ...

    async def give(self, side: Side) -> None:
        """Let the other side have it. Raises SupervisionError when `side` does not hold it."""
        ...

    async def wanted(self, side: Side, timeout_s: float) -> bool:
        """True as soon as the other side waits for the device that `side` holds; False after `timeout_s`."""
        ...

    async def forget(self, side: Side) -> None:
        """`side` died. Frees the device if it was its holder, and takes it out of the line."""
        ...


class LocalTurns:
    """Within one event loop; over Ray, the class of the actor behind `RayTurns`."""

    def __init__(self) -> None:
        self._holder: Side | None = "engine"
        self._waiting: set[Side] = set()
        self._lives: Counter[Side] = Counter()
        """How often each side has been forgotten: what it asked before that is not granted any more."""
        self._changed = asyncio.Condition()

    async def take(self, side: Side, timeout_s: float) -> None:
        async with self._changed:
            if self._holder == side:
                return
            life = self._lives[side]
            self._waiting.add(side)
            self._changed.notify_all()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self._holder in (None, side) or self._lives[side] > life)
            except TimeoutError as error:
                if self._holder != side:  # else it was handed over at the last moment
                    raise DeadlineError(
                        f"the {side} did not get its turn on the GPU",
                        got=f"the {self._holder} has held it for more than {timeout_s:g} s",
                        do="see whether that process still works",
                    ) from error
            except asyncio.CancelledError:
                if self._holder == side and self._lives[side] == life:
                    self._hand_on(side)
                raise
            finally:
                if self._lives[side] == life:
                    self._waiting.discard(side)
            if self._lives[side] > life:
                raise SupervisionError(f"the {side} has been replaced and gets no turn")
            self._holder = side
            self._changed.notify_all()

    async def give(self, side: Side) -> None:
        async with self._changed:
            if self._holder != side:
                raise SupervisionError(
                    f"the {side} gave a turn that it did not have", got=f"the holder: {self._holder}", do="take() first"
                )
            self._hand_on(side)

    def _hand_on(self, side: Side) -> None:
        """To the other side, if that waits: `side` may want it again at once, and must not overtake it."""
        others = self._waiting - {side}
        self._holder = others.pop() if others else None
        self._changed.notify_all()

    async def wanted(self, side: Side, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._holder == side and bool(self._waiting - {side}))
        except TimeoutError:
            return False
        return True

    async def forget(self, side: Side) -> None:
        async with self._changed:
            self._lives[side] += 1
            self._waiting.discard(side)
            if self._holder == side:
                self._hand_on(side)
            self._changed.notify_all()


@dataclass(frozen=True)
class RayTurns:
    """Turns for processes of one Ray cluster. Picklable."""

    actor: Any
    call_timeout_s: float = 30.0
    """For the actor's answer, on top of a call's own waiting time."""

    @classmethod
    def create(cls) -> RayTurns:
        """The first turn is the engine's. On the caller's node, for as long as a handle to it, or until `close`."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        keeper = ray.remote(num_cpus=0, max_concurrency=100, scheduling_strategy=here)(LocalTurns)
        return cls(actor=keeper.remote())

    async def take(self, side: Side, timeout_s: float) -> None:
        await self._within(self.actor.take.remote(side, timeout_s), timeout_s)

    async def give(self, side: Side) -> None:
        await self._within(self.actor.give.remote(side), 0.0)

    async def wanted(self, side: Side, timeout_s: float) -> bool:
        return bool(await self._within(self.actor.wanted.remote(side, timeout_s), timeout_s))

    async def forget(self, side: Side) -> None:
        await self._within(self.actor.forget.remote(side), 0.0)

    def forget_now(self, side: Side) -> None:
        """`forget`, for threads without an event loop."""
        import ray

        try:
            ray.get(self.actor.forget.remote(side), timeout=self.call_timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise DeadlineError("the keeper of turns does not answer", got=f"{self.call_timeout_s:g} s") from error
        except ray.exceptions.RayActorError as error:
            raise SupervisionError("the keeper of turns is gone", do="restart the run; it resumes") from error

    def close(self) -> None:
        import ray

        ray.kill(self.actor)

    async def _within(self, answer: Awaitable[Any], timeout_s: float) -> Any:
        import ray

        try:
            async with asyncio.timeout(timeout_s + self.call_timeout_s):
                return await answer
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, DeadlineError | SupervisionError) else error from error
        except TimeoutError as error:
            raise DeadlineError("the keeper of turns does not answer", got=f"{timeout_s:g} s and more") from error
        except ray.exceptions.RayActorError as error:
            raise SupervisionError("the keeper of turns is gone", do="restart the run; it resumes") from error


@asynccontextmanager
async def turn(turns: Turns, side: Side, *, timeout_s: float) -> AsyncIterator[None]:
    """Hold the device for the time of the block."""
    await turns.take(side, timeout_s)
    try:
        yield
    finally:
        await turns.give(side)
