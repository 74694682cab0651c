"""Measurements beside training, with actors, reward model and judge that do as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.data_records import EVAL_PROMPTS_FILE, PromptRecord, data_dir, read_rows
from cluster.files import read_jsonl
from cluster.review_queue import Judgement, MemoryReviewQueue, Recorded, ReviewItem
from cluster.text import prompt_text
from configs.run import RunConfig
from keel.comparison import REFERENCE_ROWS, outcomes, reference_answers
from keel.online import watch_people
from keel.online.judges import PEOPLE
from keel.online.watch import EVALUATIONS_FILE, Watch, make_watch, signals_of
from keel.online.watch_people import people_outcomes
from keel.online.watch_start import ANCHOR_FILE, CANARY_FILE
from tests.run_support import prepare_run
from tests.watch_scene import Scene, ids

SECTION = "guard.watch={every_versions: 4, prompts: 24, anchor_texts: 6, canary: {prompts: 8}, timeout_s: 20}"
GOOD, BAD = "please restart the router.", "i love you."


@pytest.fixture(name="config", scope="module")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = prepare_run(tmp_path_factory.mktemp("runs"), SECTION)
    rows = [
        {"prompt": prompt_text(record.prompt), "answer": BAD, "truncated": number == 1, "gold": -1.0}
        for number, record in enumerate(read_rows(data_dir(config.run_dir) / EVAL_PROMPTS_FILE, PromptRecord))
    ]
    (config.run_dir / "eval").mkdir()
    (config.run_dir / REFERENCE_ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


@pytest.fixture(autouse=True)
def clean(config: RunConfig) -> None:
    for name in (EVALUATIONS_FILE, CANARY_FILE, ANCHOR_FILE, "progress.jsonl", "reviews.jsonl"):
        (config.run_dir / name).unlink(missing_ok=True)


def good_judge(prompt: Any, a: str, b: str, rng: Any) -> list[bool]:
    return [GOOD in a] * 3


def watch_of(scene: Scene, judge: Any = good_judge) -> Watch:
    watch = make_watch(scene.runtime(), scene.roles())
    assert watch is not None
    watch._judge = judge
    watch.step([])  # the first turn of a new run
    return watch


def until_idle(watch: Watch, *, version: int) -> None:
    watch.step([{"step": version, "version": version}])
    until_s = time.monotonic() + 30.0
    while time.monotonic() < until_s:
        if watch._work is None:
            return
        watch.step([])
        time.sleep(0.001)  # for the judge's thread
    raise AssertionError("the measurement did not end")


def lines(config: RunConfig) -> list[dict[str, Any]]:
    path = config.run_dir / EVALUATIONS_FILE
    return read_jsonl(path) if path.exists() else []


def test_no_section_no_watch(config: RunConfig) -> None:
    bare = config.model_copy(update={"guard": config.guard.model_copy(update={"watch": None})})
    scene = Scene(bare, [5])
    assert make_watch(scene.runtime(), scene.roles()) is None


def test_a_measurement_comes_in_its_time_and_says_all_there_is(config: RunConfig) -> None:
    scene = Scene(config, ids(config, BAD))
    watch = watch_of(scene)
    canary = json.loads((config.run_dir / CANARY_FILE).read_text())
    assert (len(canary["prompts"]), canary["rm_version"]) == (8, "rm-1")
    assert json.loads((config.run_dir / ANCHOR_FILE).read_text())["nats_per_token"] == 1.0
    until_idle(watch, version=3)
    assert lines(config) == []
    scene.answer, scene.nats = ids(config, GOOD), 1.0 + 0.4055
    until_idle(watch, version=4)
    (line,) = lines(config)
    assert (line["step"], line["version"], line["prompts"]) == (4, 4, 24)
    assert line["win_rate"] == 1.0
    assert line["win_rate_low"] == pytest.approx(24 / (24 + 1.959964**2))
    assert line["anchor_perplexity_ratio"] == pytest.approx(1.5, abs=1e-3)
    assert line["gold_reference"] == -1.0
    assert line["gold"] is not None
    assert line["canary_ks"] == 1.0
    assert line["canary_z"] > 100, "all baseline answers were as long as each other"
    assert scene.told == [(signals_of(line), 4)]
    assert scene.told[0][0]["win_rate_high"] == pytest.approx(1.0)
    until_idle(watch, version=7)
    assert len(lines(config)) == 1
    until_idle(watch, version=8)
    assert [one["version"] for one in lines(config)] == [4, 8]
    watch.close()


def test_the_judge_sees_either_order_and_lengths_make_no_difference_to_who_wins(config: RunConfig) -> None:
    places = []

    def judge(prompt: Any, a: str, b: str, rng: Any) -> list[bool]:
        places.append(GOOD in a)
        return [GOOD in a]

    scene = Scene(config, ids(config, GOOD))
    watch = watch_of(scene, judge)
    until_idle(watch, version=4)
    assert {True, False} == set(places)
    assert lines(config)[0]["win_rate"] == 1.0
    watch.close()


def test_a_judge_that_breaks_costs_the_win_rate_alone(config: RunConfig) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no connection")

    scene = Scene(config, ids(config, GOOD))
    watch = watch_of(scene, broken)
    until_idle(watch, version=4)
    (line,) = lines(config)
    assert "win_rate" not in line
    assert {"gold", "canary_ks", "anchor_perplexity_ratio"} <= set(line)
    assert "win_rate" not in scene.told[0][0]
    assert "no connection" in (config.run_dir / "progress.jsonl").read_text()
    watch.close()


def test_a_judge_that_hangs_ends_its_part_and_is_not_asked_again_before_it_is_done(config: RunConfig) -> None:
    released, calls = threading.Event(), []

    def hangs(*_: Any) -> list[bool]:
        calls.append(1)
        released.wait(30.0)
        return [True]

    scene = Scene(config, ids(config, GOOD))
    watch = watch_of(scene, hangs)
    watch.step([{"step": 4, "version": 4}])
    while not calls:
        watch.step([])
    watch._until_s = 0.0
    until_idle(watch, version=5)
    assert "win_rate" not in lines(config)[0]
    until_idle(watch, version=8)
    assert len(calls) == 1
    assert "still at it" in (config.run_dir / "progress.jsonl").read_text()
    released.set()
    watch._hanging["the judge"].result(timeout=20)
    until_idle(watch, version=12)
    assert lines(config)[-1]["win_rate"] is not None
    watch.close()


def test_actors_that_never_answer_do_not_stop_the_driver_and_the_next_measurement_goes_well(config: RunConfig) -> None:
    scene = Scene(config, ids(config, GOOD))
    watch = watch_of(scene)
    scene.ready = False
    started_s = time.monotonic()
    for version in range(1, 7):
        watch.step([{"step": version, "version": version}])
    assert time.monotonic() - started_s < 2.0
    assert scene.cancelled == []
    watch._until_s = 0.0
    until_idle(watch, version=7)
    assert len(scene.cancelled) == 2, "answers and anchor: the next measurement must not come on top of this one"
    assert lines(config) == []
    assert scene.told == []
    scene.ready = True
    until_idle(watch, version=8)
    assert [line["version"] for line in lines(config)] == [8]
    watch.close()


def test_another_reward_model_scores_the_stored_baseline_too(config: RunConfig) -> None:
    scene = Scene(config, ids(config, BAD))
    watch = watch_of(scene)
    scene.score = lambda response: 1000.0 + len(response)  # another scale: the same answers have not shifted on it
    until_idle(watch, version=4)
    assert (lines(config)[0]["canary_ks"], lines(config)[0]["canary_z"]) == (0.0, 0.0)
    watch.close()


def test_a_resumed_driver_takes_no_baseline_again_and_goes_on_by_the_record(config: RunConfig) -> None:
    scene = Scene(config, ids(config, BAD))
    watch = watch_of(scene)
    until_idle(watch, version=4)
    watch.close()
    before = (config.run_dir / CANARY_FILE).read_bytes()
    again = Scene(config, ids(config, GOOD), nats=2.0)
    resumed = watch_of(again)
    assert again.asked == 0
    assert (config.run_dir / CANARY_FILE).read_bytes() == before
    resumed.step([{"step": one, "version": one} for one in (1, 2, 3, 4, 5)])
    assert resumed._work is None
    until_idle(resumed, version=8)
    assert lines(config)[-1]["anchor_nats_per_token"] == 2.0
    assert lines(config)[-1]["anchor_perplexity_ratio"] == pytest.approx(2.718, abs=1e-3)
    resumed.close()


def test_what_an_earlier_driver_left_due_waits_for_a_step_since_actors_hold_their_boots_weights(
    config: RunConfig,
) -> None:
    watch = make_watch((scene := Scene(config, ids(config, GOOD))).runtime(), scene.roles())
    assert watch is not None
    watch.step([{"step": one, "version": one} for one in (1, 2, 3, 4)])
    watch.step([])
    assert watch._work is None
    until_idle(watch, version=5)
    assert [line["version"] for line in lines(config)] == [5]
    watch.close()


def test_a_baseline_that_cannot_be_had_is_noted_and_the_run_goes_on(config: RunConfig) -> None:
    section = config.guard.watch
    assert section is not None
    impatient = section.model_copy(update={"timeout_s": 0.2})
    guard = config.guard.model_copy(update={"watch": impatient})
    scene = Scene(config.model_copy(update={"guard": guard}), ids(config, BAD), ready=False)
    watch = watch_of(scene)
    assert scene.ticks > 0
    assert "no canary to compare with" in (config.run_dir / "progress.jsonl").read_text()
    assert not (config.run_dir / CANARY_FILE).exists()
    scene.ready = True
    watch._section = section
    until_idle(watch, version=4)
    assert "canary_z" not in lines(config)[0]
    assert lines(config)[0]["win_rate"] is not None
    watch.close()


def test_a_run_that_ends_gives_up_what_is_under_way(config: RunConfig) -> None:
    scene = Scene(config, ids(config, GOOD))
    watch = watch_of(scene)
    scene.ready = False
    watch.step([{"step": 4, "version": 4}])
    watch.close()
    assert "given up" in (config.run_dir / "progress.jsonl").read_text()
    assert len(scene.cancelled) == 1


# ---------------------------------------------------------------- parts


def test_a_reference_that_was_cut_has_no_end_of_sequence(config: RunConfig) -> None:
    whole, cut, *_ = reference_answers(config, config.run_dir, limit=5)
    assert whole.token_ids == ids(config, BAD)
    assert cut.token_ids == ids(config, BAD)[:-1]
    assert whole.gold == -1.0


def test_outcomes_of_empty_equal_and_undecided_answers() -> None:
    found = outcomes(
        ["p"] * 4, answers=["", "same", "x", "y"], references=["r", "same", " ", "z"],
        judge=lambda prompt, a, b, rng: [True, False], seed=0,
    )  # fmt: skip
    assert found == [0.0, 0.5, 1.0, 0.5]


def test_signals_are_those_that_are_there_and_a_shift_down_is_a_shift() -> None:
    assert signals_of({"canary_z": -4.0, "win_rate": 0.4, "win_rate_high": 0.52, "gold": 1.0}) == {
        "win_rate": 0.4, "win_rate_high": 0.52, "canary_z": 4.0,
    }  # fmt: skip
    assert signals_of({"prompts": 3, "rm_judge_agreement": None}) == {}


async def log_of(items: Sequence[tuple[ReviewItem, Sequence[tuple[str, str]]]]) -> list[Recorded]:
    queue = MemoryReviewQueue()
    for item, said in items:
        await queue.push([item], limit=100)
        for who, verdict in said:
            await queue.judge(Judgement(item_id=item.item_id, annotator=who, verdict=cast(Any, verdict)), votes=9)
    return await queue.judgements()


def item(name: str, first: int | None, second: int | None) -> ReviewItem:
    return ReviewItem(item_id=name, kind="pair", prompt="p", answers=("a", "b"), policy_versions=(first, second))


async def test_people_who_compare_a_later_policy_with_the_reference_are_counted() -> None:
    log = await log_of([
        (item("won", 20, 0), [("ann", "first"), ("bob", "first"), ("cyd", "second")]),
        (item("lost", 0, 20), [("ann", "first")]),
        (item("even", 0, 20), [("ann", "first"), ("bob", "second"), ("cyd", "tie")]),
        (item("skipped", 20, 0), [("ann", "skip")]),
        (item("two of the same policy", 20, 20), [("ann", "first")]),
        (item("too old", 4, 0), [("ann", "first")]),
        (item("not known", None, 0), [("ann", "first")]),
    ])  # fmt: skip
    assert people_outcomes(log, after_version=10) == [1.0, 0.0, 0.5]


def test_where_people_judge_pairs_are_put_to_them_and_their_win_rate_is_apart(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = config.guard.watch
    assert section is not None
    guard = config.guard.model_copy(update={"watch": section.model_copy(update={"judge": PEOPLE})})
    scene = Scene(config.model_copy(update={"guard": guard}), ids(config, GOOD))
    pushed: list[ReviewItem] = []

    async def push(self: Any, items: Sequence[ReviewItem]) -> int:
        pushed.extend(items)
        return len(items)

    monkeypatch.setattr(watch_people.People, "_push", push)
    watch = watch_of(scene, judge=None)
    until_idle(watch, version=4)
    assert len(pushed) == 24
    assert {one.policy_versions for one in pushed} == {(4, 0), (0, 4)}
    assert all(GOOD in one.answers[one.policy_versions.index(4)] for one in pushed)
    assert "win_rate" not in lines(config)[0]
    entries = [
        Recorded(
            position=number,
            item=one,
            judgement=Judgement(
                item_id=one.item_id, annotator="ann", verdict="first" if one.policy_versions[0] else "second"
            ),
        )
        for number, one in enumerate(pushed, start=1)
    ]
    write_log(config.run_dir / "reviews.jsonl", entries)
    until_idle(watch, version=8)
    assert (lines(config)[1]["win_rate_people"], lines(config)[1]["pairs_judged_by_people"]) == (1.0, 24)
    assert "win_rate" not in scene.told[-1][0]
    watch.close()


def write_log(path: Path, entries: Sequence[Recorded]) -> None:
    import msgspec

    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
