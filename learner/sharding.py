"""Models over ranks: FSDP2 (`torch.distributed.fsdp.fully_shard`) on each decoder layer and then on the whole module.

Rank 0 reads the weights from disk; the others build the same module around memory that nobody has written to, which
costs addresses but no pages, and take their shards from rank 0's broadcast, one tensor at a time. A node so holds
one copy of the weights at most while they are loaded, and each rank its shard afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cluster.errors import ModelError
from learner.backbone import DtypeName, config_without_dropout, inner_decoder
from learner.ranks import Ranks


def shard(module: nn.Module, *, ranks: Ranks, dtype: DtypeName, offload: bool) -> None:
    """Shard a Policy or Critic in place over all ranks and give every rank rank 0's weights and buffers.

    `dtype`: of the gathered weights in forward and backward; the shards, which the optimiser steps on, and gradient
    reductions stay float32. `offload`: shards, gradients and optimiser state live in host memory.
    """
    assert ranks.mesh is not None
    options: dict[str, Any] = {"mesh": ranks.mesh}
    if dtype == "bfloat16":
        # Inputs are left alone: of a batch FSDP would round temperatures too, as it looks into dataclasses.
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    whole = dict(_detached(module)) if ranks.rank == 0 else {}
    model: nn.Module = module.get_submodule("model")
    for layer in decoder_layers(inner_decoder(model)):
        fully_shard(layer, **options)
    # A forward without a backward would leave the root's own weights whole, and the optimiser without them.
    fully_shard(module, reshard_after_forward=True, **options)
    with ranks.bounded("sharing out the weights"):
        _spread(module, whole, device=compute_device(module))


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's layers: its outermost list of modules. Raises ModelError when there is none."""
    for part in decoder.modules():
        if isinstance(part, nn.ModuleList):
            return part
    raise ModelError(
        "the model has no list of layers to shard",
        got=type(decoder).__name__,
        do="use a Transformers decoder model, or learner.ranks 1",
    )


def compute_device(module: nn.Module) -> torch.device:
    """Where the module's forward runs. Offloaded shards lie elsewhere between two passes."""
    parameter = next(module.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor that this is a shard of; itself when it is none. All ranks must call it, in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor
    shards: Any = tensor.to(tensor.device_mesh.device_type)  # Offloaded ones travel between GPUs all the same.
    gathered: Tensor = shards.full_tensor()
    return gathered


def hollow_model(auto_class: Any, path: str | Path, **options: Any) -> nn.Module:
    """The model of this directory's config.json without its weights: zeros that take no memory until written to.
    Weights that the architecture ties are tied. Raises ModelError."""
    try:
        config = config_without_dropout(path, **options)
        with torch.device("meta"):
            model: nn.Module = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"cannot build the model of {path}",
            got=f"{type(error).__name__}: {error}",
            do="give a Hugging Face model directory with config.json, on a file system that every node sees",
        ) from error
    made: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                # calloc: NumPy's zeros are pages that the kernel has not given yet; torch's are written at once.
                zeros = torch.from_numpy(np.zeros(tuple(parameter.shape), dtype=np.float32))
                made[id(parameter)] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
            setattr(part, name, made[id(parameter)])
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(part, name, torch.zeros_like(buffer, device="cpu"))
    return model


def _detached(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach()) for name, parameter in module.named_parameters()]


@torch.no_grad()
def _spread(module: nn.Module, whole: dict[str, Tensor], *, device: torch.device) -> None:
    """Broadcast rank 0's `whole` tensors, and its buffers, into every rank's shards."""
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor)
        mine = whole.pop(name, None)
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device) if mine is None else mine.to(device)
        full = full.contiguous()
        distributed.broadcast(full, src=0)
        part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    for buffer in module.buffers():
        full = buffer.contiguous()
        distributed.broadcast(full, src=0)
        buffer.copy_(full)
