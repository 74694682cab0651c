"""Models taken as they are: a policy that has had its SFT (sft.epochs 0), reward models trained elsewhere (rm.models).
With real TRL where something is trained first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelError, NonFiniteError
from cluster.reward_models import RewardModels, RmManifest, StoredRm
from cluster.stored_models import stored_dtype
from configs.run import RunConfig
from learner.sft import run_sft
from reward_service.rm.train import run_rm
from tests.integration.test_offline_stages import prepared, tiny_config

Weights = dict[str, torch.Tensor]


def nothing(_event: dict[str, Any]) -> None:
    pass


@pytest.fixture(scope="module", name="trained")
def make_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run after SFT and the training of two reward models."""
    run_dir = tmp_path_factory.mktemp("trained")
    config = prepared(run_dir, tiny_config())
    run_sft(config, run_dir, nothing)
    run_rm(config, run_dir, nothing)
    return run_dir


def first_version(run_dir: Path) -> StoredRm:
    return RewardModels(run_dir / "rm").current()


def run(config: RunConfig, run_dir: Path) -> RmManifest:
    stored = run_rm(config, run_dir, nothing)
    assert stored is not None
    return stored.manifest


def taking(trained: Path, *, models: list[Path] | None = None, **rm: Any) -> RunConfig:
    """A run that starts from what the other one made."""
    paths = list(map(str, first_version(trained).member_dirs)) if models is None else models
    return tiny_config(
        model={"kind": "pretrained", "path": str(trained / "sft" / "model")},
        sft={"epochs": 0},
        rm={"models": paths, "threads": 1, "held_out_annotators": 0, **rm},
    )


def second_run(trained: Path, run_dir: Path) -> None:
    """Its data, and its policy as it is."""
    shutil.copytree(trained / "data", run_dir / "data")
    run_sft(taking(trained), run_dir, nothing)


