"""Policy, critic, experience and the PPO update on tiny models."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import learner.policy
from cluster.errors import CheckpointError, ConfigError, ModelError, NonFiniteError
from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, pack_floats, pack_ids
from configs.run import FixedKl, LearnerSection, OptimizerSection
from learner.algo.normalise import ScoreNormaliser
from learner.backbone import DtypeName, inner_decoder, named_head
from learner.batch import TrainBatch, train_batch
from learner.critic import Critic
from learner.experience import Experience, experience_stats, make_experience, normalised_scores
from learner.policy import Policy
from learner.schedule import ScheduledAdamW, learning_rate_at
from learner.update import Trainable, UpdateStats, ppo_update

VOCAB = 13
SETTINGS = LearnerSection(
    batch_size=6,
    policy=OptimizerSection(learning_rate=1e-3, warmup_steps=0, decay="constant"),
    critic=OptimizerSection(learning_rate=1e-3, warmup_steps=0, decay="constant"),
    kl=FixedKl(beta=0.1),
)


def llama_config(**changes: object) -> LlamaConfig:
    sizes: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**sizes, **changes})


def new_policy(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    return Policy(LlamaForCausalLM(llama_config()))


def new_critic(seed: int = 1, *, mean: float = 0.0, std: float = 1.0) -> Critic:
    torch.manual_seed(seed)
    return Critic(LlamaForSequenceClassification(llama_config(num_labels=1)), mean=mean, std=std)


def rollouts(count: int = 6, *, seed: int = 5, drift: float = 0.3) -> list[ScoredRollout]:
    """Random answers of random lengths, with log-probabilities that are near no model's in particular."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        drawn: list[int] = torch.randint(0, VOCAB, (size,), generator=generator).tolist()
        return drawn

    made = []
    for index in range(count):
        response = ids(1, 9)
        logprobs = (-2.5 + drift * torch.randn(2, len(response), generator=generator)).tolist()
        task = PromptTask(
            task_id=f"t-{index}",
            prompt_id=f"p-{index // 2}",
            group_id=f"p-{index // 2}",
            prompt_ids_i32=pack_ids(ids(1, 5)),
            max_new_tokens=8,
            temperature=0.8,
        )
        rollout = Rollout(
            task=task,
            response_ids_i32=pack_ids(response),
            behaviour_logprobs_f32=pack_floats(logprobs[0]),
            version_runs=(VersionRun(0, 0),),
            finish_reason="length" if index == 0 else "stop",
            actor="rollout-0",
            generate_s=0.0,
        )
        reward = float(torch.randn(1, generator=generator))
        made.append(
            ScoredRollout(
                rollout=rollout,
                member_scores=(reward,),
                reward=reward,
                uncertainty=0.0,
                ref_logprobs_f32=pack_floats(logprobs[1]),
                rm_version="rm-1",
            )
        )
    return made


def experience_of(
    batch: TrainBatch, policy: Policy, critic: Critic | None, settings: LearnerSection = SETTINGS
) -> Experience:
    scores_B, _ = normalised_scores(batch, ScoreNormaliser(), score_clip=settings.score_clip)
    return make_experience(batch, policy=policy, critic=critic, scores_B=scores_B, beta=0.1, settings=settings)


def trainable(policy: Policy, critic: Critic | None, settings: LearnerSection = SETTINGS) -> Trainable:
    return Trainable(
        policy=policy,
        policy_optimiser=ScheduledAdamW(policy, section=settings.policy, total_steps=10),
        critic=critic,
        critic_optimiser=ScheduledAdamW(critic, section=settings.critic, total_steps=10) if critic else None,
    )


