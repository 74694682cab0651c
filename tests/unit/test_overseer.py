"""The driver's overseer: the lock that a killed driver left, and the lock of one that lives."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.control import ScaleRequest
from cluster.errors import RunExistsError
from cluster.redis_server import EmbeddedServer
from cluster.run_redis import RunRedis
from configs.run import DataSection, MetricsSection, RunConfig
from keel.online import overseer as module
from keel.online.overseer import Overseer
from keel.online.scaler import Scaler
from tests.unit.test_scaler import FakePool

CONFIG = RunConfig(name="held", data=DataSection(), metrics=MetricsSection(enabled=False))


def overseer(url: str, *, run_dir: Path) -> Overseer:
    scaler = Scaler(FakePool(), config=CONFIG, idle_of_actors=lambda: None, note=lambda event, text: None)
    return Overseer(CONFIG, run_dir=run_dir, redis_url=url, pools=list, scaler=scaler)


@contextmanager
def another_driver(url: str, *, lock_ttl_s: float, renews: bool) -> Iterator[None]:
    """Holds the lock, and asks for actors, before the body begins."""
    held, ended = threading.Event(), threading.Event()

    async def hold() -> None:
        async with RunRedis(url, run=CONFIG.name, lock_ttl_s=lock_ttl_s) as redis:
            await redis.lock.acquire()
            await redis.control.ask(ScaleRequest(7))
            held.set()
            while renews and not ended.is_set():
                await redis.lock.renew()
                await asyncio.sleep(lock_ttl_s / 4)

    thread = threading.Thread(target=asyncio.run, args=(hold(),))
    thread.start()
    assert held.wait(10.0)
    yield
    ended.set()
    thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_WAIT_S", 3.0)
    monkeypatch.setattr(module, "_LOCK_POLL_S", 0.05)


def test_the_lock_of_a_killed_driver_is_waited_for_and_its_requests_are_forgotten(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "redis") as server, another_driver(server.url, lock_ttl_s=1.0, renews=False):
        with overseer(server.url, run_dir=tmp_path) as mine:
            assert mine.error is None
            assert mine.scaler.request is None
    (record,) = map(json.loads, (tmp_path / "progress.jsonl").read_text().splitlines())
    assert "run's lock" in record["note"]


def test_a_living_driver_keeps_its_lock(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with EmbeddedServer(tmp_path / "redis") as server, another_driver(server.url, lock_ttl_s=1.0, renews=True):
        with pytest.raises(RunExistsError, match="held"), overseer(server.url, run_dir=tmp_path):
            pass
    assert time.monotonic() - started_s < 20.0
