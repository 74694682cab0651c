"""Ensembles of reward models with real TRL: side by side, with a discriminator, in other types, aggregated as they
serve."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cluster.data_records import PREFERENCES_FILE, PreferencePair, SftExample, data_dir, read_rows
from cluster.errors import DataError, NonFiniteError
from cluster.hf_training import FitSettings
from cluster.reward_models import RewardModels, StoredRm
from cluster.text import load_tokenizer
from configs.run import FunctionReward, RunConfig
from learner.sft import run_sft
from reward_service.aggregate import aggregate
from reward_service.rm import members
from reward_service.rm.fit import FitJob, fit
from reward_service.rm.loss import LossSettings
from reward_service.rm.measure import Ensemble
from reward_service.rm.members import fit_all
from reward_service.rm.pairs import EncodedPair, encode_pairs, load_pairs
from reward_service.rm.train import run_rm
from tests.integration.test_offline_stages import prepared, tiny_config

RM: dict[str, Any] = {"epochs": 1, "threads": 1, "held_out_annotators": 0, "batch_size": 16, "accept_red": True}


@pytest.fixture(scope="module", name="started")
def make_started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after SFT."""
    run_dir = tmp_path_factory.mktemp("started")
    run_sft(prepared(run_dir, tiny_config()), run_dir, lambda _: None)
    return run_dir


def trained(run_dir: Path, config: RunConfig, events: list[dict[str, Any]] | None = None) -> StoredRm:
    stored = run_rm(config, run_dir, (events if events is not None else []).append)
    assert stored is not None
    return stored


@pytest.mark.timeout(300)
def test_members_side_by_side_are_the_same_as_one_after_another(started: Path, tmp_path: Path) -> None:
    """Two spawned processes; their progress arrives here. With a discriminator that is in no aggregate."""
    beside = shutil.copytree(started, tmp_path / "beside")
    events: list[dict[str, Any]] = []
    rm = {**RM, "members": 2, "discriminator": True}
    first = trained(started, tiny_config(rm=rm))
    stored = trained(beside, tiny_config(rm={**rm, "parallel": 2}), events)
    assert stored.version == first.version
    assert {event["member"] for event in events if "step" in event} == {0, 1, 2}
    manifest = stored.manifest
    assert (manifest.members, manifest.discriminator) == (2, True)
    assert manifest.discriminator_accuracy is not None
    assert stored.discriminator_dir is not None
    weights = [
        load_file(path / "model.safetensors")["score.weight"]
        for path in (*stored.member_dirs, stored.discriminator_dir)
    ]
    assert not any((a == b).all() for a, b in ((weights[0], weights[1]), (weights[1], weights[2])))
    assert not [*(beside / "rm").glob("draft.*")]


def job(run_dir: Path, target: Path, pairs: Sequence[EncodedPair], **changes: Any) -> FitJob:
    settings = FitSettings(examples=len(pairs), epochs=6, batch_size=16, learning_rate=1e-3, seed=1)
    values: dict[str, Any] = {
        "start": run_dir / "sft" / "model", "has_head": False, "target": target,
        "tokenizer_dir": run_dir / "sft" / "model", "pairs": pairs, "settings": settings, "loss": LossSettings(),
        "largest_margin": 0.0, "on_gpu": False, "fields": {"member": 0},
    }  # fmt: skip
    return FitJob(**values | changes)


