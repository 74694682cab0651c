"""A real Chromium for tests, and the review page served to it.

`tests/get_chromium.sh` gets the browser where it is not installed. A test that needs it and finds none skips.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import pytest
import uvicorn

from cluster.review_queue import ReviewItem, ReviewQueue
from reward_service.review.files import ReviewFiles
from reward_service.review.page import PageSettings, ReviewPage, make_app
from reward_service.review.session import Access

TOKEN: Final = "a-token-for-tests"
_START_TIMEOUT_S: Final = 20.0
_T = TypeVar("_T")


def find_chromium() -> Path | None:
    """On PATH, or in the cache that get_chromium.sh fills."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (on_path := shutil.which(name)) is not None:
            return Path(on_path)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    program = Path(os.environ.get("KEEL_CHROMIUM_DIR") or Path(caches) / "keel" / "chromium") / "chromium"
    return program if os.access(program, os.X_OK) else None


def require_chromium() -> Path:
    """The browser; skips the test without it."""
    program = find_chromium()
    if program is None:
        pytest.skip("chromium is not installed: tests/get_chromium.sh gets it")
    return program


class ServedPage:
    """The review page on a free port of this machine, in a thread with a loop of its own, for the `with` block.

    `make_queue` runs on that loop; `close` too, at the end.
    """

    def __init__(
        self,
        directory: Path,
        *,
        make_queue: Callable[[], ReviewQueue],
        close: Callable[[], Awaitable[None]],
        settings: PageSettings,
    ) -> None:
        self.directory: Final = directory
        self._make_queue = make_queue
        self._close = close
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._server: uvicorn.Server | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="review page", daemon=True)
        self.url: Final = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self.queue: ReviewQueue

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run on the page's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_TIMEOUT_S)

    def push(self, *items: ReviewItem) -> None:
        assert self.call(self.queue.push(items, limit=10_000)) == len(items)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(_START_TIMEOUT_S), "the page did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(_START_TIMEOUT_S)
        self._listening.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self.queue = self._make_queue()
        with ReviewFiles(self.directory) as files:
            page = ReviewPage(self.queue, files=files, access=Access(TOKEN), settings=self._settings)
            await page.write_files()
            app = make_app(page)
            config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
            self._server = uvicorn.Server(config)
            self._loop.call_soon(self._started.set)
            await self._server.serve(sockets=[self._listening])
        await self._close()
