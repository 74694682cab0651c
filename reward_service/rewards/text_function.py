"""A user's function of (prompt, answer), called with a time limit so that it can neither stop nor stall the worker.

Consumes: texts. Produces: what the function returned for each, in order, or a ScoringError. Waits for: the function, at
most `timeout_s` a call. Who unblocks it: the function ending, or the time limit.
Always holds: a plain function runs in one thread of its own, one call at a time, so it need not be thread-safe; a
coroutine runs on the caller's event loop, at most `_CONCURRENT` calls at a time, and must not block. A plain function
that overruns cannot be stopped: its thread is left behind, and with `_MAX_STUCK` of those the process is given up.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

from cluster.errors import ScoringError
from reward_service.forward_thread import ForwardThread, StuckError

_CONCURRENT: Final = 16
_MAX_STUCK: Final = 8
"""More than one sample alone can cause: each is tried reward.max_deliveries times."""


class TextFunction:
    """`name` is for messages: the reference in the configuration."""

    def __init__(self, function: Callable[..., Any], *, name: str, timeout_s: float) -> None:
        self.name = name
        self._function = function
        self._timeout_s = timeout_s
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self._thread = ForwardThread(name=name, max_stuck=_MAX_STUCK)

    async def outcomes(self, texts: Sequence[tuple[str, str]]) -> list[Any | ScoringError]:
        """One a (prompt, answer). Raises StuckError."""
        if not self._is_async:
            return [await self._in_thread(prompt, answer) for prompt, answer in texts]
        turns = asyncio.Semaphore(_CONCURRENT)

        async def one(prompt: str, answer: str) -> Any | ScoringError:
            async with turns:
                return await self._on_loop(prompt, answer)

        return list(await asyncio.gather(*(one(prompt, answer) for prompt, answer in texts)))

    def close(self) -> None:
        """Let the thread end. Repeatable."""
        self._thread.close()

    async def _in_thread(self, prompt: str, answer: str) -> Any | ScoringError:
        def run() -> tuple[Any, BaseException | None]:
            try:
                return self._function(prompt, answer), None
            except BaseException as error:  # SystemExit too: a function must not end the worker
                return None, error

        try:
            value, error = await self._thread.call(run, timeout_s=self._timeout_s)
        except StuckError as stuck:
            raise StuckError(
                f"{self.name} is stuck",
                got=f"{_MAX_STUCK} calls over their {self._timeout_s:g} s, still running",
                do="make it end on every text, or raise its timeout_s",
            ) from stuck
        except ScoringError:
            return self._too_slow()
        return value if error is None else self._failed(error)

    async def _on_loop(self, prompt: str, answer: str) -> Any | ScoringError:
        limit, task = asyncio.timeout(self._timeout_s), asyncio.current_task()
        try:
            async with limit:
                return await self._function(prompt, answer)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # we are told to end; the function's own cancellations must not end the worker's task in silence
            return self._too_slow() if limit.expired() else self._failed(error)

    def _too_slow(self) -> ScoringError:
        return ScoringError(
            f"{self.name} took too long",
            got=f"no result after {self._timeout_s:g} s",
            do="make it faster, or raise its timeout_s",
        )

    def _failed(self, error: BaseException) -> ScoringError:
        failure = ScoringError(f"{self.name} failed", got=repr(error)[:300], do="correct it; nothing is scored as 0")
        failure.__cause__ = error
        return failure