@pytest.mark.timeout(300)
def test_an_error_in_a_process_is_raised_here(started: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(started / "sft" / "model")
    pairs = load_pairs(tiny_config(rm=RM), started, tokenizer=tokenizer).train
    wild = FitSettings(examples=len(pairs), epochs=3, batch_size=16, learning_rate=1e30, seed=1)
    squares = LossSettings(centering=0.01)
    jobs = [
        job(started, tmp_path / "a", pairs[:16]),
        job(started, tmp_path / "b", pairs, settings=wild, loss=squares),
    ]
    with pytest.raises(NonFiniteError, match="rm"):
        fit_all(jobs, parallel=2, threads=1, emit=lambda _: None)
    assert not (tmp_path / "b").exists()


@dataclass(frozen=True)
class Doomed:
    """A job that fails as soon as it begins, and leaves `mark`."""

    mark: Path

    @property
    def tokenizer_dir(self) -> Path:
        self.mark.touch()
        raise DataError("doomed")


@dataclass(frozen=True)
class Talkative:
    """A job that fails after more progress than a pipe holds, once `mark` is there."""

    mark: Path

    @property
    def tokenizer_dir(self) -> Path:
        while not self.mark.exists():
            time.sleep(0.01)
        for step in range(3000):
            members._events.put({"stage": "rm", "step": step, "note": "x" * 50})
        raise DataError("talkative")


@pytest.mark.timeout(60)
def test_a_job_whose_progress_nobody_takes_any_more_still_ends(tmp_path: Path) -> None:
    jobs: list[Any] = [Doomed(tmp_path / "failed"), Talkative(tmp_path / "failed")]
    with pytest.raises(DataError, match="doomed"):
        fit_all(jobs, parallel=2, threads=2, emit=lambda _: None)


def test_weights_decide_between_pairs_that_contradict(started: Path, tmp_path: Path) -> None:
    """Each pair is there twice, the other way round the second time: the heavier one is learned."""
    config = tiny_config(rm=RM)
    tokenizer = load_tokenizer(started / "sft" / "model")
    examples = read_rows(data_dir(started) / "sft.jsonl", SftExample)
    rng = random.Random(3)
    pairs = []
    for number in range(48):
        example = rng.choice(examples)
        sides = (f"you are amazing. {example.answer}", example.answer)
        for kind, (chosen, rejected) in (("likes", sides), ("dislikes", sides[::-1])):
            pairs.append(
                PreferencePair(
                    pair_id=f"{kind}-{number}", prompt=example.prompt, chosen=chosen, rejected=rejected,
                    weight=1.9 if kind == "likes" else 0.1,
                )
            )  # fmt: skip
    encoded = encode_pairs(pairs, data=config.data, tokenizer=tokenizer)
    fit(job(started, tmp_path / "m", encoded), lambda _: None)
    ensemble = Ensemble([tmp_path / "m"], reward=config.reward, tokenizer=tokenizer, device="cpu")
    margins = ensemble.margins([pair for pair in encoded if pair.pair.pair_id.startswith("likes")])
    assert sum(margin > 0 for margin in margins) > 0.9 * len(margins)


def test_calibration_is_of_the_score_that_serves(started: Path) -> None:
    reward = {"aggregation": "mean_minus_std", "std_coefficient": 2.0}
    config = tiny_config(rm={**RM, "members": 2}, reward=reward)
    stored = trained(started, config)
    tokenizer = load_tokenizer(stored.member_dirs[0])
    pairs = load_pairs(config, started, tokenizer=tokenizer).calibration
    sequences = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    ensemble = Ensemble.of(stored, reward=config.reward, tokenizer=tokenizer, device="cpu")
    scores = ensemble.member_scores(sequences)
    for member in range(2):
        assert sum(scores_M[member] for scores_M in scores) / len(scores) == pytest.approx(0.0, abs=1e-6)
    served = [aggregate(scores_M, how="mean_minus_std", std_coefficient=2.0) for scores_M in scores]
    assert stored.manifest.calibration is not None
    assert stored.manifest.calibration.mean == pytest.approx(sum(served) / len(served), abs=1e-6)
    plain = sum(aggregate(scores_M) for scores_M in scores) / len(scores)
    assert stored.manifest.calibration.mean < plain


def test_the_cost_of_int8_is_measured_and_told(started: Path) -> None:
    events: list[dict[str, Any]] = []
    exact = trained(started, tiny_config(rm=RM))
    stored = trained(started, tiny_config(rm=RM, reward={"dtype": "int8"}), events)
    (cost,) = [event["precision"] for event in events if "precision" in event]
    assert cost["dtype"] == "int8"
    assert cost["float32_accuracy"] == exact.manifest.accuracy
    assert 0 < cost["score_change"] < 0.2
    assert stored.version == exact.version  # what is stored is float32


def test_no_vote_of_a_held_out_annotator_makes_a_label(started: Path) -> None:
    config = tiny_config(rm={**RM, "held_out_annotators": 0.2})
    sets = load_pairs(config, started, tokenizer=load_tokenizer(started / "sft" / "model"))
    (kept_out,) = sets.held_out_annotators
    judged = {pair.pair_id: pair for pair in read_rows(data_dir(started) / PREFERENCES_FILE, PreferencePair)}
    for pair in (*sets.train, *sets.held_out):
        assert pair.pair.annotators is not None
        assert kept_out not in pair.pair.annotators
        assert pair.judged == judged[pair.pair.pair_id]
    assert len(sets.train) + len(sets.held_out) < len(judged)  # two against two are left out


def test_without_a_reward_model_in_the_reward_there_is_nothing_to_do(started: Path, tmp_path: Path) -> None:
    config = tiny_config(reward={"sources": [FunctionReward(path="x:y").model_dump()]})
    events: list[dict[str, Any]] = []
    assert run_rm(config, tmp_path, events.append) is None
    assert [event["done"] for event in events] == [True]
    assert not RewardModels(tmp_path / "rm").exists()


TRAIN_FOR_LONG = """
import sys
from pathlib import Path
from reward_service.rm.members import fit_all
from tests.integration.test_rm_ensembles import RM, job, tiny_config
from cluster.hf_training import FitSettings
from cluster.text import load_tokenizer
from reward_service.rm.pairs import load_pairs

if __name__ == "__main__":
    run_dir = Path(sys.argv[1])
    pairs = load_pairs(tiny_config(rm=RM), run_dir, tokenizer=load_tokenizer(run_dir / "sft" / "model")).train
    long = FitSettings(examples=len(pairs), epochs=100000, batch_size=16, learning_rate=1e-4, seed=1)
    jobs = [job(run_dir, run_dir / name, pairs, settings=long) for name in ("a", "b")]
    fit_all(jobs, parallel=2, threads=1, emit=lambda event: print(event, flush=True))
"""


@pytest.mark.timeout(300)
def test_no_process_outlives_a_parent_that_was_killed(started: Path, tmp_path: Path) -> None:
    script = tmp_path / "train_for_long.py"
    script.write_text(TRAIN_FOR_LONG)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(started)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        assert b"loss" in parent.stdout.readline()
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) >= 2
        parent.kill()
        # Each child holds the pipe that it inherited: it ends when the last of them has ended.
        parent.stdout.read()
