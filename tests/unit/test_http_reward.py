"""A reward server that fails: what is tried again, what is not, what opens the breaker. Real server, manual clock."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator

import pytest

from cluster.errors import ConfigError, ScoringError
from configs.reward import HttpReward
from reward_service.rewards.breaker import Breaker
from reward_service.rewards.http import HttpSource, HttpTime
from reward_service.rewards.sources import SourceDownError, TextSample
from tests.reward_server import Reply, RewardServer, reward_server

pytestmark = pytest.mark.timeout(60)


class Clock:
    """Sleeping moves it on."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def now(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


class World:
    def __init__(self, server: RewardServer) -> None:
        self.server = server
        self.clock = Clock()
        self.source = self.with_settings()

    def with_settings(self, *, retries: int = 2, breaker_failures: int = 5, timeout_s: float = 5.0) -> HttpSource:
        config = HttpReward(
            url=self.server.url,
            retries=retries,
            breaker_failures=breaker_failures,
            breaker_pause_s=10.0,
            timeout_s=timeout_s,
        )
        time = HttpTime(now=self.clock.now, sleep=self.clock.sleep, rng=random.Random(0))
        self.source = HttpSource(config, name="http", time=time)
        return self.source

    async def ask(self, count: int = 2) -> list[float | ScoringError]:
        return await self.source.rewards([TextSample(f"t{n}", "p", str(n), "stop", 1) for n in range(count)])

    async def error(self) -> ScoringError:
        """The one error of both samples."""
        first, second = await self.ask()
        assert isinstance(first, ScoringError)
        assert first is second
        return first


def state(source: HttpSource) -> str:
    """Of its breaker."""
    return source.breaker.state


@pytest.fixture
async def world() -> AsyncIterator[World]:
    with reward_server(lambda prompt, answer: float(answer)) as server:
        opened = World(server)
        yield opened
        await opened.source.aclose()


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
async def test_what_may_pass_is_tried_again_with_growing_pauses(world: World, status: int) -> None:
    world.server.replies.extend([Reply(status), Reply(status)])

    assert await world.ask() == [0.0, 1.0]
    assert len(world.server.bodies) == 3
    first, second = world.clock.slept_s
    assert 0.125 <= first <= 0.25 <= second <= 0.5


async def test_a_server_that_keeps_failing_is_away_and_says_why(world: World) -> None:
    world.server.replies.extend([Reply(500, b"out of memory")] * 3)

    error = await world.error()
    assert isinstance(error, SourceDownError)
    assert "500" in str(error)
    assert "out of memory" in str(error)


async def test_no_server_at_all_is_away(world: World) -> None:
    config = HttpReward(url="http://127.0.0.1:9/get_reward", retries=1)
    world.source = HttpSource(config, name="http", time=HttpTime(sleep=world.clock.sleep))

    assert isinstance(await world.error(), SourceDownError)
    assert len(world.clock.slept_s) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>welcome</html>",
        b"[1.0, 2.0]",
        b'{"scores": [1.0, 2.0]}',
        b'{"rewards": 1.0}',
        b'{"rewards": [1.0]}',
        b'{"rewards": [1.0, 2.0, 3.0]}',
        b'{"rewards": {"0": 1.0, "1": 2.0}}',
        b"\xff\xfe",
    ],
)
async def test_a_malformed_answer_is_an_error_for_all_and_not_asked_for_again(world: World, body: bytes) -> None:
    world.server.replies.append(Reply(200, body))

    error = await world.error()
    assert not isinstance(error, SourceDownError)
    assert len(world.server.bodies) == 1


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
async def test_a_refusal_is_not_tried_again(world: World, status: int) -> None:
    world.server.replies.append(Reply(status, b"no"))

    assert not isinstance(await world.error(), SourceDownError)
    assert len(world.server.bodies) == 1


async def test_rewards_in_lists_of_one_and_one_that_is_no_number(world: World) -> None:
    world.server.replies.append(Reply(200, b'{"rewards": [[0.25], true], "scores": [9, 9]}'))

    first, second = await world.ask()
    assert first == 0.25
    assert isinstance(second, ScoringError)


async def test_an_open_breaker_asks_nothing_then_one_then_all(world: World) -> None:
    source = world.with_settings(retries=0, breaker_failures=2)
    world.server.replies.extend([Reply(500, b"down")] * 3)
    for _ in range(2):
        await world.error()
    assert state(source) == "open"
    assert "down" in str(await world.error()), "the reason is not forgotten while nothing is asked"
    assert len(world.server.bodies) == 2

    world.clock.now_s += 10.0
    await world.error()  # the one try of the half-open state fails
    assert len(world.server.bodies) == 3
    assert isinstance(await world.error(), SourceDownError)
    assert len(world.server.bodies) == 3

    world.clock.now_s += 10.0
    assert await world.ask() == [0.0, 1.0]
    assert state(source) == "closed"


async def test_samples_that_the_server_refuses_do_not_open_the_breaker(world: World) -> None:
    source = world.with_settings(retries=0, breaker_failures=2)
    world.server.replies.extend([Reply(422)] * 4)
    for _ in range(4):
        await world.error()
    assert state(source) == "closed"

    world.server.replies.extend([Reply(200, b"<html>")] * 2)
    for _ in range(2):
        await world.error()
    assert state(source) == "open"


async def test_a_cancelled_call_leaves_the_breaker_as_it_was(world: World) -> None:
    source = world.with_settings(retries=0, breaker_failures=1, timeout_s=20.0)
    world.server.replies.append(Reply(500))
    await world.error()
    world.clock.now_s += 10.0
    call = asyncio.create_task(source.rewards([TextSample("t", "p", "hang", "stop", 1)]))
    assert await asyncio.to_thread(world.server.hangs.wait, 20.0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)

    assert await world.ask() == [0.0, 1.0], "the half-open state's one try is free again"


@pytest.mark.parametrize("url", ["rm.example/get_reward", "ftp://rm.example", "http://", "file:///etc/passwd"])
def test_a_url_of_no_server_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        HttpSource(HttpReward(url=url), name="http")


async def test_no_log_holds_what_is_secret_in_the_url(world: World, caplog: pytest.LogCaptureFixture) -> None:
    url = world.server.url.replace("http://", "http://me:s3cret@") + "?key=k3y"
    source = HttpSource(HttpReward(url=url, timeout_s=5.0), name="http")
    with caplog.at_level(logging.INFO):
        assert await source.rewards([TextSample("t", "p", "1", "stop", 1)]) == [1.0]
        world.server.replies.append(Reply(404))
        (error,) = await source.rewards([TextSample("t", "p", "1", "stop", 1)])
    await source.aclose()
    assert "404" in str(error)
    assert not any(secret in f"{error} {caplog.text}" for secret in ("s3cret", "k3y"))


def test_a_failure_of_an_earlier_call_does_not_lengthen_the_pause() -> None:
    clock = Clock()
    breaker = Breaker(failures=2, pause_s=10.0, now=clock.now)
    assert [breaker.admits() for _ in range(3)] == [True] * 3
    breaker.failed()
    breaker.failed()
    clock.now_s = 9.0
    breaker.failed()  # the third of those calls, late
    clock.now_s = 10.0
    assert [breaker.admits(), breaker.admits()] == [True, False]


def test_a_success_between_starts_the_count_anew() -> None:
    breaker = Breaker(failures=2, pause_s=10.0)
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert breaker.state == "closed"
