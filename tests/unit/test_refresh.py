"""The driver's side of a refresh, step by step, with actors, judge and training process that do as told."""

from __future__ import annotations

import json
import random
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.data_records import (
    FRESH_PREFERENCES_FILE,
    PREFERENCES_FILE,
    REVIEWED_PREFERENCES_FILE,
    PreferencePair,
    data_dir,
    read_rows,
    read_training_pairs,
    stable_prompt_id,
    write_rows,
)
from cluster.errors import SupervisionError
from cluster.files import read_jsonl
from cluster.reward_models import RewardModels
from cluster.supervise import RolePool
from cluster.text import load_tokenizer
from configs.load import load_config
from configs.run import RunConfig
from keel.online import refresh
from keel.online.fresh_pairs import PairSampler
from keel.online.refresh import ASKED_FILE, REFRESHES_FILE
from keel.sampling import Asking, load_questions
from learner.dpo import encode_preferences
from learner.guard.journal import LEFT_FILE
from reward_service.rm.pairs import PairSets
from reward_service.rm.refresh import RefreshOutcome, RefreshRequest, _load_fresh
from tests.refresh_scene import Handle, Reference, Scene, outcome, records, until_idle
from tests.run_support import prepare_run

SECTION = (
    "rm.refresh={every_versions: 4, pairs: 20, budget_pairs: 50, earlier_fraction: 0.25, temperatures: [1.0, 1.3]}"
)


@pytest.fixture(name="config", scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = prepare_run(tmp_path_factory.mktemp("runs"), SECTION)
    (question, *_) = load_questions(config, config.run_dir, table="prompts")
    old = PreferencePair(
        pair_id="old", prompt=question.record.prompt, chosen="restart the router .", rejected="i love you .",
        policy_version=0,
    )  # fmt: skip
    write_rows(data_dir(config.run_dir) / PREFERENCES_FILE, [old])
    return config


@pytest.fixture(autouse=True)
def clean(config: RunConfig) -> None:
    for name in (REFRESHES_FILE, ASKED_FILE, f"data/{FRESH_PREFERENCES_FILE}", "progress.jsonl"):
        (config.run_dir / name).unlink(missing_ok=True)


def test_a_refresh_samples_judges_trains_and_announces(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))
    refresher = scene.refresher()
    for version in (1, 2, 3):
        until_idle(refresher, version=version)
    assert scene.requests == []
    until_idle(refresher, version=4)
    (request,) = scene.requests
    assert (request.number, request.policy_version) == (1, 4)
    assert request.fresh == (data_dir(config.run_dir) / FRESH_PREFERENCES_FILE,)
    assert scene.announced == [("rm-new-1", request.reason)]
    assert sorted(scene.asked) == [1.0] * 20 + [1.3] * 15, "a quarter has an earlier answer on its other side"
    pairs = read_rows(request.fresh[0], PreferencePair)
    assert len(pairs) + int(json.loads((config.run_dir / REFRESHES_FILE).read_text())["pairs"]) >= 20
    assert {pair.source for pair in pairs} == {"refresh"}
    versions = {(pair.policy_version, pair.rejected_version) for pair in pairs}
    assert versions <= {(4, None), (4, 0), (0, 4)}
    assert versions & {(4, 0), (0, 4)}
    (line,) = read_jsonl(config.run_dir / REFRESHES_FILE)
    assert (line["outcome"], line["version"], line["pairs_judged"], line["fresh"]["after"]) == (
        "accepted", "rm-new-1", 20, 0.7,
    )  # fmt: skip
    refresher.close()


def test_a_version_that_a_rollback_pushed_aside_as_it_was_published_scores_all_the_same(config: RunConfig) -> None:
    models = RewardModels(config.run_dir / "rm")

    def train_and_roll_back(request: RefreshRequest) -> RefreshOutcome:
        done = outcome(accepted=True)(request)  # which publishes
        models.make_current("rm-1")
        return done

    scene = Scene(config, train_and_roll_back)
    refresher = scene.refresher()
    until_idle(refresher, version=4)
    refresher.close()
    assert [version for version, _ in scene.announced] == ["rm-new-1"]
    assert models.current().version == "rm-new-1", "the registry says what the workers were told"


