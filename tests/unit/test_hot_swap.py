"""A reward model takes over while scoring goes on: nothing lost, nothing mixed. By order of events."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from cluster.errors import ModelError, StreamError
from cluster.records import ScoredRollout
from cluster.reward_models import Calibration, RewardModels, RmManifest
from cluster.rm_announcement import MemoryRewardModelBoard, RmAnnouncement
from cluster.stores import MemoryScores
from learner.batch import train_batch
from learner.score_scale import ScoreScale
from reward_service.hot_swap import ModelWatch, WatchTimes
from reward_service.rewards.compose import Composed, Composer
from reward_service.scorer import ScriptedScorer
from reward_service.serving import Rewarding, Serving
from reward_service.worker import WorkerSettings
from tests.reward_support import LONG_S, Gate, ManualClock, Watch, World, rollout
from tests.serving_support import batch_scoring, running

OFFSETS = {"rm-1": 0.0, "rm-2": 1000.0, "rm-3": 5000.0}
"""Added to the length of an answer, which tells versions' scores apart."""


def scorer(version: str) -> ScriptedScorer:
    return ScriptedScorer(version=version, members=lambda item: (OFFSETS[version] + len(item.response_ids),))


def serving(version: str) -> Serving:
    return Serving(scorer(version))


def versions_of(outcomes: Sequence[object]) -> set[str]:
    """Of scored rollouts, each of whose scores is its version's own."""
    scored = [item for item in outcomes if isinstance(item, ScoredRollout)]
    assert len(scored) == len(outcomes)
    assert [item.reward for item in scored] == [
        OFFSETS[item.rm_version] + len(item.rollout.response_ids) for item in scored
    ]
    return {item.rm_version for item in scored}


# ---------------------------------------------------------------- a batch has one version


async def test_a_batch_in_its_forward_pass_ends_with_the_model_it_began_with() -> None:
    old, gate = scorer("rm-1"), Gate()
    old.before = gate
    scoring = batch_scoring(old)
    task = asyncio.create_task(scoring.score([rollout("a"), rollout("b")]))
    await gate.wait_entered()
    scoring.install(serving("rm-2"))
    gate.opened.set()
    outcomes, learned = await task
    assert versions_of(outcomes) == {"rm-1"}
    assert all(key.startswith("rm-1:") for key in learned)
    assert versions_of((await scoring.score([rollout("c")]))[0]) == {"rm-2"}
    assert scoring.counts == {"swaps": 1}


