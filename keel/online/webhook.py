"""Posts JSON to a URL from a thread of its own, so that nobody waits for it and nothing fails with it.

Consumes: bodies (`post`, from any thread). Produces: POST requests, one after the other, in order; `counts`. Waits:
for the server, `timeout_s` each phase of a try; between tries, a growing pause. Who unblocks it: the server, or these
limits. Always holds: `post` returns at once; a body that cannot be delivered in three tries is logged, counted and
forgotten, as is the oldest when too many wait; the URL, in which there may be a secret, is in no log.

Tried again: no connection, time-outs, status 408, 429 and 5xx.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import httpx

log = logging.getLogger(__name__)

_TRIES: Final = 3
_MOST_WAITING: Final = 256
_TRANSIENT: Final = frozenset({408, 429})


class Webhook:
    """`pause_s`: before the second try; twice as long before the third."""

    def __init__(self, url: str, *, timeout_s: float, pause_s: float = 1.0) -> None:
        self.counts: Counter[str] = Counter()
        """sent, failed."""
        self._url = url
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._host = httpx.URL(url).host
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(maxsize=_MOST_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        # It logs each request with its whole URL.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._thread.start()

    def post(self, body: Mapping[str, Any]) -> None:
        self._put(body)

    def close(self) -> None:
        """What waits still gets one try, within the time that one try may take; then it is given up."""
        self._closing.set()
        self._put(None)
        self._thread.join(self._timeout_s)

    def _put(self, body: Mapping[str, Any] | None) -> None:
        while True:
            try:
                return self._waiting.put_nowait(body)
            except queue.Full:
                try:
                    self._waiting.get_nowait()
                except queue.Empty:
                    continue
                self._failed("too many wait")

    def _work(self) -> None:
        with httpx.Client(timeout=self._timeout_s) as client:
            while (body := self._waiting.get()) is not None:
                try:
                    self._deliver(client, body)
                except Exception as error:  # A body that is no JSON, say: no reason to fall silent for the rest.
                    self._failed(repr(error))

    def _deliver(self, client: httpx.Client, body: Mapping[str, Any]) -> None:
        problem = ""
        for attempt in range(_TRIES):
            if attempt and self._closing.wait(self._pause_s * 2 ** (attempt - 1)):
                break
            problem, again = self._try(client, body)
            if not problem:
                self.counts["sent"] += 1
                return
            if not again:
                break
        self._failed(problem)

    def _try(self, client: httpx.Client, body: Mapping[str, Any]) -> tuple[str, bool]:
        """What went wrong, empty when nothing did, and whether another try may help."""
        begun_s = time.monotonic()
        try:
            status = client.post(self._url, json=body).status_code
        except httpx.HTTPError as error:
            return f"{type(error).__name__} after {time.monotonic() - begun_s:.1f} s", True
        if status < 300:
            return "", False
        return f"status {status}", status in _TRANSIENT or status >= 500

    def _failed(self, problem: str) -> None:
        log.warning("an alert did not reach guard.webhook at %s: %s", self._host, problem)
        self.counts["failed"] += 1
