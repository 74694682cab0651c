"""A real vLLM engine that takes its versions over gloo from a publisher in another process, beside members that come
and are killed. After each version its log-probs are compared with Hugging Face's."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engine_vllm import VllmEngine
from actors.rollout_worker import RolloutWorker, WorkerSettings
from actors.vllm_spec import VllmSpec
from cluster.streams_memory import MemoryStreams
from cluster.weight_group import GroupSettings
from cluster.weights_collective import CollectiveWeightChannel
from cluster.weights_ray import RayWeightChannel
from configs.run import RolloutSection
from tests.actors_support import Reference, contained_vllm, save_tiny_llama
from tests.weight_members import Member, running

SETTINGS = GroupSettings(
    bucket_bytes=16_384, timeout_s=6.0, ready_timeout_s=3.0, check_period_s=0.2, address="127.0.0.1"
)
TOLERANCE_NATS = 1e-4


@pytest.fixture
def local_ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR", log_to_driver=False
    )
    yield ray
    ray.shutdown()


class Publisher:
    """The learner's process: a model that changes with each version."""

    def __init__(self, channel: CollectiveWeightChannel, model: str) -> None:
        self._channel, self._reference, self._version = channel, Reference(Path(model)), 0

    def publish(self) -> int:
        self._reference.train(self._version)
        self._channel.publish(self._reference.blob(self._version))
        self._version += 1
        return self._version - 1

    def stats(self) -> Any:
        return self._channel.stats

    def group(self) -> tuple[int, int]:
        """(epoch, members) of the group that versions are offered to; zeros when there is none."""
        publisher = self._channel._publisher
        plan = None if publisher is None else publisher._plan
        return (0, 0) if plan is None else (plan.epoch, len(plan.offsets))


class OtherMember:
    """Another engine's process."""

    async def run(self, channel: CollectiveWeightChannel, name: str) -> None:
        self._member = Member()
        async with running(channel, self._member, name=name):
            await asyncio.Event().wait()

    async def came(self, version: int) -> str:
        return await self._member.until_version(version, timeout_s=60)


class VllmMember:
    """The engine under test, run by a rollout worker."""

    def __init__(self, engine: VllmEngine, channel: CollectiveWeightChannel) -> None:
        self.engine = engine
        self.worker = RolloutWorker(
            MemoryStreams(),
            engine=engine,
            weights=channel,
            settings=WorkerSettings(consumer="vllm.0", claim_wait_s=0.05, weights_poll_s=2.0),
        )

    async def check(self, version: int, reference: Reference) -> None:
        """Holds the version, and says about a sequence what `reference` says."""
        await self.worker.versions.wait(version, timeout_s=60)
        ids = [3, 9, 27, 17, 51, 25, 7]
        logprobs = await self.engine.probe(np.array(ids, dtype=np.int32))
        assert np.abs(logprobs - reference.logprobs(ids)).max() < TOLERANCE_NATS


async def until(condition: Any, *, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - it is asked of another process
            await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("parallel", [1, 2])
async def test_vllm_takes_broadcasts_while_members_come_and_die(local_ray: Any, tmp_path: Path, parallel: int) -> None:
    """parallel 2: the engine is split over two processes, each with a rank of its own in the group."""
    ray, model = local_ray, save_tiny_llama(tmp_path)
    channel = CollectiveWeightChannel(RayWeightChannel.create(), settings=SETTINGS)
    publisher = ray.remote(num_cpus=0)(Publisher).remote(channel, str(model))
    reference = Reference(model)
    rollout = RolloutSection(tensor_parallel_size=parallel, cpus_per_actor=1)
    spec = VllmSpec(model_path=str(model), rollout=rollout, max_sequence_tokens=64, seed=1)

    async def publish() -> int:
        version: int = await publisher.publish.remote()
        reference.train(version)
        return version

    def other(name: str) -> Any:
        handle = ray.remote(num_cpus=0, max_concurrency=10)(OtherMember).remote()
        handle.run.remote(channel, name)
        return handle

    async def pair(*, above: int) -> int:
        """Wait for a group of two, later than epoch `above`."""

        async def formed() -> bool:
            epoch, members = await publisher.group.remote()
            return bool(epoch > above and members == 2)

        await until(formed)
        epoch: int = (await publisher.group.remote())[0]
        return epoch

    with contained_vllm():
        engine = await VllmEngine.start(spec)
        member = VllmMember(engine, channel)
        run = asyncio.create_task(member.worker.run())
        try:
            first = other("first.0")
            await member.check(await publish(), reference)
            assert member.worker.meter.tally.group_syncs == 0, "there was no group yet"
            epoch = await pair(above=0)
            before = member.worker.meter.tally.group_syncs
            version = await publish()
            await member.check(version, reference)
            assert await first.came.remote(version) == "group"
            assert member.worker.meter.tally.group_syncs == before + 1

            ray.kill(first)
            started_s = time.monotonic()
            version = await publish()
            await member.check(version, reference)
            assert time.monotonic() - started_s < 2 * SETTINGS.timeout_s + 5, "a dead member costs a deadline at most"

            second = other("second.0")
            await pair(above=epoch)
            before = member.worker.meter.tally.group_syncs
            version = await publish()
            await member.check(version, reference)
            assert await second.came.remote(version) == "group"
            assert member.worker.meter.tally.group_syncs == before + 1

            async def counted() -> bool:  # a moment later: with the last member's report
                return bool((await publisher.stats.remote()).broadcasts >= 2)

            await until(counted)
            assert (await publisher.stats.remote()).failures >= 1
        finally:
            member.worker.stop()
            await asyncio.wait([run], timeout=30)
            await engine.shutdown()
            channel.close()
