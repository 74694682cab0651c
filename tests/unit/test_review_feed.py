"""Answers on their way to people: which, how often, and at nobody's cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.errors import ScoringError, StreamError
from cluster.records import DeadLetter, RuleVerdict, ScoredRollout, pack_floats
from cluster.review_queue import MemoryReviewQueue, ReviewItem
from reward_service.review.feed import FeedSettings, ReviewFeed, is_audited
from reward_service.scorer import Scores, ScriptedScorer
from reward_service.serving import Measured, Outcome
from tests.reward_support import LONG_S, Watch, World, rollout
from tests.serving_support import batch_scoring, running

HIT = (RuleVerdict("no_flattery", "penalise", "dear customer"), RuleVerdict("short", "flag"))


def measured(name: str) -> Measured:
    return Measured(rollout(name), Scores((1.0,), np.full(3, -1.0, dtype=np.float32)), ("hello", f"answer {name}"))


def scored(name: str, *, verdicts: tuple[RuleVerdict, ...] = ()) -> ScoredRollout:
    return ScoredRollout(
        rollout=rollout(name),
        member_scores=(1.0,),
        reward=1.0,
        uncertainty=0.0,
        ref_logprobs_f32=pack_floats([-1.0] * 3),
        rm_version="rm-1",
        verdicts=verdicts,
    )


class Queue(MemoryReviewQueue):
    """Fails on command; a test can wait for what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.pushed: list[ReviewItem] = []
        self.changed = asyncio.Event()

    async def push(self, items: Sequence[ReviewItem], *, limit: int) -> int:
        if self.failures:
            self.failures -= 1
            raise StreamError("unreachable")
        self.pushed += items
        self.changed.set()
        return await super().push(items, limit=limit)


class Scene:
    def __init__(self, *, audit_fraction: float = 0.0, queue_limit: int = 500, buffer: int = 512) -> None:
        self.queue, self.metrics, self.pauses = Queue(), Watch(), list[float]()
        settings = FeedSettings(audit_fraction=audit_fraction, queue_limit=queue_limit, buffer=buffer)
        self.feed = ReviewFeed(self.queue, settings=settings, metrics=self.metrics, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def offer(self, *outcomes: Outcome) -> None:
        names = [f"t{number}" for number in range(len(outcomes))]
        self.feed.offer([measured(name) for name in names], outcomes)


@pytest.fixture(name="scene")
async def make_scene() -> Scene:
    return Scene()


async def test_an_answer_that_rules_hit_goes_to_people_with_the_rules(scene: Scene) -> None:
    scene.offer(scored("t0"), scored("t1", verdicts=HIT))
    await scene.feed.flush()
    (item,) = scene.queue.pushed
    assert (item.kind, item.prompt, item.answers, item.policy_versions) == ("flagged", "hello", ("answer t1",), (0,))
    assert item.reason == "no_flattery (penalise): dear customer; short (flag)"
    assert scene.metrics.counts == {"review_taken": 1}


async def test_whatever_becomes_of_an_answer_it_may_be_audited() -> None:
    scene = Scene(audit_fraction=1.0)
    letter = DeadLetter(task=rollout("t1").task, stage="reward", reason="", deliveries=1, rejected=True)
    scene.offer(scored("t0"), letter, scored("t2", verdicts=HIT))
    await scene.feed.flush()
    assert [item.kind for item in scene.queue.pushed] == ["audit", "audit", "flagged"]


async def test_an_answer_that_waits_for_a_source_is_one_item_when_it_is_scored() -> None:
    scene = Scene(audit_fraction=1.0)
    for _ in range(3):
        scene.offer(ScoringError("source down"))
        await scene.feed.flush()
    scene.offer(scored("t0", verdicts=HIT))
    await scene.feed.flush()
    assert [item.kind for item in scene.queue.pushed] == ["flagged"]
    assert scene.metrics.counts == {"review_taken": 1}


def test_the_audited_share_is_what_was_asked_for_and_the_same_everywhere() -> None:
    names = [f"task-{number}" for number in range(20_000)]
    drawn = [is_audited(name, fraction=0.1) for name in names]
    assert 0.09 < sum(drawn) / len(names) < 0.11  # 4.7 standard deviations
    assert drawn == [is_audited(name, fraction=0.1) for name in names]
    assert not any(is_audited(name, fraction=0.0) for name in names)
    assert all(is_audited(name, fraction=1.0) for name in names)


async def test_the_same_answer_offered_again_is_one_item(scene: Scene) -> None:
    for _ in range(2):
        scene.offer(scored("t0", verdicts=HIT))
        await scene.feed.flush()
    assert scene.metrics.counts == {"review_taken": 1, "review_left_out": 1}
    assert (await scene.queue.progress()).waiting["flagged"] == 1


async def test_a_full_queue_and_a_full_buffer_leave_items_out_and_count_them() -> None:
    scene = Scene(audit_fraction=1.0, queue_limit=3, buffer=5)
    scene.offer(*(scored(f"t{number}") for number in range(9)))
    assert scene.metrics.counts == {"review_left_out": 4}
    await scene.feed.flush()
    assert scene.metrics.counts == {"review_taken": 3, "review_left_out": 6}


async def test_a_queue_that_errs_is_tried_again_and_nothing_is_pushed_twice(scene: Scene) -> None:
    scene.queue.failures = 3
    run = asyncio.create_task(scene.feed.run())
    scene.offer(scored("t0", verdicts=HIT))
    await asyncio.wait_for(scene.queue.changed.wait(), LONG_S)
    scene.queue.changed.clear()
    scene.offer(scored("t0"), scored("t1", verdicts=HIT))
    await asyncio.wait_for(scene.queue.changed.wait(), LONG_S)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert scene.pauses == [0.5, 1.0, 2.0]
    assert [item.answers[0] for item in scene.queue.pushed] == ["answer t0", "answer t1"]


async def test_what_waits_at_the_end_is_given_up_when_the_queue_does_not_answer(scene: Scene) -> None:
    scene.queue.failures = 99
    scene.offer(scored("t0", verdicts=HIT))
    await asyncio.wait_for(scene.feed.flush(), LONG_S)
    assert scene.queue.pushed == []


async def test_samples_are_scored_though_the_review_queue_is_dead() -> None:
    scene, world = Scene(audit_fraction=1.0, buffer=2), World()
    scene.queue.failures = 10**9
    scoring = batch_scoring(ScriptedScorer(), feed=scene.feed)
    async with running(world, scoring) as worker:
        await world.publish(*(rollout(f"t{number}") for number in range(6)))
        assert len(await world.scored(6)) == 6
    assert worker.counts == {"scored": 6}
    assert scene.metrics.counts == {"review_left_out": 4}
