"""The half of the weight channel that runs inside vLLM's workers: a weight-transfer backend named "keel".

Named as `worker_extension_cls`, this module is imported by every worker before its model is built, and the import
registers the backend. It takes a version from where it lies and loads it with the model's own `load_weights`, which
fuses, shards for tensor parallelism, casts and copies to the device. A version comes one of three ways:
- "memory:…" or "file:…": the packed buffer where the actor put it (actors/landing.py).
- "shared:…": the packed buffer where the learner keeps it, on the GPU that both use, or in host memory.
- "staged": the packed buffer that this worker received from its group, whole, before the update began: over gloo, or
  by vLLM's own NCCL receiver, which hands over tensor after tensor (`_Stager`).

Two ways to load:
- GPU: vLLM's layer-wise reload, which repeats whatever a quantisation or kernel does to weights after loading.
- CPU: in place, with oneDNN's packing switched off. Packing keeps a private copy of the weights that a reload leaves
  stale for a tied LM head: wrong log-probs without a warning. Should a later vLLM drop the private switch, the
  layer-wise reload is used and that handle is rebuilt.

Joining a group, receiving and leaving run in a thread each (`WorkerPlugin`), so the engine answers meanwhile. A thread
that a later job has replaced changes nothing any more: what it has made, it closes.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from actors.landing import in_process_buffer
from cluster.errors import WeightSyncError
from cluster.gloo_group import GlooFollower
from cluster.weight_group import GroupBrokenError, GroupPlan
from cluster.weight_sharing import is_shared, open_shared
from cluster.weights import Bytes, SharedBytes, TensorEntry, copy_entries, unpack_entries, unpack_storage

BACKEND: Final = "keel"
_log = logging.getLogger(__name__)


class WorkerPlugin:
    """Mixed into vLLM's worker class; called by `collective_rpc`, which blocks the engine: so both return at once."""

    weight_transfer_engine: Any

    def keel_begin(self, job: str, argument: dict[str, Any]) -> None:
        """Start "join" (argument: a plan), "receive" (what KeelUpdateInfo holds) or "leave" in a thread."""
        self.weight_transfer_engine.begin(job, argument)

    def keel_state(self) -> str:
        """Of the last job: "busy", "done", or what went wrong."""
        state: str = self.weight_transfer_engine.job_state
        return state


@dataclass
class KeelInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand: groups come and go (`WorkerPlugin`)."""


@dataclass
class KeelUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the version is ("memory:<key>", "file:<path>", "shared:<…>", "staged"), its size, and the manifest in
    columns."""

    location: str
    size_bytes: int
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets_bytes: list[int]

    def manifest(self) -> tuple[TensorEntry, ...]:
        columns = zip(self.names, self.dtypes, self.shapes, self.offsets_bytes, strict=True)
        return tuple(TensorEntry(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in columns)


class KeelWeightTransfer(WeightTransferEngine[KeelInitInfo, KeelUpdateInfo]):  # type: ignore[misc]
    """One per worker. Raises WeightSyncError when a parameter of the model was not in the update."""

    init_info_cls = KeelInitInfo
    update_info_cls = KeelUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        # A layer that was packed after all has given its weight away and left an empty one.
        whole = all(parameter.numel() for parameter in model.parameters())
        self._in_place = current_platform.is_cpu() and _packing_is_off and whole
        self._parameter_names = {name for name, _ in model.named_parameters()}
        self._follower: GlooFollower | None = None
        self._native: Any = None
        self._staged: Bytes | None = None
        self._lock = threading.Lock()
        """Of the four fields around it, which a job that was replaced may still be about to write."""
        self._job: threading.Thread | None = None
        self.job_state = "done"
        if current_platform.is_cpu() and not self._in_place:
            _log.warning("oneDNN packing is on: weights load by layer-wise reload, which is slower")

    def init_transfer_engine(self, init_info: KeelInitInfo) -> None:
        del init_info

    # ---------------------------------------------------------------- the group

    def begin(self, job: str, argument: dict[str, Any]) -> None:
        work: dict[str, Callable[[dict[str, Any]], None]] = {
            "join": self._join,
            "receive": self._receive,
            "leave": self._leave,
        }

        def run() -> None:
            try:
                if not current_platform.is_cpu():
                    torch.accelerator.set_device_index(self.device.index or 0)  # a thread starts on device 0
                if job != "receive":
                    # A thread that still waits in the old group wakes with its abort, and reports to nobody.
                    self._leave({})
                work[job](argument)
                state = "done"
            except Exception as error:
                state = f"{type(error).__name__}: {error}"
            with self._lock:
                if self._is_current():
                    self.job_state = state

        thread = threading.Thread(target=run, name=f"keel-{job}", daemon=True)
        with self._lock:
            self._job, self.job_state = thread, "busy"
        thread.start()

    def _is_current(self) -> bool:
        """Of the thread that asks."""
        return self._job is threading.current_thread()

    def _join(self, argument: dict[str, Any]) -> None:
        first_rank = argument.pop("first_rank")
        plan = GroupPlan(**argument)
        follower: GlooFollower | None = None
        native: Any = None
        if plan.backend == "nccl":
            native = _join_nccl(self, plan, first_rank=first_rank)
        else:
            follower = GlooFollower.join(plan, rank=first_rank + self.parallel_config.rank)
        with self._lock:
            if self._is_current():
                self._follower, self._native = follower, native
                return
        _close(follower, native)

    def _receive(self, argument: dict[str, Any]) -> None:
        info = KeelUpdateInfo(**argument)
        with self._lock:
            follower, native = self._follower, self._native
        if native is not None:
            staged = _receive_nccl(native, info, wanted=self._is_current)
        elif follower is not None:
            staged = follower.receive(info.size_bytes)
        else:
            raise WeightSyncError("this engine is in no weight group", do="join one first")
        with self._lock:
            if self._is_current():
                self._staged = staged

    def _leave(self, argument: dict[str, Any]) -> None:
        del argument
        with self._lock:
            follower, native = self._follower, self._native
            self._follower = self._native = self._staged = None
        _close(follower, native)

    # ---------------------------------------------------------------- an update

    def start_weight_update(self) -> None:
        if not self._in_place:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: KeelUpdateInfo) -> None:
        # vLLM itself accepts a partial update without a word.
        missing = self._parameter_names - self._load(update_info)
        if missing:
            raise WeightSyncError(
                "the weight update left parameters as they were",
                got=", ".join(sorted(missing)[:5]),
                do="publish every parameter of the model",
            )

    def _load(self, update_info: KeelUpdateInfo) -> set[str]:
        if is_shared(update_info.location):
            shared = SharedBytes(update_info.location, update_info.size_bytes)
            storage = open_shared(shared, device=self.device)  # closed when the last tensor on it is gone
            return set(self.model.load_weights(unpack_storage(update_info.manifest(), storage)) or ())
        if update_info.location == "staged":
            if self._staged is None or len(self._staged) != update_info.size_bytes:
                raise WeightSyncError("the staged weights are not those of this update")
            buffer, self._staged = self._staged, None
        else:
            buffer = _open(update_info)
        return set(self.model.load_weights(unpack_entries(update_info.manifest(), buffer)) or ())

    def finish_weight_update(self) -> None:
        if not self._in_place:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        self._leave({})


