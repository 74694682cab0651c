"""The guard as a whole: signals in, decisions, journal and metrics fields out; across checkpoints and rollbacks."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.files import read_jsonl
from configs.guard import Above, Below, GuardSection, Thresholds, WatchSection
from learner.guard.guard import Guard
from learner.guard.journal import GUARD_FILE, LEFT_FILE, SAMPLES_FILE, Journal
from learner.guard.record import Alert, Decision, Halt, Level, RaiseBeta, Reading, RollBack

KL = "kl_nats_per_sequence"
LIMITS = Thresholds(
    kl_nats_per_sequence=Above(warn=8.0, act=10.0),
    entropy_nats_per_token=Below(warn=0.15, act=0.1),
    win_rate=Below(warn=0.5, act=0.4),
    canary_z=Above(warn=3.0),
)


@dataclass
class Batch:
    prompts: Sequence[object] = tuple(f"prompt {row}" for row in range(20))
    texts: Sequence[str] = tuple(f"answer {row}" for row in range(20))
    rewards: Sequence[float] = tuple(float(row) for row in range(20))


@dataclass
class ScriptedReader:
    """Says what `values` holds; counts its reads since the last reset."""

    values: dict[str, float] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    reads: int = 0

    def read(self, view: Batch) -> Reading:
        self.reads += 1
        return Reading(dict(self.values), self.words)

    def reset(self) -> None:
        self.reads = 0

    def to_state(self) -> dict[str, Any]:
        return {"reads": self.reads}

    def from_state(self, state: Mapping[str, Any]) -> None:
        self.reads = state["reads"]


class Scene:
    """A guard and what its learner does: one version a step, a good checkpoint kept where it may be, actions carried
    out."""

    def __init__(self, run_dir: Path, *, step: int = 0, refreshes: bool = False, **changes: Any) -> None:
        quick = {
            "thresholds": LIMITS, "warmup_steps": 0, "patience_steps": 1, "patience_measurements": 1,
            "cool_down_steps": 3, "watch": WatchSection(),
        }  # fmt: skip
        self.section = GuardSection(**{**quick, **changes})
        self.run_dir = run_dir
        self.reader = ScriptedReader()
        self.guard = Guard(
            self.section,
            reader=self.reader,
            journal=Journal(run_dir, step=step),
            refreshes=refreshes,
            sample_every_steps=5,
        )
        self.step = step
        self.good = [0]

    def observe(self, **values: float) -> Decision:
        self.step += 1
        self.reader.values = values
        decision = self.guard.observe(Batch(), step=self.step, version=self.version, good_steps=self.good)
        for action in decision.actions:
            self.guard.applied(action)
            if isinstance(action, RollBack):
                self.good = [step for step in self.good if step <= action.to_step]
        if decision.good:
            self.good.append(self.step)
        return decision

    @property
    def version(self) -> int:
        return self.step + 3

    def events(self) -> list[dict[str, Any]]:
        return read_jsonl(self.run_dir / GUARD_FILE)

    def shown(self) -> list[str]:
        return [event.get("action") or event["event"] for event in self.events()]

    def moments(self) -> list[tuple[int, str]]:
        return list(dict.fromkeys((one["step"], one["moment"]) for one in read_jsonl(self.run_dir / SAMPLES_FILE)))


MakeScene = Callable[..., Scene]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeScene]:
    """Scene(…) of settings, in the test's directory if no other is named."""
    with ExitStack() as stack:

        def make_one(run_dir: Path = tmp_path, **settings: Any) -> Scene:
            made = Scene(run_dir, **settings)
            stack.callback(made.guard.close)
            return made

        yield make_one


@pytest.fixture
def scene(make: MakeScene) -> Scene:
    return make()


def test_a_quiet_step_is_good_and_writes_no_event(scene: Scene) -> None:
    decision = scene.observe(kl_nats_per_sequence=1.0)
    assert decision.good
    assert decision.actions == ()
    assert scene.events() == []
    assert scene.guard.record() == {
        "signals": {KL: 1.0},
        "guard": {"level": "ok", "warn": [], "act": [], "actions": [], "words": []},
        "branch": 0,
    }


def test_over_a_threshold_is_not_good_before_patience_ends(make: MakeScene) -> None:
    scene = make(patience_steps=3)
    assert [scene.observe(kl_nats_per_sequence=kl).good for kl in (7.9, 8.1, 11.0, 7.9)] == [True, False, False, True]


def test_a_budget_that_is_nearly_spent_leaves_checkpoints_good(make: MakeScene) -> None:
    scene = make(patience_steps=1)
    told, decision = (scene.observe(kl_nats_per_sequence=1.0, kl_budget_share=0.9) for _ in range(2))
    assert [type(action) for action in told.actions] == [Alert]
    assert (decision.verdict.warn, decision.good) == (("kl_budget_share",), True)
    assert not scene.observe(kl_nats_per_sequence=9.0, kl_budget_share=0.9).good


