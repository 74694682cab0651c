"""What the policy and the critic share: loading a decoder, and its hidden states where response tokens are predicted.

Transformers is imported inside the functions that load; the rest needs torch alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cluster.errors import ModelError
from learner.batch import TrainBatch
from learner.packing import packed_response_states

DtypeName = Literal["float32", "bfloat16"]


def load_pretrained(auto_class: Any, path: str | Path, **options: Any) -> nn.Module:
    """A Transformers model from a directory (or cached name), float32, without dropout.

    Dropout would make the update's forward differ from the one that gave the proximal log-probabilities. Raises
    ModelError when the model cannot be read or the files lack weights that would then be random.
    """
    try:
        config = config_without_dropout(path, **options)
        model, report = auto_class.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"cannot load a model from {path}",
            got=f"{type(error).__name__}: {error}",
            do="give a Hugging Face model directory with config.json and safetensors weights",
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ModelError(
            f"the model in {path} has no weights for parts of its architecture",
            got=f"missing {sorted(report['missing_keys'])[:3]}, misshapen {sorted(report['mismatched_keys'])[:3]}",
            do="give a checkpoint of this architecture and head; random weights are never filled in",
        )
    loaded: nn.Module = model
    return loaded


def config_without_dropout(path: str | Path, **options: Any) -> Any:
    """The Transformers configuration of a model directory, every dropout rate 0. Raises what Transformers raises."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    return config


def inner_decoder(model: nn.Module) -> nn.Module:
    """The decoder without its head. Raises ModelError for a model that has none to show."""
    decoder = getattr(model, "base_model", None)
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise ModelError(
            "the model does not show its decoder",
            got=type(model).__name__,
            do="use a Transformers decoder model whose `base_model` is the decoder without its head",
        )
    return decoder


def named_head(model: nn.Module, name: str) -> nn.Module:
    """The head called `name`. Raises ModelError when there is none."""
    head = getattr(model, name, None)
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"the model has no `{name}` head", got=type(model).__name__, do="use a Transformers decoder model with one"
        )
    return head


def linear_head(model: nn.Module, name: str) -> nn.Linear:
    """`named_head`, which must be a linear layer. Raises ModelError when it is not."""
    head = named_head(model, name)
    if not isinstance(head, nn.Linear):
        raise ModelError(f"the model's `{name}` is not a linear layer", got=repr(head), do="use a model with one")
    return head


def set_gradient_checkpointing(model: nn.Module, *, enabled: bool) -> None:
    """Recompute layers in the backward pass instead of keeping their activations. Transformers only does so in
    training mode, which without dropout is the same function as evaluation mode."""
    model.train(enabled)
    if enabled:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


def response_states(decoder: nn.Module, batch: TrainBatch, *, packed: bool = False) -> Tensor:
    """[N, H] hidden state before each valid response token, rows one after another.

    `packed`: all sequences in one row, for a decoder that attends so (learner/packing.py); else as follows.

    The state before token t of a response is at sequence position prompt_tokens − 1 + t, so the last token of a
    sequence is never fed. Rows are padded right and attention is causal: no real position can see padding, and no
    attention mask is needed (which lets attention take its fast causal path). Positions count from the first prompt
    token, the model's default.
    """
    if packed:
        return packed_response_states(decoder, batch)
    inputs_BL = batch.sequence_ids_BL[:, :-1]
    states_BLH: Tensor = decoder(input_ids=inputs_BL, use_cache=False).last_hidden_state
    positions_T = torch.arange(batch.response_ids_BT.shape[1], device=inputs_BL.device)
    rows, columns = (positions_T < batch.response_tokens_B[:, None]).nonzero(as_tuple=True)
    return states_BLH[rows, batch.prompt_tokens_B[rows] - 1 + columns]


def to_rows(values_N: Tensor, batch: TrainBatch) -> Tensor:
    """[N] values of valid response tokens → [B, T], 0 on padding. Differentiable."""
    valid_BT = batch.mask_BT.bool()
    return torch.zeros(valid_BT.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(valid_BT, values_N)


@contextlib.contextmanager
def compute_dtype(device: torch.device, dtype: DtypeName) -> Iterator[None]:
    """Matrix products in this type; parameters, gradients and optimiser state stay float32."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        yield
