"""Real models score while another thread loads one: the loading library changes torch's default type for the whole
process meanwhile, which must not reach a score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from reward_service.scorer_transformers import TransformersScorer
from tests.integration.test_scorer import BATCH, SETTINGS, save_member, save_reference, stored_rm


@pytest.fixture(name="building_in_bfloat16")
def make_building() -> Iterator[Callable[[], None]]:
    """Leaves the process as `from_pretrained(dtype=bfloat16)` does while it builds the model."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.bfloat16)
    torch.set_default_dtype(before)


def test_scores_are_the_same_while_a_model_is_loaded(tmp_path: Path, building_in_bfloat16: Callable[[], None]) -> None:
    save_member(tmp_path / "rm" / "member_0", seed=0)
    save_reference(tmp_path / "ref")
    scorer = TransformersScorer(
        stored_rm(tmp_path / "rm", members=1), reference_dir=tmp_path / "ref", settings=SETTINGS
    )
    before = scorer.score(BATCH)
    building_in_bfloat16()
    during = scorer.score(BATCH)
    assert [scores.member_scores for scores in during] == [scores.member_scores for scores in before]
    for was, now in zip(before, during, strict=True):
        assert now.ref_logprobs.tolist() == was.ref_logprobs.tolist()