def test_alarm_rolls_back_raises_beta_and_is_told(scene: Scene) -> None:
    scene.observe(kl_nats_per_sequence=1.0)
    scene.reader.words = ("fantastic",)
    decision = scene.observe(kl_nats_per_sequence=12.0)
    assert [type(action) for action in decision.actions] == [Alert, RollBack, RaiseBeta]
    assert decision.actions[1] == RollBack(1)
    assert not decision.good
    assert scene.guard.record()["guard"] == {
        "level": "act", "warn": [], "act": [KL], "actions": ["alert", "roll_back", "raise_beta"],
        "words": ["fantastic"],
    }  # fmt: skip
    assert scene.guard.record()["branch"] == 0, "the step belongs to the branch that was left"
    assert scene.shown() == ["act", "alert", "roll_back", "raise_beta"]
    level, alert, rolled, raised = scene.events()
    assert level["signals"] == {KL: 12.0}
    assert level["why"] == "kl_nats_per_sequence 12 (act over 10)"
    assert "rolling back to step 1" in alert["why"]
    assert (rolled["to_step"], rolled["branch"], raised["factor"], raised["floor"]) == (1, 0, 2.0, 0.05)
    assert {"time_s", "step", "version", "branch", "event", "signals", "why"} <= rolled.keys()


def test_what_is_on_its_way_back_when_the_cool_down_ends_is_not_acted_on_again(make: MakeScene) -> None:
    scene = make(actions=("alert", "raise_beta"), patience_steps=3)
    raised = [
        scene.step
        for kl in (12.0, 12.0, 12.0, 12.0, 12.0, 9.0, 9.0, 12.0, 12.0, 12.0, 12.0, 9.0, 9.0, 9.0, 9.0)
        if RaiseBeta(factor=2.0, floor=0.05) in scene.observe(kl_nats_per_sequence=kl).actions
    ]
    assert raised == [3, 8], "the cool-down ends at step 7 and, once more, at 12; KL is over 10 again from 8 on"


def test_what_came_of_an_action_is_written_with_it(scene: Scene) -> None:
    scene.observe(kl_nats_per_sequence=1.0)
    scene.guard.applied(RollBack(4), to_step=2, rm_version="rm-1", beta=0.2)
    (event,) = scene.events()
    assert (event["to_step"], event["rm_version"], event["beta"]) == (2, "rm-1", 0.2)
    assert scene.guard.to_state()["actions"]["rolled_to"] == 2


def test_after_a_rollback_the_signals_start_anew_and_the_count_stays(make: MakeScene) -> None:
    scene = make(warmup_steps=1, patience_steps=2, max_rollbacks=1)
    for kl in (1.0, 12.0, 12.0):
        decision = scene.observe(kl_nats_per_sequence=kl)
    assert scene.guard.branch == 1
    assert scene.reader.reads == 0
    calm = [scene.observe(kl_nats_per_sequence=12.0).verdict.level for _ in range(3)]
    assert calm == [Level.OK, Level.OK, Level.ACT], "warm-up and patience"
    decision = scene.observe(kl_nats_per_sequence=12.0)
    assert isinstance(decision.actions[-1], Halt)
    assert [action.reason for action in decision.actions if isinstance(action, Halt)] == [scene.guard.halted]
    assert scene.guard.halted
    assert scene.observe(kl_nats_per_sequence=12.0).actions == ()
    scene.guard.go_on()
    assert scene.guard.halted == ""


def test_level_events_come_when_the_set_changes(scene: Scene) -> None:
    for kl, entropy in ((9.0, 1.0), (9.0, 1.0), (9.0, 0.12), (1.0, 1.0), (1.0, 1.0)):
        scene.observe(kl_nats_per_sequence=kl, entropy_nats_per_token=entropy)
    levels = [(event["step"], event["event"], sorted(event["signals"])) for event in scene.events()
              if event["event"] != "action"]  # fmt: skip
    both = ["entropy_nats_per_token", KL]
    assert levels == [(1, "warn", [KL]), (3, "warn", both), (4, "ok", [])]


def test_nan_is_an_alarm_and_null_on_disk(scene: Scene) -> None:
    assert scene.observe(kl_nats_per_sequence=math.nan).verdict.level is Level.ACT
    assert scene.events()[0]["signals"] == {KL: None}


# ---------------------------------------------------------------- measured beside training


def test_measurements_are_judged_once_and_shown_until_the_next(scene: Scene) -> None:
    scene.observe()
    scene.guard.measured({"win_rate": 0.3, "win_rate_high": 0.45, "gold": 2.0, "canary_z": None}, 4)
    decision = scene.observe()
    assert decision.reading.values == {"win_rate": 0.3}
    assert decision.verdict.warn == ("win_rate",), "0.45 is under 0.5, not under 0.4"
    assert scene.observe().reading.values == {"win_rate": 0.3}


