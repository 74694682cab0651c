"""The PPO update, its optimiser and schedule, on tiny models; and that it learns."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cluster.errors import NonFiniteError
from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, pack_floats, pack_ids
from configs.run import OptimizerSection
from learner.algo.normalise import ScoreNormaliser
from learner.backbone import inner_decoder
from learner.batch import train_batch
from learner.experience import experience_stats, make_experience, normalised_scores
from learner.policy import Policy
from learner.schedule import ScheduledAdamW, learning_rate_at
from learner.update import ppo_update
from tests.learner_support import (
    SETTINGS,
    VOCAB,
    experience_of,
    new_critic,
    new_policy,
    rollouts,
    trainable,
    tuned,
    update,
    weights,
)


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
    again.reset_state(zeros=True)
    assert again.state_tensors().keys() == saved.keys()
    for key, tensor in again.state_tensors().items():
        tensor.copy_(saved[key])
    for number in range(2, 4):
        step(straight, optimiser, number)
        step(resumed, again, number)
    torch.testing.assert_close(weights(resumed), weights(straight), atol=0.0, rtol=0.0)


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
