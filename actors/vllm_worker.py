"""The half of the weight channel that runs inside vLLM's workers: a weight-transfer backend named "keel".

Named as `worker_extension_cls`, this module is imported by every worker before its model is built, and the import
registers the backend. It reads the packed buffer where the actor put it (`Landing`) and loads it with the model's own
`load_weights`, which fuses, shards for tensor parallelism, casts and copies to the device.

Two ways to load:
- GPU: vLLM's layer-wise reload, which repeats whatever a quantisation or kernel does to weights after loading.
- CPU: in place, with oneDNN's packing switched off. Packing keeps a private copy of the weights that a reload leaves
  stale for a tied LM head: wrong log-probs without a warning. Should a later vLLM drop the private switch, the
  layer-wise reload is used and that handle is rebuilt.
"""

from __future__ import annotations

import logging
import mmap
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
from cluster.weights import Bytes, TensorEntry, unpack_entries

BACKEND: Final = "keel"
_log = logging.getLogger(__name__)


class WorkerPlugin:
    """Mixed into vLLM's worker class. Empty: importing this module is what registers the backend."""


@dataclass
class KeelInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand."""


@dataclass
class KeelUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the buffer lies ("memory:<key>" or "file:<path>"), its size, and the manifest in columns."""

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
        if current_platform.is_cpu() and not self._in_place:
            _log.warning("oneDNN packing is on: weights load by layer-wise reload, which is slower")

    def init_transfer_engine(self, init_info: KeelInitInfo) -> None:
        del init_info

    def start_weight_update(self) -> None:
        if not self._in_place:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: KeelUpdateInfo) -> None:
        buffer = _open(update_info)
        loaded = self.model.load_weights(unpack_entries(update_info.manifest(), buffer))
        # vLLM itself accepts a partial update without a word.
        missing = self._parameter_names - set(loaded or ())
        if missing:
            raise WeightSyncError(
                "the weight update left parameters as they were",
                got=", ".join(sorted(missing)[:5]),
                do="publish every parameter of the model",
            )

    def finish_weight_update(self) -> None:
        if not self._in_place:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


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