class SlowStore(MemoryScores):
    """Lets the test in while a batch looks its scores up."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        self.asked.set()
        await self.go_on.wait()
        return await super().get_many(keys)


async def test_a_batch_that_waits_for_the_cache_ends_with_the_model_whose_scores_it_looked_up() -> None:
    store = SlowStore()
    scoring = batch_scoring(scorer("rm-1"), store=store)
    task = asyncio.create_task(scoring.score([rollout("a")]))
    await store.asked.wait()
    scoring.install(serving("rm-2"))
    store.go_on.set()
    outcomes, learned = await task
    assert versions_of(outcomes) == {"rm-1"}
    await scoring.remember(learned)
    assert versions_of((await scoring.score([rollout("a")]))[0]) == {"rm-2"}  # the same text, scored anew


async def test_a_batch_that_waits_for_other_sources_keeps_version_and_calibration() -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()
    seen: list[Calibration | None] = []

    class Slow:
        tag = "t"

        async def compose(
            self, samples: Sequence[object], *, model_rewards: Sequence[float], calibration: Calibration | None
        ) -> list[Composed]:
            seen.append(calibration)
            asked.set()
            await go_on.wait()
            return [Composed(reward, {}, ()) for reward in model_rewards]

    scoring = batch_scoring(scorer("rm-1"), rewarding=Rewarding(composer=cast(Composer, Slow())))
    first, second = (Calibration(mean=mean, std=1.0, count=9) for mean in (0.0, 1000.0))
    scoring.install(Serving(scorer("rm-1"), first))
    task = asyncio.create_task(scoring.score([rollout("a")]))
    await asked.wait()
    scoring.install(Serving(scorer("rm-2"), second))
    go_on.set()
    (outcome,), _ = await task
    assert isinstance(outcome, ScoredRollout)
    assert (outcome.rm_version, outcome.reward) == ("rm-1~t", 3.0)
    (outcome,), _ = await scoring.score([rollout("b")])
    assert isinstance(outcome, ScoredRollout)
    assert (outcome.rm_version, outcome.reward) == ("rm-2~t", 1003.0)
    assert seen == [first, second]


async def test_the_old_model_is_let_go_of() -> None:
    old = scorer("rm-1")
    scoring = batch_scoring(old)
    await scoring.score([rollout("a")])
    gone = weakref.ref(old)
    scoring.install(serving("rm-2"))
    await scoring.score([rollout("b")])
    del old
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- a stream


def registry(directory: Path) -> RewardModels:
    """rm-1 and rm-2, each calibrated to its own scores."""
    models = RewardModels(directory)
    for version in ("rm-1", "rm-2"):
        calibration = Calibration(mean=OFFSETS[version] + 3, std=1.0, count=10)
        with models.draft() as draft:
            (draft / "member_0").mkdir()
            models.publish(draft, RmManifest(version=version, members=1, calibration=calibration))
    models.make_current("rm-1")
    return models


async def test_a_swap_during_a_stream_loses_no_sample_and_mixes_no_versions(tmp_path: Path) -> None:
    world, board, store = World(), MemoryRewardModelBoard(), MemoryScores()
    scorings = [batch_scoring(scorer("rm-1"), store=store) for _ in range(2)]
    loads: list[str] = []

    async def load(version: str) -> Serving:
        loads.append(version)
        return serving(version)

    watches = [ModelWatch(board, load=load, scoring=scoring, metrics=Watch()) for scoring in scorings]
    names = [f"t{number}" for number in range(120)]
    answers = [rollout(name, response=[7] * (number % 5 + 1)) for number, name in enumerate(names)]
    world.settings = WorkerSettings(consumer="w0", batch_size=4, batch_wait_s=0.0, claim_wait_s=0.02)
    scored: list[ScoredRollout] = []
    async with running(world, scorings[0]):
        world.settings = WorkerSettings(consumer="w1", batch_size=4, batch_wait_s=0.0, claim_wait_s=0.02)
        async with running(world, scorings[1]):
            await world.publish(*answers[:40])
            scored += await world.scored(20)
            await board.announce("rm-2", reason="better")
            await watches[0].look()  # the workers hear of it at different times
            await world.publish(*answers[40:80])
            scored += await world.scored(60)
            await watches[1].look()
            await world.publish(*answers[80:])
            scored += await world.scored(40)
    assert sorted(item.rollout.task.task_id for item in scored) == sorted(names)
    assert await world.left() == 0
    assert loads == ["rm-2", "rm-2"]
    assert versions_of(scored) == {"rm-1", "rm-2"}
    assert versions_of(scored[-40:]) == {"rm-2"}
    learner_statistics_are_each_versions_own(scored, registry(tmp_path / "rm"))


def learner_statistics_are_each_versions_own(scored: Sequence[ScoredRollout], models: RewardModels) -> None:
    scale = ScoreScale(models)
    for start in range(0, len(scored), 8):
        batch = train_batch(scored[start : start + 8])
        scores_B = scale.normalised(batch, score_clip=5.0)
        assert float(scores_B.abs().max()) < 5.0  # a score on the other's scale would be hundreds away
    for version in ("rm-1", "rm-2"):
        own = [item.reward for item in scored if item.rm_version == version]
        calibration = models.get(version).manifest.calibration
        assert calibration is not None
        moments = scale.normaliser.moments[version]
        assert moments.count == calibration.count + len(own)
        total = calibration.mean * calibration.count + sum(own)
        assert moments.mean == pytest.approx(total / moments.count)


# ---------------------------------------------------------------- the watch


class Board(MemoryRewardModelBoard):
    """Fails on command."""

    error: Exception | None = None

    async def newest(self, *, after: int = -1) -> RmAnnouncement | None:
        if self.error is not None:
            raise self.error
        return await super().newest(after=after)


class Scene:
    """A watch over a board, with loads that fail on command."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.board = Board(now_s=self.clock)
        self.scoring = batch_scoring(scorer("rm-1"))
        self.metrics = Watch()
        self.loads: list[str] = []
        self.broken: set[str] = set()
        self.during = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        times = WatchTimes(first_retry_s=1.0, last_retry_s=4.0, now=self.clock)
        self.watch = ModelWatch(self.board, load=self.load, scoring=self.scoring, metrics=self.metrics, times=times)

    async def load(self, version: str) -> Serving:
        self.loads.append(version)
        self.during.set()
        await self.may_end.wait()
        if version in self.broken:
            raise ModelError("damaged", got=version)
        return serving(version)

    @property
    def version(self) -> str:
        return self.scoring.serving.version


