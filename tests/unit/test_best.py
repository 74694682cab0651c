"""The policies that a run hands over: when the best one is written, and what a killed learner leaves beside them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from cluster.errors import CheckpointError
from learner.best import WINDOW_STEPS, BestPolicy

TOKENIZER = mock.Mock()


def write_model(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"weights")


def no_room(directory: Path) -> None:
    write_model(directory)
    raise OSError(28, "No space left on device")


def note(path: Path) -> dict[str, float]:
    loaded: dict[str, float] = json.loads((path / "keel.json").read_text())
    return loaded


def test_the_best_is_the_highest_mean_within_the_kl_bounds(tmp_path: Path) -> None:
    best = BestPolicy(tmp_path)
    for step, (score, kl) in enumerate([(1.0, 4.0), (3.0, 4.0), (0.0, 4.0), (9.0, 40.0)]):
        best.observe(score, kl=kl, kl_target=4.0)
        best.save_if_better(write_model, tokenizer=TOKENIZER, step=step)
    assert note(tmp_path / "best") == {"step": 1, "score_normalised": 2.0}
    for step in range(10, 10 + WINDOW_STEPS):
        best.observe(9.0, kl=4.0, kl_target=4.0)
        best.save_if_better(write_model, tokenizer=TOKENIZER, step=step)
    assert note(tmp_path / "best")["step"] == 10 + WINDOW_STEPS - 1


def test_a_refreshed_reward_model_has_its_own_best(tmp_path: Path) -> None:
    """The policy that fooled the old one most would otherwise stay the best for ever."""
    best = BestPolicy(tmp_path)
    for step, (score, version) in enumerate([(5.0, "rm-a"), (1.0, "rm-b"), (0.5, "rm-b")]):
        best.observe(score, kl=4.0, kl_target=4.0, rm_version=version)
        best.save_if_better(write_model, tokenizer=TOKENIZER, step=step)
    assert note(tmp_path / "best") == {"step": 1, "score_normalised": 1.0}
    resumed = BestPolicy(tmp_path)
    resumed.from_state(best.to_state())
    resumed.observe(0.6, kl=4.0, kl_target=4.0, rm_version="rm-b")
    resumed.save_if_better(write_model, tokenizer=TOKENIZER, step=3)
    assert note(tmp_path / "best")["step"] == 1


def test_a_best_that_is_not_there_is_written_again(tmp_path: Path) -> None:
    """A learner died between removing it, as a rollback does, and the checkpoint that would have known."""
    best = BestPolicy(tmp_path)
    best.observe(5.0, kl=4.0, kl_target=4.0)
    best.save_if_better(write_model, tokenizer=TOKENIZER, step=1)
    saved = best.to_state()
    best.rolled_back(saved, to_step=0)
    assert not (tmp_path / "best").exists()
    resumed = BestPolicy(tmp_path)
    resumed.from_state(saved)
    resumed.observe(1.0, kl=4.0, kl_target=4.0)
    resumed.save_if_better(write_model, tokenizer=TOKENIZER, step=2)
    assert note(tmp_path / "best") == {"step": 2, "score_normalised": 3.0}


def test_what_a_killed_learner_left_half_written_goes_with_the_next_save(tmp_path: Path) -> None:
    """One has the size of a model, and each new learner another process id."""
    left = [tmp_path / "best.new.tmp-1", tmp_path / "final.new.tmp-2", tmp_path / "final.new"]
    for directory in left:
        directory.mkdir()
        write_model(directory)
    BestPolicy(tmp_path).save_final(write_model, tokenizer=TOKENIZER, step=3)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_failed_save_leaves_the_policy_before_it(tmp_path: Path) -> None:
    best = BestPolicy(tmp_path)
    best.save_final(write_model, tokenizer=TOKENIZER, step=3)
    with pytest.raises(CheckpointError, match="cannot write policy/final"):
        best.save_final(no_room, tokenizer=TOKENIZER, step=4)
    assert note(tmp_path / "final") == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