def test_a_measurement_is_one_value_however_long_it_is_shown(make: MakeScene) -> None:
    scene = make(patience_measurements=2)
    scene.guard.measured({"canary_z": 9.0}, 0)
    assert [scene.observe().verdict.level for _ in range(4)] == [Level.OK] * 4
    scene.guard.measured({"canary_z": 9.0}, 4)
    assert scene.observe().verdict.level is Level.WARN


def test_no_step_is_good_while_the_last_evaluation_failed(make: MakeScene) -> None:
    scene = make(patience_measurements=2)
    assert scene.observe().good
    scene.guard.measured({"win_rate": 0.4, "win_rate_high": 0.49}, 1)
    assert not scene.observe().good
    assert not scene.observe().good
    scene.guard.measured({"win_rate": 0.6, "win_rate_high": 0.7}, 2)
    assert scene.observe().good


def test_an_evaluation_that_failed_speaks_against_the_checkpoints_since_the_last_that_passed(scene: Scene) -> None:
    for _ in range(4):
        scene.observe(kl_nats_per_sequence=1.0)
    scene.guard.measured({"win_rate": 0.6, "win_rate_high": 0.7}, version=2 + 3)  # after step 2
    scene.observe(kl_nats_per_sequence=1.0)
    scene.guard.measured({"win_rate": 0.3, "win_rate_high": 0.39}, version=5 + 3)
    assert scene.good == [0, 1, 2, 3, 4, 5]
    decision = scene.observe(kl_nats_per_sequence=1.0)
    assert decision.verdict.act == ("win_rate",)
    assert RollBack(2) in decision.actions


def test_measurements_of_a_branch_that_was_left_are_dropped(scene: Scene) -> None:
    scene.observe(kl_nats_per_sequence=1.0)
    scene.observe(kl_nats_per_sequence=12.0)
    assert scene.guard.branch == 1
    left = scene.version
    scene.guard.measured({"win_rate": 0.1, "win_rate_high": 0.2}, left)
    assert scene.observe(kl_nats_per_sequence=1.0).good
    scene.guard.measured({"win_rate": 0.1, "win_rate_high": 0.2}, left + 1)
    assert not scene.observe(kl_nats_per_sequence=1.0).good


def test_measurements_may_come_from_any_thread(scene: Scene) -> None:
    def tell() -> None:
        for version in range(200):
            scene.guard.measured({"canary_z": 1.0, "canary_ks": 0.5}, version)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(scene.observe().reading.values) in (0, 2)
    for thread in threads:
        thread.join()
    assert scene.observe().reading.values == {"canary_z": 1.0, "canary_ks": 0.5}


# ---------------------------------------------------------------- samples


def test_answers_are_kept_at_the_start_now_and_then_at_the_alarm_and_after(scene: Scene) -> None:
    for kl in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 12.0, 1.0, 1.0, 1.0):
        scene.observe(kl_nats_per_sequence=kl)
    assert scene.moments() == [(1, "start"), (5, "steady"), (7, "alarm"), (8, "after_rollback"), (10, "steady")]
    (first, *_) = samples = [s for s in read_jsonl(scene.run_dir / SAMPLES_FILE) if s["step"] == 7]
    assert len(samples) == 8
    assert first == {
        "step": 7, "version": 10, "branch": 0, "moment": "alarm", "prompt": "prompt 0", "answer": "answer 0",
        "reward": 0.0,
    }  # fmt: skip
    assert [sample["reward"] for sample in samples] == [0, 2, 5, 7, 10, 12, 15, 17], "all over the batch"


def test_a_small_batch_has_fewer_samples(make: MakeScene, tmp_path: Path) -> None:
    scene = make()
    scene.reader.values = {}
    scene.guard.observe(Batch(prompts=["p"], texts=["a"], rewards=[1.0]), step=1, version=1)
    assert len(read_jsonl(tmp_path / SAMPLES_FILE)) == 1
    scene.guard.observe(Batch(prompts=[], texts=[], rewards=[]), step=5, version=5)
    assert len(read_jsonl(tmp_path / SAMPLES_FILE)) == 1


@pytest.mark.parametrize("refreshes", [True, False])
def test_all_last_answers_of_a_policy_that_is_left_are_kept_for_a_reward_model_that_learns(
    make: MakeScene, tmp_path: Path, refreshes: bool
) -> None:
    scene = make(refreshes=refreshes)
    for kl in (1.0, 1.0, 12.0, 1.0):
        scene.observe(kl_nats_per_sequence=kl)
    left = tmp_path / LEFT_FILE
    assert left.exists() is refreshes
    if refreshes:
        rows = read_jsonl(left)
        assert [row["answer"] for row in rows] == list(Batch().texts)
        assert rows[1] == {
            "step": 3, "version": 6, "branch": 0, "prompt": "prompt 1", "answer": "answer 1", "reward": 1.0
        }  # fmt: skip
        Journal(tmp_path, step=2).close()
        assert left.read_bytes() == b"", "a learner killed before the rollback was saved is not left yet"


