"""The ranks of the learner: one process, or a torch.distributed group in which rank 0 leads and the others follow.

Consumes: tensors of equal shape from every rank; orders, as bytes, from rank 0. Produces: sums and maxima on every
rank; the orders, on the others. Waits: in every call for the other ranks, at most the collective time-out; in `listen`
for rank 0's next order, as long as rank 0 lives. Who unblocks it: the other ranks' same call, or the loss of a rank: a
closed connection is noticed at once (gloo), a silent host at the time-out.
Always holds: ranks that make the same calls in the same order never wait for each other for ever; a rank that is lost
in a call inside `bounded` is the error that it gave up with, or else a SupervisionError. On a GPU, tensors travel
through NCCL, whose watchdog ends the process at the time-out; orders and tensors in host memory travel through gloo on
either device.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Final, Protocol

import torch
from torch import Tensor, distributed
from torch.distributed import (  # type: ignore[attr-defined]
    DistBackendError,
    DistNetworkError,
    DistStoreError,
    PrefixStore,
    Store,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cluster.errors import KeelError, SupervisionError

_LISTEN_S: Final = 2.0
"""One wait of `listen`; between two of them an abort is noticed."""
_FAILED: Final = "failed"
_GLOO_TIMEOUT: Final = "Timed out waiting"
_GLOO_LOSSES: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "ProcessGroup")


class Ranks(Protocol):
    """This process's place among the learner's ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def mesh(self) -> DeviceMesh | None:
        """What models are sharded over; None: they are whole."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in `values` itself."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """The largest over all ranks, in `values` itself."""
        ...

    def tell(self, order: bytes) -> None:
        """Rank 0: give every other rank this order."""
        ...

    def listen(self) -> bytes:
        """Other ranks: rank 0's next order. Raises what rank 0 gave up with, or SupervisionError when it is lost."""
        ...

    def bounded(self, what: str) -> AbstractContextManager[None]:
        """A block with calls between ranks: lost ranks and time-outs in it become errors that say so."""
        ...

    def close(self) -> None:
        """After the last order, on every rank."""
        ...

    def abort(self, error: BaseException) -> None:
        """Leave at once; the other ranks' calls then fail, with this error where it can still be told."""
        ...


class SoloRanks:
    """One process: nobody to wait for."""

    rank: Final = 0
    size: Final = 1
    mesh: Final = None

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values

    def tell(self, order: bytes) -> None:
        del order

    def listen(self) -> bytes:
        raise SupervisionError("a single rank has nobody to listen to", got="listen() with one rank")

    def bounded(self, what: str) -> AbstractContextManager[None]:
        del what
        return contextlib.nullcontext()

    def close(self) -> None:
        pass

    def abort(self, error: BaseException) -> None:
        del error


SOLO: Final = SoloRanks()


class GroupRanks:
    """One rank of a torch.distributed group; the default group of this process, made here and destroyed by `close`."""

    def __init__(self, store: Store, *, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        """Returns when all ranks are there. `store` is shared by them and lives in rank 0. Raises
        SupervisionError."""
        self.rank: Final = rank
        self.size: Final = size
        self._timeout_s = timeout_s
        self._store = store
        self._orders = 0
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        if device.type == "cuda":
            torch.cuda.set_device(device)  # The mesh would guess, and warn that it does.
        with self.bounded("forming the group"):
            distributed.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
            self.mesh: Final = init_device_mesh(device.type, (size,))
            distributed.barrier() if device.type == "cpu" else self.sum(torch.zeros(1, device=device))

    def sum(self, values: Tensor) -> Tensor:
        with self.bounded("a sum"):
            distributed.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        with self.bounded("a maximum"):
            distributed.all_reduce(values, op=distributed.ReduceOp.MAX)
        return values

    def tell(self, order: bytes) -> None:
        if self.size == 1:
            return
        # The store says that an order comes and how long it is: waiting there has no time-out, a collective has.
        with self.bounded("an order"):
            self._store.set(self._order_key(self._orders), str(len(order)))
            self._share(torch.frombuffer(bytearray(order), dtype=torch.uint8))
        self._orders += 1

    def listen(self) -> bytes:
        with self.bounded("waiting for an order"):
            key = self._order_key(self._orders)
            while not self._has(key):
                if (failure := self._failure()) is not None:
                    raise failure
            payload = self._share(torch.empty(int(self._store.get(key)), dtype=torch.uint8))
            self._forget(key)
        self._orders += 1
        return bytes(payload.numpy())

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        try:
            yield
        except KeelError:
            raise
        except RuntimeError as error:
            lost = self._as_loss(what, error)
            if lost is None:
                raise
            raise lost from error

    def close(self) -> None:
        with contextlib.suppress(RuntimeError, KeelError):
            self.sum(torch.zeros(1))  # Nobody leaves while another still reads the last order.
        distributed.destroy_process_group()

    def abort(self, error: BaseException) -> None:
        with contextlib.suppress(RuntimeError):
            if not self._store.check([_FAILED]):  # The first rank that gives up knows why.
                self._store.set(_FAILED, _failure_text(error, rank=self.rank))
        with contextlib.suppress(RuntimeError, AssertionError):
            distributed.distributed_c10d._abort_process_group()

    def _share(self, payload: Tensor) -> Tensor:
        if len(payload):
            distributed.broadcast(payload, src=0)
        return payload

    def _forget(self, key: str) -> None:
        """The last to have heard an order takes it back: rank 0 can be orders ahead of a slow listener."""
        heard_key = f"{key}/heard"
        with contextlib.suppress(RuntimeError):  # The order counts all the same; the next call notices the loss.
            if self._store.add(heard_key, 1) == self.size - 1:
                self._store.delete_key(key)
                self._store.delete_key(heard_key)

    def _has(self, key: str) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=_LISTEN_S))
        except DistStoreError:
            return False
        return True

    def _failure(self) -> KeelError | None:
        """What another rank gave up with, as it told itself."""
        try:
            return _told_failure(self._store.get(_FAILED)) if self._store.check([_FAILED]) else None
        except RuntimeError:
            return None

    def _as_loss(self, what: str, error: RuntimeError) -> KeelError | None:
        """The error as a loss of ranks, or None when it is something else, e.g. memory that ran out."""
        text = str(error)
        late = isinstance(error, DistStoreError) or _GLOO_TIMEOUT in text
        torn = isinstance(error, DistBackendError | DistNetworkError) or any(mark in text for mark in _GLOO_LOSSES)
        if not late and not torn:
            return None
        return self._failure() or SupervisionError(
            f"the learner's ranks did not meet within {self._timeout_s:g} s" if late else "the learner lost a rank",
            got=f"rank {self.rank} of {self.size}, {what}: {text.splitlines()[0]}",
            do="look at logs/learner-*.log of the other ranks; a run goes on from its newest checkpoint",
        )

    @staticmethod
    def _order_key(number: int) -> str:
        return f"order/{number}"


def _failure_text(error: BaseException, *, rank: int) -> str:
    """An error for the other ranks: one of Keel's by its class and parts, so that theirs is of the same class."""
    if isinstance(error, KeelError):
        return json.dumps([type(error).__name__, error.what, error.got, error.do])
    what = f"rank {rank} of the learner failed"
    return json.dumps([SupervisionError.__name__, what, f"{type(error).__name__}: {error}", ""])


def _told_failure(text: bytes) -> KeelError:
    name, what, got, do = json.loads(text)
    kinds = {kind.__name__: kind for kind in KeelError.__subclasses__()}
    return kinds.get(name, SupervisionError)(what, got=got, do=do)