def update(
    experience: Experience, policy: Policy, critic: Critic | None, settings: LearnerSection = SETTINGS
) -> UpdateStats:
    return ppo_update(
        experience,
        trainable=trainable(policy, critic, settings),
        settings=settings,
        rng=torch.Generator().manual_seed(0),
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def tuned(**changes: object) -> LearnerSection:
    return SETTINGS.model_copy(update=changes)


# ---------------------------------------------------------------- policy and critic


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
    monkeypatch.setattr(learner.policy, "MAX_LIVE_LOGITS", 3 * VOCAB)
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


# ---------------------------------------------------------------- experience


def test_experience_is_independent_of_the_token_budget() -> None:
    batch, policy, critic = train_batch(rollouts()), new_policy(), new_critic()
    whole = experience_of(batch, policy, critic)
    cut = experience_of(batch, policy, critic, tuned(token_budget=9))
    for name in ("prox_logprobs_BT", "values_BT", "advantages_BT", "returns_BT", "behaviour_weight_BT", "entropy_BT"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), atol=2e-5, rtol=1e-4)


def test_rewards_hold_kl_score_and_penalty() -> None:
    made = rollouts()
    experience = experience_of(train_batch(made), new_policy(), new_critic())
    raw = [scored.reward for scored in made]
    mean = sum(raw) / 6
    std = math.sqrt(sum((score - mean) ** 2 for score in raw) / 6)
    for row, scored in enumerate(made):
        kl = float((scored.rollout.behaviour_logprobs - scored.ref_logprobs).sum())
        penalty = 1.0 if row == 0 else 0.0
        want = (raw[row] - mean) / std - penalty - 0.1 * kl
        assert experience.rewards_BT[row].sum().item() == pytest.approx(want, abs=1e-4)
        assert experience.kl_nats_per_sequence_B[row].item() == pytest.approx(kl, abs=1e-5)
    stats = experience_stats(experience, settings=SETTINGS)
    assert stats.score_mean == pytest.approx(mean)
    assert stats.score_normalised_mean == pytest.approx(0.0, abs=1e-6)
    assert stats.truncated_fraction == pytest.approx(1 / 6)
    assert stats.tokens == sum(len(scored.rollout.response_ids) for scored in made)
    assert stats.response_tokens_mean == pytest.approx(stats.tokens / 6)
    assert stats.value_explained_variance is not None


def test_on_policy_samples_have_weight_one() -> None:
    batch, policy = train_batch(rollouts()), new_policy()
    with torch.no_grad():
        own_BT, _ = policy.response_logprobs(batch)
    stats = experience_stats(
        experience_of(replace(batch, behaviour_logprobs_BT=own_BT), policy, new_critic()), settings=SETTINGS
    )
    assert stats.behaviour_weight_mean == pytest.approx(1.0, abs=1e-4)
    assert stats.behaviour_gap_max_nats < 1e-4
    assert stats.behaviour_weight_capped_fraction == 0.0


def test_each_reward_model_version_is_normalised_by_itself() -> None:
    batch = replace(
        train_batch(rollouts(4)),
        score_B=torch.tensor([0.0, 2.0, 100.0, 300.0], dtype=torch.float64),
        rm_versions=("rm-1", "rm-1", "rm-2", "rm-2"),
    )
    scores_B, normaliser = normalised_scores(batch, ScoreNormaliser(), score_clip=5.0)
    assert scores_B.tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0])
    assert normaliser.moments.keys() == {"rm-1", "rm-2"}


@pytest.mark.parametrize("name", ["group_relative", "leave_one_out", "reinforce"])
def test_estimators_without_critic_train(name: str) -> None:
    settings = tuned(advantages=name)
    policy = new_policy()
    experience = experience_of(train_batch(rollouts()), policy, None, settings)
    before = weights(policy)
    stats = update(experience, policy, None, settings)
    assert experience.values_BT is None
    assert stats.value_loss is None
    assert stats.grad_norm_critic is None
    assert any(not torch.equal(before[key], value) for key, value in weights(policy).items())


def test_settings_that_cannot_work_are_config_errors() -> None:
    policy, batch = new_policy(), train_batch(rollouts())
    with pytest.raises(ConfigError, match="needs a critic"):
        experience_of(batch, policy, None)
    alone = replace(batch, group_B=torch.arange(6))
    with pytest.raises(ConfigError, match="leave_one_out"):
        experience_of(alone, policy, None, tuned(advantages="leave_one_out"))
    with pytest.raises(ConfigError, match="do not match"):
        update(experience_of(batch, policy, new_critic()), policy, None)