# ---------------------------------------------------------------- checkpoints


def test_what_is_done_on_resuming_is_written_down_where_the_checkpoint_stands(make: MakeScene, tmp_path: Path) -> None:
    scene = make(max_rollbacks=0)
    scene.observe(kl_nats_per_sequence=1.0)
    scene.observe(kl_nats_per_sequence=12.0)
    saved = scene.guard.to_state()
    assert scene.guard.halted
    again = make(step=2)
    again.guard.from_state(saved)
    assert again.guard.halted == scene.guard.halted
    again.guard.go_on()
    again.guard.applied(RollBack(1), why="other settings")
    last = scene.events()[-1]
    assert (last["step"], last["version"], last["to_step"], last["why"]) == (2, 5, 1, "other settings")
    assert again.guard.branch == 1
    again.guard.measured({"canary_z": 9.0}, 5)
    assert again.observe(kl_nats_per_sequence=1.0).good, "of the branch that was left"


def test_a_guard_that_begins_in_mid_run_counts_branches_as_the_run_does(tmp_path: Path) -> None:
    guard = Guard(GuardSection(), reader=ScriptedReader(), journal=Journal(tmp_path, step=7), branch=2)
    guard.observe(Batch(), step=8, version=12)
    assert guard.record()["branch"] == 2
    guard.close()


@pytest.mark.parametrize("watched", [True, False])
def test_what_was_measured_last_counts_no_more_where_nothing_is_measured_any_more(
    make: MakeScene, tmp_path: Path, watched: bool
) -> None:
    scene = make()
    scene.guard.measured({"canary_z": 4.0}, 4)
    assert scene.observe(kl_nats_per_sequence=1.0).verdict.warn == ("canary_z",)
    again = make(step=1, watch=WatchSection() if watched else None)
    again.guard.from_state(scene.guard.to_state())
    assert again.observe(kl_nats_per_sequence=1.0).good is not watched


SCRIPT = [1.0, 9.0, 1.0, 12.0, 1.0, 1.0, 9.0, 9.0, 1.0, 12.0, 1.0, 12.0]


@pytest.mark.parametrize("at", range(len(SCRIPT)))
def test_a_resumed_guard_goes_on_as_if_nothing_had_been(make: MakeScene, tmp_path: Path, at: int) -> None:
    def life(run_dir: Path, restart_at: int) -> tuple[list[Decision], list[dict[str, Any]], list[tuple[int, str]]]:
        scene, found = make(run_dir, patience_steps=1, cool_down_steps=2), []
        for place, kl in enumerate(SCRIPT):
            if place == restart_at:
                saved, good = json.loads(json.dumps(scene.guard.to_state(), allow_nan=False)), scene.good
                # Later steps of the learner that died, which the next one does again.
                scene.observe(kl_nats_per_sequence=12.0)
                scene.guard.close()
                scene = make(run_dir, step=place, patience_steps=1, cool_down_steps=2)
                scene.good = [step for step in good if step <= place]
                scene.guard.from_state(saved)
            if place == 2:
                scene.guard.measured({"canary_z": 3.5}, place + 3)
            found.append(scene.observe(kl_nats_per_sequence=kl))
        events = [{key: value for key, value in event.items() if key != "time_s"} for event in scene.events()]
        return found, events, scene.moments()

    assert life(tmp_path / "resumed", at) == life(tmp_path / "whole", -1)


def test_the_state_is_finite_whatever_was_measured(scene: Scene) -> None:
    scene.guard.measured({"anchor_perplexity_ratio": math.inf, "canary_z": math.nan}, 1)
    assert not scene.observe(kl_nats_per_sequence=math.nan).good
    json.dumps(scene.guard.to_state(), allow_nan=False)
    assert set(scene.guard.record()["signals"]) == {KL, "anchor_perplexity_ratio"}


def test_the_journal_takes_back_later_lines_and_leaves_the_others_alone(tmp_path: Path) -> None:
    kept = b'{"step":1, "x": 1}\n{"step": 3}\n'
    (tmp_path / GUARD_FILE).write_bytes(kept + b'{"step": 4}\n{"no": 1}\n[2]\n{"step": 2, "torn')
    Journal(tmp_path, step=3).close()
    assert (tmp_path / GUARD_FILE).read_bytes() == kept
    inode = (tmp_path / GUARD_FILE).stat().st_ino
    Journal(tmp_path, step=3).close()
    assert (tmp_path / GUARD_FILE).stat().st_ino == inode, "nothing to take back"
