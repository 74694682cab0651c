"""Members of a weight group for tests: scripted engines that take versions from a channel, as a rollout worker does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import torch

from actors.engine import ScriptedEngine
from actors.rollout_worker import RolloutWorker, WorkerSettings
from cluster.streams_memory import MemoryStreams
from cluster.weight_group import GroupPlan, GroupSettings, GroupUpdate
from cluster.weights import Probe, WeightBlob, WeightChannel, pack

SETTINGS = GroupSettings(
    bucket_bytes=4096, timeout_s=2.0, ready_timeout_s=1.0, check_period_s=0.05, address="127.0.0.1"
)


class Member(ScriptedEngine):
    """Remembers by which way each version came. `hang_on` names a phase in which it stops for good: "join", "receive";
    "report" receives and never says so."""

    def __init__(self) -> None:
        super().__init__()
        self.came: list[tuple[int, str]] = []
        self.epochs: list[int] = []
        self.first_ranks: list[int] = []
        self.sums: dict[int, float] = {}
        self.hang_on = ""
        self.changed = asyncio.Event()

    async def join_group(self, plan: GroupPlan, *, first_rank: int) -> None:
        if self.hang_on == "join":
            await asyncio.Event().wait()
        await super().join_group(plan, first_rank=first_rank)
        self.epochs.append(plan.epoch)
        self.first_ranks.append(first_rank)
        self.changed.set()

    async def receive_weights(self, update: GroupUpdate):  # type: ignore[no-untyped-def]
        if self.hang_on == "receive":
            await asyncio.Event().wait()
        return await super().receive_weights(update)

    async def load_weights(self, blob: WeightBlob):  # type: ignore[no-untyped-def]
        timings = await super().load_weights(blob)
        self.came.append((blob.version, "group" if blob is self.received else "store"))
        self.sums[blob.version] = float(np.frombuffer(blob.buffer.tobytes(), dtype=np.float32).sum())
        self.changed.set()
        if self.hang_on == "report" and blob is self.received:
            await asyncio.Event().wait()
        return timings

    async def until_version(self, version: int, *, timeout_s: float = 30.0) -> str:
        """How that version came."""
        async with asyncio.timeout(timeout_s):
            while (ways := dict(self.came)).get(version) is None:
                self.changed.clear()
                await self.changed.wait()
        return ways[version]

    async def until_epoch(self, above: int, *, timeout_s: float = 30.0) -> int:
        """The first group after epoch `above` that this member joined."""
        async with asyncio.timeout(timeout_s):
            while not (later := [epoch for epoch in self.epochs if epoch > above]):
                self.changed.clear()
                await self.changed.wait()
        return later[0]


@asynccontextmanager
async def running(channel: WeightChannel, member: Member, *, name: str) -> AsyncIterator[asyncio.Task[None]]:
    """The member as the engine of a rollout worker."""
    settings = WorkerSettings(consumer=name, claim_wait_s=0.02, weights_poll_s=1.0)
    worker = RolloutWorker(MemoryStreams(), engine=member, weights=channel, settings=settings)
    run = asyncio.create_task(worker.run())
    try:
        yield run
    finally:
        worker.stop()
        await asyncio.wait([run], timeout=20)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await member.shutdown()


def weights(version: int, *, floats: int = 5000) -> WeightBlob:
    """All of them equal to the version, so that a sum shows a mix."""
    probe = Probe(token_ids=np.array([5, 6], dtype=np.int32), logprobs=np.array([-1.0 - version], dtype=np.float32))
    return pack(version, [("w", torch.full((floats,), float(version)))], probe=probe)
