"""Saving and resuming the learner: whole, exact, and without a process around it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from cluster.data import fit_data, prepare_data
from cluster.errors import CheckpointError
from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, pack_floats, pack_ids
from cluster.streams_memory import MemoryStreams
from cluster.text import load_tokenizer
from cluster.weights import MemoryWeightChannel
from configs.load import load_config
from configs.run import RunConfig
from learner.model_init import make_model
from learner.state import LearnerState


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run directory as the offline stages leave it, with untrained models."""
    runs_dir = tmp_path_factory.mktemp("runs")
    config = load_config(
        "demo_ci",
        overrides=[
            f"runs_dir={runs_dir}",
            "data.world.sft_examples=200",
            "learner.batch_size=8",
            "checkpoint.keep_last=3",
        ],
    )
    run_dir = config.run_dir
    prepare_data(config, run_dir)
    initial = make_model(config, run_dir)
    fit_data(config, run_dir, tokenizer=load_tokenizer(initial.tokenizer_dir))
    (run_dir / "sft").mkdir()
    initial.model_dir.rename(run_dir / "sft" / "model")
    write_reward_model(run_dir, version="rm-1")
    return config


def write_reward_model(run_dir: Path, *, version: str) -> None:
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(run_dir / "sft" / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(run_dir / "rm" / "member_0")
    manifest = {"version": version, "calibration": {"mean": 0.1, "std": 0.5, "count": 100}}
    (run_dir / "rm" / "manifest.json").write_text(json.dumps(manifest))


def build(config: RunConfig) -> LearnerState:
    return LearnerState.build(config, run_dir=config.run_dir, streams=MemoryStreams(), channel=MemoryWeightChannel())


def rollouts(*, seed: int, count: int = 8) -> list[ScoredRollout]:
    """Answers of random tokens with random scores."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(rng.integers(2, 12))
        task = PromptTask(
            task_id=f"t-{seed}-{number}",
            prompt_id="p",
            group_id=f"t-{seed}-{number}",
            prompt_ids_i32=pack_ids(rng.integers(4, 60, size=4)),
            max_new_tokens=12,
            temperature=1.0,
        )
        rollout = Rollout(
            task=task,
            response_ids_i32=pack_ids(rng.integers(4, 60, size=length)),
            behaviour_logprobs_f32=pack_floats(-rng.random(length) - 4.0),
            version_runs=(VersionRun(0, 0),),
            finish_reason="stop",
            actor="a",
            generate_s=0.1,
        )
        score = float(rng.normal())
        made.append(
            ScoredRollout(
                rollout=rollout,
                member_scores=(score,),
                reward=score,
                uncertainty=0.0,
                ref_logprobs_f32=pack_floats(-rng.random(length) - 4.0),
                rm_version="rm-1",
            )
        )
    return made


def step(state: LearnerState, *, seed: int) -> None:
    experience = state.make_experience(rollouts(seed=seed))
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
    assert second.normaliser == first.normaliser
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
    write_reward_model(config.run_dir, version="rm-2")
    try:
        with pytest.raises(CheckpointError, match="another reward model"):
            build(config)
    finally:
        write_reward_model(config.run_dir, version="rm-1")
