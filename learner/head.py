"""Log-probabilities and entropies of a long vocabulary, without ever holding [tokens × vocabulary].

Logits are made one chunk of tokens × vocabulary at a time, in the forward pass and again in the backward pass; what
stays between the two is three numbers a token. The gradients of states, weight and bias are added up in place. Logits
that are few all together are kept instead: for a small model, making them again would cost more than it saves.
Shapes: N tokens, H hidden size, V vocabulary; a chunk has C tokens and W words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Chunking(NamedTuple):
    """How much is worked on at once."""

    bytes: int
    """Working memory of one chunk."""
    tokens: int
    """Of a chunk at least, where there are so many: each chunk reads (and where products are in bfloat16, converts) its
    part of the weight."""
    kept_bytes: int = 0
    """Logits that take no more than this all together are kept for the backward pass."""


CPU_CHUNKING: Final = Chunking(bytes=4 << 20, tokens=256, kept_bytes=16 << 20)
"""About the cache that a core has to itself: a chunk is gone over several times."""
GPU_CHUNKING: Final = Chunking(bytes=512 << 20, tokens=8192, kept_bytes=512 << 20)
"""Matrix products at full speed."""


def target_logprobs(
    states_NH: Tensor,
    *,
    head: nn.Linear,
    targets_N: Tensor,
    temperature_N: Tensor,
    entropy_grad: bool = False,
    chunking: Chunking | None = None,
) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy) of softmax(head(state) / temperature), both [N] in nats, float32 (float64 for float64).

    Differentiable in states, weight and bias, once. `entropy_grad`: also through the entropy; else that is detached.
    Matrix products are in autocast's type where that is on. chunking: by the device if not given.
    """
    device = states_NH.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_NH.dtype
    chunking = chunking or (CPU_CHUNKING if device == "cpu" else GPU_CHUNKING)
    sum_dtype = torch.promote_types(compute_dtype, torch.float32)
    all_logits_bytes = len(states_NH) * len(head.weight) * sum_dtype.itemsize
    plan = _Plan(
        chunking=chunking,
        compute_dtype=compute_dtype,
        sum_dtype=sum_dtype,
        entropy_grad=entropy_grad,
        may_keep_logits=torch.is_grad_enabled() and all_logits_bytes <= chunking.kept_bytes,
    )
    with torch.autocast(device, enabled=False):
        result: tuple[Tensor, Tensor] = _TargetLogprobs.apply(  # type: ignore[no-untyped-call]
            states_NH, head.weight, head.bias, targets_N, temperature_N.to(sum_dtype), plan
        )
    return result