def changed(source: Path, target: Path, change: Callable[[Weights], Weights], **config: Any) -> Path:
    """A copy of a model directory with other weights and keys of config.json."""
    shutil.copytree(source, target)
    save_file(change(load_file(target / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return target


# ---------------------------------------------------------------- the policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("claimed", ["float32", "bfloat16"])
def test_a_policy_taken_as_it_is_keeps_every_bit(
    trained: Path, tmp_path: Path, dtype: torch.dtype, claimed: str
) -> None:
    """Also where config.json names another type than the weights have."""
    source = changed(
        trained / "sft" / "model", tmp_path / "source",
        lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()}, dtype=claimed,
    )  # fmt: skip
    config = tiny_config(model={"kind": "pretrained", "path": str(source)}, sft={"epochs": 0})
    events: list[dict[str, Any]] = []
    report = run_sft(config, tmp_path / "run", events.append)  # no data is needed
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "run/sft/model/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name
    assert (report.taken_as_it_is, report.steps, report.eval_loss) == (True, 0, None)
    assert json.loads((tmp_path / "run/sft/report.json").read_text())["taken_as_it_is"] is True
    assert [event["done"] for event in events] == [True]
    assert (tmp_path / "run/sft/model/tokenizer.json").is_file()


def test_an_incomplete_or_broken_policy_is_refused_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    source = trained / "sft" / "model"
    name = "model.layers.0.mlp.up_proj.weight"
    halved = changed(source, tmp_path / "halved", lambda weights: {k: v for k, v in weights.items() if k != name})
    broken = changed(source, tmp_path / "broken", lambda weights: weights | {name: weights[name] * torch.nan})
    for path, error, match in ((halved, ModelError, "incomplete"), (broken, NonFiniteError, "not finite")):
        config = tiny_config(model={"kind": "pretrained", "path": str(path)}, sft={"epochs": 0})
        with pytest.raises(error, match=match):
            run_sft(config, tmp_path / "run", nothing)
    assert not (tmp_path / "run" / "sft" / "model").exists()


def test_the_widest_stored_type_is_found(trained: Path, tmp_path: Path) -> None:
    mixed = changed(
        trained / "sft" / "model", tmp_path / "mixed",
        lambda weights: {
            name: tensor.to([torch.bfloat16, torch.float16][number % 2])
            for number, (name, tensor) in enumerate(weights.items())
        },
    )  # fmt: skip
    assert stored_dtype(mixed) == "float32"
    assert stored_dtype(trained / "sft" / "model") == "float32"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no plain weights"):
        stored_dtype(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="cannot read the weights"):
        stored_dtype(tmp_path / "empty")


# ---------------------------------------------------------------- reward models


def test_reward_models_taken_as_they_are_measure_the_same(trained: Path, tmp_path: Path) -> None:
    second_run(trained, tmp_path)
    manifest = run(taking(trained), tmp_path)
    first = first_version(trained).manifest
    assert (manifest.members, manifest.pairs_train, len(manifest.taken_from)) == (2, 0, 2)
    assert manifest.accuracy == first.accuracy
    assert manifest.member_accuracies == first.member_accuracies
    assert manifest.pairs_held_out == first.pairs_held_out
    assert manifest.calibration is not None
    assert first.calibration is not None
    assert manifest.calibration.mean == pytest.approx(first.calibration.mean, abs=1e-6)
    assert manifest.calibration.std == pytest.approx(first.calibration.std, rel=1e-5)
    assert manifest.version == first.version  # it follows from the weights' bytes
    for before, after in zip(first_version(trained).member_dirs, first_version(tmp_path).member_dirs, strict=True):
        weights = load_file(after / "model.safetensors")
        for name, tensor in load_file(before / "model.safetensors").items():
            assert torch.equal(weights[name], tensor), name


def test_they_serve_and_start_a_critic(trained: Path, tmp_path: Path) -> None:
    from learner.critic import Critic
    from reward_service.scorer_transformers import ScorerSettings, TransformersScorer

    second_run(trained, tmp_path)
    run(taking(trained, models=first_version(trained).member_dirs[1:]), tmp_path)
    stored = first_version(tmp_path)
    scorer = TransformersScorer(stored, reference_dir=tmp_path / "sft" / "model", settings=ScorerSettings())
    assert (scorer.members, scorer.version) == (1, stored.version)
    Critic.load(stored.member_dirs[0], mean=0.0, std=1.0, vocab_size=len(scorer._policy_tokenizer))


def test_in_bfloat16_the_figures_are_nearly_the_same(trained: Path, tmp_path: Path) -> None:
    second_run(trained, tmp_path)
    config = taking(trained)
    served = config.model_copy(update={"reward": config.reward.model_copy(update={"dtype": "bfloat16"})})
    manifest, first = run(served, tmp_path), first_version(trained).manifest
    assert manifest.accuracy == pytest.approx(first.accuracy, abs=0.1)
    assert manifest.calibration is not None
    assert first.calibration is not None
    assert manifest.calibration.std == pytest.approx(first.calibration.std, rel=0.05)
    assert manifest.version == first.version  # what is stored keeps its type


def test_a_weak_reward_model_is_refused_all_the_same(trained: Path, tmp_path: Path) -> None:
    second_run(trained, tmp_path)
    upside_down = changed(
        first_version(trained).member_dirs[0], tmp_path / "bad",
        lambda weights: weights | {"score.weight": torch.zeros_like(weights["score.weight"])},
    )  # fmt: skip
    with pytest.raises(ModelError, match="too weak"):
        run_rm(taking(trained, models=[upside_down], min_accuracy=0.99), tmp_path, nothing)
    assert not RewardModels(tmp_path / "rm").exists()


def _two_labels(weights: Weights) -> Weights:
    return weights | {"score.weight": weights["score.weight"].repeat(2, 1)}


def _cut_embedding(weights: Weights) -> Weights:
    name = "model.embed_tokens.weight"
    return weights | {name: weights[name][:-3].clone()}


def test_what_does_not_fit_the_policy_is_refused(trained: Path, tmp_path: Path) -> None:
    second_run(trained, tmp_path)
    member = first_version(trained).member_dirs[0]
    rows = load_file(member / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    labels = changed(member, tmp_path / "labels", _two_labels, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    small = changed(member, tmp_path / "small", _cut_embedding, vocab_size=rows - 3)
    short = changed(member, tmp_path / "short", dict, max_position_embeddings=40)
    other = changed(member, tmp_path / "other", dict)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = {
        labels: "is no reward model",
        trained / "sft" / "model": "incomplete",
        small: "another vocabulary",
        short: "reward model's context",
        other: "another tokenizer",
        tmp_path / "nowhere": "model not found",
    }
    for path, match in refused.items():
        with pytest.raises(ModelError, match=match):
            run_rm(taking(trained, models=[path]), tmp_path, nothing)
        assert not RewardModels(tmp_path / "rm").exists()


def test_a_reward_model_without_a_tokenizer_is_believed(trained: Path, tmp_path: Path) -> None:
    second_run(trained, tmp_path)
    bare = changed(first_version(trained).member_dirs[0], tmp_path / "bare", dict)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    run_rm(taking(trained, models=[bare]), tmp_path, nothing)
    assert (first_version(tmp_path).member_dirs[0] / "tokenizer.json").is_file()
