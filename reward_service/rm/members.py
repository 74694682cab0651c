"""Several fits, one after the other or side by side in spawned processes.

Consumes: jobs. Produces: what each job writes, and every job's progress events in this process, one at a time. Waits
for: its own child processes. Who unblocks it: they end, or die, which breaks the pool. Always holds: on return every
job has been done, and the first error of any job is raised once no child runs any more; no child outlives this process,
however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

from cluster.errors import ModelError
from cluster.hf_training import Emit, torch_threads
from reward_service.rm.fit import FitJob, fit

_POLL_S: Final = 0.2


def fit_all(jobs: Sequence[FitJob], *, parallel: int, threads: int, emit: Emit) -> None:
    """Do every job, at most `parallel` at a time, with `threads` compute threads in all. Raises what a fit raises."""
    side_by_side = min(parallel, len(jobs))
    if side_by_side == 1:
        with torch_threads(threads):
            for job in jobs:
                fit(job, emit)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    events: Any = context.Queue()
    pool = ProcessPoolExecutor(side_by_side, mp_context=context, initializer=_begin, initargs=(events,))
    try:
        each = max(1, threads // side_by_side)
        running = [pool.submit(_fit_there, job, each) for job in jobs]
        _watch(running, events=events, emit=emit)
    except BrokenProcessPool as error:
        raise ModelError(
            "a process that trained a reward model died",
            got=str(error),
            do="look for the out-of-memory killer, and lower rm.parallel or rm.batch_size",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        events.close()


def _watch(running: Sequence[Future[None]], *, events: Any, emit: Emit) -> None:
    """Of errors that come together, the first job's is raised."""
    while running:
        ended, _ = wait(running, timeout=_POLL_S)
        with contextlib.suppress(queue.Empty):
            while True:
                emit(events.get_nowait())
        for future in running:
            if future in ended:
                future.result()
        running = [future for future in running if future not in ended]


_events: Any = None
"""In a child: where its progress goes."""


def _begin(events: Any) -> None:
    global _events  # an initializer has no other way to its process's tasks
    _events = events
    events.cancel_join_thread()  # after another job's error nobody reads on, and a full pipe would never let this end
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns too when it was killed, which would leave this process waiting for work
        os._exit(1)


def _fit_there(job: FitJob, threads: int) -> None:
    with torch_threads(threads):
        fit(job, _events.put)
