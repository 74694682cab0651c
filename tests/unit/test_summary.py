"""How a run begins and ends: functions that it names, evaluations in their order, what they came to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.errors import ConfigError
from configs.load import load_config
from keel import evaluate, stages
from keel.roles import Roles
from keel.runtime import Runtime
from keel.summary import _last_mean, guard_summary, write_samples
from tests.guarded_run import write_guarded_run


def evaluated(run_dir: Path, *, tag: str, version: str, count: int) -> None:
    (run_dir / "eval").mkdir(exist_ok=True)
    rows = [{"prompt": f"p{i}", "answer": f"{tag} {i}", "gold": 1.0, "reward": 2.0} for i in range(count)]
    (run_dir / "eval" / f"{tag}.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "eval" / f"{tag}.json").write_text(json.dumps({"rm_version": version}))


def runtime(run_dir: Path, *overrides: str) -> Runtime:
    config = load_config("demo_ci", overrides=[f"runs_dir={run_dir}", *overrides])
    return cast(Runtime, SimpleNamespace(config=config, run=SimpleNamespace(path=run_dir)))


def samples(run_dir: Path) -> list[dict[str, Any]]:
    write_samples(runtime(run_dir))
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("last", "shown"), [("rm-1", True), ("rm-2", False)])
def test_rewards_stand_side_by_side_only_on_one_scale(tmp_path: Path, last: str, *, shown: bool) -> None:
    evaluated(tmp_path, tag="sft", version="rm-1", count=4)
    evaluated(tmp_path, tag="final", version=last, count=4)
    (first, *_) = samples(tmp_path)
    assert (first["before"], first["after"], first["gold_after"]) == ("sft 0", "final 0", 1.0)
    assert ("reward_before" in first, "reward_after" in first) == (shown, shown)


def test_evaluations_of_different_size_are_compared_as_far_as_both_go(tmp_path: Path) -> None:
    """A run may be resumed with another evaluation.prompts."""
    evaluated(tmp_path, tag="sft", version="rm-1", count=4)
    evaluated(tmp_path, tag="final", version="rm-1", count=2)
    assert [one["prompt"] for one in samples(tmp_path)] == ["p0", "p1"]


def test_a_reward_model_that_the_run_does_not_ask_is_not_asked_for_its_evaluation(tmp_path: Path) -> None:
    """It may lie there from before: reward.sources can change when a run is resumed."""
    overrides = ['reward.sources=[{kind: function, path: "m:f"}]', "learner.advantages=reinforce"]
    here = runtime(tmp_path, *overrides)
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "current.json").write_text('{"version": "rm-1"}')
    assert evaluate._score(here, cast(Roles, None), [], []) == {}


def test_the_final_policy_is_not_asked_of_engines_that_hold_the_sft_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(evaluate, "evaluate_policy", lambda runtime, roles, *, tag, model_dir: events.append(tag))
    (tmp_path / "policy" / "final").mkdir(parents=True)
    evaluate.evaluate_run(runtime(tmp_path), cast(Roles, SimpleNamespace(stop=lambda name: events.append("stop"))))
    assert events == ["stop", "sft", "stop", "final"]


@pytest.mark.parametrize("key", ["rm.refresh.judge", "evaluation.gold"])
def test_a_function_that_is_not_there_is_found_before_the_first_stage(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        stages.data(runtime(tmp_path, f"{key}=no.such.module:function"), cast(Roles, None))


def test_what_the_guard_did_is_summed_up(tmp_path: Path) -> None:
    assert guard_summary(tmp_path, {"step": 3}) == {}
    run = write_guarded_run(tmp_path / "run")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert guard_summary(run, last) == {
        "level": "ok", "first_sign_step": 17, "first_sign": "overused_words_share", "acts": 1, "rollbacks": 1,
        "halted": False, "actions": {"alert": 2, "raise_beta": 1, "roll_back": 1},
    }  # fmt: skip
    assert guard_summary(tmp_path, {"guard": {"level": "ok"}})["rollbacks"] == 0
    with (run / "guard.jsonl").open("a") as file:
        file.write(json.dumps({"step": last["step"], "event": "action", "action": "halt"}) + "\n")
    assert guard_summary(run, last)["halted"]
    assert not guard_summary(run, last | {"step": last["step"] + 1})["halted"]


def test_a_step_without_a_number_is_left_out_of_a_mean() -> None:
    assert _last_mean([{"kl": 1.0}, {"kl": None}, {"kl": 3.0}], "kl") == 2.0
    assert _last_mean([{"kl": None}], "kl") is None