def test_pairs_about_held_out_prompts_train_nothing(config: RunConfig) -> None:
    run_dir = config.run_dir
    kept, asked = (load_questions(config, run_dir, table=table)[0] for table in ("eval_prompts", "prompts"))
    reviewed = run_dir / REVIEWED_PREFERENCES_FILE
    write_rows(reviewed, [
        PreferencePair(pair_id=name, prompt=question.record.prompt, chosen="restart the router .", rejected="love .")
        for name, question in (("watch-000004-0001", kept), ("refresh-0001-0000001", asked))
    ])  # fmt: skip
    try:
        assert [pair.pair_id for pair in read_training_pairs(reviewed, run_dir=run_dir)] == ["refresh-0001-0000001"]
        tokenizer = load_tokenizer(run_dir / "sft" / "model")
        sets = PairSets([], [], [], held_out_annotators=(), digest="")
        fresh = _load_fresh(config, run_dir, [reviewed], after_version=-1, sets=sets, tokenizer=tokenizer)
        assert [one.pair.pair_id for one in (*fresh.train, *fresh.held_out)] == ["refresh-0001-0000001"]
        write_rows(reviewed, read_rows(reviewed, PreferencePair) * 3)
        prompts = {prompt for prompt, _ in encode_preferences(run_dir, data=config.data, tokenizer=tokenizer)}
        assert stable_prompt_id(asked.record.prompt) in prompts
        assert stable_prompt_id(kept.record.prompt) not in prompts
    finally:
        reviewed.unlink()


def test_training_is_held_while_a_refresh_lasts_where_the_section_says_so(config: RunConfig) -> None:
    section = config.rm.refresh
    assert section is not None
    waiting = config.model_copy(update={"rm": config.rm.model_copy(update={
        "refresh": section.model_copy(update={"wait_after_versions": 2})
    })})  # fmt: skip
    scene = Scene(waiting, outcome(accepted=False))
    refresher = scene.refresher()
    until_idle(refresher, version=4)
    assert scene.held == [6, None]
    scene.train = lambda request: 1 / 0
    until_idle(refresher, version=8)
    assert scene.held == [6, None, 10, None], "a refresh that fails holds nobody"


def test_a_refused_or_failed_refresh_announces_nothing_and_the_next_comes_in_its_time(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=False))
    refresher = scene.refresher()
    until_idle(refresher, version=4)

    def dead(request: RefreshRequest) -> Any:
        raise SupervisionError("a process of the run died")

    scene.train = dead
    until_idle(refresher, version=5)
    until_idle(refresher, version=8)
    assert scene.announced == []
    assert dict(refresher.counts) == {"pairs_judged": 40, "refused": 1, "failed": 1}
    outcomes = [line["outcome"] for line in read_jsonl(config.run_dir / REFRESHES_FILE)]
    assert outcomes == ["refused", "failed"]
    notes = [line.get("note", "") for line in read_jsonl(config.run_dir / "progress.jsonl")]
    assert any("the reward model stays" in note for note in notes)
    refresher.close()


def test_a_judge_that_breaks_does_not_end_the_run(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))

    def broken(*_: Any) -> Any:
        raise RuntimeError("no connection")

    refresher = scene.refresher(judge=broken)
    until_idle(refresher, version=4)
    assert (scene.requests, scene.announced, refresher.counts["failed"]) == ([], [], 1)
    refresher.close()


def test_the_budget_holds_also_after_a_restart(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))
    refresher = scene.refresher()
    until_idle(refresher, version=4)
    until_idle(refresher, version=8)
    refresher.close()
    again = scene.refresher()
    assert again.progress.pairs_judged == 40
    until_idle(again, version=9)
    assert len(scene.requests) == 2, "not before every_versions have passed since the last"
    until_idle(again, version=12)
    until_idle(again, version=16)
    assert [request.number for request in scene.requests] == [1, 2, 3]
    assert read_jsonl(config.run_dir / REFRESHES_FILE)[-1]["pairs_judged"] == 50, "10 were left for the third"
    again.close()


def test_a_resumed_driver_that_reads_all_steps_again_does_not_refresh_for_them(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))
    refresher = scene.refresher()
    until_idle(refresher, version=4)
    refresher.close()
    again = scene.refresher()
    again.step(records(1, 2, 3, 4, 5))
    assert again._work is None
    assert len(scene.requests) == 1
    again.close()


def test_what_an_earlier_driver_left_due_waits_for_a_step_since_actors_hold_their_boots_weights(
    config: RunConfig,
) -> None:
    scene = Scene(config, outcome(accepted=True))
    refresher = scene.refresher(turned=False)
    refresher.step(records(1, 2, 3, 4))
    refresher.step([])
    assert refresher._work is None
    until_idle(refresher, version=5)
    assert [request.policy_version for request in scene.requests] == [5]
    refresher.close()


