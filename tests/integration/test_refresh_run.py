"""The whole job with a reward model that is refreshed, killed in the middle and resumed: real Ray, vLLM and Valkey."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.data_records import FRESH_PREFERENCES_FILE, PreferencePair, data_dir, read_rows
from cluster.reward_models import RewardModels
from tests.integration.runs import DEADLINE_S, Run, adopt, assert_all_gone, settings, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAIRS, BUDGET, BATCH = 40, 200, 32
EVERY = 3
SETTINGS = [
    f"rm.refresh.every_versions={EVERY}", f"rm.refresh.pairs={PAIRS}", f"rm.refresh.budget_pairs={BUDGET}",
    "rm.refresh.old_pairs=20", "rm.refresh.judge=tests.integration.test_refresh_run:prefers_brevity",
    "rm.refresh.epochs=10", "rm.refresh.learning_rate=2e-3", "rm.refresh.held_out_fraction=0.2",
    "rm.refresh.earlier_fraction=0.5",
    # The judge says other than the first annotators did: what the refreshed model unlearns is no reason to refuse it.
    "rm.refresh.old_accuracy_margin=1.0",
    "checkpoint.every_steps=4",
]  # fmt: skip


def prefers_brevity(_prompt: Any, answer_a: str, answer_b: str, _rng: random.Random) -> dict[str, bool]:
    """The judge: news to a reward model of annotators of whom two like length, and learned from a few dozen pairs."""
    return {"brevity_lover": len(answer_a) < len(answer_b)}


@dataclass(frozen=True)
class Killed:
    """A run killed at a moment when a refreshed model scored, resumed from its checkpoint, and ended."""

    run: Run
    output: str
    metrics: list[dict[str, Any]]
    """Up to the checkpoint that it was resumed from."""
    refreshes: list[dict[str, Any]]
    """That were on record when it was resumed."""

    @property
    def all_refreshes(self) -> list[dict[str, Any]]:
        return lines(self.run.path / "refreshes.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        return lines(self.run.path / "progress.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def newest_checkpoint(run: Run) -> int:
    """Its step; 0 for none."""
    names = [path.name for path in (run.path / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names if name[5:].isdigit()), default=0)


def _lose(run: Run) -> None:
    """Everything of the run dies at once, as with its host."""
    if run.process.poll() is not None:
        return
    everything = [*run.descendants(), psutil.Process(run.process.pid)]
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.finish(timeout_s=30)
    assert_all_gone(everything)


@pytest.fixture(scope="module", name="killed")
def make_killed(prepared_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    runs_dir = tmp_path_factory.mktemp("refreshed")
    adopt(prepared_run, runs_dir, name="refreshed")
    first = start(runs_dir, "--resume", *settings([*SETTINGS, "learner.steps=400"]), name="refreshed")

    def refreshed_and_saved() -> bool:
        versions = [record["rm_version"] for record in first.metrics()[: newest_checkpoint(first)]]
        return len(set(versions)) > 1

    try:
        first.wait_for(refreshed_and_saved, what="a checkpoint after a refresh", timeout_s=DEADLINE_S)
    finally:
        _lose(first)
    saved = newest_checkpoint(first)
    metrics, refreshes = first.metrics()[:saved], lines(first.path / "refreshes.jsonl")
    again = start(runs_dir, "--resume", *settings([*SETTINGS, f"learner.steps={saved + 16}"]), name="refreshed")
    return Killed(again, again.finish(), metrics, refreshes)


def test_the_resumed_run_ends_well_and_leaves_no_draft(killed: Killed) -> None:
    assert killed.run.process.returncode == 0, killed.output
    assert not [*(killed.run.path / "rm").glob("draft.*")]
    summary = json.loads((killed.run.path / "summary.json").read_text())
    assert summary["versions"] == len(killed.run.metrics())


def test_each_refresh_is_on_record_with_its_figures(killed: Killed) -> None:
    refreshes = [line for line in killed.all_refreshes if line["kind"] == "refresh"]
    assert {line["outcome"] for line in refreshes} <= {"accepted", "refused"}, refreshes
    assert "accepted" in {line["outcome"] for line in refreshes}
    for line in refreshes:
        assert line["pairs"] == PAIRS
        assert line["reason"].endswith(f"(every_versions {EVERY})")
        assert line["fresh"]["pairs"] == line["counts"]["fresh_held_out"] > 0
        assert line["old"]["pairs"] == line["counts"]["old_held_out"] > 0
        assert 0 < line["counts"]["old"] <= 20
        assert 0.0 <= line["disagreement"] <= 1.0
        assert 0 < line["seconds"] <= line["total_seconds"]
        place = "versions" if line["outcome"] == "accepted" else "refused"
        assert (killed.run.path / "rm" / place / line["version"] / "card.json").is_file()


def test_scores_change_their_version_with_the_registry(killed: Killed) -> None:
    """Every version that scored is one of the registry's, in its order; each refresh learned on from the one before."""
    stored = RewardModels(killed.run.path / "rm").versions()
    known = [one.version for one in stored]
    seen: list[str] = []
    for record in killed.run.metrics():
        if record["rm_version"] not in seen:
            seen.append(record["rm_version"])
        assert record["rm_version"] == seen[-1], "an older version scored again"
    assert len(seen) > 1
    assert seen == [version for version in known if version in seen]
    assert seen[0] == known[0]
    accepted = [line["version"] for line in killed.all_refreshes if line["outcome"] == "accepted"]
    assert set(seen[1:]) <= set(accepted) <= set(known[1:])
    for one in stored[1:]:
        assert one.manifest.parent in known[: known.index(one.version)]


def test_no_sample_is_lost(killed: Killed) -> None:
    metrics = killed.run.metrics()
    assert [record["step"] for record in metrics] == list(range(1, len(metrics) + 1))
    for record in metrics:
        assert record["samples_trained"] == BATCH * record["step"]
    last = metrics[-1]
    assert last["samples_issued"] == sum(
        last[f"samples_{end}"] for end in ("trained", "stale_dropped", "dead", "rejected")
    )
    assert last["samples_dead"] == last["samples_rejected"] == 0


def test_fresh_pairs_are_of_several_policies(killed: Killed) -> None:
    pairs = read_rows(data_dir(killed.run.path) / FRESH_PREFERENCES_FILE, PreferencePair)
    newest = {pair.policy_version for pair in pairs} | {pair.rejected_version for pair in pairs}
    assert len(newest - {None}) >= 3, newest
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    assert all(len(pair.chosen) <= len(pair.rejected) for pair in pairs)


def test_resuming_goes_on_with_the_checkpoints_reward_model_and_the_judged_budget(killed: Killed) -> None:
    saved = len(killed.metrics)
    metrics = killed.run.metrics()
    assert metrics[:saved] == killed.metrics
    assert metrics[saved]["rm_version"] == killed.metrics[-1]["rm_version"] != metrics[0]["rm_version"]
    before, later = killed.refreshes, killed.all_refreshes
    assert later[: len(before)] == before
    numbers = [line["number"] for line in later]
    assert numbers == sorted(set(numbers))
    # One that was cut off has its number and its share of the budget, and no line.
    assert [line["pairs_judged"] for line in later] == [PAIRS * number for number in numbers]
    asked = json.loads((killed.run.path / "refresh_asked.json").read_text())
    assert asked["pairs_judged"] == PAIRS * asked["number"] <= BUDGET
    resumed_s = max(event["t"] for event in killed.events if event.get("event") == "start" and event["stage"] == "ppo")
    began = [event for event in killed.events if event.get("event") == "began" and event["t"] > resumed_s]
    assert began, "no refresh was begun after the run was resumed"