@pytest.fixture(name="scene")
async def make_scene() -> Scene:
    return Scene()


async def test_nothing_announced_is_nothing_to_do(scene: Scene) -> None:
    await scene.watch.look()
    assert (scene.loads, scene.version) == ([], "rm-1")


async def test_an_announced_version_takes_over_once(scene: Scene) -> None:
    await scene.board.announce("rm-2", reason="")
    for _ in range(3):
        await scene.watch.look()
    assert (scene.loads, scene.version) == (["rm-2"], "rm-2")


async def test_a_return_to_an_older_version_is_news(scene: Scene) -> None:
    for version in ("rm-2", "rm-1"):
        await scene.board.announce(version, reason="")
        await scene.watch.look()
    assert (scene.loads, scene.version) == (["rm-2", "rm-1"], "rm-1")


async def test_what_scores_already_is_not_loaded_again(scene: Scene) -> None:
    await scene.board.announce("rm-1", reason="start of the run")
    await scene.watch.look()
    assert scene.loads == []


async def test_scoring_goes_on_during_a_load(scene: Scene) -> None:
    scene.may_end.clear()
    await scene.board.announce("rm-2", reason="")
    looking = asyncio.create_task(scene.watch.look())
    await asyncio.wait_for(scene.during.wait(), LONG_S)
    assert versions_of((await scene.scoring.score([rollout("a")]))[0]) == {"rm-1"}
    scene.may_end.set()
    await looking
    assert versions_of((await scene.scoring.score([rollout("a")]))[0]) == {"rm-2"}


async def test_a_version_that_does_not_load_leaves_the_old_one_and_is_tried_again_after_growing_pauses(
    scene: Scene,
) -> None:
    scene.broken = {"rm-2"}
    await scene.board.announce("rm-2", reason="")
    tries: list[int] = []
    for second in range(16):
        scene.clock.now_s = float(second)
        await scene.watch.look()
        if len(scene.loads) > len(tries):
            tries.append(second)
    assert tries == [0, 1, 3, 7, 11, 15]  # after 1, 2, 4, 4, 4 seconds
    assert scene.version == "rm-1"
    assert scene.watch.counts["swap_failures"] == scene.metrics.counts["swap_failures"] == 6
    scene.broken = set()
    scene.clock.now_s = 19.0
    await scene.watch.look()
    assert scene.version == "rm-2"


async def test_something_newer_does_not_wait_for_the_pause_of_what_failed(scene: Scene) -> None:
    scene.broken = {"rm-2"}
    await scene.board.announce("rm-2", reason="")
    await scene.watch.look()
    await scene.board.announce("rm-3", reason="")
    await scene.watch.look()
    assert scene.version == "rm-3"


async def test_a_model_that_was_overtaken_while_it_loaded_is_not_used(scene: Scene) -> None:
    scene.may_end.clear()
    await scene.board.announce("rm-2", reason="")
    looking = asyncio.create_task(scene.watch.look())
    await asyncio.wait_for(scene.during.wait(), LONG_S)
    await scene.board.announce("rm-3", reason="")
    scene.may_end.set()
    await looking
    assert scene.version == "rm-1"
    await scene.watch.look()
    assert (scene.version, scene.scoring.counts["swaps"]) == ("rm-3", 1)


async def test_a_board_that_does_not_answer_is_asked_again(scene: Scene) -> None:
    await scene.board.announce("rm-2", reason="")
    scene.board.error = StreamError("unreachable")
    for _ in range(3):
        await scene.watch.look()
    assert (scene.version, scene.watch.counts["board_failures"]) == ("rm-1", 3)
    scene.board.error = None
    await scene.watch.look()
    assert scene.version == "rm-2"


async def test_run_looks_until_it_is_cancelled() -> None:
    scene, pauses = Scene(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        assert seconds == 0.5
        pauses.set()
        await asyncio.sleep(0)

    times = WatchTimes(sleep=sleep)
    watch = ModelWatch(scene.board, load=scene.load, scoring=scene.scoring, metrics=scene.metrics, times=times)
    run = asyncio.create_task(watch.run())
    await scene.board.announce("rm-2", reason="")
    await asyncio.wait_for(scene.during.wait(), LONG_S)
    await asyncio.wait_for(pauses.wait(), LONG_S)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert scene.version == "rm-2"