def test_a_broken_model_is_named() -> None:
    policy, critic, batch = new_policy(), new_critic(), train_batch(rollouts())
    next(named_head(critic.model, "score").parameters()).data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="critic's values"):
        experience_of(batch, policy, critic)


# ---------------------------------------------------------------- update


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.05])
def test_micro_batching_changes_neither_loss_nor_weights(entropy_bonus: float) -> None:
    batch = train_batch(rollouts(10))
    results = []
    for token_budget in (8192, 20, 1):
        policy, critic = new_policy(), new_critic()
        settings = tuned(token_budget=token_budget, entropy_bonus=entropy_bonus, max_step_kl_nats_per_token=100.0)
        stats = update(experience_of(batch, policy, critic), policy, critic, settings)
        results.append((stats, weights(policy), weights(critic)))
    for stats, policy_weights, critic_weights in results[1:]:
        assert stats.policy_loss == pytest.approx(results[0][0].policy_loss, rel=1e-3, abs=1e-6)
        assert stats.value_loss == pytest.approx(results[0][0].value_loss, rel=1e-4)
        assert stats.grad_norm_policy == pytest.approx(results[0][0].grad_norm_policy, rel=1e-3)
        torch.testing.assert_close(policy_weights, results[0][1], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(critic_weights, results[0][2], atol=1e-4, rtol=1e-3)
    assert results[0][0].policy_steps == SETTINGS.epochs * SETTINGS.minibatches
    assert results[2][0].micro_batches == 10 * SETTINGS.epochs, "every row alone"


def test_the_first_minibatch_sits_on_the_proximal_policy() -> None:
    policy, critic = new_policy(), new_critic()
    settings = tuned(epochs=1, minibatches=1)
    stats = update(experience_of(train_batch(rollouts()), policy, critic), policy, critic, settings)
    assert stats.ratio_mean == pytest.approx(1.0, abs=1e-5)
    assert stats.ratio_max == pytest.approx(1.0, abs=1e-4)
    assert stats.clip_fraction == 0.0
    assert stats.value_clip_fraction == 0.0
    assert stats.update_kl_k3_nats_per_token == pytest.approx(0.0, abs=1e-8)
    assert stats.step_kl_nats_per_token > 0.0, "measured after the step"
    assert (stats.policy_steps, stats.critic_steps) == (1, 1)


def test_the_loss_of_the_first_minibatch_by_hand() -> None:
    """Ratio 1 everywhere: loss = −Σ w·A / N; the value loss = ½·Σ (V − R)² / N."""
    policy, critic = new_policy(), new_critic()
    experience = experience_of(train_batch(rollouts()), policy, critic)
    assert experience.values_BT is not None
    assert experience.returns_BT is not None
    objective = value_loss = 0.0
    tokens = 0
    for row, length in enumerate(experience.batch.response_tokens_B.tolist()):
        for t in range(length):
            objective += float(experience.behaviour_weight_BT[row, t] * experience.advantages_BT[row, t])
            value_loss += 0.5 * float(experience.values_BT[row, t] - experience.returns_BT[row, t]) ** 2
            tokens += 1
    stats = update(experience, policy, critic, tuned(epochs=1, minibatches=1))
    assert stats.policy_loss == pytest.approx(-objective / tokens, abs=1e-5)
    assert stats.value_loss == pytest.approx(value_loss / tokens, rel=1e-4)


def test_the_policy_stops_early_and_the_critic_goes_on() -> None:
    policy, critic = new_policy(), new_critic()
    settings = tuned(epochs=4, minibatches=1, max_step_kl_nats_per_token=1e-7)
    stats = update(experience_of(train_batch(rollouts()), policy, critic), policy, critic, settings)
    assert stats.stopped_early
    assert stats.policy_steps == 1, "the second mini-batch shows the movement; its gradient is discarded"
    assert stats.critic_steps == 4


@pytest.mark.parametrize("poison", ["advantages_BT", "returns_BT"])
def test_nothing_that_is_not_finite_is_stepped_on(poison: str) -> None:
    policy, critic = new_policy(), new_critic()
    experience = experience_of(train_batch(rollouts()), policy, critic)
    poisoned = getattr(experience, poison).clone()
    poisoned[0, 0] = math.nan
    before = weights(policy), weights(critic)
    with pytest.raises(NonFiniteError, match="not finite"):
        update(replace(experience, **{poison: poisoned}), policy, critic, tuned(minibatches=1))
    torch.testing.assert_close((weights(policy), weights(critic)), before, atol=0.0, rtol=0.0)
    assert all(p.grad is None for module in (policy, critic) for p in module.parameters())


def test_a_gradient_that_is_not_finite_is_not_stepped_on() -> None:
    policy, critic = new_policy(), new_critic()
    experience = experience_of(train_batch(rollouts()), policy, critic)
    before = weights(policy)
    next(policy.parameters()).register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
    with pytest.raises(NonFiniteError, match="policy gradient"):
        update(experience, policy, critic)
    torch.testing.assert_close(weights(policy), before, atol=0.0, rtol=0.0)


def test_updates_repeat_bit_by_bit() -> None:
    batch = train_batch(rollouts())
    runs = []
    for _ in range(2):
        policy, critic = new_policy(), new_critic()
        runs.append((update(experience_of(batch, policy, critic), policy, critic), weights(policy)))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], atol=0.0, rtol=0.0)


