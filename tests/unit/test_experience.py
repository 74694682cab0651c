"""From a batch to experience on tiny models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError, NonFiniteError
from learner.algo.normalise import ScoreNormaliser
from learner.backbone import named_head
from learner.batch import train_batch
from learner.experience import experience_stats, normalised_scores
from tests.learner_support import (
    SETTINGS,
    experience_of,
    new_critic,
    new_policy,
    rollouts,
    tuned,
    update,
    weights,
)


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