@dataclass(frozen=True)
class _Plan:
    """How one call is computed. compute_dtype: of matrix products; sum_dtype: of all else, float32 at least."""

    chunking: Chunking
    compute_dtype: torch.dtype
    sum_dtype: torch.dtype
    entropy_grad: bool
    may_keep_logits: bool

    def chunk_shape(self, states_NH: Tensor, *, weight_VH: Tensor) -> tuple[int, int]:
        """(C, W) that fit the working memory, in which there are: two copies of the chunk's logits; the C states,
        scaled, and where types differ their gradient and its latest part; where products are in a shorter type than
        the weight's, W rows of the weight and of its gradient in that type."""
        (tokens, hidden), vocabulary = states_NH.shape, len(weight_VH)
        short = self.compute_dtype.itemsize
        logit_bytes = 2 * self.sum_dtype.itemsize
        row_bytes = 0 if weight_VH.dtype == self.compute_dtype else 2 * short * hidden
        state_bytes = short * hidden
        if self.compute_dtype != self.sum_dtype:
            state_bytes += short * hidden
        if states_NH.dtype != self.sum_dtype:
            state_bytes += self.sum_dtype.itemsize * hidden
        memory = self.chunking.bytes
        with_all_words = (memory - vocabulary * row_bytes) // (vocabulary * logit_bytes + state_bytes)
        at_least = min(self.chunking.tokens, memory // (2 * state_bytes))
        chunk_tokens = max(1, min(tokens, max(with_all_words, at_least)))
        words = (memory - chunk_tokens * state_bytes) // (chunk_tokens * logit_bytes + row_bytes)
        return chunk_tokens, max(1, min(vocabulary, words))


@dataclass(frozen=True)
class _Inputs:
    """A call's tensors, given out in chunks."""

    states_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    targets_N: Tensor
    temperature_N: Tensor
    plan: _Plan

    def token_chunks(self) -> Iterator[slice]:
        return _slices(len(self.states_NH), step=self._chunk_shape[0])

    def word_chunks(self) -> Iterator[slice]:
        return _slices(len(self.weight_VH), step=self._chunk_shape[1])

    @property
    def keep_logits(self) -> bool:
        """Whether logits stay for the backward pass, less their row's maximum. Only chunks of all words know that."""
        return self.plan.may_keep_logits and self._chunk_shape[1] == len(self.weight_VH)

    @property
    def _chunk_shape(self) -> tuple[int, int]:
        return self.plan.chunk_shape(self.states_NH, weight_VH=self.weight_VH)

    def scaled_states(self, tokens: slice) -> Tensor:
        """[C, H] in the products' type, divided by the temperature: the logits then need not be."""
        scaled_CH = self.states_NH[tokens].to(self.plan.sum_dtype) / self.temperature_N[tokens, None]
        return scaled_CH.to(self.plan.compute_dtype)

    def weight(self, words: slice) -> Tensor:
        """[W, H] in the products' type."""
        return self.weight_VH[words].to(self.plan.compute_dtype)

    def logits(self, scaled_CH: Tensor, weight_WH: Tensor, tokens: slice, words: slice) -> Tensor:
        """[C, W] divided by the temperature. The caller's own, to write into."""
        logits_CW = (scaled_CH @ weight_WH.t()).to(self.plan.sum_dtype)
        if self.bias_V is not None:
            logits_CW += self.bias_V[words].to(self.plan.sum_dtype) / self.temperature_N[tokens, None]
        return logits_CW

    def targets(self, tokens: slice, words: slice) -> tuple[Tensor, Tensor]:
        """([C, 1] each target's column in this chunk, [C] whether the target is in this chunk)."""
        column_C = self.targets_N[tokens] - words.start
        last = words.stop - words.start - 1
        return column_C.clamp(0, last)[:, None], (column_C >= 0) & (column_C <= last)


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature_N: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        inputs = _Inputs(states_NH, weight_VH, bias_V, targets_N, temperature_N, plan)
        logprobs_N, entropy_N, offset_N = (torch.empty_like(temperature_N) for _ in range(3))
        kept: list[Tensor] = []
        for tokens in inputs.token_chunks():
            logprobs_N[tokens], entropy_N[tokens], offset_N[tokens] = _forward(inputs, tokens, kept)
        ctx.save_for_backward(states_NH, weight_VH, bias_V, targets_N, temperature_N, offset_N, entropy_N, *kept)
        ctx.plan = plan
        if not plan.entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_grad_N: Tensor, entropy_grad_N: Tensor) -> tuple[Tensor | None, ...]:
        states_NH, weight_VH, bias_V, targets_N, temperature_N, offset_N, entropy_N, *kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        inputs = _Inputs(states_NH, weight_VH, bias_V, targets_N, temperature_N, plan)
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        grads = _Gradients(
            states_NH=torch.zeros_like(states_NH) if need_states else None,
            weight_VH=torch.zeros_like(weight_VH) if need_weight else None,
            bias_V=torch.zeros_like(bias_V) if need_bias else None,
        )
        kept_chunks = iter(kept)
        for tokens in inputs.token_chunks():
            arriving = _Arriving(
                logprob_grad_C=logprob_grad_N[tokens],
                entropy_grad_C=entropy_grad_N[tokens] if plan.entropy_grad else None,
                offset_C=offset_N[tokens],
                entropy_C=entropy_N[tokens],
            )
            _backward(inputs, tokens, arriving, kept_chunks, grads)
        return grads.states_NH, grads.weight_VH, grads.bias_V, None, None, None


@dataclass(frozen=True)
class _Gradients:
    """What the backward pass adds up. None: not asked for, as with a frozen head."""

    states_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


@dataclass(frozen=True)
class _Arriving:
    """Of a chunk's tokens: the gradients that arrive, and what the forward pass found."""

    logprob_grad_C: Tensor
    entropy_grad_C: Tensor | None
    offset_C: Tensor
    """What to take from the logits, as they were kept or are made again, to have log-probabilities."""
    entropy_C: Tensor