def test_sharded_models_train_as_whole_ones() -> None:
    """FSDP2 over a group of one: weights are DTensors, layers gather and reduce, and the result is the same."""
    batch = train_batch(rollouts())
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        runs = []
        for sharded in (False, True):
            policy, critic = new_policy(), new_critic()
            for module in (policy, critic) if sharded else ():
                for layer in inner_decoder(module.model).get_submodule("layers").children():
                    fully_shard(layer, mesh=mesh)
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
            stats = update(experience_of(batch, policy, critic), policy, critic)
            names = [name for name, parameter in policy.named_parameters() if isinstance(parameter, DTensor)]
            assert bool(names) == sharded
            whole = {
                name: value.full_tensor() if isinstance(value, DTensor) else value
                for name, value in weights(policy).items()
            }
            runs.append((stats, whole))
    finally:
        distributed.destroy_process_group()
    assert runs[1][0].policy_loss == pytest.approx(runs[0][0].policy_loss, abs=1e-5)
    assert runs[1][0].grad_norm_policy == pytest.approx(runs[0][0].grad_norm_policy, rel=1e-4)
    torch.testing.assert_close(runs[1][1], runs[0][1], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- optimiser and schedule


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.7, 0.4, 0.1, 0.1]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.775, 0.325, 0.1, 0.1]),
    ],
)
def test_learning_rate_table(decay: str, rates: list[float]) -> None:
    section = OptimizerSection(learning_rate=1.0, warmup_steps=2, final_fraction=0.1).model_copy(
        update={"decay": decay}
    )
    got = [learning_rate_at(step, section=section, total_steps=6) for step in range(7)]
    assert got == pytest.approx(rates)


def test_optimiser_state_survives_as_plain_tensors() -> None:
    """Stopped and resumed after two steps, against four steps in one go."""
    batch = train_batch(rollouts())

    def step(policy: Policy, optimiser: ScheduledAdamW, number: int) -> None:
        optimiser.set_step(number)
        policy.response_logprobs(batch)[0].sum().backward()  # type: ignore[no-untyped-call]
        optimiser.clip()
        optimiser.step()
        optimiser.zero_grad()

    straight = new_policy()
    optimiser = ScheduledAdamW(straight, section=SETTINGS.policy, total_steps=4)
    assert optimiser.state_tensors() == {}
    for number in range(2):
        step(straight, optimiser, number)
    resumed = Policy(copy.deepcopy(straight.model))
    saved = {key: value.clone() for key, value in optimiser.state_tensors().items()}
    again = ScheduledAdamW(resumed, section=SETTINGS.policy, total_steps=4)
    again.load_state_tensors(saved)
    for number in range(2, 4):
        step(straight, optimiser, number)
        step(resumed, again, number)
    torch.testing.assert_close(weights(resumed), weights(straight), atol=0.0, rtol=0.0)
    saved.popitem()
    with pytest.raises(CheckpointError, match="does not fit"):
        again.load_state_tensors(saved)
    with pytest.raises(CheckpointError, match="does not fit"):
        again.load_state_tensors({"other/step": torch.tensor(1.0)})


