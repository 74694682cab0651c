"""Loading a configuration: presets, files, --set, errors in words, checks across sections, and the way back to YAML."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.errors import ConfigError, KeelError
from configs.load import dump_config, load_config, parse_config, preset_names
from configs.run import AdaptiveKl, ConstrainedKl, FileSource, FixedKl, PretrainedModel

ROOT = Path(__file__).parents[2]
MINIMAL = "name: mini\ndata: {world: {factory: 'a.b:c'}}\ncollect: {judge: 'a.b:j'}\n"


def refused(source: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides=overrides)
    return str(caught.value)


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    path = tmp_path / "mini.yaml"
    path.write_text(MINIMAL)
    return path


# ---------------------------------------------------------------- files


def test_a_file_and_a_bare_name(mini: Path) -> None:
    assert load_config(mini).name == "mini"
    assert load_config("demo").name == "demo"


def test_missing_file_lists_presets_and_the_nearest() -> None:
    message = refused("dmo")
    assert "did you mean demo" in message
    assert all(name in message for name in preset_names())


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    assert "a directory" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: a\ndata: [1, 2\n", "line 3"), ("name: a\n\tdata: 1\n", "line 2"), ("a: b: c\n", "line 1")],
)
def test_yaml_syntax_error_names_its_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    message = refused(path)
    assert line in message
    assert "broken.yaml" in message


def test_a_repeated_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nseed: 1\nseed: 2\n")
    message = refused(path)
    assert "line 3" in message
    assert "first on line 2" in message


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n", "just text\n", "7\n"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(text)
    assert "no sections" in refused(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refused(path)


def test_objects_of_python_are_not_built(tmp_path: Path) -> None:
    path = tmp_path / "object.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n")
    assert "not valid YAML" in refused(path)


def test_exponents_without_a_dot_are_numbers(mini: Path) -> None:
    config = load_config(mini, overrides=["sft.learning_rate=1e-3", "learner.policy.learning_rate=2E+1"])
    assert config.sft.learning_rate == 0.001
    assert config.learner.policy.learning_rate == 20.0


# ---------------------------------------------------------------- --set


def test_overrides_reach_nested_keys_and_leave_the_rest(mini: Path) -> None:
    config = load_config(mini, overrides=["learner.kl.target_nats_per_sequence=6", "seed=7"])
    assert config.learner.kl == AdaptiveKl(target_nats_per_sequence=6.0)
    assert config.seed == 7


def test_a_later_override_wins(mini: Path) -> None:
    assert load_config(mini, overrides=["seed=1", "seed=2"]).seed == 2


def test_a_kind_can_be_set_where_the_file_is_silent(mini: Path) -> None:
    overrides = ["learner.kl.kind=constrained", "learner.kl.limit_nats_per_sequence=2"]
    assert load_config(mini, overrides=overrides).learner.kl == ConstrainedKl(limit_nats_per_sequence=2.0)


def test_a_section_can_be_set_as_a_whole() -> None:
    assert load_config("demo", overrides=["learner.kl={kind: fixed, beta: 0}"]).learner.kl == FixedKl(beta=0.0)


def test_values_are_yaml(mini: Path) -> None:
    config = load_config(mini, overrides=["stages=[rm, ppo]", "ray.address=null", "metrics.enabled=false"])
    assert config.stages == ("rm", "ppo")
    assert config.ray.address is None
    assert config.metrics.enabled is False


def test_a_free_mapping_takes_any_key() -> None:
    config = load_config("hh_harmless", overrides=["data.preferences.columns.chosen=better"])
    assert isinstance(config.data.preferences, FileSource)
    assert config.data.preferences.columns == {"chosen": "better", "rejected": "rejected"}


def test_an_override_of_an_alias_changes_one_place(tmp_path: Path) -> None:
    path = tmp_path / "alias.yaml"
    path.write_text(MINIMAL + "learner: {policy: &o {learning_rate: 0.1}, critic: *o}\n")
    config = load_config(path, overrides=["learner.critic.learning_rate=0.2"])
    assert (config.learner.policy.learning_rate, config.learner.critic.learning_rate) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("learner.stps=3", "nearest valid: learner.steps"),
        ("learnr.steps=3", "nearest valid: learner"),
        ("learner.kl.target_nats=3", "nearest valid: learner.kl.target_nats_per_sequence"),
        ("beta_init=1", "nearest valid: learner.kl.beta_init"),
        ("data.world.promts=3", "nearest valid: data.world.prompts"),
        ("name.x=1", "set name itself"),
        ("qqqqq=1", "valid here: name, seed"),
    ],
)
def test_an_unknown_path_is_refused_with_the_nearest(override: str, nearest: str) -> None:
    assert nearest in refused("demo", override)


@pytest.mark.parametrize("override", ["seed", "=1", "learner.=1", ".seed=1", ""])
def test_a_malformed_override_is_refused(override: str) -> None:
    assert "dotted path" in refused("demo", override)


def test_a_value_that_is_no_yaml_is_refused() -> None:
    assert "--set seed=[1" in refused("demo", "seed=[1")


# ---------------------------------------------------------------- errors in words


def test_all_problems_are_listed_with_path_and_value() -> None:
    message = refused("demo", "seed=x", "learner.steps=-1", "learner.advantages=gea", "rollout={actrs: 2}")
    assert "4 problems" in message
    assert "seed: got 'x' (str)" in message
    assert "learner.steps: got -1 (int)" in message
    assert "learner.advantages: got 'gea'" in message
    assert "nearest: gae" in message
    assert "rollout.actrs: unknown key (value 2 (int)); nearest valid: rollout.actors" in message


def test_unknown_keys_inside_a_tagged_union(mini: Path) -> None:
    mini.write_text(MINIMAL + "learner: {kl: {kind: adaptive, target_nats: 3}}\n")
    message = refused(mini)
    assert "learner.kl.target_nats: unknown key of kind adaptive" in message
    assert "nearest valid: learner.kl.target_nats_per_sequence" in message
    assert ".adaptive." not in message


def test_a_changed_kind_explains_the_keys_left_over() -> None:
    message = refused("demo", "learner.kl.kind=fixed")
    assert "learner.kl.beta_init: unknown key of kind fixed" in message
    assert "it belongs to kind adaptive and constrained" in message
    assert "--set 'learner.kl={kind: fixed" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.kl={kind: fixd}", "learner.kl.kind: got 'fixd'; one of fixed, adaptive, constrained; nearest: fixed"),
        ("learner.kl={beta: 1}", "learner.kl: `kind` is missing; one of fixed, adaptive, constrained"),
        ("data.world={prompts: 3}", "data.world.factory: missing"),
        ("name=a/b", "name: got 'a/b' (str)"),
        ("seed=-1", "seed: got -1 (int)"),
        ("rm.refresh.caught_fraction=1", "rm.refresh.caught_fraction: got 1 (int)"),
    ],
)
def test_one_problem_in_words(override: str, expected: str) -> None:
    assert expected in refused("demo", override)


def test_errors_pickle_and_stand_in_the_tree() -> None:
    with pytest.raises(KeelError) as caught:
        load_config("demo", overrides=["seed=x"])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


# ---------------------------------------------------------------- checks across sections


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.max_response_tokens=200"], "model.max_position_embeddings = 128"),
        (["model.heads=3"], "no multiple of model.heads"),
        (["model.heads=8"], "no kernel for that head size"),
        (["model.hidden_size=96"], "model.hidden_size / model.heads = 24"),
        (["model.tokenizer=byte_bpe", "model.vocab_size=200"], "byte_bpe needs 256 bytes"),
        (["learner.samples_per_prompt=3"], "no multiple of learner.samples_per_prompt = 3"),
        (
            ["rm.refresh.plateau_versions=5", 'reward.sources=[{kind: model}, {kind: function, path: "m:f"}]'],
            "rm.refresh.plateau_versions with reward.sources",
        ),
        (
            ["rm.refresh.disagreement_over=0.3", "rm.refresh.earlier_fraction=1"],
            "rm.refresh.disagreement_over with rm.refresh.earlier_fraction = 1",
        ),
        (["learner.advantages=group_relative"], "learner.samples_per_prompt = 1, 2 at least"),
        (["learner.advantages=leave_one_out"], "learner.samples_per_prompt = 1, 2 at least"),
        (["learner.minibatches=200"], "more than learner.batch_size = 128"),
        (["learner.token_budget=79"], "learner.token_budget = 79, less than one sequence"),
        (["reward.token_budget=79"], "reward.token_budget = 79, less than one sequence"),
        (["data.prompts={kind: hub, name: a/b}"], "data.world makes all data itself"),
        (["data.world=null"], "data: no source"),
        (["data.world=null", "data.sft={kind: hub, name: a/b}"], "data.prompts is missing"),
        (["collect.judge=null"], "collect.judge is missing"),
        (["collect.judge=module.function"], "write package.module:function"),
        (["evaluation.gold='os; rm:x'"], "write package.module:function"),
        (["learner.kl.beta_init=20"], "lies outside"),
        (["learner.kl.beta_min=11"], "lies outside"),
        (["learner.kl.horizon_samples=25"], "could take β to 0"),
        (["learner.kl_budget.start=0"], "learner.kl_budget.start = 0"),
        (["learner.kl_budget.start=0.5"], "no effect while learner.kl_budget.widen_steps = 0"),
        (["learner.kl={kind: fixed}", "learner.kl_budget={start: 0.5, widen_steps: 9}"], "no KL target to widen"),
        (["learner.kl.target_nats_per_sequence=8"], "guard.thresholds.kl_nats_per_sequence (8)"),
        (["guard.beta_floor=11"], "more than learner.kl.beta_max"),
        (["guard.actions=[refresh_rm]"], "without rm.refresh"),
        (["rm.refresh={every_versions: null}"], "no reason to refresh"),
        (
            ["rm.refresh={every_versions: null}", "guard={enabled: false, actions: [refresh_rm]}"],
            "no reason to refresh",
        ),
        (["guard.watch.judge=a.b"], "write package.module:function"),
        (["redis.lease_s=120"], "not less than learner.task_deadline_s"),
        (["learner.stall_timeout_s=100"], "not less than learner.stall_timeout_s"),
        (["stages=[ppo, rm]"], "in the order data, sft"),
        (["stages=[rm, rm]"], "at most once"),
        (["stages=[]"], "name at least one"),
        (["sft.epochs=0"], "has learned nothing"),
        (["rm.models=[a, b]", "rm.members=3"], "rm.models names 2"),
        (["learner.policy.betas=[0.9, 1.0]"], "learner.policy.betas"),
        (["learner.critic.weight_decay=-1"], "learner.critic.weight_decay"),
        (["learner.policy.learning_rate=.inf"], "learner.policy.learning_rate: got inf"),
        (["sft.weight_decay=.nan"], "sft.weight_decay: got nan"),
        (["collect.temperatures=[1.0, .inf]"], "collect.temperatures[1]: got inf"),
        (["rollout.actors=8"], "less than the 5.5 that"),
        (["rollout.gpus_per_actor=1", "rollout.tensor_parallel_size=2"], "rollout.gpus_per_actor = 1: an engine takes"),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], expected: str) -> None:
    message = refused("demo", *overrides)
    assert "contradiction" in message
    assert expected in message


def test_all_contradictions_are_listed() -> None:
    message = refused("demo", "model.heads=8", "learner.minibatches=200", "redis.lease_s=500")
    assert "3 contradictions" in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.heads=2"],
        ["learner.advantages=group_relative", "learner.samples_per_prompt=4"],
        ["learner.kl.horizon_samples=26"],
        ["stages=[ppo, evaluate]", "collect.judge=null"],
        ["data.world=null", "data.prompts={kind: hub, name: a/b}", "data.sft={kind: file, path: x.jsonl}"],
        ["rollout.engine=scripted", "model.hidden_size=64"],
        ["rm.models=[a, b]"],
        ["rm.models=[a, b]", "rm.members=2"],
        ["model={kind: pretrained, path: a}", "sft.epochs=0", "data.world=null", "data.prompts={kind: hub, name: a/b}"],
        ["ray.address=auto", "rollout.actors=8"],
    ],
)
def test_what_fits_is_let_through(overrides: list[str]) -> None:
    load_config("demo", overrides=overrides)


# ---------------------------------------------------------------- and back


def test_the_guard_alone_may_ask_for_a_refresh() -> None:
    asks = ["rm.refresh={every_versions: null}", "guard.actions=[alert, refresh_rm, roll_back]"]
    assert load_config("demo", overrides=asks).rm.refresh is not None


def test_dump_loads_back_equal_and_shows_defaults(mini: Path) -> None:
    config = load_config(mini, overrides=["name='1e3'", "learner.clip_epsilon=1e-7"])
    text = dump_config(config)
    assert yaml.safe_load(text)["learner"]["kl"]["horizon_samples"] == 2000
    mini.write_text(text)
    assert load_config(mini) == config


def test_a_preset_survives_its_dump(tmp_path: Path) -> None:
    config = load_config("demo", overrides=["model={kind: pretrained, path: /models/x}"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    again = load_config(path)
    assert again == config
    assert again.model == PretrainedModel(path="/models/x")


def test_a_mapping_can_be_parsed_without_a_file() -> None:
    raw = yaml.safe_load(MINIMAL)
    assert parse_config(raw, where="test").run_dir == Path("runs/mini")


def test_loading_needs_no_heavy_library() -> None:
    code = (
        "import sys; from configs.load import load_config; load_config('demo');"
        "print([m for m in ('torch', 'ray', 'vllm', 'redis', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
