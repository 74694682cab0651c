"""SFT and RM training on a tiny world with real TRL: outputs complete, usable and reproducible; failures clear."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.data import fit_data, prepare_data
from cluster.data_records import PREFERENCES_FILE, PreferencePair, SftExample, data_dir, read_rows, write_rows
from cluster.errors import DataError, ModelError, NonFiniteError
from cluster.reward_models import RewardModels
from cluster.text import check_vocabulary, encode_answer, encode_prompt, load_tokenizer
from configs.run import RunConfig
from examples.support_desk.annotators import judge
from learner.model_init import make_model
from learner.sft import encode_examples, run_sft
from reward_service.preferences import Candidate, collect_pairs
from reward_service.rm.measure import score_sequences
from reward_service.rm.train import run_rm


def tiny_config(**sections: Any) -> RunConfig:
    """A run whose offline stages take seconds."""
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "seed": 5,
            "model": {"kind": "new", "hidden_size": 64, "intermediate_size": 96, "layers": 1, "heads": 2},
            "data": {
                "world": {
                    "kind": "world",
                    "factory": "examples.support_desk.world:make",
                    "sft_examples": 200,
                    "prompts": 64,
                    "eval_prompts": 16,
                }
            },
            "sft": {"epochs": 1, "threads": 1},
            "rm": {"epochs": 1, "members": 2, "batch_size": 16, "threads": 1, "held_out_annotators": 0},
            **sections,
        }
    )


def prepared(run_dir: Path, config: RunConfig) -> RunConfig:
    """Data, initial model and tokenizer-fitted files; preferences between demonstrations, labelled by the judge."""
    prepare_data(config, run_dir)
    initial = make_model(config, run_dir)
    fit_data(config, run_dir, tokenizer=load_tokenizer(initial.tokenizer_dir))
    examples = read_rows(data_dir(run_dir) / "sft.jsonl", SftExample)
    rng = random.Random(0)
    candidates = [Candidate(example.prompt, example.answer, rng.choice(examples).answer) for example in examples[:80]]
    write_rows(data_dir(run_dir) / PREFERENCES_FILE, collect_pairs(candidates, judge=judge, seed=1).pairs)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run directory after both stages, and what they emitted."""
    run_dir = tmp_path_factory.mktemp("run")
    events: list[dict[str, Any]] = []
    config = prepared(run_dir, tiny_config())
    run_sft(config, run_dir, events.append)
    run_rm(config, run_dir, events.append)
    return run_dir, events


