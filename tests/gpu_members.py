"""The receiving end of an NCCL group as vLLM's own engine has it, on the second GPU, with a model that only adds up."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from cluster.weight_group import GroupPlan
from cluster.weights import TensorEntry


class Summing:
    """Stands in for a model."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            self.sums[name] = float(tensor.double().sum())
        return set(self.sums)


def receive_over_nccl(plan: GroupPlan, manifest: tuple[TensorEntry, ...]) -> dict[str, float]:
    """Join as rank 1 and take one version. Returns each tensor's sum."""
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLWeightTransferEngine,
        NCCLWeightTransferInitInfo,
        NCCLWeightTransferUpdateInfo,
    )

    torch.cuda.set_device(1)
    model: Any = Summing()
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    engine = NCCLWeightTransferEngine(None, config, torch.device("cuda", 1), model)
    engine.init_transfer_engine(
        NCCLWeightTransferInitInfo(
            master_address=plan.address,
            master_port=plan.port,
            rank_offset=1,
            world_size=plan.world_size,
            packed=True,
            packed_buffer_size_bytes=plan.bucket_bytes,
        )
    )
    engine.receive_weights(
        NCCLWeightTransferUpdateInfo(
            names=[entry.name for entry in manifest],
            dtype_names=[entry.dtype for entry in manifest],
            shapes=[list(entry.shape) for entry in manifest],
        )
    )
    engine.shutdown()
    sums: dict[str, float] = model.sums
    return sums
