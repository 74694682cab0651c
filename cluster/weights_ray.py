"""Weights over Ray: the payload in Ray's object store, and a small actor, the board, that knows which is newest.

Consumes: blobs from the learner's process. Produces: read-only, zero-copy views of the newest payload on every node.
Waits for: the board's answer and the payload's arrival, each with a deadline. Who unblocks a long poll: the board, at
the next `publish` or at the poll's timeout.
Always holds: the board keeps a reference to the newest payload only; older ones are freed when their last reader lets
go. The board's process owns the payload, so the learner's death loses no weights. A board that dies is not started
again, since an empty one would leave engines and learner waiting for each other: every call on it then raises
WeightSyncError, the run ends, and goes on from its checkpoint with --resume.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from cluster.errors import DeadlineError, WeightSyncError
from cluster.weight_board import Notice, OverBoard, WeightBoard
from cluster.weights import Bytes, WeightBlob

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_FETCH_SLICE_S: Final = 5.0


class RayWeightBoard(WeightBoard):
    """The board as a Ray actor: payloads belong to its process."""

    def keep(self, buffer: Bytes) -> Any:
        import ray

        return ray.put(buffer)


@dataclass(frozen=True)
class RayWeightChannel(OverBoard):
    """A WeightChannel for processes of one Ray cluster. Picklable: pass it to other actors as it is.

    `call_timeout_s` bounds a board's answer (on top of a long poll's own timeout), `fetch_timeout_s` a payload's way
    from node to node. Raises DeadlineError when they pass, WeightSyncError when the board is gone.
    """

    board: Any
    call_timeout_s: float = 30.0
    fetch_timeout_s: float = 300.0

    @classmethod
    def create(cls, *, name: str | None = None, namespace: str | None = None) -> RayWeightChannel:
        """Start a board on this node and return its channel. It lives as long as a handle to it, or until `close`."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Every engine keeps a long poll waiting: with fewer places than engines, `publish` would wait behind them.
        remote = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=100_000)(RayWeightBoard)
        # Beside its creator: another host can be lost without the weights.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"scheduling_strategy": here}
        if name is not None:
            options |= {"name": name, "namespace": namespace}
        return cls(board=remote.options(**options).remote())

    @classmethod
    def connect(cls, name: str, *, namespace: str | None = None) -> RayWeightChannel:
        """The channel whose board was created under `name`. Raises WeightSyncError when there is none."""
        import ray

        try:
            return cls(board=ray.get_actor(name, namespace=namespace))
        except ValueError as error:
            raise WeightSyncError(
                f"no weight board named {name}", got=str(error), do="start the run before its actors"
            ) from error

    def lose_shared(self) -> None:
        """For whoever saw the publisher die: what it shared with it cannot be had any more."""
        self.ask_now("lose_shared", timeout_s=0.0)

    def close(self) -> None:
        """Stop the board. For whoever created it; later calls on any copy of the channel raise WeightSyncError."""
        import ray

        ray.kill(self.board, no_restart=True)

    # ---------------------------------------------------------------- the board

    async def ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a board's method that itself waits for `timeout_s` at most."""
        import ray

        answer = getattr(self.board, method).remote(*arguments)
        try:
            return await _within(answer, timeout_s=timeout_s + self.call_timeout_s, what="the weight board's answer")
        except ray.exceptions.RayActorError as error:
            raise _board_gone(error) from error

    def ask_now(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """`ask`, for threads without an event loop."""
        import ray

        answer, limit_s = getattr(self.board, method).remote(*arguments), timeout_s + self.call_timeout_s
        try:
            return ray.get(answer, timeout=limit_s)
        except ray.exceptions.GetTimeoutError as error:
            raise _late(f"the weight board's answer to {method}", limit_s) from error
        except ray.exceptions.RayActorError as error:
            raise _board_gone(error) from error

    async def fetch(self, notice: Notice) -> WeightBlob | None:
        """The notice's blob, or a newer one; None when the board died before the payload came here.

        A payload that a newer version has replaced may be freed while it is on its way here, and Ray then lets its
        readers wait for minutes: so the board is asked again every few seconds, and its newest notice followed.
        """
        deadline_s = time.monotonic() + self.fetch_timeout_s
        arrival = asyncio.ensure_future(_payload(notice))
        try:
            while not (await asyncio.wait((arrival,), timeout=_FETCH_SLICE_S))[0]:
                if time.monotonic() > deadline_s:
                    raise _late(f"fetching weights {notice.version}", self.fetch_timeout_s)
                newest: Notice | None = await self.ask("latest", timeout_s=0.0)
                if newest is not None and newest.version > notice.version:
                    _log.info("weights %d were replaced on their way here, taking %d", notice.version, newest.version)
                    arrival.cancel()
                    notice, arrival = newest, asyncio.ensure_future(_payload(newest))
            return arrival.result()
        finally:
            arrival.cancel()


async def _payload(notice: Notice) -> WeightBlob | None:
    import ray

    try:
        buffer = await notice.payload[0]
    except ray.exceptions.ObjectLostError as error:
        _log.warning("weights %d were lost with the board, waiting for newer ones: %s", notice.version, error)
        return None
    if not isinstance(buffer, np.ndarray) or buffer.dtype != np.uint8:
        raise WeightSyncError(f"weights {notice.version} are no byte array", got=str(type(buffer)))
    return notice.blob(buffer)


async def _within(answer: Awaitable[_T], *, timeout_s: float, what: str) -> _T:
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError as error:
        raise _late(what, timeout_s) from error


def _late(what: str, timeout_s: float) -> DeadlineError:
    return DeadlineError(f"{what} took too long", got=f"nothing in {timeout_s:g} s", do="look at Ray's node and board")


def _board_gone(error: Exception) -> WeightSyncError:
    return WeightSyncError("the weight board is gone", got=type(error).__name__, do="restart the run; it resumes")
