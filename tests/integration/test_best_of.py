"""Best of n: several answers a prompt, chosen by a run's own reward model."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from cluster.errors import ConfigError, ModelError
from cluster.reward_models import Calibration, RewardModels, RmManifest
from cluster.text import EncodedPrompt, encode_prompt, load_tokenizer
from configs.run import RunConfig
from keel.best_of import best_of, kl_bound_nats
from keel.cli import app
from keel.generate import Sampler
from tests.run_support import prepare_run

PROMPTS = ["my slow router in berlin since monday.", "help with my late parcel in oslo since friday."]


@pytest.fixture(name="run", scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with an untrained policy, and a reward model of random weights with the policy's tokenizer."""
    config = prepare_run(tmp_path_factory.mktemp("runs"))
    models = RewardModels(config.run_dir / "rm")
    member = models.current().member_dirs[0]
    model = AutoModelForSequenceClassification.from_pretrained(member)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    with models.draft() as draft:
        model.save_pretrained(draft / "member_0")
        load_tokenizer(config.run_dir / "sft" / "model").save_pretrained(draft / "member_0")
        calibration = Calibration(mean=0.0, std=1.0, count=1)
        models.publish(draft, RmManifest(version="rm-2", members=1, number=2, calibration=calibration))
    return config


def chosen(run: RunConfig, n: int, *, seed: int = 0, rm: Path | None = None) -> list[list[float]]:
    found = best_of(run.run_dir / "sft" / "model", PROMPTS, n=n, rm=rm, max_new_tokens=12, temperature=1.0, seed=seed)
    return [[one.reward for one in answers] for _, answers in found]


def test_the_best_of_many_is_better_than_one(run: RunConfig) -> None:
    one = [rewards[0] for seed in range(6) for rewards in chosen(run, 1, seed=seed)]
    many = [rewards[0] for seed in range(6) for rewards in chosen(run, 8, seed=seed)]
    spread = statistics.pstdev(one)
    assert statistics.fmean(many) > statistics.fmean(one) + 0.5 * spread, "the maximum of 8 lies 1.4 deviations higher"


def test_answers_come_best_first_and_repeat_with_the_seed(run: RunConfig) -> None:
    first = chosen(run, 4)
    assert all(rewards == sorted(rewards, reverse=True) and len(rewards) == 4 for rewards in first)
    assert chosen(run, 4) == first
    assert chosen(run, 4, seed=1) != first
    assert chosen(run, 4, rm=run.run_dir / "rm") == first


def test_what_is_missing_is_said(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no policy here"):
        list(best_of(tmp_path, PROMPTS, n=2, rm=None, max_new_tokens=4, temperature=1.0, seed=0))
    with pytest.raises(ModelError, match="no reward model"):
        chosen(run, 2, rm=tmp_path)
    with pytest.raises(ConfigError, match="all the same"):
        list(best_of(run.run_dir, PROMPTS, n=2, rm=None, max_new_tokens=4, temperature=0.0, seed=0))


def test_prompts_are_encoded_as_in_training_and_must_fit(run: RunConfig) -> None:
    sampler = Sampler(run.run_dir / "sft" / "model", seed=0)
    tokenizer = load_tokenizer(run.run_dir / "sft" / "model")
    (sampled,) = sampler.sample("my <eos> router", count=1, max_new_tokens=1, temperature=0.0)
    encoded = encode_prompt(tokenizer, "my <eos> router", max_tokens=64)
    assert isinstance(encoded, EncodedPrompt)
    assert sampled.token_ids[:-1] == list(encoded.ids)
    assert tokenizer.eos_token_id not in encoded.ids
    with pytest.raises(ConfigError, match="empty prompt"):
        sampler.sample(" ", count=1, max_new_tokens=1, temperature=0.0)
    with pytest.raises(ConfigError, match="do not fit"):
        sampler.sample("my router", count=1, max_new_tokens=100_000, temperature=0.0)


def test_the_command(run: RunConfig) -> None:
    arguments = ["generate", str(run.run_dir / "sft" / "model"), PROMPTS[0], "--max-new-tokens", "8"]
    plain = CliRunner().invoke(app, arguments)
    assert plain.exit_code == 0, plain.output
    assert plain.output.count("→") == 1
    shown = CliRunner().invoke(app, [*arguments, "--best-of", "4", "--show-all"])
    assert shown.exit_code == 0, shown.output
    assert len(shown.output.strip().splitlines()) == 5


def test_the_bound_on_the_distance() -> None:
    assert kl_bound_nats(1) == 0.0
    assert kl_bound_nats(8) == pytest.approx(1.2044, abs=1e-4)
