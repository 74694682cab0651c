"""Every preset that ships loads, fits together, and says what its comments say."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import PRESETS_DIR, dump_config, load_config, preset_names
from configs.run import AdaptiveKl, NewModel, PretrainedModel


def test_the_named_presets_ship() -> None:
    assert {"demo", "demo_ci", "hh_harmless", "ppo_7b_8gpu"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("name", preset_names())
def test_preset_explains_itself(name: str) -> None:
    text = (PRESETS_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert text.count("#") >= 4


def test_run_names_differ() -> None:
    names = [load_config(name).name for name in preset_names()]
    assert len(set(names)) == len(names)


def test_the_demo_is_the_support_desk() -> None:
    config = load_config("demo")
    assert config.data.world is not None
    assert config.data.world.factory == "examples.support_desk.world:make"
    assert config.collect.judge == "examples.support_desk.annotators:judge"
    assert config.evaluation.gold == "examples.support_desk.gold:gold_reward"
    assert (config.learner.steps, config.learner.batch_size) == (60, 128)
    assert isinstance(config.learner.kl, AdaptiveKl)


def test_ci_is_small() -> None:
    config = load_config("demo_ci")
    assert config.learner.steps == 8
    assert isinstance(config.model, NewModel)
    assert config.model.hidden_size // config.model.heads == 32


def test_real_text_needs_bytes() -> None:
    config = load_config("hh_harmless")
    assert isinstance(config.model, NewModel)
    assert config.model.tokenizer == "byte_bpe"
    assert (config.data.max_prompt_tokens, config.data.max_response_tokens) == (192, 96)


def test_the_large_preset_uses_all_eight_gpus() -> None:
    config = load_config("ppo_7b_8gpu")
    assert isinstance(config.model, PretrainedModel)
    gpus = (
        config.learner.gpus
        + config.rollout.actors * config.rollout.gpus_per_actor
        + config.reward.workers * config.reward.gpus_per_worker
    )
    assert gpus == 8
    assert config.learner.dtype == config.rollout.dtype == "bfloat16"
