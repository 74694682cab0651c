from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError, RunExistsError
from cluster.plugin import resolve
from configs.load import load_config
from configs.run import RunConfig
from keel.constitution import keep_constitution
from keel.rundir import open_run


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config("demo_ci", overrides=[f"runs_dir={tmp_path}", *overrides])


def test_a_stage_is_done_when_its_body_ended_without_an_error(tmp_path: Path) -> None:
    with open_run(config(tmp_path), resume=False, fresh=False) as run:
        with run.stage("data"):
            pass
        with pytest.raises(ZeroDivisionError), run.stage("sft"):
            raise ZeroDivisionError
    with open_run(config(tmp_path), resume=True, fresh=False) as again:
        assert again.done("data")
        assert not again.done("sft")
    events = [json.loads(line) for line in (tmp_path / "demo-ci" / "progress.jsonl").read_text().splitlines()]
    assert [(event["stage"], event["event"]) for event in events] == [
        ("data", "start"),
        ("data", "end"),
        ("sft", "start"),
    ]


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    with open_run(config(tmp_path), resume=False, fresh=False) as run:
        (run.path / "precious").touch()
    with pytest.raises(RunExistsError, match="--resume"), open_run(config(tmp_path), resume=False, fresh=False):
        pass
    with open_run(config(tmp_path), resume=False, fresh=True) as run:
        assert not (run.path / "precious").exists()
    assert (tmp_path / "demo-ci.old-1" / "precious").exists()


def test_what_made_the_finished_stages_may_not_change_on_resume(tmp_path: Path) -> None:
    with open_run(config(tmp_path), resume=False, fresh=False):
        pass
    with open_run(config(tmp_path, "learner.steps=9"), resume=True, fresh=False):
        pass
    with pytest.raises(ConfigError, match="seed"), open_run(config(tmp_path, "seed=1"), resume=True, fresh=False):
        pass


def test_finished_stages_keep_their_settings_and_more_steps_reopen_ppo(tmp_path: Path) -> None:
    with open_run(config(tmp_path), resume=False, fresh=False) as run:
        for stage in ("sft", "ppo", "dpo", "evaluate"):
            with run.stage(stage):
                pass
    changed = open_run(config(tmp_path, "sft.epochs=9"), resume=True, fresh=False)
    with pytest.raises(ConfigError, match="sft"), changed:
        pass
    with open_run(config(tmp_path, "rm.epochs=9", "learner.steps=20"), resume=True, fresh=False) as run:
        assert run.done("sft")
        assert not run.done("ppo")
        assert not run.done("dpo"), "it starts from the policy that PPO ends with"
        assert not run.done("evaluate")


def test_another_kl_budget_reopens_ppo(tmp_path: Path) -> None:
    spent = "learner.kl_budget.cumulative_nats_per_sequence=5"
    with open_run(config(tmp_path, spent), resume=False, fresh=False) as run, run.stage("ppo"):
        pass
    with open_run(config(tmp_path, spent), resume=True, fresh=False) as run:
        assert run.done("ppo")
    with open_run(config(tmp_path, spent.replace("5", "8")), resume=True, fresh=False) as run:
        assert not run.done("ppo")


def test_a_resumed_run_keeps_its_rules(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: []")
    run_dir = tmp_path / "run"
    keep_constitution(config(tmp_path), run_dir)
    assert not run_dir.exists()
    ruled = config(tmp_path, f"reward.constitution={rules}")
    keep_constitution(ruled, run_dir)
    keep_constitution(ruled, run_dir)
    with pytest.raises(ConfigError, match="without its constitution"):
        keep_constitution(config(tmp_path), run_dir)
    rules.write_text("rules: [other]")
    with pytest.raises(ConfigError, match="another constitution"):
        keep_constitution(ruled, run_dir)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rediss://user:hunter2@cache.example:6380/1", "rediss://***@cache.example:6380/1"),
        ("redis://cache.example/1?password=hunter2&db=2", "redis://cache.example/1?password=***&db=2"),
    ],
)
def test_no_password_lies_in_the_run_directory(tmp_path: Path, url: str, shown: str) -> None:
    changed = config(tmp_path, f"redis.url={url}")
    with open_run(changed, resume=False, fresh=False) as run:
        text = (run.path / "config.yaml").read_text()
    assert "hunter2" not in text
    assert shown in text
    with open_run(changed, resume=True, fresh=False):
        pass


def test_a_living_run_cannot_be_opened_twice(tmp_path: Path) -> None:
    with open_run(config(tmp_path), resume=False, fresh=False):
        with (
            pytest.raises(RunExistsError, match="another process"),
            open_run(config(tmp_path), resume=True, fresh=False),
        ):
            pass


@pytest.mark.parametrize(
    ("reference", "message"),
    [("json", "is not a reference"), ("no_such_module:f", "cannot import"), ("json:lods", "has no function")],
)
def test_a_wrong_reference_says_which_key_holds_it(reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.gold.*{message}"):
        resolve(reference, key="evaluation.gold")
