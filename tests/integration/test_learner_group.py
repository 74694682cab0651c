"""The learner's ranks as processes: they meet through the run's queue server, train together, lose one, come back."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import KeelError
from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, decode, encode, pack_floats, pack_ids
from cluster.redis_server import EmbeddedServer
from cluster.run_redis import RunRedis
from cluster.streams import StreamName
from cluster.weights import MemoryWeightChannel
from configs.run import RunConfig
from learner.learner_actor import LearnerActor, LearnerSpec
from tests.run_support import prepare_run

pytestmark = pytest.mark.slow

LONG_S = 120.0
STEPS = 6


@pytest.fixture(name="redis_url", scope="module")
def make_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(name="config")
def make_config(tmp_path: Path) -> RunConfig:
    return prepare_run(
        tmp_path, f"learner.steps={STEPS}", "learner.ranks=2", "learner.collective_timeout_s=30",
        "learner.max_staleness=4", "checkpoint.every_steps=2", "metrics.enabled=false",
    )  # fmt: skip


@dataclass
class Rank:
    process: BaseProcess
    pipe: Connection

    async def next(self) -> Any:
        """The next thing it says: what start() returned, then what run() returned; an error's text instead."""
        assert await asyncio.to_thread(self.pipe.poll, LONG_S), "a rank neither spoke nor ended"
        try:
            return self.pipe.recv()
        except EOFError:
            return None


def rank_main(spec: dict[str, Any], pipe: Connection) -> None:
    """What Ray does with a LearnerActor."""
    actor = LearnerActor(LearnerSpec(channel=MemoryWeightChannel(), **spec))

    async def live() -> None:
        stopping: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: stopping.append(loop.create_task(actor.stop())))
        try:
            pipe.send(await actor.start())
            pipe.send(await actor.run())
        except KeelError as error:
            pipe.send(f"{type(error).__name__}: {error}")
        await asyncio.gather(*stopping)

    asyncio.run(live())


def start_group(config: RunConfig, redis_url: str, *, size: int, incarnation: int = 0) -> list[Rank]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.learner_support", "tests.ranks_support"])
    ranks = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        spec = {"config": config, "redis_url": redis_url, "run_dir": str(config.run_dir)}
        spec |= {"rank": rank, "world_size": size, "incarnation": incarnation}
        process = context.Process(target=rank_main, args=(spec, theirs), daemon=True)
        process.start()
        theirs.close()
        ranks.append(Rank(process, ours))
    return ranks


@asynccontextmanager
async def answering(redis_url: str, config: RunConfig) -> AsyncIterator[list[str]]:
    """Actors and reward service in one: answers every prompt at random. Yields the task ids answered."""
    answered: list[str] = []
    rng = np.random.default_rng(0)
    async with RunRedis(redis_url, run=config.name) as redis:

        async def answer() -> None:
            while True:
                prompts = await redis.streams.claim(StreamName.PROMPTS, consumer="test", max_count=16, wait_s=0.5)
                tasks = [decode(entry.payload, PromptTask) for entry in prompts]
                answers = [scored(task, rng) for task in tasks]
                if prompts:
                    await redis.streams.publish(StreamName.SCORED, [encode(one) for one in answers])
                    await redis.streams.settle(StreamName.PROMPTS, [entry.entry_id for entry in prompts])
                    answered.extend(task.task_id for task in tasks)

        answering_task = asyncio.create_task(answer())
        try:
            yield answered
        finally:
            answering_task.cancel()
            await asyncio.gather(answering_task, return_exceptions=True)


def scored(task: PromptTask, rng: np.random.Generator) -> ScoredRollout:
    length = int(rng.integers(2, 30))
    rollout = Rollout(
        task=task,
        response_ids_i32=pack_ids(rng.integers(4, 60, size=length)),
        behaviour_logprobs_f32=pack_floats(-rng.random(length) - 4.0),
        version_runs=(VersionRun(0, task.issued_version),),
        finish_reason="stop",
        actor="a",
        generate_s=0.1,
    )
    score = float(rng.normal())
    return ScoredRollout(
        rollout=rollout,
        member_scores=(score,),
        reward=score,
        uncertainty=0.0,
        ref_logprobs_f32=pack_floats(-rng.random(length) - 4.0),
        rm_version="rm-1",
    )


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    path = config.run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def until_step(config: RunConfig, step: int) -> None:
    async with asyncio.timeout(LONG_S):
        while len(metrics(config)) < step:  # noqa: ASYNC110 — a file that another process writes
            await asyncio.sleep(0.05)


async def test_two_ranks_lose_one_and_go_on_from_the_checkpoint(config: RunConfig, redis_url: str) -> None:
    async with answering(redis_url, config) as answered:
        first = start_group(config, redis_url, size=2)
        begun = {"step": 0, "version": 0}
        assert [await rank.next() for rank in first] == [begun | {"rm_version": "rm-1"}, begun]
        await until_step(config, 3)
        assert first[1].process.pid is not None
        os.kill(first[1].process.pid, signal.SIGKILL)
        failure = await first[0].next()
        assert failure.startswith("SupervisionError: the learner lost a rank"), failure

        again = start_group(config, redis_url, size=2, incarnation=1)
        standing = [await rank.next() for rank in again]
        assert standing[0] == standing[1] | {"rm_version": "rm-1"}
        assert standing[0]["step"] >= 2
        assert standing[0]["step"] % 2 == 0, "that of the newest checkpoint"
        assert [await rank.next() for rank in again] == ["steps_done"] * 2
    record = metrics(config)
    assert [line["step"] for line in record] == list(range(1, STEPS + 1)), "no step is missing or there twice"
    versions = [line["version"] for line in record]
    assert versions == sorted(set(versions))
    incarnations = {task_id.split("-")[0] for task_id in answered}
    assert len(incarnations) == 2, f"tasks carry their incarnation: {sorted(answered)[:3]}"
    assert (config.run_dir / "policy" / "final" / "model.safetensors").exists()
    logs = {path.name for path in (config.run_dir / "logs").iterdir()}
    assert {"learner-1.0.log", "learner-1.1.log"} <= logs, "one for each life of a rank"


async def test_a_stop_ends_all_ranks_with_a_checkpoint(config: RunConfig, redis_url: str) -> None:
    config = config.model_copy(update={"learner": config.learner.model_copy(update={"steps": 1000})})
    async with answering(redis_url, config):
        ranks = start_group(config, redis_url, size=2, incarnation=7)
        for rank in ranks:
            assert (await rank.next())["step"] == 0
        await until_step(config, 1)
        for rank in reversed(ranks):
            rank.process.terminate()  # SIGTERM, which rank_main takes for stop().
        assert [await rank.next() for rank in ranks] == ["stopped"] * 2
    for rank in ranks:
        await asyncio.to_thread(rank.process.join, LONG_S)
        assert rank.process.exitcode == 0
    assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