def test_a_driver_that_ends_while_a_judge_hangs_has_spent_its_pairs_and_its_number(config: RunConfig) -> None:
    """People would otherwise find other answers under the names of pairs that they have judged."""
    scene, called, released = Scene(config, outcome(accepted=True)), threading.Event(), threading.Event()

    def hangs(*_: Any) -> list[bool]:
        called.set()
        released.wait(30.0)
        return [True] * 3

    refresher = scene.refresher(judge=hangs)
    refresher.step(records(4))
    while not called.is_set():
        refresher.step([])
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "judge"] == [True]
    refresher.close()
    assert "refresh 1 is given up" in (config.run_dir / "progress.jsonl").read_text()
    again = scene.refresher()
    assert (again.progress.pairs_judged, again.progress.last_version) == (20, 0)
    until_idle(again, version=4)
    assert [request.number for request in scene.requests] == [2]
    assert read_jsonl(config.run_dir / REFRESHES_FILE)[-1]["pairs_judged"] == 40
    released.set()
    again.close()


def test_a_judge_that_never_answers_fails_the_refresh_alone(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "_LABEL_GRACE_S", 0.0)
    overrides = [f"runs_dir={config.runs_dir}", SECTION, "rm.refresh.label_timeout_s=0.05"]
    scene = Scene(load_config("demo_ci", overrides=overrides), outcome(accepted=True))
    released = threading.Event()
    refresher = scene.refresher(judge=lambda *_: [released.wait(30.0)] * 3)
    until_idle(refresher, version=4)
    (line,) = read_jsonl(config.run_dir / REFRESHES_FILE)
    assert (line["outcome"], line["pairs_judged"]) == ("failed", 0)
    assert "did not answer" in line["why"]
    released.set()
    refresher.close()


def test_a_torn_line_of_an_earlier_driver_does_not_fail_every_refresh(config: RunConfig) -> None:
    (data_dir(config.run_dir) / FRESH_PREFERENCES_FILE).write_text('{"pair_id": "torn", "pro')
    scene = Scene(config, outcome(accepted=True))
    refresher = scene.refresher()
    until_idle(refresher, version=4)
    assert refresher.counts["accepted"] == 1
    assert read_rows(scene.requests[0].fresh[0], PreferencePair)
    refresher.close()


def test_too_few_clear_labels_are_kept_but_train_nothing(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))
    refresher = scene.refresher(judge=lambda prompt, a, b, rng: [True, False])
    until_idle(refresher, version=4)
    assert scene.requests == []
    assert "clear label" in read_jsonl(config.run_dir / REFRESHES_FILE)[0]["why"]
    refresher.close()


def test_a_probe_measures_disagreement_and_a_refresh_follows(config: RunConfig) -> None:
    probing = SECTION.replace("every_versions: 4", "every_versions: null, disagreement_over: 0.5, probe_pairs: 12")
    parted = load_config("demo_ci", overrides=[f"runs_dir={config.runs_dir}", probing])
    scene = Scene(parted, outcome(accepted=True))
    # The reward model of this scene pays for tokens, the judge for their lack.
    refresher = scene.refresher(judge=lambda prompt, a, b, rng: [len(a.split()) < len(b.split())] * 3)
    until_idle(refresher, version=4)
    assert refresher.progress.disagreement is not None
    assert refresher.progress.disagreement > 0.9
    until_idle(refresher, version=5)
    assert "differently" in scene.requests[0].reason
    kinds = [line["kind"] for line in read_jsonl(config.run_dir / REFRESHES_FILE)]
    assert kinds == ["probe", "refresh"]
    refresher.close()


def test_a_probe_without_pairs_to_compare_measures_nothing(config: RunConfig) -> None:
    probing = SECTION.replace("every_versions: 4", "every_versions: null, disagreement_over: 0.0, probe_pairs: 12")
    only_earlier = probing.replace("earlier_fraction: 0.25", "earlier_fraction: 0.99")
    parted = load_config("demo_ci", overrides=[f"runs_dir={config.runs_dir}", only_earlier])
    refresher = Scene(parted, outcome(accepted=True)).refresher()
    until_idle(refresher, version=4)
    assert refresher.progress.disagreement is None
    assert read_jsonl(config.run_dir / REFRESHES_FILE)[-1]["disagreement"] is None
    refresher.close()


