"""The learner's loop with a guard: what a decision leads to, in the run's files and in what is trained next."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from cluster.checkpoint import CheckpointStore
from cluster.process import Process
from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, decode, encode, pack_floats, pack_ids
from cluster.streams import StreamName
from cluster.streams_memory import MemoryStreams
from cluster.weights import MemoryWeightChannel
from configs.guard import Above, Thresholds
from configs.learner import KlBudget
from configs.run import RunConfig
from learner.follow import Follower
from learner.guard.record import Alert, Halt, RaiseBeta, RollBack
from learner.guarded import MakeGuard, make_guard
from learner.learner_actor import LearnerActor
from learner.loop import Ending, train
from learner.ranks import Ranks
from learner.state import LearnerState
from learner.team import Team
from learner.telemetry import Telemetry
from learner.trainer import Trainer
from tests.guard_support import ScriptedGuard, alarm
from tests.ranks_support import on_ranks
from tests.run_support import prepare_run

STEPS = 8
BUDGET_NATS = 0.009
"""About two steps' movement of these models."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepare_run(tmp_path_factory.mktemp("prepared"), f"learner.steps={STEPS}", "checkpoint.every_steps=2")


@pytest.fixture
def config(prepared: RunConfig, tmp_path: Path) -> RunConfig:
    """A run directory of this test's own over the same models."""
    run_dir = tmp_path / prepared.name
    run_dir.mkdir()
    for name in ("sft", "rm", "data", "model"):
        if (prepared.run_dir / name).exists():
            (run_dir / name).symlink_to(prepared.run_dir / name)
    return prepared.model_copy(update={"runs_dir": tmp_path})


class World:
    """A learner with its loop, and one who answers its prompts."""

    def __init__(self, config: RunConfig, guarded_by: MakeGuard, team: Team | None = None) -> None:
        self.streams, self.channel = MemoryStreams(), MemoryWeightChannel()
        self.state = LearnerState.build(
            config, run_dir=config.run_dir, streams=self.streams, channel=self.channel, team=team, guarded_by=guarded_by
        )
        process = SimpleNamespace(
            registry=CollectorRegistry(),
            heartbeat=SimpleNamespace(beat=lambda: None),
            redis=SimpleNamespace(streams=self.streams),
        )
        self.telemetry = Telemetry(config, run_dir=config.run_dir, process=cast(Process, process), state=self.state)
        self._random = np.random.default_rng(0)

    async def train(self) -> Ending:
        actor = asyncio.create_task(self._act())
        try:
            async with asyncio.timeout(90):
                return await train(self.state, self.telemetry, stop=asyncio.Event())
        finally:
            actor.cancel()
            await asyncio.gather(actor, return_exceptions=True)

    async def _act(self) -> None:
        while True:
            for delivery in await self.streams.claim(StreamName.PROMPTS, consumer="a", max_count=64, wait_s=0.05):
                newest = await self.channel.newest_version()
                answer = self._answer(decode(delivery.payload, PromptTask), version=newest or 0)
                await self.streams.advance(
                    StreamName.PROMPTS, delivery.entry_id, target=StreamName.SCORED, payload=encode(answer)
                )

    def _answer(self, task: PromptTask, *, version: int) -> ScoredRollout:
        length = int(self._random.integers(2, 12))
        rollout = Rollout(
            task=task,
            response_ids_i32=pack_ids(self._random.integers(4, 60, size=length)),
            behaviour_logprobs_f32=pack_floats(-self._random.random(length) - 4.0),
            version_runs=(VersionRun(0, version),),
            finish_reason="stop",
            actor="a",
            generate_s=0.1,
        )
        score = float(self._random.normal())
        return ScoredRollout(
            rollout=rollout,
            member_scores=(score,),
            reward=score,
            uncertainty=0.0,
            ref_logprobs_f32=pack_floats(-self._random.random(length) - 4.0),
            rm_version="rm-1",
        )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def identity(record: dict[str, Any]) -> int:
    """Samples that are out or held, by the record's own numbers."""
    outcomes = ("trained", "stale_dropped", "dead", "rejected", "abandoned")
    return int(record["samples_issued"] - sum(record[f"samples_{outcome}"] for outcome in outcomes))


@pytest.mark.timeout(120)
async def test_a_rollback_in_the_loop(config: RunConfig) -> None:
    actions = (Alert("look"), RollBack(2), RaiseBeta(factor=2.0, floor=0.05))
    guard = ScriptedGuard({5: alarm(*actions)})
    world = World(config, guard)
    assert await world.train() is Ending.STEPS_DONE
    records = lines(config.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["branch"] for record in records] == [0] * 5 + [1] * 3
    versions = [record["version"] for record in records]
    assert versions == sorted(set(versions))
    assert [record["guard"]["level"] for record in records] == ["ok"] * 4 + ["act"] + ["ok"] * 3
    assert records[4]["samples_abandoned"] == 0
    assert records[5]["samples_abandoned"] > 0
    assert all(0 <= identity(record) <= 2 * config.learner.batch_size for record in records)
    assert records[-1]["samples_trained"] == STEPS * config.learner.batch_size
    # The controller moves β before it is recorded, by at most a half a step.
    assert records[5]["beta"] > 1.4 * records[1]["beta"]
    assert [type(entry[0]) for entry in guard.log if len(entry) == 2 and not isinstance(entry[1], int)] == [
        Alert, RollBack, RaiseBeta,
    ]  # fmt: skip
    assert guard.seen[0][2] == (0,)
    assert guard.seen[4][2] == (0, 2, 4)
    assert guard.seen[5][2] == (0, 2)
    assert all(text.strip() for text in guard.texts)
    store = CheckpointStore(config.run_dir / "checkpoints", keep_last=9)
    assert {0, 2, 6, 8} <= set(store.list())


