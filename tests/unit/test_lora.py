"""Low-rank adapters: what is trained, what is sent, and that the base underneath stays what it was."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from cluster.errors import ModelError
from cluster.weights import pack, unpack
from configs.run import LoraSection, OptimizerSection
from learner.batch import train_batch
from learner.policy import ADAPTER_DIR, Policy
from learner.schedule import ScheduledAdamW
from tests.learner_support import VOCAB, experience_of, llama_config, new_critic, rollouts, tuned, update, weights

LORA = LoraSection(rank=3, alpha=6.0)
ADAPTER_ONLY = LORA.model_copy(update={"broadcast": "adapter"})
FAST = OptimizerSection(learning_rate=1e-2, warmup_steps=0, decay="constant")


def base_model(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**changes))


def trained(lora: LoraSection = LORA, *, steps: int = 3, gradient_checkpointing: bool = False) -> Policy:
    """A policy after some steps up the log-probability of the first rollouts."""
    policy = Policy(base_model(), lora=lora, gradient_checkpointing=gradient_checkpointing)
    optimiser, batch = ScheduledAdamW(policy, section=FAST, total_steps=steps), train_batch(rollouts())
    for _ in range(steps):
        (-policy.response_logprobs(batch)[0].sum()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
    return policy


def logprobs(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.response_logprobs(train_batch(rollouts()))[0]


def test_a_new_adapter_changes_nothing_and_only_it_is_trainable() -> None:
    plain, policy = Policy(base_model()), Policy(base_model(), lora=LORA)
    assert torch.equal(logprobs(policy), logprobs(plain))
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 7 * 2, "A and B of seven linear layers in each of two"
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert policy.checkpoint_tensors().keys() == trainable
    assert plain.checkpoint_tensors().keys() == dict(plain.named_parameters()).keys()


def test_chosen_layers_alone_are_adapted_and_others_are_refused() -> None:
    policy = Policy(base_model(), lora=LoraSection(rank=2, target_modules=("q_proj", "v_proj")))
    assert len(policy.checkpoint_tensors()) == 2 * 2 * 2
    with pytest.raises(ModelError, match="no such linear layers"):
        Policy(base_model(), lora=LoraSection(target_modules=("q_proj", "qkv")))
    with pytest.raises(ModelError, match="no such linear layers"):
        Policy(base_model(), lora=LoraSection(target_modules=("lm_head",)))
    with pytest.raises(ModelError, match="no such linear layers"):
        Policy(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)), lora=LORA)


def test_ppo_moves_the_policy_and_leaves_its_base_alone() -> None:
    policy, critic, batch = Policy(base_model(), lora=LORA), new_critic(), train_batch(rollouts())
    before, frozen = logprobs(policy), {k: v for k, v in weights(policy).items() if ".lora_" not in k}
    settings = tuned(policy=FAST, epochs=2, minibatches=2, max_step_kl_nats_per_token=100.0)
    stats = update(experience_of(batch, policy, critic, settings), policy, critic, settings)
    assert stats.policy_steps == 4
    assert stats.grad_norm_policy > 0.0
    assert (logprobs(policy) - before).abs().max() > 0.01
    after = weights(policy)
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert sorted(frozen) == sorted(name for name in after if ".lora_" not in name)


def test_training_raises_what_it_is_asked_to_raise() -> None:
    start, end = logprobs(Policy(base_model())), logprobs(trained(steps=8))
    assert end.sum() > start.sum() + 1.0


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """The first layer's inputs come from frozen embeddings and need no gradient of their own."""
    policies = [trained(steps=1), trained(steps=1, gradient_checkpointing=True)]
    for name, tensor in policies[0].checkpoint_tensors().items():
        torch.testing.assert_close(policies[1].checkpoint_tensors()[name], tensor, atol=1e-6, rtol=1e-4)
    assert all(tensor.abs().sum() > 0 for tensor in policies[1].checkpoint_tensors().values())


def test_merged_weights_have_the_models_names_and_make_the_same_policy() -> None:
    policy, plain = trained(), base_model()
    merged = dict(policy.named_tensors())
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logprobs(Policy(plain)), logprobs(policy), atol=1e-5, rtol=1e-5)
    name = "model.layers.1.self_attn.v_proj"
    down, up = (policy.get_parameter(f"model.{name}.lora_{part}.default.weight") for part in "AB")
    want = base_model().get_parameter(f"{name}.weight").double() + 6.0 / 3 * up.double() @ down.double()
    torch.testing.assert_close(merged[f"{name}.weight"].double(), want, atol=1e-6, rtol=1e-6)


