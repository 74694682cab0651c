"""Sequences of different lengths in one row, one after another and without padding.

On a GPU attention then runs torch's variable-length kernel (`torch.nn.attention.varlen`), which is told where each
sequence begins; on a CPU it has a twin, sequence by sequence, that holds the packed path to the padded one. Which path
a model takes is `packs`' decision: padding is cheap on a CPU, where batches are sorted by length, and the kernel takes
nothing wider than bfloat16.
Shapes: B sequences, L tokens of the longest, N valid response tokens, M tokens of all sequences together, H heads or
hidden size, D head size.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from cluster.errors import ModelError
from learner.batch import TrainBatch

log = logging.getLogger(__name__)

ATTENTION: Final = "keel_packed"
"""Our attention's name among those of Transformers."""
_FLASH_CAPABILITY: Final = (8, 0)
_NOT_A_MASK: Final = (1, 1, 1, 1)
"""A mask of four dimensions is passed on as it is, so Transformers builds no [M, M] mask of its own."""


@dataclass(frozen=True)
class PackedRows:
    """What a model is fed: each sequence without its last token, which predicts nothing."""

    ids_M: Tensor
    positions_M: Tensor
    """From 0 in each sequence."""
    starts: Tensor
    """int32 [B + 1]: where each sequence begins, and M."""
    longest: int
    predicting_N: Tensor
    """Index into M of the token before each valid response token, rows one after another."""


def pack_rows(batch: TrainBatch) -> PackedRows:
    """Padded rows → one packed row. Example: prompts of 2 and 1 tokens with answers of 1 and 2: lengths 2 and 2,
    positions 0 1 0 1, starts 0 2 4, predicting 1 2 3."""
    lengths_B = batch.prompt_tokens_B + batch.response_tokens_B - 1
    columns_L = torch.arange(batch.sequence_ids_BL.shape[1] - 1, device=lengths_B.device)
    fed_BL = columns_L < lengths_B[:, None]
    starts = nn.functional.pad(lengths_B.cumsum(0), (1, 0))
    rows_N, offsets_N = batch.mask_BT.nonzero(as_tuple=True)
    return PackedRows(
        ids_M=batch.sequence_ids_BL[:, :-1][fed_BL],
        positions_M=columns_L.expand_as(fed_BL)[fed_BL],
        starts=starts.int(),
        longest=int(lengths_B.max()),
        predicting_N=starts[rows_N] + batch.prompt_tokens_B[rows_N] - 1 + offsets_N,
    )


def packed_response_states(decoder: nn.Module, batch: TrainBatch) -> Tensor:
    """[N, H] hidden state before each valid response token, as `learner.backbone.response_states` gives them.

    The decoder must attend by ATTENTION: see `attend_packed`.
    """
    rows = pack_rows(batch)
    return _states(decoder, rows)[rows.predicting_N]


def packs(device: torch.device, *, dtype: str) -> bool:
    """Whether there is a variable-length kernel for this device and type of products."""
    if device.type != "cuda" or dtype != "bfloat16":
        return False
    return torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def attend_packed(model: nn.Module, decoder: nn.Module) -> bool:
    """Let the model attend by ATTENTION; padded rows it then attends to as by "sdpa". False, and the model as it was,
    when its packed states are not those of each sequence alone, for instance because it has layers without attention
    that run along the row."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    before: str = model.config._attn_implementation  # type: ignore[union-attr, assignment]
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    if model.config._attn_implementation == ATTENTION and _packs_right(decoder):  # type: ignore[union-attr]
        return True
    model.set_attn_implementation(before)  # type: ignore[operator]
    log.info("%s cannot take packed sequences: batches are padded", type(model).__name__)
    return False


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row: [1, H, M, D] → [1, M, H, D]. Options as Transformers gives
    them; without `cu_seq_lens_q` rows are padded and "sdpa" attends. Raises ModelError for what the kernel lacks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    starts, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
    if starts is None or longest is None:
        padded: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return padded
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ModelError(
                f"packed attention has no {name}", got=type(module).__name__, do="set learner.sequence_packing: off"
            )
    window, scale = options.get("sliding_window"), options.get("scaling")
    attend = _attend_by_kernel if query.is_cuda else _attend_one_by_one
    heads_last = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(*heads_last, starts=starts, longest=longest, window=window, scale=scale)[None], None


def _attend_by_kernel(
    query_MHD: Tensor,
    key_MHD: Tensor,
    value_MHD: Tensor,
    *,
    starts: Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Rotary embeddings leave queries and keys in float32 under autocast.
    short = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value_MHD.dtype
    out = varlen_attn(
        query_MHD.to(short),
        key_MHD.to(short),
        value_MHD.to(short),
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query_MHD.shape[1] != key_MHD.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def _attend_one_by_one(
    query_MHD: Tensor,
    key_MHD: Tensor,
    value_MHD: Tensor,
    *,
    starts: Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """The kernel's twin."""
    reach = longest if window is None else window
    sees_LL = torch.ones(longest, longest, dtype=torch.bool, device=query_MHD.device).tril().triu(1 - reach)
    outputs: list[Tensor] = []
    for start, end in itertools.pairwise(starts.tolist()):
        query_HLD, key_HLD, value_HLD = (
            tensor[start:end].transpose(0, 1) for tensor in (query_MHD, key_MHD, value_MHD)
        )
        attended_HLD = nn.functional.scaled_dot_product_attention(
            query_HLD,
            key_HLD,
            value_HLD,
            attn_mask=sees_LL[: end - start, : end - start],
            scale=scale,
            enable_gqa=query_MHD.shape[1] != key_MHD.shape[1],
        )
        outputs.append(attended_HLD.transpose(0, 1))
    return torch.cat(outputs)


@torch.no_grad()
def _packs_right(decoder: nn.Module, tolerance: float = 1e-3) -> bool:
    """Whether two sequences in one row have the states that the second has alone."""
    device = next(decoder.parameters()).device
    first, second = 5, 4
    ids_M = torch.arange(1, 1 + first + second, device=device)
    rows = PackedRows(
        ids_M=ids_M,
        positions_M=torch.cat([torch.arange(first), torch.arange(second)]).to(device),
        starts=torch.tensor([0, first, first + second], dtype=torch.int32, device=device),
        longest=first,
        predicting_N=ids_M[:0],
    )
    try:
        packed = _states(decoder, rows)[first:]
    except (ModelError, RuntimeError, TypeError, ValueError) as error:
        log.info("packed sequences: %s", error)
        return False
    alone = decoder(input_ids=ids_M[None, first:], use_cache=False).last_hidden_state[0]
    return torch.allclose(packed, alone, atol=tolerance, rtol=tolerance)


def _states(decoder: nn.Module, rows: PackedRows) -> Tensor:
    """[M, H]"""
    states_1MH: Tensor = decoder(
        input_ids=rows.ids_M[None],
        position_ids=rows.positions_M[None],
        attention_mask=torch.zeros(_NOT_A_MASK, device=rows.ids_M.device),
        use_cache=False,
        cu_seq_lens_q=rows.starts,
        cu_seq_lens_k=rows.starts,
        max_length_q=rows.longest,
        max_length_k=rows.longest,
    ).last_hidden_state
    return states_1MH[0]
