"""The learner's loop and an engine in turns on one device, in one process: who does what while whom the device has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from actors.engine import SyncTimings
from cluster.errors import DeadlineError
from cluster.records import Rollout, ScoredRollout, decode, encode, pack_floats
from cluster.streams import StreamName
from cluster.streams_memory import MemoryStreams
from cluster.turns import LocalTurns
from cluster.weight_sharing import open_shared
from cluster.weights import WeightBlob, unpack, unpack_storage
from configs.run import RunConfig
from learner.device_turns import DeviceTurns
from learner.loop import Ending, train
from learner.state import LearnerState
from learner.telemetry import Telemetry
from tests.rollout_scene import Scene, until
from tests.run_support import prepare_run

STEPS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return prepare_run(tmp_path_factory.mktemp("runs"), f"learner.steps={STEPS}", "learner.max_staleness=0")


class Colocated:
    """A learner, a worker with a scripted engine, and a scorer. `log`: what happened, and who had the device then."""

    def __init__(self, config: RunConfig) -> None:
        self.turns = LocalTurns()
        self.streams = MemoryStreams()
        self.scene = Scene(streams=self.streams, turns=self.turns)
        self.state = LearnerState.build(
            config, run_dir=config.run_dir, streams=self.streams, channel=self.scene.weights, turns=self.turns
        )
        self.log: list[tuple[str, str | None]] = []
        self.in_place: list[bool] = []
        """Of each version that the engine loaded: whether its bytes were the learner's own, where the learner had
        them."""
        engine, team = self.scene.engine, self.state.team
        for name in ("make_experience", "update"):
            self._watch(team, name)
        self._watch(engine, "_advance")
        load = engine.load_weights

        async def load_weights(blob: WeightBlob) -> SyncTimings:
            self._note("load")
            assert not engine.asleep
            storage = None if blob.shared is None else open_shared(blob.shared, device=CPU)
            found = unpack(blob) if storage is None else unpack_storage(blob.manifest, storage)
            own = dict(team.weights())
            assert all(torch.equal(tensor, own[name]) for name, tensor in found)
            self.in_place.append(storage is not None)
            return await load(blob)

        engine.load_weights = load_weights  # type: ignore[method-assign]

    def _note(self, event: str) -> None:
        self.log.append((event, self.turns._holder))

    def _watch(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def watched(*args: Any, **more: Any) -> Any:
            self._note(name)
            result = method(*args, **more)
            self._note(f"{name} done")
            return result

        setattr(owner, name, watched)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        scorer = asyncio.create_task(self._score())
        try:
            async with self.scene.running() as worker:
                yield worker
                scorer.cancel()
                await asyncio.gather(scorer, return_exceptions=True)
        finally:
            scorer.cancel()

    async def _score(self) -> None:
        while True:
            for delivery in await self.streams.claim(StreamName.ROLLOUTS, consumer="s", max_count=8, wait_s=0.05):
                rollout = decode(delivery.payload, Rollout)
                scored = ScoredRollout(
                    rollout=rollout,
                    member_scores=(0.5,),
                    reward=0.5,
                    uncertainty=0.0,
                    ref_logprobs_f32=pack_floats(rollout.behaviour_logprobs),
                    rm_version="rm-1",
                )
                await self.streams.advance(
                    StreamName.ROLLOUTS, delivery.entry_id, target=StreamName.SCORED, payload=encode(scored)
                )

    async def train(self) -> Ending:
        async def emit(*_: Any) -> None:
            """Nobody reads it."""

        telemetry = SimpleNamespace(report=lambda *_: None, emit=emit)
        return await train(self.state, cast(Telemetry, telemetry), stop=asyncio.Event())


@pytest.mark.timeout(120)
async def test_the_learner_trains_while_the_engine_sleeps_and_the_engine_works_while_the_learner_waits(
    config: RunConfig, tmp_path: Path
) -> None:
    colocated = Colocated(config)
    async with colocated.running():
        async with asyncio.timeout(90):
            assert await colocated.train() is Ending.STEPS_DONE
        final = colocated.state.version
        await until(lambda: colocated.scene.engine.version == final)
        assert not colocated.scene.engine.asleep
    trained = [event for event in colocated.log if event[0].startswith(("make_experience", "update"))]
    assert len(trained) == 4 * STEPS
    assert {holder for _, holder in trained} == {"learner"}
    sampled = [event for event in colocated.log if event[0].startswith(("_advance", "load"))]
    assert {holder for _, holder in sampled} == {"engine"}
    order = [name for name, _ in colocated.log]
    for begin in (index for index, name in enumerate(order) if name == "make_experience"):
        assert order[begin : begin + 4] == ["make_experience", "make_experience done", "update", "update done"]
    assert colocated.in_place == [True] * (STEPS + 1) + [False], (
        "the last comes by the channel, and outlives the learner"
    )


@pytest.mark.timeout(120)
async def test_an_engine_that_keeps_the_device_costs_the_learner_its_deadline(config: RunConfig) -> None:
    moved: list[str] = []
    turns = LocalTurns()
    side = DeviceTurns(turns, lambda device: moved.append(str(device)), device=CPU, timeout_s=0.05)
    with pytest.raises(DeadlineError, match="the learner did not get its turn"):
        async with side.held():
            pytest.fail("it is the engine's turn")
    assert moved == [], "nothing is put on a device that is another's"
    await turns.forget("engine")  # it died, as its supervisor saw
    async with side.held():
        assert turns._holder == "learner"
    assert turns._holder is None


async def test_a_learner_that_fails_on_the_device_keeps_it_until_it_is_gone() -> None:
    turns = LocalTurns()
    await turns.give("engine")
    side = DeviceTurns(turns, lambda device: None, device=CPU, timeout_s=1.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        async with side.held():
            raise RuntimeError("out of memory")
    with pytest.raises(DeadlineError, match="the engine did not get its turn"):
        await turns.take("engine", 0.02)
    await turns.forget("learner")
    await turns.take("engine", 1.0)


async def test_weights_are_on_the_device_for_the_turn_alone() -> None:
    moved: list[str] = []
    turns = LocalTurns()
    await turns.give("engine")
    side = DeviceTurns(turns, lambda device: moved.append(f"{device} {turns._holder}"), device=torch.device("cuda", 0),
                       timeout_s=1.0)  # fmt: skip
    async with side.held():
        assert moved == ["cuda:0 learner"]
    assert moved == ["cuda:0 learner", "cpu learner"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="host memory and a GPU's are the same thing without a GPU")
def test_a_learner_that_moved_there_and_back_goes_on_as_before(config: RunConfig) -> None:
    from learner.ranks import SOLO
    from learner.trainer import Trainer

    trainer = Trainer(config, run_dir=config.run_dir, ranks=SOLO)
    before = {(group, name): tensor.clone() for group, named in trainer.checkpoint_tensors().items()
              for name, tensor in named.items()}  # fmt: skip
    trainer.move_to(torch.device("cuda", 0))
    assert all(tensor.is_cuda for _, tensor in trainer.weights())
    held_bytes = torch.cuda.memory_allocated()
    trainer.move_to(CPU)
    assert torch.cuda.memory_allocated() < held_bytes
    after = {(group, name): tensor for group, named in trainer.checkpoint_tensors().items()
             for name, tensor in named.items()}  # fmt: skip
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
