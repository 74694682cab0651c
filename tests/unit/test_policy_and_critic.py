"""Policy and critic on tiny models: log-probabilities, values, loading."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, LlamaForSequenceClassification

import learner.head
from cluster.errors import ModelError
from learner.backbone import DtypeName, inner_decoder, named_head
from learner.batch import train_batch
from learner.critic import Critic
from learner.head import Chunking
from learner.policy import Policy
from tests.learner_support import (
    VOCAB,
    llama_config,
    new_critic,
    new_policy,
    rollouts,
)


def test_logprobs_are_those_of_each_sequence_alone() -> None:
    """Batched and padded, against the whole model's own logits on one unpadded sequence at a time."""
    policy, made = new_policy(), rollouts()
    with torch.no_grad():
        logprobs_BT, entropy_BT = policy.response_logprobs(train_batch(made))
        for row, scored in enumerate(made):
            prompt = scored.rollout.task.prompt_ids.tolist()
            response = scored.rollout.response_ids.tolist()
            logits = policy.model(input_ids=torch.tensor([prompt + response])).logits[0] / 0.8
            for t, token in enumerate(response):
                distribution = logits[len(prompt) - 1 + t].double().softmax(-1)
                assert logprobs_BT[row, t].item() == pytest.approx(math.log(distribution[token]), abs=1e-5)
                entropy = -sum(p * math.log(p) for p in distribution.tolist())
                assert entropy_BT[row, t].item() == pytest.approx(entropy, abs=1e-5)
            assert not logprobs_BT[row, len(response) :].any()
            assert not entropy_BT[row, len(response) :].any()


def test_values_see_the_prefix_only_and_start_in_score_units() -> None:
    critic, made = new_critic(mean=0.5, std=2.0), rollouts()
    with torch.no_grad():
        values_BT = critic.values(train_batch(made))
        for row, scored in enumerate(made):
            prompt = scored.rollout.task.prompt_ids.tolist()
            response = scored.rollout.response_ids.tolist()
            for t in range(len(response)):
                prefix = torch.tensor([prompt + response[:t]])
                hidden = inner_decoder(critic.model)(input_ids=prefix).last_hidden_state[0, -1]
                raw = named_head(critic.model, "score")(hidden).item()
                assert values_BT[row, t].item() == pytest.approx((raw - 0.5) / 2.0, abs=1e-5)
            assert not values_BT[row, len(response) :].any()


def test_a_sliced_vocabulary_projection_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, policy = train_batch(rollouts()), new_policy()

    def run() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        policy.zero_grad()
        logprobs_BT, entropy_BT = policy.response_logprobs(batch, entropy_grad=True)
        (logprobs_BT.sum() + entropy_BT.sum()).backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        return logprobs_BT.detach(), entropy_BT.detach(), gradients

    whole = run()
    monkeypatch.setattr(learner.head, "CPU_CHUNKING", Chunking(bytes=64, tokens=2))
    sliced = run()
    torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(policy.response_logprobs(batch), whole[:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_and_bfloat16_agree_with_float32(dtype: DtypeName) -> None:
    batch, plain = train_batch(rollouts()), new_policy()
    other = Policy(copy.deepcopy(plain.model), gradient_checkpointing=True, dtype=dtype)
    tolerance = 1e-5 if dtype == "float32" else 0.15
    for policy in (plain, other):
        policy.response_logprobs(batch)[0].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(
        other.response_logprobs(batch)[0], plain.response_logprobs(batch)[0], atol=tolerance, rtol=tolerance
    )
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() <= tolerance * (theirs.grad.norm() + 1e-3)


def test_models_load_from_directories(tmp_path: Path) -> None:
    policy, critic, batch = new_policy(), new_critic(), train_batch(rollouts())
    policy.save_pretrained(tmp_path / "policy")
    critic.model.save_pretrained(tmp_path / "rm")  # type: ignore[operator]
    loaded = Policy.load(tmp_path / "policy")
    assert torch.equal(loaded.response_logprobs(batch)[0], policy.response_logprobs(batch)[0])
    same = Critic.load(tmp_path / "rm", mean=0.0, std=1.0, vocab_size=VOCAB)
    assert torch.equal(same.values(batch), critic.values(batch))
    with pytest.raises(ModelError, match="cannot read the policy's tokens"):
        Critic.load(tmp_path / "rm", mean=0.0, std=1.0, vocab_size=VOCAB + 1)
    with pytest.raises(ModelError, match="no weights for parts"):
        Critic.load(tmp_path / "policy", mean=0.0, std=1.0, vocab_size=VOCAB)
    with pytest.raises(ModelError, match="cannot load"):
        Policy.load(tmp_path / "nowhere")


def test_dropout_is_off_even_with_gradient_checkpointing(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.5, embd_pdrop=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    policy, batch = Policy.load(tmp_path, gradient_checkpointing=True), train_batch(rollouts())
    assert torch.equal(policy.response_logprobs(batch)[0], policy.response_logprobs(batch)[0])


def test_models_of_another_make_are_refused() -> None:
    with pytest.raises(ModelError, match="does not show its decoder"):
        Policy(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="one output"):
        Critic(LlamaForSequenceClassification(llama_config(num_labels=2)), mean=0.0, std=1.0)
    with pytest.raises(ModelError, match="calibration"):
        Critic(LlamaForSequenceClassification(llama_config(num_labels=1)), mean=math.nan, std=1.0)

    class Capped(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: object, **options: object) -> object:
            out = super().forward(*args, **options)
            out.logits = 0.1 * torch.tanh(out.logits)
            return out

    with pytest.raises(ModelError, match="logits are not lm_head"):
        Policy(Capped(llama_config()))


def test_probe_is_the_models_own_next_token_distribution() -> None:
    policy, ids = new_policy(), torch.tensor([3, 1, 4, 1, 5])
    got = policy.probe_logprobs(ids)
    with torch.no_grad():
        logits = policy.model(input_ids=ids[None]).logits[0].double()
    want = [math.log(logits[t].softmax(-1)[ids[t + 1]]) for t in range(4)]
    assert got.tolist() == pytest.approx(want, abs=1e-5)


def test_published_names_are_the_models_own_and_tied_weights_come_once() -> None:
    names = [name for name, _ in new_policy().named_tensors()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
