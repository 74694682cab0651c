"""`keel eval` over a scripted engine, and what it measures beside the engine."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from actors.engine import ScriptedEngine
from actors.rollout_actor import RolloutActor, RolloutSpec
from cluster.data_records import EVAL_PROMPTS_FILE, PromptRecord, data_dir, read_rows
from cluster.errors import ConfigError, DataError, EngineDeadError, ModelError
from cluster.files import read_jsonl
from cluster.text import prompt_text
from configs.guard import GuardSection, WatchSection
from configs.load import dump_config
from configs.run import RunConfig
from keel.comparison import REFERENCE_ROWS
from keel.eval_command import evaluate_now, policy_dir
from learner.evaluate import nats_per_token
from learner.held_out import held_out_texts
from tests.run_support import prepare_run

JUDGE = "tests.unit.test_eval_command:dislikes_love"


def dislikes_love(prompt: Any, a: str, b: str, rng: Any) -> list[bool]:
    return [a != "i love you."]


@pytest.fixture(name="config", scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = prepare_run(tmp_path_factory.mktemp("runs"), "rollout.engine=scripted")
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    return config


@pytest.fixture(name="run_dir")
def with_reference(config: RunConfig) -> Path:
    rows = [
        {"prompt": prompt_text(record.prompt), "answer": "i love you.", "truncated": False}
        for record in read_rows(data_dir(config.run_dir) / EVAL_PROMPTS_FILE, PromptRecord)
    ]
    (config.run_dir / "eval").mkdir(exist_ok=True)
    (config.run_dir / REFERENCE_ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config.run_dir


def shown_by(run_dir: Path, **options: Any) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=120)
    path = evaluate_now(run_dir, console=console, **options)
    return json.loads(path.read_text()), cast(io.StringIO, console.file).getvalue()


def test_a_policy_is_compared_and_everything_is_written_down(run_dir: Path) -> None:
    policy = str(run_dir / "sft" / "model")
    result, shown = shown_by(run_dir, prompts=12, judge=JUDGE, policy=policy)
    assert result["prompts"] == 12
    assert result["win_rate"] == 1.0
    assert result["win_rate_low"] == pytest.approx(12 / (12 + 1.959964**2))
    assert result["win_rate_length_controlled"] is None, "from 12 pairs"
    assert result["kl_nats_per_sequence"] == pytest.approx(0.0, abs=1e-4)
    assert result["anchor_perplexity_ratio"] == pytest.approx(1.0)
    assert {"gold_gain_low", "reward_gain_low", "rm_version", "rm_judge_agreement"} <= set(result)
    rows = read_jsonl(next((run_dir / "eval").glob("eval-*.rows.jsonl")))
    assert [row["outcome"] for row in rows] == [1.0] * 12
    assert "100%" in shown
    assert "win rate against the policy before training" in shown


def test_where_people_judge_nobody_is_waited_for_and_the_rest_is_told(run_dir: Path, config: RunConfig) -> None:
    by_people = config.model_copy(update={"guard": GuardSection(watch=WatchSection(judge="review"))})
    (run_dir / "config.yaml").write_text(dump_config(by_people))
    try:
        result, shown = shown_by(run_dir, prompts=4, policy=str(run_dir / "sft" / "model"))
    finally:
        (run_dir / "config.yaml").write_text(dump_config(config))
    assert "win_rate" not in result
    assert "no function judges" in shown


def test_what_is_missing_is_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no trained policy yet"):
        evaluate_now(run_dir)
    with pytest.raises(ModelError, match="no policy here"):
        evaluate_now(run_dir, policy="best")
    with pytest.raises(ConfigError, match="not a run directory"):
        evaluate_now(tmp_path)
    with pytest.raises(ConfigError, match="people are not waited for"):
        evaluate_now(run_dir, judge="review")
    (run_dir / REFERENCE_ROWS).unlink()
    with pytest.raises(DataError, match="nothing to compare with"):
        evaluate_now(run_dir, policy=str(run_dir / "sft" / "model"))


def test_the_final_policy_comes_before_the_best(tmp_path: Path) -> None:
    for name in ("best", "final"):
        (tmp_path / "policy" / name).mkdir(parents=True)
        (tmp_path / "policy" / name / "config.json").touch()
        assert policy_dir(tmp_path, None) == (tmp_path / "policy" / name, f"eval-{name}")
    assert policy_dir(tmp_path, "best")[1] == "eval-best"


# ---------------------------------------------------------------- what is forgotten


def test_held_out_texts_are_those_that_sft_kept_back(config: RunConfig) -> None:
    found = held_out_texts(config, config.run_dir, limit=100)
    assert found is not None
    assert len(found.sequences) == 10, "5 % of 200"
    ended = sum(answer[-1] == 2 for _, answer in found.sequences)
    assert ended >= 5, "with their end-of-sequence token, but for those that were cut"
    few = held_out_texts(config, config.run_dir, limit=3)
    assert few is not None
    assert few.sequences == found.sequences[:3]
    untrained = config.model_copy(update={"sft": config.sft.model_copy(update={"epochs": 0})})
    every = held_out_texts(untrained, config.run_dir, limit=1000)
    assert every is not None
    assert (len(every.sequences), every.source != found.source) == (200, True)
    assert held_out_texts(config, config.run_dir, limit=0) is None


def test_nats_per_token_is_the_models_cross_entropy_on_the_answers(config: RunConfig) -> None:
    texts = held_out_texts(config, config.run_dir, limit=4)
    assert texts is not None
    model_dir = config.run_dir / "sft" / "model"
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    nats, tokens = 0.0, 0
    for prompt, answer in texts.sequences:
        with torch.inference_mode():
            logprobs_TV = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        for place, token in enumerate(answer, start=len(prompt)):
            nats -= float(logprobs_TV[place - 1, token])
            tokens += 1
    assert nats_per_token(model_dir, sequences=texts.sequences) == pytest.approx(nats / tokens, rel=1e-4)


# ---------------------------------------------------------------- an actor reads texts


class Reads(ScriptedEngine):
    """Each token costs its place."""

    async def probe(self, token_ids: np.ndarray[Any, np.dtype[np.int32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        self._ensure_alive()
        return -np.arange(1, len(token_ids), dtype=np.float32)


def actor_with(engine: ScriptedEngine, config: RunConfig) -> RolloutActor:
    spec = RolloutSpec(
        config=config, model_path="", redis_url="", log_dir="", channel=cast(Any, None), index=0, incarnation=0
    )
    actor = RolloutActor(spec)
    actor._engine = engine
    actor._worker = cast(Any, SimpleNamespace(meter=SimpleNamespace(beat=lambda: None)))
    return actor


async def test_an_actor_tells_what_responses_cost_after_their_prompts(config: RunConfig) -> None:
    actor = actor_with(Reads(), config)
    longest = config.max_sequence_tokens - 1
    found = await actor.response_nats([([7, 7, 7], [8, 8]), ([], [8, 8, 8]), ([7], [8] * 200), ([], [8])])
    assert found == [
        (3.0 + 4.0, 2),
        (1.0 + 2.0, 2),  # without a prompt nothing comes before the first token
        (sum(range(1, longest)), longest - 1),  # cut to what the engine can read
        (0.0, 0),
    ]


async def test_an_actor_whose_engine_died_fails_the_call(config: RunConfig) -> None:
    engine = Reads()
    engine.die()
    actor = actor_with(engine, config)
    with pytest.raises(EngineDeadError):
        await actor.response_nats([([7], [8])])
    assert actor._direct == 0
