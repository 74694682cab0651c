"""The learner's process: what it ends before it says that it has ended."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from cluster.weights import MemoryWeightChannel
from configs.run import DataSection, RunConfig
from learner import learner_actor
from learner.learner_actor import LearnerActor, LearnerSpec


class Channel(MemoryWeightChannel):
    """`slow`: a broadcast that does not end."""

    def __init__(self) -> None:
        super().__init__()
        self.closed_in: threading.Thread | None = None
        self.slow: threading.Event | None = None

    def close_publisher(self) -> None:
        self.closed_in = threading.current_thread()
        if self.slow is not None:
            self.slow.wait(30)


def learner(channel: Channel, tmp_path: Path) -> LearnerActor:
    config = RunConfig(name="t", data=DataSection())
    return LearnerActor(LearnerSpec(config=config, redis_url="", run_dir=str(tmp_path), channel=channel))


@pytest.mark.parametrize("fails", [False, True])
async def test_the_publisher_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    channel = Channel()
    actor = learner(channel, tmp_path)

    async def run(_: LearnerActor) -> str:
        assert channel.closed_in is None
        if fails:
            raise RuntimeError("a bad step")
        return "steps_done"

    monkeypatch.setattr(LearnerActor, "_run", run)
    if fails:
        with pytest.raises(RuntimeError, match="a bad step"):
            await actor.run()
    else:
        assert await actor.run() == "steps_done"
    assert channel.closed_in is not None
    assert channel.closed_in is not threading.current_thread(), "it may block, and the loop must not"


async def test_a_broadcast_that_does_not_end_holds_the_end_up_for_a_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = Channel()
    channel.slow = threading.Event()

    async def run(_: LearnerActor) -> str:
        return "steps_done"

    monkeypatch.setattr(LearnerActor, "_run", run)
    monkeypatch.setattr(learner_actor, "_CLOSE_S", 0.05)
    try:
        async with asyncio.timeout(20):
            assert await learner(channel, tmp_path).run() == "steps_done"
    finally:
        channel.slow.set()
