"""The reward worker as a process: real queue server, tiny real models, swaps of them, and `serve` under signals."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import ModelError, ScoringError, StreamError
from cluster.records import DeadLetter, Rollout, ScoredRollout, decode, encode
from cluster.redis_server import EmbeddedServer
from cluster.review_queue import ReviewItem
from cluster.reward_models import Calibration, RewardModels, RmManifest
from cluster.run_redis import RunRedis
from cluster.streams import StreamName
from configs.reward import FunctionReward, ReviewSection
from configs.run import DataSection, RedisSection, RewardSection, RunConfig, WorldSource
from reward_service.aggregate import spread
from reward_service.hot_swap import ModelWatch
from reward_service.reward_actor import RewardActor, RewardSpec
from reward_service.scorer_transformers import TransformersScorer
from tests.integration.test_scorer import EOS, own_score, save_member, save_reference
from tests.reward_support import rollout

LONG_S = 60.0
Members = list[Any]
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


def add_version(run_dir: Path, version: str, *, seeds: Sequence[int], make_current: bool = True) -> Members:
    """A version in the run's registry, with random members; the models themselves."""
    models = RewardModels(run_dir / "rm")
    calibration = Calibration(mean=0.0, std=1.0, count=10)
    manifest = RmManifest(
        version=version,
        members=len(seeds),
        number=models.next_number,
        calibration=calibration,
        spread_percentiles=tuple(number / 100 for number in range(101)) if len(seeds) > 1 else (),
    )
    with models.draft() as draft:
        made = [save_member(draft / f"member_{place}", seed=seed) for place, seed in enumerate(seeds)]
        models.publish(draft, manifest, make_current=make_current)
    return made


@pytest.fixture(name="run_dir")
def make_run_dir(tmp_path: Path) -> Path:
    """A run whose reward model is rm-abc, of one member."""
    add_version(tmp_path, "rm-abc", seeds=[0])
    save_reference(tmp_path / "sft" / "model")
    return tmp_path


def spec(
    redis_url: str, run_dir: Path, *, name: str, reward: RewardSection = CONFIG.reward, review: bool = False
) -> RewardSpec:
    people = ReviewSection(enabled=review, audit_fraction=1.0)
    config = CONFIG.model_copy(update={"name": name, "reward": reward, "review": people})
    return RewardSpec(config=config, redis_url=redis_url, run_dir=str(run_dir), index=0, incarnation=0)


@asynccontextmanager
async def running(spec: RewardSpec) -> AsyncIterator[tuple[RewardActor, RunRedis]]:
    """A worker that runs, and another client of its run."""
    actor = RewardActor(spec)
    await actor.start()
    run = asyncio.create_task(actor.run())
    try:
        async with RunRedis(spec.redis_url, run=spec.config.name) as redis:
            yield actor, redis
        await actor.stop()
        await run
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await actor.stop()


async def scored(redis: RunRedis, count: int) -> list[ScoredRollout]:
    found: list[ScoredRollout] = []
    async with asyncio.timeout(LONG_S):
        while len(found) < count:
            entries = await redis.streams.claim(StreamName.SCORED, consumer="test", max_count=count, wait_s=1.0)
            await redis.streams.settle(StreamName.SCORED, [entry.entry_id for entry in entries])
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
    old = add_version(tmp_path, "rm-old", seeds=[5])
    members = add_version(tmp_path, "rm-new", seeds=[0, 1])
    save_reference(tmp_path / "sft" / "model")
    reward = CONFIG.reward.model_copy(update={"aggregation": "mean_minus_std", "std_coefficient": 2.0})
    actor = RewardActor(spec(redis_url, tmp_path, name="request", reward=reward))
    await actor.start()
    pairs = [([4, 5], [6 + i, EOS]) for i in range(6)]
    texts = [[*prompt, *response] for prompt, response in pairs]
    by_member = [[own_score(member, ids) for member in members] for ids in texts]
    expected = [sum(scores_M) / 2 - 2 * spread(scores_M) for scores_M in by_member]
    assert await actor.score(pairs) == pytest.approx(expected, abs=1e-5)
    assert await actor.score(pairs, "rm-old") == pytest.approx([own_score(old[0], ids) for ids in texts], abs=1e-5)
    assert in_memory() == {"rm-new", "rm-old", "none"}
    assert await actor.score(pairs, "rm-new") == pytest.approx(expected, abs=1e-5)
    assert in_memory() == {"rm-new", "none"}
    with pytest.raises(ModelError, match="no such reward model"):
        await actor.score(pairs, "rm-none")
    assert (await actor.status())["rm_version"] == "rm-new"
    await actor.stop()  # without run(): returns at once


