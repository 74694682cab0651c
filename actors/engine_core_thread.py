"""vLLM's engine core in a thread of this process: for one engine on a CPU, where it saves a process and its start.

vLLM starts the core with `get_mp_context().Process(target=EngineCoreProc.run_engine_core, …)`. While `core_in_thread`
is entered, that name, private to vLLM, gives a context whose Process is a thread. The core's loop, its sockets and its
hand-shake are vLLM's own. Callers fall back to a process when this fails: see `actors/engine_vllm.py`.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from typing import Any

_log = logging.getLogger(__name__)


class _ThreadedCore:
    """A multiprocessing.Process as far as vLLM uses one: start, sentinel, exitcode, is_alive, join, terminate."""

    def __init__(
        self,
        *,
        target: Callable[..., None] | None = None,
        name: str = "EngineCore",
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        del target  # It installs signal handlers, which only a process of its own may; `_run` does the rest of it.
        self.name, self.pid = name, os.getpid()
        self.exitcode: int | None = None
        self._kwargs = dict(kwargs or {})
        self._core: Any = None
        self._stop_requested = False
        # Readable at end of file: that is how vLLM's monitor sees a core end. Each end is closed by its user.
        self.sentinel, self._alive_fd = os.pipe()
        weakref.finalize(self, os.close, self.sentinel)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def terminate(self) -> None:
        """What SIGTERM does to a core in a process: leave the loop at its next turn."""
        self._stop_requested = True
        if self._core is not None:
            self._request_stop()

    kill = terminate

    def _request_stop(self) -> None:
        from vllm.v1.engine import EngineCoreRequestType
        from vllm.v1.engine.core import EngineShutdownState

        self._core.shutdown_state = EngineShutdownState.REQUESTED
        self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def _run(self) -> None:
        from vllm.v1.engine.core import EngineCoreProc

        arguments = dict(self._kwargs)
        rank = arguments.pop("dp_rank", 0)
        arguments.pop("local_dp_rank", None)
        try:
            parallel = arguments["vllm_config"].parallel_config
            parallel.data_parallel_index = rank
            parallel.reconfigure_for_independent_dp_rank()
            self._core = EngineCoreProc(engine_index=rank, **arguments)
            if self._stop_requested:
                self._request_stop()
            self._core.run_busy_loop()
            self.exitcode = 0
        except SystemExit:
            self.exitcode = 0
        except Exception:
            _log.exception("the engine core failed")
            self.exitcode = 1
            if self._core is not None:
                self._core._send_engine_dead()
        finally:
            if self.exitcode is None:
                self.exitcode = 1
            if self._core is not None:
                self._core.shutdown()
            os.close(self._alive_fd)


class _ThreadContext:
    """A multiprocessing context whose processes are threads."""

    Process = _ThreadedCore

    def Queue(self, maxsize: int = 0) -> Queue[Any]:
        return multiprocessing.get_context("spawn").Queue(maxsize)


@contextlib.contextmanager
def core_in_thread() -> Iterator[None]:
    """While entered, an AsyncLLM made anywhere in this process starts its core in a thread. One engine at a time.

    Raises AttributeError when this vLLM has no such seam.
    """
    from vllm.v1.engine import utils

    original = utils.get_mp_context
    utils.get_mp_context = _ThreadContext
    try:
        yield
    finally:
        utils.get_mp_context = original
