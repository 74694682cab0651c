"""The receiving end of an NCCL group as a worker has it, vLLM's own receiver and Keel's stager, on the second GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from cluster.weight_group import GroupPlan
from cluster.weights import WeightBlob, unpack_entries


def receive_over_nccl(plan: GroupPlan, blob: WeightBlob) -> dict[str, float]:
    """Join as rank 1 and take one version, without looking at the blob's bytes. Returns each tensor's sum."""
    from actors.vllm_worker import KeelUpdateInfo, _join_nccl, _receive_nccl

    torch.cuda.set_device(1)
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    transfer: Any = SimpleNamespace(config=None, vllm_config=config, device=torch.device("cuda", 1), model=None)
    native = _join_nccl(transfer, plan, first_rank=1)
    info = KeelUpdateInfo(
        location="staged",
        size_bytes=blob.size_bytes,
        names=[entry.name for entry in blob.manifest],
        dtypes=[entry.dtype for entry in blob.manifest],
        shapes=[list(entry.shape) for entry in blob.manifest],
        offsets_bytes=[entry.offset_bytes for entry in blob.manifest],
    )
    buffer = _receive_nccl(native, info, wanted=lambda: True)
    native.shutdown()
    return {name: float(tensor.double().sum()) for name, tensor in unpack_entries(blob.manifest, buffer)}
