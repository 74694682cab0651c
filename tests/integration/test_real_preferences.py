"""Real text of any length, language and form through every stage."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cluster.reward_models import RewardModels
from tests.integration.runs import KEEL, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAIRS = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless" / "pairs.jsonl.gz"
READ = 200


@pytest.mark.skipif(not PAIRS.is_file(), reason=f"needs hh-rlhf harmless-base pairs at {PAIRS}")
def test_human_preferences_go_through_every_stage_and_are_all_accounted_for(tmp_path: Path) -> None:
    changes = settings([
        f"runs_dir={tmp_path}", f"data.preferences.path={PAIRS}", f"data.preferences.limit={READ}",
        "model.hidden_size=64", "model.intermediate_size=128", "model.layers=1", "model.heads=2",
        "model.vocab_size=600",
        "sft.epochs=0.3", "rm.epochs=0.3", "learner.steps=3", "learner.batch_size=8", "evaluation.prompts=8",
        "data.max_response_tokens=32", "checkpoint.every_steps=2",
    ])  # fmt: skip
    result = subprocess.run([*KEEL, "train", "hh_harmless", *changes], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "hh-harmless"
    tables = json.loads((run / "data" / "report.json").read_text())["tables"]
    pairs = tables["preferences"]
    assert pairs["read"] == READ
    for table in tables.values():
        assert table["read"] == table["used"] + table["held_out"] + sum(table["rejected"].values())
    assert pairs["truncated"] > 0, "real dialogues are longer than this model's context"
    manifest = RewardModels(run / "rm").current().manifest
    assert manifest.accuracy_low <= manifest.accuracy <= manifest.accuracy_high  # type: ignore[operator]
    assert 0.0 <= manifest.length_only_accuracy <= 1.0  # type: ignore[operator]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["versions"] == 3
    assert summary["gold_final"] is None
    assert summary["samples_trained"] == 24
