"""The reward worker as a process: real queue server, tiny real models, and `serve` under signals."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import ModelError, StreamError
from cluster.records import ScoredRollout, decode, encode
from cluster.redis_server import EmbeddedServer
from cluster.run_redis import RunRedis
from cluster.streams import StreamName
from configs.run import DataSection, RedisSection, RewardSection, RunConfig, WorldSource
from reward_service.reward_actor import RewardActor, RewardSpec
from tests.integration.test_scorer import EOS, own_score, save_manifest, save_member, save_reference
from tests.reward_support import rollout

LONG_S = 60.0
CONFIG = RunConfig(
    name="test",
    data=DataSection(world=WorldSource(factory="x:y")),
    reward=RewardSection(batch_size=4, batch_wait_s=0.01),
    redis=RedisSection(command_timeout_s=2.0),
)


@pytest.fixture(name="redis_url", scope="module")
def make_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(name="run_dir")
def make_run_dir(tmp_path: Path) -> Path:
    save_member(tmp_path / "rm" / "member_0", seed=0)
    save_manifest(tmp_path / "rm", 1)
    save_reference(tmp_path / "sft" / "model")
    return tmp_path


def spec(redis_url: str, run_dir: Path, *, name: str) -> RewardSpec:
    config = CONFIG.model_copy(update={"name": name})
    return RewardSpec(config=config, redis_url=redis_url, run_dir=str(run_dir), index=0, incarnation=0)


async def scored(redis: RunRedis, count: int) -> list[ScoredRollout]:
    found: list[ScoredRollout] = []
    async with asyncio.timeout(LONG_S):
        while len(found) < count:
            entries = await redis.streams.claim(StreamName.SCORED, consumer="test", max_count=count, wait_s=1.0)
            found += [decode(entry.payload, ScoredRollout) for entry in entries]
    return found


def scrape(address: str) -> dict[str, float]:
    """Samples of an exporter by name, summed over labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=LONG_S) as reply:
        text = reply.read().decode()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


async def test_rollouts_through_a_real_server_and_real_models(redis_url: str, run_dir: Path) -> None:
    actor = RewardActor(spec(redis_url, run_dir, name="through"))
    info = await actor.start()
    assert (info["name"], info["rm_version"], info["members"]) == ("reward-0.0", "rm-abc", 1)
    run = asyncio.create_task(actor.run())
    items = [rollout(f"t{i}", prompt=[4, 5, 6], response=[7 + i % 3, 8, EOS]) for i in range(10)]
    async with RunRedis(redis_url, run="through") as redis:
        await redis.streams.publish(StreamName.ROLLOUTS, [encode(item) for item in items])
        results = await scored(redis, 10)
        (member,) = await redis.directory.members()
    samples = await asyncio.to_thread(scrape, member.address)
    status = await actor.status()
    await actor.stop()
    await run
    assert status["scored"] == 10
    assert sorted(item.rollout.task.task_id for item in results) == [f"t{i}" for i in range(10)]
    assert (member.role, member.instance) == ("reward", "reward-0.0")
    assert samples["keel_reward_samples_total"] == 10
    assert samples["keel_reward_batch_size_sum"] + samples["keel_reward_cache_hits_total"] == 10
    assert len({item.reward for item in results}) == 3
    assert all(item.rm_version == "rm-abc" for item in results)


async def test_scores_on_request_are_the_models_own(redis_url: str, tmp_path: Path) -> None:
    members = [save_member(tmp_path / "rm" / f"member_{seed}", seed=seed) for seed in range(2)]
    save_manifest(tmp_path / "rm", 2)
    save_reference(tmp_path / "sft" / "model")
    actor = RewardActor(spec(redis_url, tmp_path, name="request"))
    await actor.start()
    pairs = [([4, 5], [6 + i, EOS]) for i in range(6)]
    scores = await actor.score(pairs)
    expected = [sum(own_score(member, [*prompt, *response]) for member in members) / 2 for prompt, response in pairs]
    assert scores == pytest.approx(expected, abs=1e-5)
    await actor.stop()  # without run(): returns at once


async def test_start_reports_missing_models_and_an_unreachable_server(redis_url: str, run_dir: Path) -> None:
    with pytest.raises(ModelError, match="no reward model"):
        await RewardActor(spec(redis_url, run_dir / "elsewhere", name="missing")).start()
    with pytest.raises(StreamError):
        await RewardActor(spec("redis://127.0.0.1:1/0", run_dir, name="missing")).start()


def serve_process(redis_url: str, run_dir: Path) -> subprocess.Popen[str]:
    config_file = run_dir / "config.json"
    config_file.write_text(CONFIG.model_copy(update={"name": "served"}).model_dump_json())
    program = (
        "import sys; from pathlib import Path; from configs.run import RunConfig;"
        "from reward_service.reward_actor import RewardSpec, serve;"
        "config = RunConfig.model_validate_json(Path(sys.argv[2]).read_text());"
        "sys.exit(serve(RewardSpec(config=config, redis_url=sys.argv[1], run_dir=sys.argv[3], index=7, incarnation=0)))"
    )
    command = [sys.executable, "-c", program, redis_url, str(config_file), str(run_dir)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


async def test_serve_scores_until_sigterm_and_exits_clean(redis_url: str, run_dir: Path) -> None:
    process = serve_process(redis_url, run_dir)
    try:
        async with RunRedis(redis_url, run="served") as redis:
            await redis.streams.publish(StreamName.ROLLOUTS, [encode(rollout("a", response=[7, 8, EOS]))])
            (result,) = await scored(redis, 1)
        assert result.rollout.task.task_id == "a"
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.to_thread(process.communicate, timeout=LONG_S)
        assert process.returncode == 0, errors
        assert "reward-7.0 is ready" in errors
    finally:
        process.kill()


async def test_serve_exits_with_an_error_when_the_server_is_not_there(run_dir: Path) -> None:
    process = serve_process("redis://127.0.0.1:1/0", run_dir)
    _, errors = await asyncio.to_thread(process.communicate, timeout=LONG_S)
    assert process.returncode != 0
    assert "StreamError" in errors