def test_merging_is_lazy_and_changes_no_weight() -> None:
    policy = trained()
    before = weights(policy)
    tensors = policy.named_tensors()
    name, first = next(tensors)
    assert name == "model.embed_tokens.weight"
    assert first.data_ptr() == policy.get_parameter("model.model.embed_tokens.weight").data_ptr()
    list(tensors)
    assert all(torch.equal(value, before[name]) for name, value in weights(policy).items())


def test_with_the_adapter_off_the_policy_is_the_model_it_began_from() -> None:
    policy = trained()
    moved = logprobs(policy)
    with policy.adapter_off():
        assert torch.equal(logprobs(policy), logprobs(Policy(base_model())))
    assert torch.equal(logprobs(policy), moved)
    assert all(parameter.requires_grad for name, parameter in policy.named_parameters() if ".lora_" in name)
    with pytest.raises(ModelError, match="no adapter"), Policy(base_model()).adapter_off():
        pass


def test_the_adapter_alone_travels_with_what_it_takes_to_load_it() -> None:
    merged, policy = trained(), trained(ADAPTER_ONLY)
    assert merged.adapter_info is None
    info = policy.adapter_info
    assert info is not None
    assert (info.rank, info.alpha) == (3, 6.0)
    assert info.target_modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    blob = pack(0, policy.named_tensors(), adapter=info)
    assert blob.adapter == info
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in blob.shapes
    assert len(blob.manifest) == 28
    whole = dict(merged.named_tensors())
    got, plain = dict(unpack(blob)), base_model()
    for name, tensor in plain.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in got:
            tensor.data += info.alpha / info.rank * got[f"{stem}.lora_B.weight"] @ got[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(tensor.data, whole[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [LORA, ADAPTER_ONLY], ids=["merged", "adapter"])
def test_a_saved_policy_is_an_ordinary_model_with_its_adapter_beside_it(
    tmp_path: Path, tied: bool, lora: LoraSection
) -> None:
    base_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    policy = Policy.load(tmp_path / "base", lora=lora)
    with torch.no_grad():
        for tensor in policy.checkpoint_tensors().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    policy.save_pretrained(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", ADAPTER_DIR} <= files
    assert "adapter_config.json" not in files
    torch.testing.assert_close(logprobs(Policy.load(tmp_path / "saved")), logprobs(policy), atol=1e-5, rtol=1e-5)
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "saved" / ADAPTER_DIR))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(by_peft(ids).logits, policy.model(ids).logits, atol=1e-6, rtol=1e-5)


def test_a_policy_without_an_adapter_saves_no_adapter(tmp_path: Path) -> None:
    policy = Policy(base_model())
    policy.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / ADAPTER_DIR).exists()
    assert torch.equal(logprobs(Policy.load(tmp_path / "saved")), logprobs(policy))
    policy.save_pretrained(None)


def test_checkpoint_tensors_bring_a_policy_back() -> None:
    policy, resumed = trained(), Policy(base_model(), lora=LORA)
    saved = copy.deepcopy(policy.checkpoint_tensors())
    for name, tensor in resumed.checkpoint_tensors().items():
        tensor.copy_(saved[name])
    assert torch.equal(logprobs(resumed), logprobs(policy))


def test_every_run_starts_from_the_same_adapter_whatever_was_drawn_before() -> None:
    first = Policy(base_model(), lora=LORA)
    torch.randn(7)
    state = torch.get_rng_state()
    model = base_model()
    torch.set_rng_state(state)
    second = Policy(model, lora=LORA)
    assert torch.equal(torch.get_rng_state(), state), "and no one else's random state moves"
    for name, tensor in first.checkpoint_tensors().items():
        assert torch.equal(second.checkpoint_tensors()[name], tensor)


def test_bfloat16_products_train_the_adapter_too() -> None:
    policy, exact = Policy(base_model(), lora=LORA, dtype="bfloat16"), Policy(base_model(), lora=LORA)
    for one in (policy, exact):
        one.response_logprobs(train_batch(rollouts()))[0].sum().backward()  # type: ignore[no-untyped-call]
    for (name, ours), theirs in zip(policy.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad is None) == (".lora_" not in name)
        if ours.grad is not None and theirs.grad is not None:
            assert ours.grad.dtype == torch.float32
            assert math.isfinite(float(ours.grad.sum()))
            assert (ours.grad - theirs.grad).norm() <= 0.15 * theirs.grad.norm() + 1e-3