def in_memory() -> set[str]:
    """Versions of this process's scorers; "none" is the bare reference model."""
    gc.collect()
    return {found.version for found in gc.get_objects() if type(found) is TransformersScorer}


async def test_start_reports_missing_models_and_an_unreachable_server(redis_url: str, run_dir: Path) -> None:
    with pytest.raises(ModelError, match="no reward model"):
        await RewardActor(spec(redis_url, run_dir / "elsewhere", name="missing")).start()
    with pytest.raises(StreamError):
        await RewardActor(spec("redis://127.0.0.1:1/0", run_dir, name="missing")).start()


# ---------------------------------------------------------------- swaps


async def until(actor: RewardActor, key: str, value: object) -> dict[str, Any]:
    async with asyncio.timeout(LONG_S):
        while True:
            status = await actor.status()
            if status.get(key) == value:
                return status
            await asyncio.sleep(0.02)


async def test_a_swap_during_real_scoring_loses_nothing_and_every_score_is_its_versions(
    redis_url: str, run_dir: Path
) -> None:
    models = {"rm-abc": save_member(run_dir / "again", seed=0)}
    models["rm-two"] = add_version(run_dir, "rm-two", seeds=[9], make_current=False)[0]
    sent: list[Rollout] = []
    results: list[ScoredRollout] = []
    async with running(spec(redis_url, run_dir, name="swap")) as (actor, redis):

        async def send(count: int) -> None:
            items = [answer(len(sent) + place) for place in range(count)]
            sent.extend(items)
            await redis.streams.publish(StreamName.ROLLOUTS, [encode(item) for item in items])

        await send(12)  # three batches: one in its pass, one that waits, one on the way, at every moment of the swap
        async with asyncio.timeout(LONG_S):
            while sum(item.rm_version == "rm-two" for item in results) < 40:
                results += await scored(redis, 1)
                if len(results) == 40:
                    await redis.reward_model.announce("rm-two", reason="better on fresh pairs")
                await send(len(results) + 12 - len(sent))
        results += await scored(redis, len(sent) - len(results))
        status = await actor.status()
        (member,) = await redis.directory.members()
        text = await asyncio.to_thread(metrics_text, member.address)
        assert in_memory() == {"rm-two", "none"}
    assert sorted(item.rollout.task.task_id for item in results) == sorted(item.task.task_id for item in sent)
    assert (status["swaps"], status["scored"]) == (1, len(sent))
    assert {item.rm_version for item in results} == {"rm-abc", "rm-two"}
    for item in results:
        ids = [*item.rollout.task.prompt_ids, *item.rollout.response_ids]
        assert item.reward == pytest.approx(own_score(models[item.rm_version], ids), abs=1e-5)
    assert 'keel_reward_model_info{version="rm-two"} 1.0' in text
    assert "keel_reward_model_swaps_total 1.0" in text


async def test_a_worker_starts_with_what_is_announced(redis_url: str, run_dir: Path) -> None:
    add_version(run_dir, "rm-two", seeds=[9], make_current=False)
    async with RunRedis(redis_url, run="announced") as redis:
        await redis.reward_model.announce("rm-two", reason="")
        actor = RewardActor(spec(redis_url, run_dir, name="announced"))
        assert (await actor.start())["rm_version"] == "rm-two"
        await actor.stop()
        await redis.reward_model.announce("rm-of-an-earlier-run", reason="")
        actor = RewardActor(spec(redis_url, run_dir, name="announced"))
        assert (await actor.start())["rm_version"] == "rm-abc"  # the registry's
        await actor.stop()


async def test_a_version_that_does_not_load_costs_nothing_but_its_count(redis_url: str, run_dir: Path) -> None:
    add_version(run_dir, "rm-cut", seeds=[9], make_current=False)
    (weights,) = (run_dir / "rm" / "versions" / "rm-cut" / "member_0").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    async with running(spec(redis_url, run_dir, name="cut")) as (actor, redis):
        await redis.reward_model.announce("rm-cut", reason="")
        await until(actor, "swap_failures", 1)
        await redis.streams.publish(StreamName.ROLLOUTS, [encode(answer(1))])
        (result,) = await scored(redis, 1)
        assert result.rm_version == "rm-abc"
        add_version(run_dir, "rm-good", seeds=[3], make_current=False)
        await redis.reward_model.announce("rm-good", reason="")
        assert (await until(actor, "rm_version", "rm-good"))["swaps"] == 1


