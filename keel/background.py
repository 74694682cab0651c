"""A call that may take long, or for ever, on a thread of its own that nobody waits for at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(call: Callable[[], T], *, name: str) -> Future[T]:
    """Its result to come, which cannot be cancelled. The thread is a daemon: the process ends whether or not the call
    does, as it would not with asyncio.to_thread's."""
    job: Future[T] = Future()
    job.set_running_or_notify_cancel()

    def work() -> None:
        try:
            job.set_result(call())
        except Exception as error:  # A user's function: it may raise anything.
            job.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return job
