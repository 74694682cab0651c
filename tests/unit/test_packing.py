"""Packed sequences give what padded ones give; on a GPU through the variable-length kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import learner.critic
import learner.policy
from cluster.errors import ModelError
from learner.backbone import inner_decoder, response_states
from learner.batch import TrainBatch, train_batch
from learner.packing import ATTENTION, attend_packed, pack_rows, packed_attention, packs
from tests.learner_support import VOCAB, llama_config, new_critic, new_policy, rollouts


def grouped_llama() -> PreTrainedModel:
    return LlamaForCausalLM(llama_config(num_attention_heads=4, num_key_value_heads=2))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**llama_config().to_diff_dict() | {"architectures": None}))


def windowed_mistral() -> PreTrainedModel:
    """Sees three tokens back: shorter than the sequences."""
    settings = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 3, "initializer_range": 0.3}
    return MistralForCausalLM(MistralConfig(**settings, **heads))


def gpt2() -> PreTrainedModel:
    """Learned positions."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def batch_and_outer() -> tuple[TrainBatch, Tensor]:
    batch = train_batch(rollouts(9))
    return batch, torch.randn(int(batch.mask_BT.sum()), 16, generator=torch.Generator().manual_seed(0))


def states_and_gradients(model: nn.Module, *, packed: bool) -> list[Tensor]:
    batch, outer_NH = batch_and_outer()
    model.zero_grad()
    states_NH = response_states(inner_decoder(model), batch, packed=packed)
    (states_NH * outer_NH).sum().backward()  # type: ignore[no-untyped-call]
    return [states_NH.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_rows_are_laid_out_as_in_the_worked_example() -> None:
    batch = train_batch(rollouts(2))
    batch = TrainBatch(
        **{
            **vars(batch),
            "sequence_ids_BL": torch.tensor([[7, 8, 9], [4, 5, 6]]),
            "response_ids_BT": torch.tensor([[9, 0], [5, 6]]),
            "prompt_tokens_B": torch.tensor([2, 1]),
            "response_tokens_B": torch.tensor([1, 2]),
        }
    )
    rows = pack_rows(batch)
    assert rows.ids_M.tolist() == [7, 8, 4, 5]
    assert rows.positions_M.tolist() == [0, 1, 0, 1]
    assert rows.starts.tolist() == [0, 2, 4]
    assert rows.starts.dtype == torch.int32
    assert rows.longest == 2
    assert rows.predicting_N.tolist() == [1, 2, 3]


@pytest.mark.parametrize("make", [grouped_llama, qwen2, windowed_mistral, gpt2])
def test_packed_states_and_gradients_are_the_padded_ones(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    padded = states_and_gradients(model, packed=False)
    assert attend_packed(model, inner_decoder(model))
    for again in (states_and_gradients(model, packed=True), states_and_gradients(model, packed=False)):
        torch.testing.assert_close(again[0], padded[0], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(again, padded, strict=True):  # gradients are sums over tokens, in another order
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_sequences_really_are_packed_and_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder sees one row without padding; with all sequences taken for one, states differ."""
    model = grouped_llama().eval()
    attend_packed(model, inner_decoder(model))
    batch, _ = batch_and_outer()
    shapes: list[torch.Size] = []
    inner_decoder(model).register_forward_pre_hook(
        lambda _module, _args, options: shapes.append(options["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        packed = response_states(inner_decoder(model), batch, packed=True)
        assert shapes == [(1, sum(batch.sequence_tokens) - len(batch))]
        run_together = {"starts": torch.tensor([0, shapes[0][1]]), "longest": shapes[0][1]}
        rows = pack_rows(batch)
        monkeypatch.setattr("learner.packing.pack_rows", lambda _: type(rows)(**{**vars(rows), **run_together}))
        assert not torch.allclose(response_states(inner_decoder(model), batch, packed=True), packed, atol=1e-3)


def test_a_policy_and_a_critic_pack_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the kernel's twin; gradient checkpointing recomputes packed layers."""
    policy, critic, batch = new_policy(), new_critic(), train_batch(rollouts())
    want = (*policy.response_logprobs(batch), critic.values(batch))
    assert not packs(torch.device("cpu"), dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (learner.policy, learner.critic):
        monkeypatch.setattr(module, "packs", lambda _device, dtype: True)
    packing = learner.policy.Policy(policy.model, sequence_packing=True, gradient_checkpointing=True)
    packing_critic = learner.critic.Critic(critic.model, mean=0.0, std=1.0, sequence_packing=True)
    assert packing.model.config._attn_implementation == ATTENTION  # type: ignore[union-attr]
    got = (*packing.response_logprobs(batch), packing_critic.values(batch))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got[0].sum().backward()  # type: ignore[no-untyped-call]


def test_a_model_that_mixes_sequences_is_left_as_it_was() -> None:
    class Running(LlamaForCausalLM):  # type: ignore[misc]
        """Each state also has a part of the one before, whatever its position."""

    model = Running(llama_config()).eval()
    model.model.register_forward_hook(
        lambda _module, _args, out: type(out)(last_hidden_state=out.last_hidden_state.cumsum(1))
    )
    before = model.config._attn_implementation
    assert not attend_packed(model, inner_decoder(model))
    assert model.config._attn_implementation == before


def test_what_the_kernel_lacks_is_refused() -> None:
    heads = torch.zeros(1, 1, 2, 8)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ModelError, match="softcap"):
        packed_attention(nn.Identity(), heads, heads, heads, None, cu_seq_lens_q=starts, max_length_q=2, softcap=30.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's variable-length kernel")
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_agrees_with_its_twin(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    outer = torch.randn(1, 14, 4, 64, generator=generator)
    heads = [torch.randn(1, count, 14, 64, generator=generator) for count in (4, 2, 2)]

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in heads]
        query, key, value = leaves
        out, _ = packed_attention(
            nn.Identity(), query, key, value, None, cu_seq_lens_q=starts.to(device), max_length_q=8,
            sliding_window=window,
        )  # fmt: skip
        (out * outer.to(device, dtype)).sum().backward()  # type: ignore[no-untyped-call]
        return [
            result.detach().float().cpu() for result in (out, *(leaf.grad for leaf in leaves if leaf.grad is not None))
        ]

    torch.testing.assert_close(run("cuda", torch.bfloat16), run("cpu", torch.float32), atol=3e-2, rtol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's variable-length kernel")
def test_a_policy_packs_on_a_gpu() -> None:
    torch.manual_seed(0)
    config = llama_config(hidden_size=64, intermediate_size=128)
    model, batch = LlamaForCausalLM(config), train_batch(rollouts(16)).to(torch.device("cuda"))
    want = learner.policy.Policy(model).cuda().response_logprobs(batch)[0]
    policy = learner.policy.Policy(model, sequence_packing=True, dtype="bfloat16").cuda()
    got = policy.response_logprobs(batch)[0]
    got.sum().backward()  # type: ignore[no-untyped-call]
    assert (got - want).abs().mean() < 0.05
    assert all(bool(torch.isfinite(p.grad).all()) for p in policy.parameters() if p.grad is not None)
