"""One thread in which models run, so that the event loop never waits for a forward pass.

Consumes: blocking functions. Produces: their results, in the caller's event loop. Waits for: the running call, at most
its `timeout_s`. Who unblocks it: the call ending, or the time limit.
Always holds: one call at a time is under way, apart from those that overran their limit. Such a call cannot be stopped:
its thread is abandoned and a new one takes over; with `max_stuck` of them still running, every call is refused, as the
process is then no good any more. Threads are daemons: a stuck one does not keep the process alive.

The thread is kept between calls because each new one would set up its own pool of compute threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from cluster.errors import DeadlineError, ScoringError

R = TypeVar("R")

_CLOSE: Final = None


class StuckError(DeadlineError):
    """Too many calls overran their time limit and still run. The process must be replaced."""


class ForwardThread:
    """Runs blocking calls one after another in a thread of its own. For callers on one event loop."""

    def __init__(self, *, name: str = "forward", max_stuck: int = 3) -> None:
        self._name = name
        self._max_stuck = max_stuck
        self._turn = asyncio.Lock()
        self._lane: _Lane | None = None
        self._stuck: list[_Lane] = []

    async def call(self, function: Callable[[], R], *, timeout_s: float) -> R:
        """`function()` in the thread, once earlier calls are done. Raises what it raises; ScoringError when it takes
        more than `timeout_s` (waiting its turn not counted); StuckError when too many have overrun already."""
        async with self._turn:
            self._stuck = [lane for lane in self._stuck if lane.busy]
            if len(self._stuck) >= self._max_stuck:
                raise StuckError(
                    "scoring is stuck",
                    got=f"{len(self._stuck)} forward passes over their time limit of {timeout_s:g} s, still running",
                    do="raise reward.score_timeout_s, lower reward.token_budget, or give the worker more compute",
                )
            lane = self._lane or _Lane(self._name)
            self._lane = lane
            future = lane.submit(function)
            try:
                async with asyncio.timeout(timeout_s):
                    return await future
            except TimeoutError as error:
                if not lane.busy:  # the function itself raised TimeoutError
                    raise
                raise ScoringError(
                    "a forward pass took too long",
                    got=f"no result after {timeout_s:g} s",
                    do="raise reward.score_timeout_s or lower reward.token_budget",
                ) from error
            finally:
                if lane.busy:  # overran, or the caller was cancelled
                    lane.close()
                    self._stuck.append(lane)
                    self._lane = None

    def close(self) -> None:
        """Let the thread end after the call under way."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None


class _Lane:
    """A daemon thread and the queue that feeds it."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.busy = False
        """A submitted call has not come back to the event loop."""
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[[], R]) -> asyncio.Future[R]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self.busy = True

        def deliver(result: R | None, error: BaseException | None) -> None:
            self.busy = False
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # R may itself be None

        todo = [function]

        def run() -> None:
            result: R | None = None
            error: BaseException | None = None
            try:
                # Let go of before the caller hears of the result: what the function holds, models above all, is freed
                # by the caller. A daemon thread that frees them while the process ends would abort it.
                result = todo.pop()()
            except BaseException as caught:  # carried to the caller, whatever it is
                error = caught
            # A closed loop refuses: the caller is gone, and so is whoever wanted the result.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(deliver, result, error)

        self._calls.put(run)
        return future

    def close(self) -> None:
        self._calls.put(_CLOSE)

    def _work(self) -> None:
        while (call := self._calls.get()) is not _CLOSE:
            call()
            del call  # or it would live until the next one comes
