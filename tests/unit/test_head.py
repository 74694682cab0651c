"""Log-probabilities in chunks of the vocabulary: the plain computation's numbers and gradients, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import learner.head
from learner.head import Chunking, target_logprobs

TINY = Chunking(bytes=128, tokens=2)
"""Chunks of two or three tokens and a few words, of which there are then many in every direction."""


def plain(
    states_NH: Tensor, *, head: nn.Linear, targets_N: Tensor, temperature_N: Tensor, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """By torch's own log_softmax, with everything held at once."""
    logits_NV = head(states_NH)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature_N[:, None]
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None])[:, 0], entropy_N if entropy_grad else entropy_N.detach()


def problem(
    tokens: int, hidden: int, vocabulary: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """(states, head, targets, temperatures)."""
    torch.manual_seed(0)
    states_NH = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    head = nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype)
    return states_NH, head, torch.randint(vocabulary, (tokens,)), torch.rand(tokens, dtype=dtype) + 0.5


def outcome(compute: Callable[..., tuple[Tensor, Tensor]], made: tuple[Tensor, nn.Linear, Tensor, Tensor],
            **options: object) -> list[Tensor]:  # fmt: skip
    """[logprobs, entropies, gradients of states, weight and, if there is one, bias] under uneven outer gradients."""
    states_NH, head, targets_N, temperature_N = made
    states_NH.grad = None
    head.zero_grad()
    logprobs_N, entropy_N = compute(
        states_NH, head=head, targets_N=targets_N, temperature_N=temperature_N, entropy_grad=True, **options
    )
    outer_N = torch.linspace(-1.0, 2.0, len(states_NH), dtype=logprobs_N.dtype)
    (logprobs_N * outer_N + entropy_N * outer_N.flip(0)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [states_NH.grad, *(parameter.grad for parameter in head.parameters())]
    return [logprobs_N.detach(), entropy_N.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("chunking", [TINY, Chunking(bytes=1 << 12, tokens=4), None], ids=["tiny", "some", "whole"])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_plain_computation(chunking: Chunking | None, bias: bool) -> None:
    made = problem(23, 8, 37, bias=bias)
    torch.testing.assert_close(
        outcome(target_logprobs, made, chunking=chunking), outcome(plain, made), atol=3e-6, rtol=1e-6
    )


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("chunking", [TINY, None], ids=["recomputed", "kept"])
def test_gradients_are_the_derivatives(entropy_grad: bool, chunking: Chunking | None) -> None:
    states_NH, head, targets_N, temperature_N = problem(5, 3, 7, bias=True, dtype=torch.float64)

    def values(states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> tuple[Tensor, ...]:
        layer = nn.Linear(3, 7, dtype=torch.float64)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight_VH, bias_V  # type: ignore[assignment]
        both = target_logprobs(
            states_NH,
            head=layer,
            targets_N=targets_N,
            temperature_N=temperature_N,
            entropy_grad=entropy_grad,
            chunking=chunking,
        )
        return both if entropy_grad else both[:1]

    assert torch.autograd.gradcheck(values, (states_NH, head.weight, head.bias))


def test_without_the_entropys_gradient_it_is_detached() -> None:
    states_NH, head, targets_N, temperature_N = problem(5, 3, 7)
    logprobs_N, entropy_N = target_logprobs(states_NH, head=head, targets_N=targets_N, temperature_N=temperature_N)
    assert logprobs_N.requires_grad
    assert not entropy_N.requires_grad
    with torch.no_grad():
        again_N, _ = target_logprobs(states_NH, head=head, targets_N=targets_N, temperature_N=temperature_N)
    assert torch.equal(again_N, logprobs_N)


def test_a_frozen_head_gets_no_gradient() -> None:
    states_NH, head, targets_N, temperature_N = problem(5, 3, 7)
    head.requires_grad_(False)
    logprobs_N, _ = target_logprobs(states_NH, head=head, targets_N=targets_N, temperature_N=temperature_N)
    logprobs_N.sum().backward()  # type: ignore[no-untyped-call]
    assert head.weight.grad is None
    assert states_NH.grad is not None
    assert states_NH.grad.abs().sum() > 0


def test_large_logits_do_not_overflow() -> None:
    """The running maximum is taken out of every exponent, also when it jumps from chunk to chunk."""
    states_NH, head, targets_N, temperature_N = problem(6, 4, 29)
    with torch.no_grad():
        head.weight.mul_(torch.linspace(0.1, 300.0, 29)[:, None])
    made = (states_NH, head, targets_N, temperature_N)
    ours, theirs = outcome(target_logprobs, made, chunking=TINY), outcome(plain, made)
    assert all(bool(torch.isfinite(value).all()) for value in ours)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("chunking", [TINY, None], ids=["recomputed", "kept"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_products_stay_near_float32(chunking: Chunking | None, weight_dtype: torch.dtype) -> None:
    """Under autocast; the weight in float32, or already in bfloat16 as sharded models gather it."""
    made = problem(23, 16, 37)
    exact = outcome(plain, made)
    made[1].to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = outcome(target_logprobs, made, chunking=chunking)
    assert [value.dtype for value in rounded[:2]] == [torch.float32] * 2
    assert rounded[3].dtype == weight_dtype
    for ours, theirs in zip(rounded, exact, strict=True):
        assert (ours.float() - theirs).norm() <= 0.02 * theirs.norm()


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that torch's CPU allocator had given out at once during `work`, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded_with_bfloat16_products_too(dtype: torch.dtype) -> None:
    """States and weight in float32, as under autocast, or in bfloat16, as sharded models gather them."""
    states_NH, head, targets_N, temperature_N = problem(2048, 128, 20_000, dtype=dtype)
    chunk = Chunking(bytes=8 << 20, tokens=512)

    def forward_and_backward() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs_N, _ = target_logprobs(
                states_NH, head=head, targets_N=targets_N, temperature_N=temperature_N, chunking=chunk
            )
        logprobs_N.sum().backward()  # type: ignore[no-untyped-call]

    gradients_bytes = states_NH.nbytes + head.weight.nbytes
    assert peak_bytes(forward_and_backward) < 1.3 * states_NH.nbytes + chunk.bytes + gradients_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_memory_is_bounded() -> None:
    """8192 tokens, 2048 hidden, 150 000 words, as a 1.5 B-parameter model has them: all logits would be 4.9 GB."""
    states_NH, head, targets_N, temperature_N = problem(8192, 2048, 150_000)
    states_NH = states_NH.detach().cuda().requires_grad_()
    head, targets_N, temperature_N = head.cuda(), targets_N.cuda(), temperature_N.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logprobs_N, _ = target_logprobs(states_NH, head=head, targets_N=targets_N, temperature_N=temperature_N)
    logprobs_N.sum().backward()  # type: ignore[no-untyped-call]
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.3 * states_NH.nbytes + learner.head.GPU_CHUNKING.bytes + states_NH.nbytes + head.weight.nbytes


def test_memory_is_bounded_by_the_hidden_states_and_one_chunk() -> None:
    """4096 tokens, 64 hidden, 50 000 words: all logits would be 819 MB."""
    states_NH, head, targets_N, temperature_N = problem(4096, 64, 50_000)
    chunk = Chunking(bytes=8 << 20, tokens=256)
    states_bytes, weight_bytes = states_NH.nbytes, head.weight.nbytes

    def forward() -> Tensor:
        return target_logprobs(states_NH, head=head, targets_N=targets_N, temperature_N=temperature_N, chunking=chunk)[
            0
        ]

    def forward_and_backward() -> None:
        forward().sum().backward()  # type: ignore[no-untyped-call]

    assert peak_bytes(lambda: torch.empty(1 << 20)) == 4 << 20, "the measure itself"
    limit = 1.3 * states_bytes + chunk.bytes
    with torch.no_grad():
        assert peak_bytes(forward) < limit
    assert peak_bytes(forward_and_backward) < limit + states_bytes + weight_bytes