def _forward(inputs: _Inputs, tokens: slice, kept: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, _Arriving's offset) of these tokens; z = logits / temperature.

    One pass over the vocabulary, with the running maximum m taken out of every exponent. With x = z − m:
    total = Σ eˣ and moment = Σ x·eˣ; when m grows by d, total ← e⁻ᵈ·total and moment ← e⁻ᵈ·(moment − d·total).
    Then log Σ exp z = m + log total and entropy = log total − moment / total.
    """
    scaled_CH = inputs.scaled_states(tokens)
    max_C = torch.full_like(inputs.temperature_N[tokens], torch.finfo(inputs.plan.sum_dtype).min)
    total_C, moment_C, target_C = (torch.zeros_like(max_C) for _ in range(3))
    for words in inputs.word_chunks():
        z_CW = inputs.logits(scaled_CH, inputs.weight(words), tokens, words)
        column_C1, inside_C = inputs.targets(tokens, words)
        target_C = torch.where(inside_C, z_CW.gather(1, column_C1)[:, 0], target_C)
        new_max_C = torch.maximum(max_C, z_CW.amax(1))
        # Before the first chunk the maximum is the lowest number there is, and what it is multiplied with is 0.
        grown_C = torch.where(total_C > 0, new_max_C - max_C, 0.0)
        shrink_C = grown_C.neg().exp()
        x_CW = z_CW.sub_(new_max_C[:, None])
        exp_CW = x_CW.exp()
        moment_C = shrink_C * (moment_C - grown_C * total_C)
        total_C = shrink_C * total_C + exp_CW.sum(1)
        moment_C = moment_C + exp_CW.mul_(x_CW).sum(1)
        max_C = new_max_C
        if inputs.keep_logits:
            kept.append(x_CW)
        del z_CW, x_CW, exp_CW  # before the next chunk's are made
    log_total_C = total_C.log()
    offset_C = log_total_C if inputs.keep_logits else max_C + log_total_C
    return target_C - (max_C + log_total_C), log_total_C - moment_C / total_C, offset_C


def _backward(inputs: _Inputs, tokens: slice, arriving: _Arriving, kept: Iterator[Tensor], grads: _Gradients) -> None:
    """Add these tokens' part to the gradients.

    With p = softmax(z), a the gradient of log p(target) and b that of the entropy H:
    ∂/∂z_j = a·[j = target] − p_j·(a + b·(log p_j + H)).
    """
    a_C, b_C = arriving.logprob_grad_C, arriving.entropy_grad_C
    scaled_CH = inputs.scaled_states(tokens)
    per_temperature_C = inputs.temperature_N[tokens].reciprocal()
    states_grad_CH = None if grads.states_NH is None else grads.states_NH[tokens].to(inputs.plan.sum_dtype)
    for words in inputs.word_chunks():
        weight_WH = inputs.weight(words)
        if inputs.keep_logits:
            logp_CW = next(kept) - arriving.offset_C[:, None]
        else:
            logp_CW = inputs.logits(scaled_CH, weight_WH, tokens, words).sub_(arriving.offset_C[:, None])
        if b_C is None:
            grad_CW = logp_CW.exp_().mul_(-a_C[:, None])
        else:
            p_CW = logp_CW.exp()
            grad_CW = logp_CW.mul_(-b_C[:, None]).sub_((a_C + b_C * arriving.entropy_C)[:, None]).mul_(p_CW)
            del p_CW
        column_C1, inside_C = inputs.targets(tokens, words)
        grad_CW.scatter_add_(1, column_C1, torch.where(inside_C, a_C, 0.0)[:, None])
        if grads.bias_V is not None:
            grads.bias_V[words] += per_temperature_C @ grad_CW
        grad_CW = grad_CW.to(inputs.plan.compute_dtype)
        if states_grad_CH is not None:
            _add_product(states_grad_CH, grad_CW, weight_WH)
        if grads.weight_VH is not None:
            _add_product(grads.weight_VH[words], grad_CW.t(), scaled_CH)
        del logp_CW, grad_CW
    if grads.states_NH is not None and states_grad_CH is not None:
        states_grad_CH.mul_(per_temperature_C[:, None])
        if grads.states_NH.dtype != states_grad_CH.dtype:  # else it is a view of the whole gradient
            grads.states_NH[tokens] = states_grad_CH


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place; the product may be of a shorter type than the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _slices(length: int, *, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