class _Stager:
    """Stands in for the model where vLLM's NCCL receiver would load bucket by bucket: puts each tensor in its place in
    a host buffer. The model is touched when the whole version is there, so a broadcast that breaks harms no engine."""

    def __init__(self, manifest: Sequence[TensorEntry], *, size_bytes: int, wanted: Callable[[], bool]) -> None:
        self.buffer: Bytes = np.empty(size_bytes, dtype=np.uint8)
        self._entries = {entry.name: entry for entry in manifest}
        self._wanted = wanted

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Raises WeightSyncError once its job is not wanted any more."""
        storage, names = torch.from_numpy(self.buffer), set()
        for name, tensor in weights:
            self._check()
            copy_entries([(name, tensor)], [self._entries[name]], storage)  # waits for the bucket on its stream
            # An aborted group wakes the copy: its bytes are no weights, and NCCL must not be called again.
            self._check()
            names.add(name)
        return names

    def _check(self) -> None:
        if not self._wanted():
            raise WeightSyncError("this broadcast was given up")


def _receive_nccl(native: Any, info: KeelUpdateInfo, *, wanted: Callable[[], bool]) -> Bytes:
    """A new buffer with what the leader sent, as its manifest says."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    stager = _Stager(info.manifest(), size_bytes=info.size_bytes, wanted=wanted)
    native.model = stager
    try:
        native.receive_weights(
            NCCLWeightTransferUpdateInfo(names=info.names, dtype_names=info.dtypes, shapes=info.shapes)
        )
    finally:
        native.model = None  # it would keep the buffer
    return stager.buffer


def _join_nccl(transfer: KeelWeightTransfer, plan: GroupPlan, *, first_rank: int) -> Any:
    """vLLM's own receiving engine, connected to the leader (cluster/weights_nccl.py)."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

    native = NCCLWeightTransferEngine(transfer.config, transfer.vllm_config, transfer.device, transfer.model)
    native.init_transfer_engine(
        NCCLWeightTransferInitInfo(
            master_address=plan.address,
            master_port=plan.port,
            rank_offset=first_rank,
            world_size=plan.world_size,
            packed=True,
            packed_buffer_size_bytes=plan.bucket_bytes,
        )
    )
    if native.model_update_group.disabled:  # every broadcast would bring nothing, without a word
        raise GroupBrokenError("vLLM cannot use NCCL in this worker", do="see VLLM_DISABLE_PYNCCL")
    return native


def _close(follower: GlooFollower | None, native: Any) -> None:
    if follower is not None:
        follower.close()
    if native is not None:
        native.shutdown()


def _open(update_info: KeelUpdateInfo) -> Bytes:
    kind, _, key = update_info.location.partition(":")
    if kind == "memory":
        return in_process_buffer(key)
    with open(key, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), update_info.size_bytes, prot=mmap.PROT_READ), dtype=np.uint8)


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """A tied LM head may keep a packed copy of the old embedding: make it anew. Costs nothing where nothing packs."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _switch_packing_off() -> bool:
    """Make CPU layers use plain matrix products on their live weights. False when this vLLM has no such switch."""
    import vllm._custom_ops as custom_ops

    if not current_platform.is_cpu() or not hasattr(custom_ops, "_supports_onednn"):
        return False
    custom_ops._supports_onednn = False
    return True


_packing_is_off = _switch_packing_off()
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, KeelWeightTransfer)
