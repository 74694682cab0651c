"""What every implementation of `cluster.rm_announcement.RewardModelBoard` keeps."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio as aioredis

from cluster.errors import CodecError
from cluster.keys import Keys
from cluster.redis_server import EmbeddedServer
from cluster.rm_announcement import MemoryRewardModelBoard, RewardModelBoard, RmAnnouncement
from cluster.run_redis import RunRedis
from tests.contract.conftest import MakeRedis

FAR_AHEAD = 4_000_000_000_000


@pytest.fixture(params=["memory", "valkey", "valkey-learner-acl"], name="board")
async def make_board(request: pytest.FixtureRequest, make_redis_world: MakeRedis) -> RewardModelBoard:
    if request.param == "memory":
        return MemoryRewardModelBoard()
    server: EmbeddedServer = request.getfixturevalue("valkey")
    world = await make_redis_world(server, role="learner" if request.param == "valkey-learner-acl" else None)
    return world.client().reward_model


@pytest.fixture(name="redis")
async def make_redis(valkey: EmbeddedServer) -> AsyncIterator[RunRedis]:
    async with RunRedis(valkey.url, run=f"t-{secrets.token_hex(6)}") as redis:
        yield redis


async def test_nothing_is_announced_at_first(board: RewardModelBoard) -> None:
    assert await board.newest() is None


async def test_what_is_announced_is_read_back(board: RewardModelBoard) -> None:
    made = await board.announce("rm-1", reason='a "quoted" reason / ünïcode \\ and a\nline')
    assert (made.version, made.reason) == ("rm-1", 'a "quoted" reason / ünïcode \\ and a\nline')
    assert await board.newest() == made


async def test_numbers_rise_with_every_announcement_also_back_to_an_older_version(board: RewardModelBoard) -> None:
    made = [await board.announce(version, reason="") for version in ("rm-1", "rm-2", "rm-1", "rm-1")]
    numbers = [one.number for one in made]
    assert numbers == sorted(set(numbers))
    assert await board.newest() == made[-1]
    assert made[-1].version == "rm-1"


async def test_only_what_is_newer_is_news(board: RewardModelBoard) -> None:
    first = await board.announce("rm-1", reason="")
    assert await board.newest(after=first.number) is None
    second = await board.announce("rm-2", reason="")
    assert await board.newest(after=first.number) == second
    assert await board.newest(after=second.number) is None


async def test_announcements_at_the_same_time_get_different_numbers(board: RewardModelBoard) -> None:
    made = await asyncio.gather(*(board.announce(f"rm-{index}", reason="") for index in range(20)))
    assert len({one.number for one in made}) == 20
    assert await board.newest() == max(made, key=lambda one: one.number)


async def test_a_clock_that_stands_or_goes_back_still_gives_higher_numbers() -> None:
    times = iter([50.0, 50.0, 10.0])
    board = MemoryRewardModelBoard(now_s=lambda: next(times))
    assert [(await board.announce("rm", reason="")).number for _ in range(3)] == [50_000, 50_001, 50_002]


async def test_a_server_whose_clock_went_back_still_gives_higher_numbers(redis: RunRedis) -> None:
    key = redis.reward_model._key
    ahead = f'{{"version":"rm-1","number":{FAR_AHEAD},"reason":"","token":""}}'
    await redis.reward_model._client.command("SET", key, ahead)
    assert (await redis.reward_model.announce("rm-2", reason="")).number == FAR_AHEAD + 1


async def test_a_server_that_lost_its_data_goes_on_above_what_was_heard(
    redis: RunRedis, valkey: EmbeddedServer
) -> None:
    first = await redis.reward_model.announce("rm-1", reason="")
    admin: Any = aioredis.Redis.from_url(valkey.url, protocol=2)
    await admin.delete(redis.reward_model._key)
    await asyncio.sleep(0.002)  # the server's clock counts milliseconds
    second = await redis.reward_model.announce("rm-2", reason="")
    await admin.aclose()
    assert second.number > first.number


async def test_a_call_that_is_sent_again_announces_nothing_new(
    redis: RunRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "same")
    first = await redis.reward_model.announce("rm-1", reason="")
    assert await redis.reward_model.announce("rm-1", reason="") == first


async def test_damaged_text_is_an_error_to_read_and_can_be_written_over(redis: RunRedis) -> None:
    await redis.reward_model._client.command("SET", redis.reward_model._key, b"\xff garbage")
    with pytest.raises(CodecError, match="no announcement of a reward model"):
        await redis.reward_model.newest()
    made = await redis.reward_model.announce("rm-1", reason="repaired")
    assert await redis.reward_model.newest() == made


def test_the_key_is_one_of_the_runs() -> None:
    assert Keys("r").reward_model == "keel:{r}:rm"
    assert RmAnnouncement(version="v", number=1).reason == ""