def test_an_actor_that_dies_is_the_watch_loops_and_its_prompts_go_to_another(config: RunConfig) -> None:
    """What the pool raises when it cannot go on must end the run, not a refresh."""
    scene = Scene(config, outcome(accepted=True))
    dead = Handle(generate=lambda prompts, **_: Reference(None))
    scene_pool = scene.pool()
    pool = cast(RolePool, SimpleNamespace(handles=[dead, *scene_pool.handles]))  # neither poll nor lost
    runtime = scene.runtime()

    def get(reference: Any) -> Any:
        if reference.value is None:
            raise SystemError("the actor died")
        return reference.value

    runtime.ray.get = get
    asking = Asking(runtime, pool, temperature=1.0, online=True)
    for start in range(4):
        asking.ask(start, [[1, 2]])
    found: list[int] = []
    while asking.open:
        found += [start for start, _ in asking.answered(wait_s=0.0)]
    assert sorted(found) == [0, 1, 2, 3]
    pool.handles[:] = [dead]
    asking.ask(4, [[1]])
    assert asking.answered(wait_s=0.0) == []
    assert asking.open, "it waits for an actor that lives"


def test_earlier_answers_come_from_all_versions_alike(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))
    prompt = read_rows(data_dir(config.run_dir) / PREFERENCES_FILE, PreferencePair)[0].prompt
    many = [
        PreferencePair(pair_id=f"f{i}", prompt=prompt, chosen=f"a{i}", rejected=f"b{i}", policy_version=8)
        for i in range(50)
    ]
    write_rows(data_dir(config.run_dir) / FRESH_PREFERENCES_FILE, many)
    section = config.rm.refresh
    assert section is not None
    sampler = PairSampler(scene.runtime(), scene.pool(), section=section)
    drawn = sampler._draw_earlier(400, random.Random(0))
    of_version_0 = sum(one.version == 0 for one in drawn)
    assert 150 < of_version_0 < 250


def test_what_a_policy_said_before_a_rollback_left_it_is_judged_against_the_one_after(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))
    pair = read_rows(data_dir(config.run_dir) / PREFERENCES_FILE, PreferencePair)[0]
    row = {"step": 12, "version": 12, "branch": 0, "prompt": pair.prompt, "answer": "so fantastic", "reward": 3.0}
    unknown = {**row, "prompt": "not asked any more"}
    lines = "".join(json.dumps(one) + "\n" for one in (row, unknown)) + json.dumps(row)[:30]
    (config.run_dir / LEFT_FILE).write_text(lines)
    section = config.rm.refresh
    assert section is not None
    drawn = PairSampler(scene.runtime(), scene.pool(), section=section)._draw_earlier(200, random.Random(0))
    left = [one for one in drawn if one.version == 12]
    assert 60 < len(left) < 140
    assert {(one.question.record.prompt, one.text) for one in left} == {(pair.prompt, "so fantastic")}


def test_a_frozen_reward_model_is_left_alone_until_then(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))
    refresher = scene.refresher()
    refresher.freeze_until(7)
    refresher.freeze_until(3)
    until_idle(refresher, version=6)
    assert scene.requests == []
    until_idle(refresher, version=7)
    assert len(scene.requests) == 1
    refresher.close()


def test_a_refresh_that_is_asked_for_comes_at_once_within_the_budget(config: RunConfig) -> None:
    scene = Scene(config, outcome(accepted=True))
    refresher = scene.refresher()
    refresher.ask("the guard says so")
    until_idle(refresher, version=1)
    assert scene.announced == [("rm-new-1", "the guard says so")]
    until_idle(refresher, version=2)
    assert len(scene.requests) == 1, "asked once"
    for version in (3, 4):
        refresher.ask("again")
        until_idle(refresher, version=version)
    assert (len(scene.requests), refresher.progress.pairs_judged) == (3, 50)
    refresher.ask("once more")
    until_idle(refresher, version=5)
    assert len(scene.requests) == 3
    notes = [line.get("note", "") for line in read_jsonl(config.run_dir / "progress.jsonl")]
    assert "no refresh is allowed at version 5: once more" in notes
    refresher.close()


def test_a_refresh_asked_for_during_another_follows_it(config: RunConfig) -> None:
    scene, called, released = Scene(config, outcome(accepted=True)), threading.Event(), threading.Event()

    def slow(prompt: Any, a: str, b: str, rng: Any) -> list[bool]:
        called.set()
        released.wait(30.0)
        return [len(a) >= len(b)] * 3

    refresher = scene.refresher(judge=slow)
    refresher.step(records(4))
    while not called.is_set():
        refresher.step([])
    refresher.ask("the guard says so")
    released.set()
    until_idle(refresher, version=5)
    until_idle(refresher, version=5)
    assert [request.reason for request in scene.requests][1:] == ["the guard says so"]
    refresher.close()