def test_initial_model_is_seeded_and_loadable(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        prepared(tmp_path / name, tiny_config())
        weights.append((tmp_path / name / "init" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    other = tiny_config(seed=6)
    prepare_data(other, tmp_path / "c")
    make_model(other, tmp_path / "c")
    assert (tmp_path / "c" / "init" / "model.safetensors").read_bytes() != weights[0]


def test_sft_writes_an_ordinary_model_directory(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    from transformers import AutoModelForCausalLM

    run_dir, events = finished
    model = AutoModelForCausalLM.from_pretrained(run_dir / "sft" / "model", local_files_only=True)
    tokenizer = load_tokenizer(run_dir / "sft" / "model")
    check_vocabulary(tokenizer, model.config)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    assert model.config.use_cache
    steps = [event for event in events if event["stage"] == "sft" and "step" in event]
    assert [event["steps"] for event in steps] == [6] * len(steps)
    report = json.loads((run_dir / "sft" / "report.json").read_text())
    assert (report["examples_train"], report["examples_held_out"]) == (190, 10)
    assert report["perplexity"] == pytest.approx(math.exp(report["eval_loss"]))
    assert report["eval_loss"] < math.log(len(tokenizer))  # better than guessing
    assert not [*run_dir.rglob("*.new"), *run_dir.rglob("*.tmp-*")]


def test_sft_loss_covers_the_answer_alone(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    run_dir, _ = finished
    tokenizer = load_tokenizer(run_dir / "sft" / "model")
    row = read_rows(data_dir(run_dir) / "sft.jsonl", SftExample)[0]
    example = encode_examples(run_dir, data=tiny_config().data, tokenizer=tokenizer)[0]
    prompt = tokenizer(row.prompt)["input_ids"]
    assert example["input_ids"][: len(prompt)] == prompt
    assert set(example["labels"][: len(prompt)]) == {-100}
    assert example["labels"][len(prompt) :] == example["input_ids"][len(prompt) :]
    assert example["labels"][-1] == tokenizer.eos_token_id


def test_sft_is_reproducible(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    run_dir, _ = finished
    run_sft(prepared(tmp_path, tiny_config()), tmp_path, lambda _: None)
    assert (tmp_path / "sft/model/model.safetensors").read_bytes() == (
        run_dir / "sft/model/model.safetensors"
    ).read_bytes()


def test_rm_manifest(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    run_dir, events = finished
    stored = RewardModels(run_dir / "rm").current()
    manifest = stored.manifest
    assert manifest.version.startswith("rm-")
    assert len(manifest.version) == 15
    assert (manifest.members, manifest.number, manifest.parent) == (2, 1, None)
    assert manifest.accuracy_low <= manifest.accuracy <= manifest.accuracy_high  # type: ignore[operator]
    pairs = len(read_rows(data_dir(run_dir) / PREFERENCES_FILE, PreferencePair))
    assert manifest.pairs_train + manifest.pairs_held_out == pairs
    assert manifest.calibration is not None
    assert manifest.calibration.count == 2 * pairs
    assert manifest.calibration.std > 0
    assert len(manifest.spread_percentiles) == 101
    assert list(manifest.spread_percentiles) == sorted(manifest.spread_percentiles)
    assert manifest.spread_percentiles[100] > 0
    assert {event["member"] for event in events if event["stage"] == "rm" and "member" in event} == {0, 1}
    members = [(directory / "model.safetensors").read_bytes() for directory in stored.member_dirs]
    assert members[0] != members[1]
    assert not [*(run_dir / "rm").glob("draft.*")]


def test_rm_scores_at_the_last_token(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    """Batched, padded scores equal the model's own, one sequence at a time and without padding."""
    from transformers import AutoModelForSequenceClassification

    run_dir, _ = finished
    directory = RewardModels(run_dir / "rm").current().member_dirs[0]
    member = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = load_tokenizer(directory)
    sequences: list[list[int]] = []
    for row in read_rows(data_dir(run_dir) / "sft.jsonl", SftExample)[:8]:
        prompt = encode_prompt(tokenizer, row.prompt, max_tokens=16)
        sequences.append([*prompt.ids, *encode_answer(tokenizer, row.answer, max_tokens=64).ids])  # type: ignore[union-attr]
    assert len({len(sequence) for sequence in sequences}) > 1
    with torch.inference_mode():
        alone = [member(input_ids=torch.tensor([sequence])).logits.item() for sequence in sequences]
    assert score_sequences(member, sequences, pad_id=tokenizer.pad_token_id) == pytest.approx(alone, abs=1e-5)


def test_weak_reward_model_is_refused_but_kept(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    config = prepared(tmp_path, tiny_config(rm={"epochs": 0.1, "min_accuracy": 1.0, "threads": 1}))
    with pytest.raises(ModelError, match="too weak"):
        run_rm(config, tmp_path, lambda _: None)
    models = RewardModels(tmp_path / "rm")
    assert not models.exists()
    assert models.versions() == []
    (refused,) = (tmp_path / "rm" / "refused").iterdir()
    assert (refused / "manifest.json").is_file()
    told_otherwise = tiny_config(rm={"epochs": 0.1, "min_accuracy": 1.0, "threads": 1, "accept_red": True})
    stored = run_rm(told_otherwise, tmp_path, lambda _: None)
    assert stored is not None
    assert (stored.version, stored.manifest.verdict) == (refused.name, "red")
    assert models.current().version == refused.name


def test_non_finite_loss_stops_sft_and_leaves_nothing(tmp_path: Path) -> None:
    config = prepared(tmp_path, tiny_config(sft={"epochs": 3, "learning_rate": 1e30, "threads": 1}))
    with pytest.raises(NonFiniteError, match="sft"):
        run_sft(config, tmp_path, lambda _: None)
    assert not (tmp_path / "sft" / "model").exists()


def test_missing_inputs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model to start"):
        run_rm(tiny_config(), tmp_path, lambda _: None)
    with pytest.raises(DataError, match="run the data stage first"):
        run_sft(tiny_config(), tmp_path, lambda _: None)
    pretrained = tiny_config(model={"kind": "pretrained", "path": str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match="model not found"):
        make_model(pretrained, tmp_path)


def test_pretrained_directory_is_checked(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    path = str(finished[0] / "sft" / "model")
    initial = make_model(tiny_config(model={"kind": "pretrained", "path": path}), tmp_path)
    assert (str(initial.model_dir), str(initial.tokenizer_dir)) == (path, path)
    data = {**tiny_config().data.model_dump(), "max_response_tokens": 1000}
    with pytest.raises(ModelError, match="context"):
        make_model(tiny_config(model={"kind": "pretrained", "path": path}, data=data), tmp_path)
