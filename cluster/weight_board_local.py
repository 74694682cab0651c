"""A board within one process: the twin of cluster/weights_ray.py, for tests and for runs without Ray.

Consumes and produces: as cluster/weight_board.py. Waits: as long as the board's method does. Who unblocks it: the
board's event loop, in a thread of its own, so that any thread and any other loop may ask.
Always holds: payloads are the publisher's own buffers; `close` ends the thread and every call that waits in it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import CancelledError, Future
from typing import Any

from cluster.errors import DeadlineError, WeightSyncError
from cluster.weight_board import Notice, OverBoard, WeightBoard
from cluster.weights import WeightBlob


class LocalBoardChannel(OverBoard):
    """A cluster.weights_collective.BoardChannel."""

    fetch_timeout_s = 30.0

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weight-board", daemon=True)
        self._thread.start()
        self._board = WeightBoard()
        self._closed = False

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True

        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_soon(self._loop.stop)

        self._loop.call_soon_threadsafe(end)
        self._thread.join()
        self._loop.close()

    async def ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a board's method that itself waits for `timeout_s` at most."""
        del timeout_s
        try:
            return await asyncio.wrap_future(self._submit(method, arguments))
        except CancelledError as error:
            raise WeightSyncError("the weight board is gone", do="restart the run; it resumes") from error

    def ask_now(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """`ask`, for threads without an event loop."""
        started_s = time.monotonic()
        try:
            return self._submit(method, arguments).result(timeout_s + 30.0)
        except CancelledError as error:
            raise WeightSyncError("the weight board is gone", do="restart the run; it resumes") from error
        except TimeoutError as error:
            waited_s = time.monotonic() - started_s
            raise DeadlineError(f"the board's answer to {method} took too long", got=f"{waited_s:.0f} s") from error

    async def fetch(self, notice: Notice) -> WeightBlob | None:
        return notice.blob(notice.payload[0])

    def _submit(self, method: str, arguments: tuple[Any, ...]) -> Future[Any]:
        if self._closed:
            raise WeightSyncError("the weight board is gone", do="restart the run; it resumes")
        return asyncio.run_coroutine_threadsafe(getattr(self._board, method)(*arguments), self._loop)
