"""A whole rollout actor, with the scripted engine, on a real queue server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.rollout_actor import RolloutActor, RolloutSpec
from cluster.errors import EngineDeadError
from cluster.records import PromptTask, Rollout, decode, encode, pack_ids
from cluster.redis_server import EmbeddedServer
from cluster.run_redis import RunRedis
from cluster.streams import StreamName
from cluster.weights import UNSYNCED, MemoryWeightChannel, pack
from configs.run import DataSection, RolloutSection, RunConfig


def spec_for(tmp_path: Path, *, redis_url: str) -> RolloutSpec:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 16, "eos_token_id": 1}))
    config = RunConfig(name="actor-test", data=DataSection(), rollout=RolloutSection(engine="scripted"))
    return RolloutSpec(
        config=config,
        model_path=str(tmp_path),
        redis_url=redis_url,
        log_dir=str(tmp_path / "logs"),
        channel=MemoryWeightChannel(),
        index=2,
        incarnation=1,
    )


def task_of_version_1() -> PromptTask:
    return PromptTask(
        task_id="t",
        prompt_id="p",
        group_id="g",
        prompt_ids_i32=pack_ids([3]),
        max_new_tokens=4,
        temperature=1.0,
        issued_version=1,
    )


async def test_a_life_of_an_actor(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "redis") as server:
        spec = spec_for(tmp_path, redis_url=server.url)
        actor = RolloutActor(spec)
        with pytest.raises(EngineDeadError, match="not started"):
            await actor.status()
        info = await actor.start()
        assert info["boot_s"] >= 0
        assert info["engine"] == "scripted"

        answers = await actor.generate([[3, 4], [5]] * 50, max_new_tokens=6, temperature=1.0)
        assert len(answers) == 100
        for ids, finish_reason in answers:
            assert all(0 <= token < 16 for token in ids)
            assert (finish_reason == "stop") == (ids[-1] == 1)
        assert await actor.sync_to_newest() == UNSYNCED

        spec.channel.publish(pack(0, [("w", torch.zeros(1))]))
        assert await actor.sync_to_newest() == 0, "loaded by the call itself: run() is not running"

        run = asyncio.create_task(actor.run())
        spec.channel.publish(pack(1, [("w", torch.zeros(1))]))
        await actor.generate([[3]], max_new_tokens=6, temperature=1.0)
        assert (await actor.status())["version"] == 1, "no answer by older weights than are published"
        assert await actor.sync_to_newest() == 1
        task = task_of_version_1()
        async with RunRedis(server.url, run="actor-test") as redis:
            await redis.streams.publish(StreamName.PROMPTS, [encode(task)])
            (delivery,) = await redis.streams.claim(StreamName.ROLLOUTS, consumer="test", max_count=1, wait_s=20)
            assert [member.instance for member in await redis.directory.members()] == ["2.1"]
        rollout = decode(delivery.payload, Rollout)
        assert rollout.actor == "rollout-2.1"
        assert rollout.oldest_version == 1
        status = await actor.status()
        assert (status["samples"], status["version"], status["running"]) == (1, 1, True)

        await actor.stop()
        await run
        await actor.stop()
        assert len(asyncio.all_tasks()) == 1


async def test_a_drained_actor_s_run_ends_cleanly_and_its_server_has_no_lease_left(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "redis") as server:
        spec = spec_for(tmp_path, redis_url=server.url)
        rollout = RolloutSection(engine="scripted", generate_timeout_s=0.5)
        spec = replace(spec, config=spec.config.model_copy(update={"rollout": rollout}))
        actor = RolloutActor(spec)
        await actor.start()
        spec.channel.publish(pack(0, [("w", torch.zeros(1))]))
        run = asyncio.create_task(actor.run())
        waits_for_a_version = task_of_version_1()
        async with RunRedis(server.url, run="actor-test") as redis:
            await redis.streams.publish(StreamName.PROMPTS, [encode(waits_for_a_version)])
            async with asyncio.timeout(20):
                while (await actor.status())["in_flight"] == 0:  # noqa: ASYNC110 - asked as a supervisor asks
                    await asyncio.sleep(0.01)
            assert await actor.drain() == 1
            await run
            status = await actor.status()
            assert (status["in_flight"], status["running"]) == (0, False)
            assert status["idle_s"] > 0
            taken = await redis.streams.claim(StreamName.PROMPTS, consumer="other", max_count=1, wait_s=0.1)
            assert [decode(delivery.payload, PromptTask) for delivery in taken] == [waits_for_a_version]
        await actor.stop()
        assert len(asyncio.all_tasks()) == 1


async def test_a_broken_engine_ends_run_with_its_error(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "redis") as server:
        actor = RolloutActor(spec_for(tmp_path, redis_url=server.url))
        await actor.start()
        run = asyncio.create_task(actor.run())
        await asyncio.sleep(0)
        engine, _ = actor._parts()
        await engine.shutdown()
        actor._spec.channel.publish(pack(0, [("w", torch.zeros(1))]))
        with pytest.raises(EngineDeadError):
            await run
        await actor.stop()
