"""Rank 0 of a weight group between GPUs: vLLM's own NCCL communicator and packed broadcast. Not run without a GPU.

Consumes: a blob in host memory, copied to the device tensor by tensor. Produces: the packed stream that vLLM's
NCCLWeightTransferEngine takes apart in each engine.
Waits: for the members in `form`, and for the device; NCCL has no deadline of its own, so the publisher gives a call up
and `close` aborts it; a group that never formed cannot be aborted: its thread waits for as long as the process lives.
Always holds: buckets have the size that the plan tells the members; after `close` nothing more is sent.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import torch

from cluster.weight_group import GroupBrokenError
from cluster.weights import WeightBlob, unpack


class NcclLeader:
    """A cluster.weight_publisher.GroupLeader on this process's current device."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        if not torch.cuda.is_available():
            raise GroupBrokenError(
                "NCCL needs a GPU in the learner's process", do="set weights.transport: object_store, or learner GPUs"
            )
        self._address, self._timeout_s = address, timeout_s
        try:
            self._listener = socket.create_server((address, 0))
        except OSError as error:
            raise GroupBrokenError(
                "no weight group can be led from here", got=f"{address}: {error}", do="look at the node's network"
            ) from error
        self.port: int = self._listener.getsockname()[1]
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._communicator: Any = None
        self._closed = threading.Event()

    def form(self, world_size: int) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        torch.cuda.set_device(self._device)  # a thread starts on device 0
        group = StatelessProcessGroup.create(
            host=self._address,
            port=self.port,
            rank=0,
            world_size=world_size,
            store_timeout=max(1, int(self._timeout_s)),
            listen_socket=self._listener,
        )
        with unpinned_nccl_env():
            communicator = PyNcclCommunicator(group, device=self._device)
        if communicator.disabled:  # vLLM's way to say so; every broadcast would send nothing, without a word
            raise GroupBrokenError("vLLM cannot use NCCL in the learner's process", do="see VLLM_DISABLE_PYNCCL")
        self._communicator = communicator
        if self._closed.is_set():
            self.close()  # given up meanwhile

    def broadcast(self, blob: WeightBlob, *, bucket_bytes: int) -> Iterator[int]:
        """Yields as tensors go into buckets, from vLLM's producer in a thread of its own."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        sent: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in unpack(blob):
                if self._closed.is_set():
                    # Woken by the abort: a further call into NCCL would use a communicator that is being freed.
                    raise GroupBrokenError("the weight group was closed")
                yield name, tensor.to(self._device)
                sent.put(tensor.nbytes)

        def produce() -> None:
            try:
                torch.cuda.set_device(self._device)
                packed_nccl_broadcast_producer(
                    iterator=tensors(),
                    group=self._communicator,
                    src=0,
                    post_iter_func=lambda item: item[1],
                    buffer_size_bytes=bucket_bytes,
                )
                sent.put(None)
            except BaseException as error:
                sent.put(error)

        threading.Thread(target=produce, name="nccl-broadcast", daemon=True).start()
        while (step := sent.get()) is not None:
            if isinstance(step, BaseException):
                raise GroupBrokenError("NCCL failed", got=repr(step)) from step
            yield step

    def close(self) -> None:
        self._closed.set()
        self._listener.close()
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.destroy()  # aborts, and so wakes whoever waits in it
