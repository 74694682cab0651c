"""A whole learner that trains an adapter: what it checkpoints, resumes from, sends and hands over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.streams_memory import MemoryStreams
from cluster.weights import MemoryWeightChannel, WeightBlob, unpack
from configs.run import LoraSection, RunConfig
from learner.policy import ADAPTER_DIR
from learner.state import LearnerState
from tests.run_support import prepare_run, random_rollouts


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepare_run(tmp_path_factory.mktemp("runs"), "learner.lora={rank: 4, alpha: 8.0}")


def build(config: RunConfig, channel: MemoryWeightChannel | None = None) -> LearnerState:
    channel = channel or MemoryWeightChannel()
    return LearnerState.build(config, run_dir=config.run_dir, streams=MemoryStreams(), channel=channel)


def step(state: LearnerState, *, seed: int) -> None:
    experience = state.make_experience(random_rollouts(seed=seed))
    state.advance(experience, state.update(experience))


def policy_tensors(state: LearnerState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.checkpoint_tensors()["policy"].items()}


async def published(state: LearnerState, channel: MemoryWeightChannel) -> WeightBlob:
    await state.publish_weights()
    blob = await channel.latest()
    assert blob is not None
    return blob


def test_an_adapter_is_all_that_is_saved_and_a_resumed_learner_goes_on_the_same(config: RunConfig) -> None:
    first = build(config)
    step(first, seed=1)
    first.save()
    assert all(".lora_" in name for name in policy_tensors(first))
    second = build(config)
    assert second.step == 1
    for state in (first, second):
        step(state, seed=2)
    ours, theirs = policy_tensors(second), policy_tensors(first)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    second.save_final()
    assert (config.run_dir / "policy" / "final" / ADAPTER_DIR / "adapter_model.safetensors").exists()


async def test_engines_get_whole_weights_or_the_adapter_for_the_same_policy(config: RunConfig) -> None:
    channel = MemoryWeightChannel()
    state = build(config, channel)
    step(state, seed=4)
    state.save()
    whole = await published(state, channel)
    base = AutoModelForCausalLM.from_pretrained(config.run_dir / "sft" / "model")
    assert whole.adapter is None
    assert whole.shapes.keys() == dict(base.named_parameters()).keys()

    lora = LoraSection(rank=4, alpha=8.0, broadcast="adapter")
    learner_section = config.learner.model_copy(update={"lora": lora})
    channel = MemoryWeightChannel()
    # Resumes from the checkpoint of the one that sends whole weights.
    alone = await published(build(config.model_copy(update={"learner": learner_section}), channel), channel)
    assert alone.adapter is not None
    assert alone.size_bytes < whole.size_bytes / 4
    merged, parts = dict(unpack(whole)), dict(unpack(alone))
    name = "model.layers.0.mlp.down_proj"
    up, down = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    moved = merged[f"{name}.weight"] - base.get_parameter(f"{name}.weight").detach()
    torch.testing.assert_close(alone.adapter.alpha / alone.adapter.rank * up @ down, moved, atol=1e-6, rtol=1e-5)
    assert moved.abs().max() > 0


def test_the_final_policy_serves_without_its_adapter(config: RunConfig, tmp_path: Path) -> None:
    state = build(config)
    step(state, seed=3)
    state.team.save_model(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    sent = dict(state.team.weights())
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter.data, sent[name], atol=0.0, rtol=0.0)
