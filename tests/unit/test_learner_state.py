"""Saving and resuming the learner: whole, exact, and without a process around it."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import CheckpointError
from cluster.streams_memory import MemoryStreams
from cluster.weights import MemoryWeightChannel
from configs.run import RunConfig
from learner.state import LearnerState
from tests.run_support import prepare_run, random_rollouts, write_reward_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepare_run(tmp_path_factory.mktemp("runs"))


def build(config: RunConfig) -> LearnerState:
    return LearnerState.build(config, run_dir=config.run_dir, streams=MemoryStreams(), channel=MemoryWeightChannel())


def step(state: LearnerState, *, seed: int) -> None:
    experience = state.make_experience(random_rollouts(seed=seed))
    state.advance(experience, state.update(experience))


def tensors(state: LearnerState) -> dict[str, torch.Tensor]:
    return {
        f"{group}/{name}": tensor.clone()
        for group, named in state.checkpoint_tensors().items()
        for name, tensor in named.items()
    }


async def test_a_resumed_learner_is_the_same_and_goes_on_the_same(config: RunConfig) -> None:
    first = build(config)
    await first.intake.issue(step=0, version=0)
    for seed in (1, 2):
        step(first, seed=seed)
    first.save()

    second = build(config)
    assert (second.step, second.version) == (2, 2)
    assert second.kl == first.kl
    assert second.kl.beta != config.learner.kl.beta_init  # type: ignore[union-attr]
    assert second.scores.to_state() == first.scores.to_state()
    assert second.deck.position == first.deck.position > 0
    assert second.intake.ledger.counts.issued == first.intake.ledger.counts.issued
    assert second.intake.ledger.outstanding == first.intake.ledger.outstanding
    before, after = tensors(first), tensors(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    step(first, seed=3)
    step(second, seed=3)
    before, after = tensors(first), tensors(second)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert second.kl == first.kl
    assert [first.deck.deal().prompt_id for _ in range(5)] == [second.deck.deal().prompt_id for _ in range(5)]


async def test_versions_go_upward_past_what_actors_have_seen(config: RunConfig) -> None:
    channel = MemoryWeightChannel()
    state = LearnerState.build(config, run_dir=config.run_dir, streams=MemoryStreams(), channel=channel)
    await state.publish_weights()
    seen = state.version
    await state.publish_weights()
    assert state.version == seen + 1
    newest = await channel.latest()
    assert newest is not None
    assert newest.version == seen + 1
    assert newest.probe is not None


def test_a_checkpoint_of_another_reward_model_is_refused(config: RunConfig) -> None:
    state = build(config)
    step(state, seed=9)
    state.save()
    versions = config.run_dir / "rm" / "versions"
    (versions / "rm-1").rename(versions / "rm-9")
    write_reward_model(config.run_dir, version="rm-2")
    try:
        with pytest.raises(CheckpointError, match="another reward model"):
            build(config)
    finally:
        (versions / "rm-9").rename(versions / "rm-1")
