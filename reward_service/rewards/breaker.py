"""A circuit breaker: what keeps failing is left alone for a while, then tried once before it is trusted again.

    closed      calls pass. `failures` failures in a row open it.
    open        no call passes, for `pause_s`.
    half-open   one call passes; its success closes the breaker, its failure opens it for another `pause_s`.

Holds no lock: for callers on one event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Ask `admits` before a call, then say `succeeded`, `failed` or, where it tells nothing, `abandoned`. `now`: a
    clock in seconds; tests replace it."""

    def __init__(self, *, failures: int, pause_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._pause_s = pause_s
        self._now = now
        self._in_a_row = 0
        self._opened_s: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        if self._opened_s is None:
            return "closed"
        return "open" if self._now() - self._opened_s < self._pause_s else "half-open"

    @property
    def opens_in_s(self) -> float:
        """Until a call may pass again; 0.0 unless open."""
        return 0.0 if self._opened_s is None else max(0.0, self._opened_s + self._pause_s - self._now())

    def admits(self) -> bool:
        """Whether a call may be made now. In the half-open state only the first that asks may."""
        state = self.state
        if state == "half-open" and not self._probing:
            self._probing = True
            return True
        return state == "closed"

    def succeeded(self) -> None:
        """A call came back well."""
        self._in_a_row, self._opened_s, self._probing = 0, None, False

    def failed(self) -> None:
        """A call failed. One that was made before the breaker opened does not lengthen the pause."""
        self._in_a_row += 1
        if self.state == "half-open" or (self.state == "closed" and self._in_a_row >= self._limit):
            self._opened_s = self._now()
        self._probing = False

    def abandoned(self) -> None:
        """A call ended and says nothing of the service: cancelled, or its own fault."""
        self._probing = False
