"""Ctrl-C: the first asks the run to save and stop, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cluster.errors import KeelError


class InterruptedRun(KeelError):
    """The user asked the run to stop; what was done is kept."""


class StopRequest:
    """requested: set by the first SIGINT or SIGTERM. at_once: set by the second."""

    def __init__(self) -> None:
        self.requested = False
        self.at_once = False

    def check(self) -> None:
        """Raise InterruptedRun once a stop was asked for. Called from the driver's waiting loops."""
        if self.requested:
            raise InterruptedRun("stopped on request", do="go on with keel train CONFIG --resume")


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM while the body runs. The second signal raises KeyboardInterrupt."""
    request = StopRequest()

    def handle(number: int, _frame: FrameType | None) -> None:
        if request.at_once:
            return  # Already on the way out; clearing up must not be cut short.
        if request.requested:
            request.at_once = True
            raise KeyboardInterrupt
        request.requested = True
        print(f"\nkeel: {signal.Signals(number).name}: saving and stopping; once more stops at once", flush=True)

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