# ---------------------------------------------------------------- it learns


def sample(policy: Policy, reference: Policy, *, count: int, generator: torch.Generator) -> list[ScoredRollout]:
    """Answers of up to 6 tokens sampled step by step; the reward counts token 7, token 2 ends an answer."""
    made = []
    ids = torch.randint(3, VOCAB, (count, 2), generator=generator)
    with torch.no_grad():
        sequence = ids
        for _ in range(6):
            logits = policy.model(input_ids=sequence).logits[:, -1]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            sequence = torch.cat([sequence, drawn], dim=1)
    for row in range(count):
        answer = sequence[row, 2:].tolist()
        stopped = 2 in answer
        answer = answer[: answer.index(2) + 1] if stopped else answer
        whole = torch.tensor(ids[row].tolist() + answer)
        reward = float(answer.count(7))
        task = PromptTask(
            task_id=f"t-{row}",
            prompt_id="p",
            group_id="p",
            prompt_ids_i32=pack_ids(ids[row].numpy()),
            max_new_tokens=6,
            temperature=1.0,
        )
        rollout = Rollout(
            task=task,
            response_ids_i32=pack_ids(answer),
            behaviour_logprobs_f32=pack_floats(policy.probe_logprobs(whole)[1:].numpy()),
            version_runs=(VersionRun(0, 0),),
            finish_reason="stop" if stopped else "length",
            actor="rollout-0",
            generate_s=0.0,
        )
        made.append(
            ScoredRollout(
                rollout=rollout,
                member_scores=(reward,),
                reward=reward,
                uncertainty=0.0,
                ref_logprobs_f32=pack_floats(reference.probe_logprobs(whole)[1:].numpy()),
                rm_version="rm-1",
            )
        )
    return made


@pytest.mark.parametrize("advantages", ["gae", "reinforce"])
def test_a_few_steps_raise_the_reward(advantages: str) -> None:
    settings = tuned(
        advantages=advantages,
        missing_eos_penalty=0.0,
        max_step_kl_nats_per_token=1.0,
        policy=OptimizerSection(learning_rate=1e-2, warmup_steps=0, decay="constant"),
        critic=OptimizerSection(learning_rate=1e-2, warmup_steps=0, decay="constant"),
    )
    policy, critic = new_policy(), new_critic() if advantages == "gae" else None
    reference = copy.deepcopy(policy)
    models = trainable(policy, critic, settings)
    generator, normaliser = torch.Generator().manual_seed(0), ScoreNormaliser()
    rewards, kl = [], []
    for step in range(8):
        batch = train_batch(sample(policy, reference, count=48, generator=generator))
        scores_B, normaliser = normalised_scores(batch, normaliser, score_clip=5.0)
        experience = make_experience(
            batch, policy=policy, critic=critic, scores_B=scores_B, beta=0.01, settings=settings
        )
        stats = experience_stats(experience, settings=settings)
        rewards.append(stats.score_mean)
        kl.append(stats.kl_nats_per_sequence)
        assert stats.behaviour_gap_max_nats < 1e-4, "sampler and learner agree on every token"
        models.set_step(step)
        ppo_update(experience, trainable=models, settings=settings, rng=generator)
    assert sum(rewards[-2:]) / 2 > rewards[0] + 1.0
    assert kl[0] == pytest.approx(0.0, abs=1e-4)
    assert kl[-1] > 0.5
