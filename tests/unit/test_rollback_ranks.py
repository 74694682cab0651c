"""Going back to a good checkpoint with the learner sharded over several ranks: exact on each of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.checkpoint_tensors import read_whole
from cluster.streams_memory import MemoryStreams
from cluster.weights import MemoryWeightChannel, unpack
from configs.run import RunConfig
from learner.follow import Follower
from learner.guard.record import LowerLearningRate, RollBack
from learner.guarded import carry_out
from learner.ranks import Ranks
from learner.state import LearnerState
from learner.team import Team
from learner.trainer import Trainer
from tests.guard_support import ScriptedGuard, alarm
from tests.ranks_support import alone, on_ranks
from tests.run_support import prepare_run, random_rollouts

Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepare_run(tmp_path_factory.mktemp("prepared"), "checkpoint.keep_last=9")


def run_with_rollback(ranks: Ranks, config: RunConfig, at: int) -> Outcome | str:
    """`at` good steps, two others, back, one more step at half the learning rate. Rank 0: what was saved at `at` and
    what stands after the rollback, and the learning rates; the others: how they ended."""
    trainer = Trainer(config, run_dir=config.run_dir, ranks=ranks)
    if ranks.rank > 0:
        follower = Follower(trainer, beat=lambda: None)
        follower.until_ready()
        return follower.until_end()
    channel = MemoryWeightChannel()
    state = LearnerState.build(
        config, run_dir=config.run_dir, streams=MemoryStreams(), channel=channel, team=Team(trainer),
        guarded_by=ScriptedGuard(),
    )  # fmt: skip
    state.begin()

    def step(seed: int) -> float:
        experience = state.make_experience(random_rollouts(seed=seed))
        update = state.update(experience)
        state.advance(experience, update)
        return update.learning_rate

    for seed in range(at):
        step(seed)
    if at:
        state.save(good=True)
    for seed in (11, 12):
        step(seed)
    asyncio.run(carry_out(alarm(RollBack(at), LowerLearningRate(0.5)), state))
    blob = asyncio.run(channel.latest())
    assert blob is not None
    rate = step(13)
    if ranks.size > 1:
        state.team.end("steps_done")
    return {
        "published": {name: tensor.numpy().copy() for name, tensor in unpack(blob)},
        "beta": state.kl.beta,
        "rate": rate,
        "step": state.step,
    }


def saved(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    groups = read_whole(config.run_dir / "checkpoints" / f"step-{step:08d}")
    return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("at", [0, 1])
def test_a_rollback_is_exact_on_one_two_and_three_ranks(prepared: RunConfig, tmp_path: Path, at: int) -> None:
    """What is saved right after it is what was saved before, bit for bit: policy, critic, optimisers, random state."""
    outcomes = []
    for size in (1, 2, 3):
        run_dir = tmp_path / str(size) / prepared.name
        run_dir.mkdir(parents=True)
        for name in ("sft", "rm", "data", "model"):
            if (prepared.run_dir / name).exists():
                (run_dir / name).symlink_to(prepared.run_dir / name)
        config = prepared.model_copy(update={"runs_dir": run_dir.parent})
        if size == 1:
            outcome = alone(run_with_rollback, config, at)
        else:
            outcome, *others = on_ranks(run_with_rollback, config, at, size=size)
            assert others == ["steps_done"] * (size - 1)
        before, after = saved(config, at), saved(config, at + 2)
        assert before.keys() == after.keys()
        groups = {"policy", "critic", "rng"} | ({"policy_optimiser", "critic_optimiser"} if at else set())
        assert {name.partition("/")[0] for name in before} == groups
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        outcomes.append(outcome)
    first = outcomes[0]
    assert first["step"] == at + 3
    for outcome in outcomes[1:]:
        assert outcome["beta"] == pytest.approx(first["beta"], rel=1e-6)
        assert outcome["rate"] == first["rate"]
        for name, expected in first["published"].items():
            np.testing.assert_allclose(outcome["published"][name], expected, atol=1e-5)
