"""The evaluate stage: a trained policy's answers beside the SFT policy's."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from configs.run import RunConfig
from keel import evaluate
from keel.evaluate import evaluate_policy
from tests.run_support import prepare_run
from tests.watch_scene import Scene, ids

GOOD, BAD = "please restart the router.", "i love you."
JUDGE = "tests.unit.test_evaluate:prefers_steps"
NEVER = threading.Event()


def prefers_steps(prompt: Any, a: str, b: str, rng: Any) -> dict[str, bool]:
    return {"ann": "restart" in a}


def hangs(prompt: Any, a: str, b: str, rng: Any) -> dict[str, bool]:
    NEVER.wait()
    return {}


def breaks(prompt: Any, a: str, b: str, rng: Any) -> dict[str, bool]:
    raise RuntimeError("no connection")


@pytest.fixture(name="config", scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = prepare_run(tmp_path_factory.mktemp("runs"), f"collect.judge={JUDGE}")
    scene = Scene(config, ids(config, BAD))
    evaluate_policy(scene.runtime(), scene.roles(), tag="sft", model_dir=config.run_dir / "sft" / "model")
    return config


def result_of(config: RunConfig, tag: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.run_dir / "eval" / f"{tag}.json").read_text())
    return found


def dpo_of(config: RunConfig, scene: Scene) -> dict[str, Any]:
    evaluate_policy(scene.runtime(), scene.roles(), tag="dpo", model_dir=Path(config.run_dir / "sft" / "model"))
    return result_of(config, "dpo")


def test_the_sft_policy_is_not_compared_with_itself(config: RunConfig) -> None:
    result = result_of(config, "sft")
    assert (result["kl_nats_per_sequence"], result["prompts"]) == (0.0, 32)
    assert not {"win_rate", "anchor_perplexity_ratio"} & set(result)


def test_a_trained_policy_is_compared(config: RunConfig) -> None:
    result = dpo_of(config, Scene(config, ids(config, GOOD)))
    assert result["win_rate"] == 1.0
    assert result["win_rate_low"] == pytest.approx(32 / (32 + 1.959964**2))
    assert result["rm_judge_agreement"] == 1.0, "this scene's reward is length, and the better answer is longer"
    assert result["anchor_perplexity_ratio"] == pytest.approx(1.0), "the same weights"
    assert result["gold"] is not None
    assert result["response_tokens"] == len(ids(config, GOOD))


def test_a_judge_that_breaks_costs_the_win_rate_alone(config: RunConfig) -> None:
    collect = config.collect.model_copy(update={"judge": JUDGE.replace("prefers_steps", "breaks")})
    scene = Scene(config.model_copy(update={"collect": collect}), ids(config, GOOD))
    result = dpo_of(config, scene)
    assert "win_rate" not in result
    assert result["proxy_z"] is not None
    assert any("no connection" in str(fields.get("note")) for fields in scene.emitted)


def test_a_judge_that_never_answers_costs_the_win_rate_alone(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "JUDGE_TIMEOUT_S", 0.2)
    collect = config.collect.model_copy(update={"judge": JUDGE.replace("prefers_steps", "hangs")})
    scene = Scene(config.model_copy(update={"collect": collect}), ids(config, GOOD))
    result = dpo_of(config, scene)
    NEVER.set()
    assert "win_rate" not in result
    assert any("did not answer 32 questions" in str(fields.get("note")) for fields in scene.emitted)
