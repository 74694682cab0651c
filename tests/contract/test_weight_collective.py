"""Broadcasting weights to a group: members that come, go, hang and die, over gloo on loopback; over NCCL on GPUs."""

from __future__ import annotations

import asyncio
import sys
import time
import types
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.gloo_group import GlooFollower, GlooLeader
from cluster.weight_board import WeightBoard
from cluster.weight_board_local import LocalBoardChannel
from cluster.weight_group import GroupBook, GroupBrokenError, GroupPlan
from cluster.weights import pack
from cluster.weights_collective import CollectiveWeightChannel
from tests.weight_members import SETTINGS, Member, running, weights

LIMIT_S = SETTINGS.timeout_s


class Scene:
    """A channel, its publisher, and members that run."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.channel = CollectiveWeightChannel(LocalBoardChannel(), settings=SETTINGS)
        self.members: dict[str, Member] = {}
        self._stack = stack

    async def add(self, name: str, *, hang_on: str = "") -> Member:
        member = Member()
        member.hang_on = hang_on
        await self._stack.enter_async_context(running(self.channel, member, name=name))
        self.members[name] = member
        return member

    async def publish(self, version: int) -> float:
        """Seconds that the learner was held up."""
        started_s = time.monotonic()
        await asyncio.to_thread(self.channel.publish, weights(version))
        return time.monotonic() - started_s

    async def grouped(self, *members: Member, above: int = 0) -> int:
        """Wait until all are connected in one group that the publisher uses; returns its epoch."""
        async with asyncio.timeout(30):
            while True:
                epochs = {await member.until_epoch(above) for member in members}
                if len(epochs) == 1 and self.in_use == epochs:
                    return epochs.pop()
                above = max(above, min(epochs) if len(epochs) > 1 else above)
                await asyncio.sleep(0.02)

    @property
    def in_use(self) -> set[int]:
        publisher = self.channel._publisher
        plan = None if publisher is None else publisher._plan
        return set() if plan is None else {plan.epoch}


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        made = Scene(stack)
        yield made
    await asyncio.to_thread(made.channel.close)


async def test_the_first_version_comes_from_the_store_and_the_next_through_the_group(scene: Scene) -> None:
    one, two = await scene.add("a.0"), await scene.add("b.0")
    await scene.publish(0)
    assert [await member.until_version(0) for member in (one, two)] == ["store", "store"]
    await scene.grouped(one, two)
    await scene.publish(1)
    assert [await member.until_version(1) for member in (one, two)] == ["group", "group"]
    assert sorted(one.first_ranks + two.first_ranks) == [1, 2], "each engine has a rank of its own"
    assert one.sums == two.sums == {0: 0.0, 1: 5000.0}
    await until_counted(scene, broadcasts=1)
    stats = scene.channel.stats
    assert (stats.groups, stats.failures, stats.by_store) == (1, 0, 1)
    assert stats.bytes >= 20_000


async def test_a_late_joiner_pulls_and_is_in_the_next_group(scene: Scene) -> None:
    one = await scene.add("a.0")
    await scene.publish(0)
    first = await scene.grouped(one)
    await scene.publish(1)
    assert await one.until_version(1) == "group"
    two = await scene.add("b.0")
    assert await two.until_version(1) == "store"
    await scene.grouped(one, two, above=first)
    await scene.publish(2)
    assert [await member.until_version(2) for member in (one, two)] == ["group", "group"]


async def test_a_member_that_leaves_is_not_waited_for(scene: Scene) -> None:
    one = await scene.add("a.0")
    await scene.publish(0)
    async with running(scene.channel, Member(), name="b.0"):
        await scene.grouped(one)
    started_s = time.monotonic()
    await scene.publish(1)
    await one.until_version(1)
    assert time.monotonic() - started_s < LIMIT_S / 2


@pytest.mark.parametrize("phase", ["receive", "report"])
async def test_a_member_that_hangs_costs_the_deadline_and_no_version(scene: Scene, phase: str) -> None:
    """In "receive" it has said that it is ready, and takes no bytes; in "report" it never says that it has them."""
    one, two = await scene.add("a.0"), await scene.add("b.0")
    three = await scene.add("c.0", hang_on=phase)
    await scene.publish(0)
    first = await scene.grouped(one, two, three)
    started_s = time.monotonic()
    assert await scene.publish(1) < 1.0, "training goes on"
    for member in (one, two):
        await member.until_version(1, timeout_s=2 * LIMIT_S + 3)
        assert member.sums[1] == 5000.0
    assert time.monotonic() - started_s < 2 * LIMIT_S + 3
    await until_counted(scene, failures=1)
    assert await scene.publish(2) < 1.0
    for member in (one, two):
        await member.until_version(2)
    await scene.grouped(one, two, above=first)
    await scene.publish(3)
    assert [await member.until_version(3) for member in (one, two)] == ["group", "group"]
    assert one.sums == two.sums == {version: 5000.0 * version for version in range(4)}


async def test_a_member_that_is_not_ready_leaves_the_others_to_the_store(scene: Scene) -> None:
    one, two = await scene.add("a.0"), await scene.add("b.0")
    await scene.publish(0)
    first = await scene.grouped(one, two)
    two.before_load = asyncio.Event()  # stuck in loading, so it does not see the next version
    await scene.publish(1)
    await until_counted(scene, failures=1)
    await scene.publish(2)
    assert await one.until_version(2) == "store"
    two.before_load.set()
    two.before_load = None
    await two.until_version(2)
    await scene.grouped(one, two, above=first)
    await scene.publish(3)
    assert [await member.until_version(3) for member in (one, two)] == ["group", "group"]


async def test_a_member_that_never_joins_is_left_out(scene: Scene) -> None:
    one = await scene.add("a.0")
    await scene.add("b.0", hang_on="join")
    await scene.publish(0)
    await until_counted(scene, failures=1)
    await scene.publish(1)
    assert await one.until_version(1) == "store"
    assert one.sums[1] == 5000.0


async def test_versions_faster_than_the_group_go_by_the_store(scene: Scene) -> None:
    one = await scene.add("a.0")
    await scene.publish(0)
    await scene.grouped(one)
    for version in range(1, 9):
        assert await scene.publish(version) < 1.0
    await one.until_version(8)
    assert all(value == 5000.0 * version for version, value in one.sums.items())
    assert scene.channel.stats.failures == 0


async def test_a_member_that_comes_while_versions_never_pause_gets_into_the_group(scene: Scene) -> None:
    scene.channel._settings = replace(SETTINGS, check_period_s=0.4)
    one = await scene.add("a.0")
    await scene.publish(0)
    await scene.grouped(one)
    two = await scene.add("b.0")
    async with asyncio.timeout(20):
        version = 1
        while "group" not in dict(two.came).values():
            await scene.publish(version)
            version += 1
            await asyncio.sleep(0.01)


async def test_a_version_offered_to_a_group_that_is_dropped_comes_from_the_store(scene: Scene) -> None:
    """The board was slow while the learner published: the publisher drops its group with the version on its way."""
    one = await scene.add("a.0")
    await scene.publish(0)
    first = await scene.grouped(one)
    publisher = scene.channel._publisher
    assert publisher is not None
    epoch = await asyncio.to_thread(publisher.reserve)
    publisher._drop_group()
    assert await asyncio.to_thread(scene.channel._store.publish_to, weights(1), epoch=epoch)
    publisher.broadcast(weights(1))
    assert await one.until_version(1, timeout_s=LIMIT_S / 2) == "store"
    await scene.grouped(one, above=first)
    await scene.publish(2)
    assert await one.until_version(2) == "group"


async def test_the_publisher_s_end_leaves_members_with_the_store(scene: Scene) -> None:
    """A learner that is replaced: its group dies with it, and the next publisher makes another."""
    one = await scene.add("a.0")
    await scene.publish(0)
    first = await scene.grouped(one)
    await asyncio.to_thread(scene.channel.close_publisher)
    await scene.publish(1)
    assert await one.until_version(1) == "store"
    await scene.grouped(one, above=first)
    await scene.publish(2)
    assert await one.until_version(2) == "group"


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL would work here")
async def test_where_nccl_cannot_lead_everything_goes_by_the_store() -> None:
    channel = CollectiveWeightChannel(LocalBoardChannel(), settings=replace(SETTINGS, backend="nccl"))
    member = Member()
    async with running(channel, member, name="a.0"):
        await asyncio.to_thread(channel.publish, weights(0))
        async with asyncio.timeout(30):
            while channel.stats.failures == 0:  # noqa: ASYNC110 - the publisher is a thread
                await asyncio.sleep(0.02)
        await asyncio.to_thread(channel.publish, weights(1))
        assert await member.until_version(1) == "store"
    await asyncio.to_thread(channel.close)


async def until_counted(scene: Scene, *, broadcasts: int = 0, failures: int = 0) -> None:
    async with asyncio.timeout(30):
        while scene.channel.stats.broadcasts < broadcasts or scene.channel.stats.failures < failures:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# ---------------------------------------------------------------- the parts


async def test_a_follower_without_a_leader_gives_up() -> None:
    with GlooPort() as port:
        plan = plan_for(port, timeout_s=0.5)
    started_s = time.monotonic()
    with pytest.raises(GroupBrokenError, match="does not answer"):
        await asyncio.to_thread(GlooFollower.join, plan, rank=1)
    assert time.monotonic() - started_s < 10


async def test_a_leader_without_followers_gives_up() -> None:
    leader = GlooLeader("127.0.0.1", timeout_s=0.5)
    with pytest.raises(GroupBrokenError, match="did not form"):
        await asyncio.to_thread(leader.form, 2)
    leader.close()


async def test_a_bucket_that_does_not_come_ends_the_wait() -> None:
    leader = GlooLeader("127.0.0.1", timeout_s=1.0)
    plan = plan_for(leader.port, timeout_s=1.0)
    _, follower = await asyncio.gather(
        asyncio.to_thread(leader.form, 2), asyncio.to_thread(GlooFollower.join, plan, rank=1)
    )
    with pytest.raises(GroupBrokenError, match="did not arrive"):
        await asyncio.to_thread(follower.receive, 100)
    follower.close()
    leader.close()


def test_ranks_follow_tensor_parallel_sizes() -> None:
    book = GroupBook()
    for name, ranks in (("b.0", 2), ("a.0", 4), ("c.0", 1)):
        book.register(name, ranks=ranks)
    plan = book.propose(book.members, backend="nccl", address="127.0.0.1", port=1, bucket_bytes=1, timeout_s=1.0)
    assert plan.offsets == {"a.0": 1, "b.0": 5, "c.0": 7}
    assert plan.world_size == 8


def test_a_restarted_member_takes_the_old_one_s_place() -> None:
    book = GroupBook()
    book.register("rollout-0.0", ranks=1)
    book.register("rollout-1.0", ranks=1)
    book.propose(book.members, backend="gloo", address="127.0.0.1", port=1, bucket_bytes=1, timeout_s=1.0)
    book.register("rollout-0.1", ranks=1)
    assert sorted(book.members) == ["rollout-0.1", "rollout-1.0"]
    assert book.plan is None, "the old group counted on a process that is gone"


def test_a_late_question_of_the_old_member_does_not_evict_the_new_one() -> None:
    book = GroupBook()
    assert book.register("rollout-0.10", ranks=1)
    plan = book.propose(book.members, backend="gloo", address="127.0.0.1", port=1, bucket_bytes=1, timeout_s=1.0)
    assert not book.register("rollout-0.9", ranks=1)
    assert sorted(book.members) == ["rollout-0.10"]
    assert book.plan is plan


async def test_only_a_poll_that_changes_something_wakes_the_others() -> None:
    board = WeightBoard()
    wakes: list[str] = []
    notify = board._notify
    board._notify = lambda: (wakes.append("wake"), notify())[1]  # type: ignore[method-assign, func-returns-value]
    assert await board.next_for("a.0", 1, -1, 0, 0.0) is None
    assert await board.next_for("b.0", 1, -1, 0, 0.0) is None
    assert len(wakes) == 2, "two members came"
    assert await board.next_for("a.0", 1, -1, 0, 0.0) is None
    assert len(wakes) == 2
    plan = await board.propose({"a.0": 1, "b.0": 1}, "gloo", "127.0.0.1", 1, 1, 1.0)
    await board.publish(0, (), None, np.zeros(1, dtype=np.uint8), None, plan.epoch)
    before = len(wakes)
    first = asyncio.create_task(board.enter("a.0", plan.epoch, 0, 30.0))
    await asyncio.sleep(0)
    assert len(wakes) == before, "one of two is ready"
    assert await board.enter("b.0", plan.epoch, 0, 30.0)
    assert await first
    assert len(wakes) == before + 1


def test_a_board_that_starts_again_gives_no_epoch_twice() -> None:
    """Its members have seen earlier plans, and take no place in one that looks older."""
    epochs = []
    for _ in range(2):
        book = GroupBook()
        book.register("a.0", ranks=1)
        for _ in range(2):
            plan = book.propose(book.members, backend="gloo", address="h", port=1, bucket_bytes=1, timeout_s=1.0)
            epochs.append(plan.epoch)
        time.sleep(0.001)  # a process takes longer to start
    assert epochs == sorted(set(epochs))


def test_nothing_goes_through_nccl_after_the_group_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing aborts NCCL, which wakes the thread that waits in it: that thread must not call NCCL again."""
    from cluster.weights_nccl import NcclLeader

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    leader = NcclLeader("127.0.0.1", timeout_s=1.0)
    leader._device = torch.device("cpu")
    calls: list[str] = []

    def producer(*, iterator: Iterator[tuple[str, torch.Tensor]], **_: object) -> None:
        for name, _tensor in iterator:
            calls.append(name)
            leader.close()  # as if this call had hung until the publisher gave it up

    packing = types.ModuleType("vllm.distributed.weight_transfer.packed_tensor")
    packing.packed_nccl_broadcast_producer = producer  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, packing.__name__, packing)
    with pytest.raises(GroupBrokenError, match="closed"):
        list(leader.broadcast(pack(1, [("a", torch.ones(2)), ("b", torch.ones(2))]), bucket_bytes=1))
    assert calls == ["a"]