async def test_a_watch_that_breaks_ends_the_worker_with_its_error(
    redis_url: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: ModelWatch) -> None:
        raise ZeroDivisionError("a fault in the watch")

    monkeypatch.setattr(ModelWatch, "look", broken)
    actor = RewardActor(spec(redis_url, run_dir, name="broken"))
    await actor.start()
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(actor.run(), LONG_S)
    await actor.stop()


def answer(number: int) -> Rollout:
    """One of 6,561 texts: mostly such as the cache does not have."""
    digits = [4 + number // 9**place % 9 for place in range(4)]
    return rollout(f"t{number}", prompt=digits[:2], response=[*digits[2:], EOS])


def metrics_text(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=LONG_S) as reply:
        text: str = reply.read().decode()
    return text


# ---------------------------------------------------------------- members that disagree


async def test_answers_on_which_real_members_disagree_are_refused_counted_and_said_why(
    redis_url: str, run_dir: Path
) -> None:
    first, second = add_version(run_dir, "rm-pair", seeds=[0, 1])
    reward = CONFIG.reward.model_copy(update={"uncertain": "reject", "uncertain_quantile": 0.5})  # a spread of 0.5
    items = [answer(number) for number in range(40)]
    refused = set()
    for item in items:
        ids = [*item.task.prompt_ids, *item.response_ids]
        if abs(own_score(first, ids) - own_score(second, ids)) / 2 > 0.5:
            refused.add(item.task.task_id)
    assert 0 < len(refused) < 40
    async with running(spec(redis_url, run_dir, name="refuse", reward=reward)) as (_, redis):
        await redis.streams.publish(StreamName.ROLLOUTS, [encode(item) for item in items])
        results = await scored(redis, 40 - len(refused))
        entries = await redis.streams.claim(StreamName.DEAD, consumer="test", max_count=40, wait_s=5.0)
        (member,) = await redis.directory.members()
        text = await asyncio.to_thread(metrics_text, member.address)
    letters = [decode(entry.payload, DeadLetter) for entry in entries]
    assert {letter.task.task_id for letter in letters} == refused
    assert {item.rollout.task.task_id for item in results} == {item.task.task_id for item in items} - refused
    assert all(letter.rejected and letter.reason.startswith("members disagree: spread ") for letter in letters)
    assert f"keel_reward_rejected_total {float(len(refused))}" in text
    assert 'keel_dead_letters_total{stage="reward"} 0.0' in text


# ---------------------------------------------------------------- other sources, people


def words(prompt: str, response: str) -> float:
    return float(len(response.split()))


async def shown(redis: RunRedis) -> ReviewItem:
    """The first answer put before people."""
    async with asyncio.timeout(LONG_S):
        while True:
            item = await redis.review.next("ann", lease_s=60.0)
            if item is not None:
                return item
            await asyncio.sleep(0.02)


async def test_without_a_reward_model_the_sources_and_the_reference_model_do(redis_url: str, tmp_path: Path) -> None:
    save_reference(tmp_path / "sft" / "model")
    reward = CONFIG.reward.model_copy(update={"sources": (FunctionReward(path=f"{__name__}:words", weight=2.0),)})
    async with running(spec(redis_url, tmp_path, name="plain", reward=reward, review=True)) as (actor, redis):
        await redis.streams.publish(StreamName.ROLLOUTS, [encode(rollout("a", response=[7, 8, 9, EOS]))])
        (result,) = await scored(redis, 1)
        with pytest.raises(ScoringError, match="no reward model"):
            await actor.score([([4], [EOS])])
        item = await shown(redis)
    assert (result.reward, result.member_scores, result.uncertainty) == (6.0, (), 0.0)
    assert result.rm_version.startswith("none~")
    assert len(result.ref_logprobs) == 4
    assert (item.kind, item.policy_versions) == ("audit", (0,))
    assert len(item.answers[0].split()) == 3


# ---------------------------------------------------------------- outside Ray


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
