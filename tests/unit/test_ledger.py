from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.records import PromptTask
from learner.ledger import Gate, Ledger
from tests.unit.helpers import scored, task


def ledger_with(*task_ids: str, groups: dict[str, str] | None = None) -> tuple[Ledger, list[PromptTask]]:
    ledger = Ledger(task_deadline_s=10.0)
    tasks = [task(task_id, group_id=(groups or {}).get(task_id)) for task_id in task_ids]
    ledger.issue(tasks, now_s=0.0)
    return ledger, tasks


@pytest.mark.parametrize(
    ("step", "max_staleness", "dropped", "allowed"), [(0, 0, 0, 8), (0, 1, 0, 16), (3, 1, 5, 45), (9, 1, 0, 80)]
)
def test_gate_counts_batches_up_to_the_last_step(step: int, max_staleness: int, dropped: int, allowed: int) -> None:
    gate = Gate(batch_size=8, max_staleness=max_staleness, total_steps=10)
    assert gate.allowance(step=step, dropped=dropped) == allowed


def test_first_result_wins_and_later_ones_are_counted() -> None:
    ledger, (first,) = ledger_with("a-0")
    assert ledger.accept(scored(first))
    assert not ledger.accept(scored(first))
    assert (ledger.held, ledger.counts.duplicates) == (1, 1)


def test_a_task_past_its_deadline_is_issued_again_with_a_higher_attempt() -> None:
    ledger, _ = ledger_with("a-0", "a-1")
    assert ledger.overdue(now_s=9.9) == []
    assert [(again.task_id, again.attempt) for again in ledger.overdue(now_s=10.0)] == [("a-0", 1), ("a-1", 1)]
    assert ledger.overdue(now_s=19.9) == []
    assert (ledger.counts.issued, ledger.counts.reissued) == (2, 2)


def test_take_waits_for_the_oldest_groups_however_late_they_come() -> None:
    groups = {"a-0": "g", "a-1": "g", "a-2": "h", "a-3": "h"}
    ledger, tasks = ledger_with("a-0", "a-1", "a-2", "a-3", groups=groups)
    for done in (tasks[3], tasks[2], tasks[1]):
        ledger.accept(scored(done))
    assert ledger.take(2) is None
    ledger.accept(scored(tasks[0]))
    batch = ledger.take(2)
    assert batch is not None
    assert [result.rollout.task.task_id for result in batch] == ["a-0", "a-1"]
    assert len(ledger.take(2) or []) == 2


def test_a_dead_member_takes_its_group_with_it_whenever_the_others_come() -> None:
    groups = {"a-0": "g", "a-1": "g", "a-2": "g"}
    ledger, tasks = ledger_with("a-0", "a-1", "a-2", groups=groups)
    ledger.accept(scored(tasks[0]))
    assert ledger.bury("a-1")
    ledger.accept(scored(tasks[2]))
    assert (ledger.counts.dead, ledger.counts.stale_dropped, ledger.held, ledger.outstanding) == (1, 2, 0, 0)


def test_samples_over_age_are_dropped_and_counted() -> None:
    ledger, tasks = ledger_with("a-0", "a-1")
    ledger.accept(scored(tasks[0], version=3))
    ledger.accept(scored(tasks[1], version=4))
    assert ledger.drop_stale(version=5, max_staleness=1) == 1
    batch = ledger.take(1)
    assert batch is not None
    assert batch[0].rollout.oldest_version == 4


def test_what_is_abandoned_has_its_outcome_and_late_results_are_dropped() -> None:
    groups = {"a-0": "g", "a-1": "g", "a-2": "h", "a-3": "h"}
    ledger, tasks = ledger_with("a-0", "a-1", "a-2", "a-3", groups=groups)
    ledger.accept(scored(tasks[0]))
    ledger.bury("a-3")
    assert ledger.abandon() == 3
    assert (ledger.counts.abandoned, ledger.counts.dead, ledger.counts.dropped) == (3, 1, 4)
    assert not any(ledger.accept(scored(late)) for late in tasks)
    assert not ledger.bury("a-2")
    assert ledger.counts.duplicates == 5
    assert ledger.overdue(now_s=99.0) == ledger.retry_all(now_s=99.0) == []
    resumed = Ledger.from_state(json.loads(json.dumps(ledger.to_state())), task_deadline_s=1.0, incarnation="b")
    assert resumed.counts == ledger.counts
    fresh = [task("a-4", group_id="g"), task("a-5", group_id="g")]
    ledger.issue(fresh, now_s=0.0)
    for one in fresh:
        ledger.accept(scored(one))
    assert len(ledger.take(2) or []) == 2, "a group of the same name is not broken any more"


def test_a_ledger_of_before_there_were_rollbacks_is_read() -> None:
    ledger, _ = ledger_with("a-0")
    state = ledger.to_state()
    del state["counts"]["abandoned"]
    assert Ledger.from_state(state, task_deadline_s=1.0, incarnation="b").counts.abandoned == 0


def test_state_survives_json_and_takes_a_new_name() -> None:
    groups = {"old-0": "old-0", "old-1": "old-0", "old-2": "old-2", "old-3": "old-2"}
    ledger, tasks = ledger_with("old-0", "old-1", "old-2", "old-3", groups=groups)
    ledger.accept(scored(tasks[0]))
    ledger.bury("old-2")
    state = json.loads(json.dumps(ledger.to_state()))
    resumed = Ledger.from_state(state, task_deadline_s=10.0, incarnation="new")
    again = resumed.retry_all(now_s=0.0)
    assert {(late.task_id, late.group_id) for late in again} == {
        ("new-0", "new-0"),
        ("new-1", "new-0"),
        ("new-3", "new-2"),
    }
    assert not resumed.accept(scored(tasks[1])), "a late result of the earlier incarnation must not count"
    assert resumed.counts.issued == 4
    for late in again:
        resumed.accept(scored(late))
    assert (resumed.held, resumed.counts.stale_dropped) == (2, 1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["issue", "accept", "bury", "stale", "take", "abandon", "resume"]), st.integers(0, 30)
        )
    )
)
def test_every_issued_task_has_exactly_one_place(moves: list[tuple[str, int]]) -> None:
    ledger, number, version = Ledger(task_deadline_s=1.0), 0, 0
    for move, pick in moves:
        if move == "issue":
            group = f"x-{number}"
            ledger.issue([task(f"x-{number + k}", group_id=group) for k in range(2)], now_s=0.0)
            number += 2
        elif move == "accept":
            members = [task(f"x-{pick}", group_id=f"x-{pick // 2 * 2}")]
            ledger.accept(scored(members[0], version=pick % 3))
        elif move == "bury":
            ledger.bury(f"x-{pick}")
        elif move == "stale":
            version = (version + 1) % 4
            ledger.drop_stale(version=version, max_staleness=1)
        elif move == "take":
            ledger.take(2)
        elif move == "abandon":
            left = ledger.outstanding + ledger.held
            assert ledger.abandon() == left
            assert ledger.outstanding == ledger.held == 0
        else:
            ledger = Ledger.from_state(ledger.to_state(), task_deadline_s=1.0, incarnation="x")
        counts = ledger.counts
        assert counts.issued == number
        dropped = counts.stale_dropped + counts.dead + counts.rejected + counts.abandoned
        assert counts.dropped == dropped
        assert counts.issued == counts.trained + dropped + ledger.outstanding + ledger.held
