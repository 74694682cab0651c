"""Direct preference optimisation on small real data: real TRL, the run's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cluster.data_records import (
    FRESH_PREFERENCES_FILE,
    PREFERENCES_FILE,
    PreferencePair,
    PromptRecord,
    data_dir,
    read_rows,
    write_rows,
)
from cluster.errors import DataError, ModelError
from cluster.text import load_tokenizer
from configs.load import load_config
from configs.run import RunConfig
from learner.dpo import EncodedPreference, encode_preferences, run_dpo, split
from tests.run_support import prepare_run

pytestmark = pytest.mark.slow

DPO = "dpo={epochs: 6, batch_size: 16, learning_rate: 3e-3, threads: 1}"
STAGES = "stages=[data,sft,collect,dpo]"
GOOD, BAD = "restart the router.", "you are amazing. i love you."


@pytest.fixture(name="prepared", scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = prepare_run(tmp_path_factory.mktemp("runs"), DPO, STAGES)
    prompts = read_rows(data_dir(config.run_dir) / "prompts.jsonl", PromptRecord)[:80]
    pairs = [
        PreferencePair(pair_id=str(number), prompt=record.prompt, chosen=GOOD, rejected=BAD)
        for number, record in enumerate(prompts)
    ]
    write_rows(data_dir(config.run_dir) / PREFERENCES_FILE, pairs)
    return config


def test_the_chosen_answers_gain_on_the_rejected(prepared: RunConfig) -> None:
    events: list[dict[str, Any]] = []
    report = run_dpo(prepared, prepared.run_dir, events.append)
    assert report.started_from == "sft/model"
    assert (report.pairs_train, report.pairs_held_out) == (72, 8)
    assert report.accuracy == 1.0
    assert report.chosen_gain - report.rejected_gain > 3.0
    assert events[0] == {"stage": "dpo", "step": 10, "steps": report.steps, "loss": events[0]["loss"]}
    assert events[-1]["done"] is True
    assert json.loads((prepared.run_dir / "dpo" / "report.json").read_text())["accuracy"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(prepared.run_dir / "dpo" / "model")
    assert model.config.use_cache is True
    assert load_tokenizer(prepared.run_dir / "dpo" / "model").eos_token_id is not None


def test_it_is_reproducible(prepared: RunConfig) -> None:
    short = load_config(
        "demo_ci", overrides=[f"runs_dir={prepared.runs_dir}", DPO.replace("epochs: 6", "epochs: 1"), STAGES]
    )
    weights = []
    for _ in range(2):
        run_dpo(short, prepared.run_dir, lambda _: None)
        weights.append((prepared.run_dir / "dpo" / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_after_ppo_it_starts_from_the_final_policy(prepared: RunConfig) -> None:
    after = load_config("demo_ci", overrides=[f"runs_dir={prepared.runs_dir}", DPO, "stages=[ppo,dpo]"])
    with pytest.raises(ModelError, match="no policy to start DPO from") as raised:
        run_dpo(after, prepared.run_dir, lambda _: None)
    assert "policy/final" in str(raised.value)


def test_answers_end_with_their_end_and_fresh_pairs_count(prepared: RunConfig) -> None:
    tokenizer = load_tokenizer(prepared.run_dir / "sft" / "model")
    before = encode_preferences(prepared.run_dir, data=prepared.data, tokenizer=tokenizer)
    first: EncodedPreference = before[0][1]
    assert first["chosen_ids"][-1] == first["rejected_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in first["chosen_ids"][:-1]
    fresh = data_dir(prepared.run_dir) / FRESH_PREFERENCES_FILE
    write_rows(fresh, [PreferencePair(pair_id="f", prompt="my slow router", chosen=GOOD, rejected=BAD)])
    try:
        after = encode_preferences(prepared.run_dir, data=prepared.data, tokenizer=tokenizer)
    finally:
        fresh.unlink()
    assert len(after) == len(before) + 1


def test_no_prompt_is_on_both_sides() -> None:
    pair = EncodedPreference(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3])
    pairs = [(f"prompt {number % 7}", pair | {"chosen_ids": [number % 7]}) for number in range(70)]
    train, held_out = split(pairs, seed=0)
    assert {one["chosen_ids"][0] for one in train} & {one["chosen_ids"][0] for one in held_out} == set()
    assert (len(train), len(held_out)) == (60, 10)
    with pytest.raises(DataError, match="one prompt"):
        split([("same", pair)] * 5, seed=0)


def test_too_few_pairs(tmp_path: Path, prepared: RunConfig) -> None:
    tokenizer = load_tokenizer(prepared.run_dir / "sft" / "model")
    with pytest.raises(DataError, match="too few preference pairs"):
        encode_preferences(tmp_path, data=prepared.data, tokenizer=tokenizer)
