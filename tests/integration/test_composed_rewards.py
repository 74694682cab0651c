"""Rewards from elsewhere through the whole worker: a real reward server that goes away and comes back, a function that
fails on one answer, rules that hit. Scripted models and memory streams around them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.records import Rollout, RuleVerdict
from cluster.reward_models import Calibration
from configs.reward import FunctionReward, HttpReward, ModelReward, RewardSection
from reward_service.batch_scoring import BatchScoring
from reward_service.forward_thread import ForwardThread
from reward_service.rewards.compose import make_composer
from reward_service.serving import Rewarding, Serving
from reward_service.worker import RewardWorker
from reward_service.worker_metrics import NoMetrics
from tests.reward_server import Reply, reward_server
from tests.reward_support import World, rollout

pytestmark = pytest.mark.timeout(90)

RULES = "rules: [{name: seven, when: {regex: '^7 '}, then: {penalise: {std: 2.0}}}]\n"


def not_nine(prompt: str, answer: str) -> float:
    """The scripted scorer's texts are token ids."""
    if answer.startswith("9"):
        raise ValueError("nine")
    return 10.0


class ComposedWorld(World):
    """A World whose worker composes rewards as the configuration says."""

    def __init__(self, config: RewardSection) -> None:
        super().__init__()
        self._config = config
        self.scoring: BatchScoring

    def worker(self) -> RewardWorker:
        rewarding = Rewarding(self._config, composer=make_composer(self._config))
        self.scoring = scoring = BatchScoring(
            self.scorer,
            thread=ForwardThread(),
            cache=None,
            metrics=NoMetrics(),
            timeout_s=self.score_timeout_s,
            rewarding=rewarding,
        )
        scoring.install(Serving(self.scorer, Calibration(mean=1.0, std=2.0, count=10), members=1))
        return RewardWorker(self.streams, scoring=scoring, metrics=self.watch, settings=self.settings, time=self.time)


def answers(*firsts: int) -> list[Rollout]:
    """Of three tokens each, so the scripted model gives 3.0."""
    return [rollout(f"t{first}", response=(first, 8, 2)) for first in firsts]


@contextlib.asynccontextmanager
async def running(config: RewardSection) -> AsyncIterator[ComposedWorld]:
    world = ComposedWorld(config)
    async with world.running():
        yield world


async def test_a_server_that_goes_away_and_comes_back_loses_nothing() -> None:
    with reward_server(lambda prompt, answer: 0.25) as server:
        server.replies.extend([Reply(503)] * 4)
        source = HttpReward(url=server.url, weight=4.0, retries=0, breaker_failures=2, breaker_pause_s=0.2)
        async with running(RewardSection(sources=(ModelReward(), source))) as world:
            await world.publish(*answers(1, 2, 3, 4, 5, 6))
            scored = await world.scored(6)

            assert sorted(record.rollout.task.task_id for record in scored) == [f"t{n}" for n in range(1, 7)]
            # (3 − 1)/2 + 4·0.25
            assert {record.reward for record in scored} == {2.0}
            assert {tuple(record.parts.values()) for record in scored} == {(3.0, 0.25)}
            version, mark, tag = scored[0].rm_version.partition("~")
            assert (version, mark) == (world.scorer.version, "~")
            assert len(tag) == 8
            assert world.watch.counts["dead"] == 0
            assert await world.left() == 0


async def test_a_function_that_fails_on_one_answer_fails_that_one_alone(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    config = RewardSection(
        sources=(FunctionReward(path=f"{__name__}:not_nine"), ModelReward()), constitution=tmp_path / "rules.yaml"
    )
    async with running(config) as world:
        await world.publish(*answers(1, 9, 7))
        scored = {record.rollout.task.task_id: record for record in await world.scored(2)}
        for delivery in range(1, world.settings.max_deliveries + 1):
            await world.watch.reached("failures", delivery)
            world.clock.now_s += 31.0  # let go, it comes again when its lease has run out
        (dead,) = await world.dead(1)

    assert {name: record.reward for name, record in scored.items()} == {"t1": 11.0, "t7": 9.0}
    assert scored["t7"].verdicts == (RuleVerdict("seven", "penalise", "'7 '"),)
    assert scored["t1"].verdicts == ()
    assert dead.task.task_id == "t9"
    assert "nine" in dead.reason
    assert not dead.rejected
    counts = world.scoring.reward_counts
    assert counts["rule seven"] == 1
    assert [count for name, count in counts.items() if name.startswith("failed") and count] == [3], "a time a delivery"