@pytest.mark.timeout(120)
async def test_a_halt_ends_the_run_with_a_checkpoint(config: RunConfig) -> None:
    world = World(config, ScriptedGuard({3: alarm(Halt("enough"))}))
    assert await world.train() is Ending.HALTED
    assert [record["step"] for record in lines(config.run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert CheckpointStore(config.run_dir / "checkpoints", keep_last=9).latest() == 3
    again = World(config, ScriptedGuard())
    assert await again.train() is Ending.HALTED
    assert again.state.step == 3


@pytest.mark.timeout(120)
async def test_the_guard_itself_rolls_a_run_back_and_halts_it(config: RunConfig) -> None:
    """Every KL is over this threshold: the alarm comes at once, and again after the rollback."""
    thresholds = Thresholds(kl_nats_per_sequence=Above(warn=-1e6, act=-1e6))
    section = config.guard.model_copy(
        update={"enabled": True, "thresholds": thresholds, "warmup_steps": 1, "patience_steps": 2,
                "cool_down_steps": 1, "max_rollbacks": 1}
    )  # fmt: skip
    config = config.model_copy(update={"guard": section})
    world = World(config, make_guard)
    assert await world.train() is Ending.HALTED
    events = lines(config.run_dir / "guard.jsonl")
    rollback = next(event for event in events if event.get("action") == "roll_back")
    assert (rollback["to_step"], rollback["rm_version"]) == (0, "rm-1")
    assert any(event.get("action") == "halt" for event in events)
    records = lines(config.run_dir / "metrics.jsonl")
    assert records[-1]["guard"]["act"] == ["kl_nats_per_sequence"]
    assert "kl_nats_per_sequence" in records[-1]["signals"]
    assert all("kl_budget_share" not in record["signals"] for record in records), "there is no budget"
    assert all(record["guard_seconds"] > 0 for record in records)
    moments = {sample["moment"] for sample in lines(config.run_dir / "guard_samples.jsonl")}
    assert {"start", "alarm", "after_rollback"} <= moments


def spend(ranks: Ranks, config: RunConfig) -> str:
    """A run under the guard on several ranks. How it ended, on each of them."""
    trainer = Trainer(config, run_dir=config.run_dir, ranks=ranks)
    if ranks.rank > 0:
        follower = Follower(trainer, beat=lambda: None)
        follower.until_ready()
        return follower.until_end()
    world = World(config, make_guard, Team(trainer))
    ending = asyncio.run(world.train())
    world.state.team.end(ending)
    return ending


@pytest.mark.timeout(180)
@pytest.mark.parametrize("size", [1, 2])
async def test_the_guard_warns_before_the_kl_budget_is_spent(config: RunConfig, size: int) -> None:
    thresholds = Thresholds(kl_budget_share=Above(warn=0.2))
    guard = {"enabled": True, "actions": ("alert",), "thresholds": thresholds, "warmup_steps": 0, "patience_steps": 1}
    budget = KlBudget(cumulative_nats_per_sequence=BUDGET_NATS)
    config = config.model_copy(
        update={"guard": config.guard.model_copy(update=guard),
                "learner": config.learner.model_copy(update={"kl_budget": budget})}
    )  # fmt: skip
    endings = on_ranks(spend, config, size=size) if size > 1 else [await World(config, make_guard).train()]
    assert endings == [Ending.KL_BUDGET_SPENT] * size
    records = lines(config.run_dir / "metrics.jsonl")
    shares = [record["signals"]["kl_budget_share"] for record in records]
    assert shares == [record["kl_cumulative_nats_per_sequence"] / BUDGET_NATS for record in records]
    assert 0.2 < shares[-2] <= 1.0 < shares[-1], "it ends with the step that spends the last of it, and not before"
    assert ["kl_budget_share" in record["guard"]["warn"] for record in records] == [share > 0.2 for share in shares]
    alerts = [event for event in lines(config.run_dir / "guard.jsonl") if event.get("action") == "alert"]
    assert any("kl_budget_share" in event["why"] for event in alerts)


async def test_measurements_reach_the_guard_of_the_first_rank(config: RunConfig) -> None:
    guard = ScriptedGuard()
    actor = LearnerActor.__new__(LearnerActor)
    actor._leading = cast(Any, (SimpleNamespace(guard=guard), None))
    await actor.measured({"win_rate": 0.6}, 7)
    assert guard.log == [({"win_rate": 0.6}, 7)]
    actor._leading = None
    await actor.measured({"win_rate": 0.6}, 8)
    assert len(guard.log) == 1
