"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) inside a decoder, by peft: W + alpha/rank · B·A with W frozen, A
random and B zero at first, so that the model begins as its base.

The layers are replaced in place: the model keeps its class, its decoder and its head, and the base model's own names
come back by leaving peft's part of a name out. Weights may be shards (DTensor): they are gathered one layer at a time,
and every rank must take all that is yielded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from cluster.errors import ModelError
from cluster.weights import AdapterInfo
from configs.run import LoraSection
from learner.sharding import whole_tensor

_NAME: Final = "default"
_BASE: Final = ".base_layer."
_SEED: Final = 0
"""Of A: every run starts from the same adapter."""


def add_adapter(model: nn.Module, decoder: nn.Module, *, section: LoraSection) -> AdapterInfo:
    """Freeze the model and put a trainable adapter on the decoder's linear layers. Raises ModelError for layers that
    are not there."""
    from peft import inject_adapter_in_model

    info = AdapterInfo(rank=section.rank, alpha=section.alpha, target_modules=_targets(decoder, section.target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        inject_adapter_in_model(_peft_config(info), model, adapter_name=_NAME)
    return info


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights under the base model's names, the adapter added in (in float32), one at a time. What has no adapter
    is yielded as it is: a live view, sharded where the model is."""
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            continue
        path, found, leaf = name.rpartition(_BASE)
        if not found:
            yield name, parameter.detach()
        elif leaf == "weight":
            yield f"{path}.weight", _merged(model.get_submodule(path))
        else:
            yield f"{path}.{leaf}", parameter.detach()


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapter alone under peft's names, as in "base_model.model.….q_proj.lora_A.weight". Live views."""
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            yield f"base_model.model.{name.replace(f'.{_NAME}.', '.')}", parameter.detach()


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is its base, to the bit."""
    # Not by peft's own switch: that one also changes which parameters are trainable, which a sharded model reads once.
    for layer in _layers(model).values():
        layer.set_scale(_NAME, 0.0)
    try:
        yield
    finally:
        for layer in _layers(model).values():
            layer.set_scale(_NAME, 1.0)


def save_adapter(directory: Path, *, info: AdapterInfo, tensors: dict[str, Tensor]) -> None:
    """Write what `peft.PeftModel.from_pretrained` and vLLM load. `tensors`: whole, as by `adapter_tensors`."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    _peft_config(info, inference_mode=True).save_pretrained(directory)


def _peft_config(info: AdapterInfo, *, inference_mode: bool = False) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=info.rank,
        lora_alpha=int(info.alpha) if info.alpha == int(info.alpha) else info.alpha,
        target_modules=list(info.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=inference_mode,
    )


def _targets(decoder: nn.Module, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Last parts of the names of the decoder's linear layers: all, or those wanted."""
    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    there = sorted({name.rpartition(".")[2] for name in linear})
    missing = sorted(set(wanted) - set(there))
    if missing or not there:
        raise ModelError(
            "the model has no such linear layers for an adapter",
            got=f"learner.lora.target_modules {missing or 'empty'}; {type(decoder).__name__} has {there}",
            do="name some of these layers, or leave target_modules empty for all; the head takes no adapter",
        )
    return tuple(sorted(set(wanted))) or tuple(there)


def _is_adapter(name: str) -> bool:
    return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name


def _layers(model: nn.Module) -> dict[str, Any]:
    """Name → linear layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """W + scale · B·A, whole."""
    base = whole_tensor(layer.base_layer.weight.detach())
    down, up = (whole_tensor(part[_NAME].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
    return torch.addmm(base.float(), up, down, alpha=layer.scaling[_NAME]).to(base.dtype)
