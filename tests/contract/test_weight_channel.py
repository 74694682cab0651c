"""One contract for every WeightChannel: in memory, on a board in this process, over Ray's object store, and with
broadcasts beside either board."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch

from actors.engine import ScriptedEngine
from cluster.errors import WeightSyncError
from cluster.weight_board_local import LocalBoardChannel
from cluster.weight_group import GroupSettings
from cluster.weights import AdapterInfo, MemoryWeightChannel, Probe, WeightBlob, WeightChannel, pack, unpack
from cluster.weights_collective import BoardChannel, CollectiveWeightChannel
from cluster.weights_ray import RayWeightChannel


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


KINDS = [
    "memory",
    "board",
    "board-broadcast",
    pytest.param("ray", marks=pytest.mark.slow),
    pytest.param("ray-broadcast", marks=pytest.mark.slow),
]


@pytest.fixture(params=KINDS)
async def channel(request: pytest.FixtureRequest) -> AsyncIterator[WeightChannel]:
    kind, _, broadcast = request.param.partition("-")
    if kind == "memory":
        yield MemoryWeightChannel()
        return
    if kind == "ray":
        request.getfixturevalue("local_ray")
    store: BoardChannel = RayWeightChannel.create() if kind == "ray" else LocalBoardChannel()
    made: Any = store
    if broadcast:
        made = CollectiveWeightChannel(store, settings=GroupSettings(address="127.0.0.1", timeout_s=20))
    yield made
    await asyncio.to_thread(made.close)


def blob(version: int) -> WeightBlob:
    probe = Probe(token_ids=np.array([5, 6, 7], dtype=np.int32), logprobs=np.array([-1, -version], dtype=np.float32))
    return pack(version, [("w", torch.full((3,), float(version)))], probe=probe)


def contents(got: WeightBlob | None) -> tuple[int, list[float]]:
    assert got is not None
    ((name, tensor),) = unpack(got)
    assert name == "w"
    return got.version, cast(list[float], tensor.tolist())


async def test_nothing_before_the_first_publication(channel: WeightChannel) -> None:
    assert await channel.latest() is None
    assert await channel.wait_newer(-1, timeout_s=0.01) is None


async def test_the_newest_is_what_everyone_gets(channel: WeightChannel) -> None:
    await asyncio.to_thread(channel.publish, blob(0))
    await asyncio.to_thread(channel.publish, blob(1))
    assert contents(await channel.latest()) == (1, [1.0, 1.0, 1.0])
    assert contents(await channel.wait_newer(-1, timeout_s=30)) == (1, [1.0, 1.0, 1.0])
    assert await channel.wait_newer(1, timeout_s=0.01) is None


async def test_the_probe_travels_along(channel: WeightChannel) -> None:
    await asyncio.to_thread(channel.publish, blob(4))
    got = await channel.latest()
    assert got is not None
    assert got.probe is not None
    assert got.probe.token_ids.tolist() == [5, 6, 7]
    assert got.probe.logprobs.tolist() == [-1.0, -4.0]


async def test_publishing_wakes_every_waiter(channel: WeightChannel) -> None:
    await asyncio.to_thread(channel.publish, blob(0))
    waiters = [asyncio.create_task(channel.wait_newer(0, timeout_s=30)) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.to_thread(channel.publish, blob(5))
    assert [contents(got)[0] for got in await asyncio.gather(*waiters)] == [5, 5, 5]


async def test_versions_must_increase(channel: WeightChannel) -> None:
    await asyncio.to_thread(channel.publish, blob(3))
    for stale in (3, 2):
        with pytest.raises(WeightSyncError, match="must increase"):
            await asyncio.to_thread(channel.publish, blob(stale))
    assert contents(await channel.latest())[0] == 3


async def test_the_newest_version_is_told_without_its_bytes(
    channel: WeightChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await channel.newest_version() is None
    await asyncio.to_thread(channel.publish, blob(3))

    async def fetch(*_: object) -> None:
        raise AssertionError("one number needs no model")

    for kind in (LocalBoardChannel, RayWeightChannel):
        monkeypatch.setattr(kind, "fetch", fetch)
    assert await channel.newest_version() == 3


async def test_what_was_published_outlives_the_publisher_s_end(channel: WeightChannel) -> None:
    await asyncio.to_thread(channel.publish, blob(0))
    await asyncio.to_thread(channel.close_publisher)
    assert contents(await channel.latest())[0] == 0
    await asyncio.to_thread(channel.publish, blob(1))
    assert contents(await channel.latest())[0] == 1


async def test_received_weights_are_read_only(channel: WeightChannel) -> None:
    await asyncio.to_thread(channel.publish, blob(0))
    got = await channel.latest()
    assert got is not None
    assert not got.buffer.flags.writeable


async def test_a_feed_has_every_newest_version_and_the_adapter_s_description(channel: WeightChannel) -> None:
    engine = ScriptedEngine()
    feed = channel.feed("reader", engine)
    info = AdapterInfo(rank=4, alpha=8.0, target_modules=("q_proj",))
    adapter = pack(2, [("lora", torch.ones(3))], adapter=info)
    assert await feed.next(-1, timeout_s=0.01) is None
    for version, published in ((0, blob(0)), (2, adapter)):
        await asyncio.to_thread(channel.publish, published)
        update = await feed.next(version - 1, timeout_s=30)
        assert isinstance(update, WeightBlob)
        assert (update.version, update.adapter) == (version, published.adapter)
    await feed.close()
    await engine.shutdown()


@pytest.mark.slow
async def test_a_ray_channel_pickles_and_serves_other_processes(local_ray: None) -> None:
    import ray

    channel = RayWeightChannel.create()

    class Reader:
        async def first(self, given: RayWeightChannel) -> tuple[int, float, bool]:
            got = await given.wait_newer(-1, timeout_s=60)
            assert got is not None
            ((_, tensor),) = unpack(got)
            return got.version, float(tensor.sum()), bool(got.buffer.flags.owndata)

    try:
        reader = ray.remote(num_cpus=0)(Reader).remote()
        answer = reader.first.remote(pickle.loads(ray.cloudpickle.dumps(channel)))
        large = pack(0, [("w", torch.ones(1 << 20))])
        await asyncio.to_thread(channel.publish, large)
        assert await answer == (0, float(1 << 20), False)
    finally:
        channel.close()


@pytest.mark.slow
async def test_a_dead_board_is_reported(local_ray: None) -> None:
    channel = RayWeightChannel.create()
    await channel.latest()
    channel.close()
    with pytest.raises(WeightSyncError, match="board is gone"):
        await channel.latest()


@pytest.mark.slow
async def test_a_board_that_dies_does_not_come_back_empty(local_ray: None) -> None:
    """Engines with a version would wait for a newer one, and the learner, told of none, for them."""
    import ray

    channel = RayWeightChannel.create()
    await asyncio.to_thread(channel.publish, blob(7))
    ray.kill(channel.board, no_restart=False)  # as a crash: restarted, were it allowed

    async def until_dead() -> None:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(ray.exceptions.ActorUnavailableError):
                    assert await channel.board.newest_version.remote() == 7

    with pytest.raises(ray.exceptions.ActorDiedError):
        await until_dead()
    with pytest.raises(WeightSyncError, match="board is gone"):
        await channel.newest_version()


@pytest.mark.slow
async def test_weights_outlive_the_process_that_published_them(local_ray: None) -> None:
    import ray

    class Learner:
        def publish(self, given: RayWeightChannel) -> None:
            given.publish(pack(0, [("w", torch.ones(1 << 20))]))

    channel = RayWeightChannel.create()
    learner = ray.remote(num_cpus=0)(Learner).remote()
    try:
        await learner.publish.remote(channel)
        ray.kill(learner)
        with pytest.raises(ray.exceptions.RayActorError):
            await learner.publish.remote(channel)
        got = await channel.latest()
        assert got is not None
        ((_, tensor),) = unpack(got)
        assert float(tensor.sum()) == float(1 << 20)
    finally:
        channel.close()