def test_an_offer_is_decided_once() -> None:
    book = GroupBook()
    for name in ("a", "b"):
        book.register(name, ranks=1)
    plan = book.propose(book.members, backend="gloo", address="127.0.0.1", port=1, bucket_bytes=1, timeout_s=1.0)
    assert not book.begin_offer(plan.epoch + 1, 1)
    assert book.begin_offer(plan.epoch, 1)
    book.enter("a", epoch=plan.epoch, version=1)
    assert book.decision(plan.epoch, 1) is None
    assert book.call_off() == ("b",)
    book.enter("b", epoch=plan.epoch, version=1)
    assert book.decision(plan.epoch, 1) is False, "a has been told to read the store"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between learner and engine needs two GPUs")
async def test_nccl_leader_reaches_vllm_s_receiver() -> None:
    """The same phases with vLLM's native engines: tensors arrive as they were sent."""
    from cluster.weights_nccl import NcclLeader
    from tests.gpu_members import receive_over_nccl

    leader = NcclLeader("127.0.0.1", timeout_s=60.0)
    plan = replace(plan_for(leader.port, timeout_s=60.0), backend="nccl", bucket_bytes=1 << 20)
    blob = weights(3, floats=1 << 20)

    def lead() -> None:
        leader.form(plan.world_size)
        for _ in leader.broadcast(blob, bucket_bytes=plan.bucket_bytes):
            pass

    _, sums = await asyncio.gather(asyncio.to_thread(lead), asyncio.to_thread(receive_over_nccl, plan, blob))
    assert sums == {"w": 3.0 * (1 << 20)}
    leader.close()


class GlooPort:
    """A port that nobody listens on after the block."""

    def __enter__(self) -> int:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        pass


def plan_for(port: int, *, timeout_s: float) -> GroupPlan:
    return GroupPlan(
        epoch=1,
        backend="gloo",
        address="127.0.0.1",
        port=port,
        world_size=2,
        offsets={"a": 1},
        bucket_bytes=64,
        timeout_s=timeout_s,
    )
