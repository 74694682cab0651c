"""What the reward service takes a second: `python -m benchmarks.reward_service`, on a CPU, in about three minutes.

Three questions, each answered beside the bare thing, in the same run and in turn, so that a busy machine slows both:

    transport  claim → score → advance with a scorer that does nothing: worker processes against a real server
               (append-only file, fsync every second), batches of 64; beside it, the same claims and hops without
               decoding or scoring.
    models     a reward model and a reference model of the demo's shape, through server, worker and cache (no answer is
               in it); beside it, the same batches through the scorer alone, in the same thread.
    cache      what a hit costs, of the process's layer and of the server's, against a miss.

Figures are medians over `--repeats`. Every process has one compute thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil

from benchmarks import reward_service_parts as parts
from benchmarks.reward_service_parts import BATCH, LEASE_S, CommitTimes, Models, Signals, WorkerReport
from cluster.records import Rollout, encode
from cluster.redis_server import EmbeddedServer
from cluster.run_redis import RunRedis
from cluster.streams import Hop, StreamName
from reward_service.batch_scoring import BatchScoring
from reward_service.cache import CacheSettings, ScoreCache
from reward_service.forward_thread import ForwardThread
from reward_service.scorer import Scorer
from reward_service.worker import RewardWorker
from reward_service.worker_metrics import NoMetrics

R = TypeVar("R")

RUN: Final = "bench"
READY_TIMEOUT_S: Final = 60.0
POINT_TIMEOUT_S: Final = 120.0
WARM_UP_SHARE: Final = 0.1
CACHE_ROUNDS: Final = 3
FORWARD_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class Size:
    """How much to measure. `samples`: rollout bytes → samples a point. `model_batches`: batches of 64 a pass."""

    samples: dict[int, int]
    workers: tuple[int, ...]
    model_batches: int
    repeats: int


FULL: Final = Size(samples={500: 30_000, 8_000: 20_000}, workers=(1, 2), model_batches=4, repeats=7)
QUICK: Final = Size(samples={500: 4_000}, workers=(1,), model_batches=2, repeats=3)


@dataclass(frozen=True)
class Transport:
    """`workers` 0: the bare hop. CPU: of all workers together, and of the server, a sample. others_cores: what
    everybody else on the machine used meanwhile; much of it, and the rate says little."""

    size_bytes: int
    workers: int
    per_s: float
    worker_cpu_us: float
    server_cpu_us: float
    others_cores: float


@dataclass(frozen=True)
class Cost:
    """By the clock, and in CPU of this process."""

    seconds: float
    cpu_s: float

    @classmethod
    def now(cls) -> Cost:
        return cls(time.perf_counter(), time.process_time())

    def since(self, earlier: Cost) -> Cost:
        return Cost(self.seconds - earlier.seconds, self.cpu_s - earlier.cpu_s)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.cpu_s + other.cpu_s)


@dataclass(frozen=True)
class ModelPass:
    """Samples a second through the service and through the scorer alone, and the CPU of this process that each took;
    microseconds a sample of a hit and a miss."""

    service_per_s: float
    bare_per_s: float
    service_cpu_us: float
    bare_cpu_us: float
    miss_us: float
    process_hit_us: float
    store_hit_us: float

    @property
    def share(self) -> float:
        """Of the bare throughput that is left behind server, worker and cache."""
        return self.service_per_s / self.bare_per_s

    @property
    def cpu_share(self) -> float:
        """The same where CPU is what limits; it hardly depends on who else is on the machine."""
        return self.bare_cpu_us / self.service_cpu_us


# ---------------------------------------------------------------- transport


async def transport(size_bytes: int, *, workers: int, samples: int) -> Transport:
    """One point, on a server of its own."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "redis") as server:
        async with RunRedis(server.url, run=RUN, lease_s=LEASE_S) as redis:
            await _fill(redis, parts.payloads(samples, size_bytes=size_bytes))
            meter = _Meter(server)
            if workers:
                reports = await _with_workers(redis, server.url, meter=meter, workers=workers, samples=samples)
            else:
                reports = [await _bare_hops(redis, meter=meter, samples=samples)]
    worker_s = sum(report.cpu_s for report in reports)
    commits_at_s = sorted(at_s for report in reports for at_s in report.commits_at_s)
    warm = int(WARM_UP_SHARE * samples)
    return Transport(
        size_bytes=size_bytes,
        workers=workers,
        per_s=(samples - 1 - warm) / (commits_at_s[-1] - commits_at_s[warm]),
        worker_cpu_us=1e6 * worker_s / samples,
        server_cpu_us=1e6 * meter.server_s / samples,
        others_cores=max(0.0, meter.busy_s - meter.server_s - worker_s) / meter.seconds,
    )


class _Meter:
    """Seconds of the clock, of the server's CPU and of all cores that were busy, from `start` to `stop`."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = psutil.Process(server.pid)
        self.seconds = self.server_s = self.busy_s = 0.0

    def start(self) -> None:
        self._add(-1)

    def stop(self) -> None:
        self._add(1)

    def _add(self, sign: int) -> None:
        server, machine = self._server.cpu_times(), psutil.cpu_times()
        self.seconds += sign * time.monotonic()
        self.server_s += sign * (server.user + server.system)
        self.busy_s += sign * (machine.user + machine.nice + machine.system + machine.softirq)


async def _fill(redis: RunRedis, payloads: Sequence[bytes]) -> None:
    for start in range(0, len(payloads), 500):
        await redis.streams.publish(StreamName.ROLLOUTS, payloads[start : start + 500])


async def _with_workers(
    redis: RunRedis, redis_url: str, *, meter: _Meter, workers: int, samples: int
) -> list[WorkerReport]:
    spawn = multiprocessing.get_context("spawn")
    signals = Signals(spawn.Semaphore(0), spawn.Event(), spawn.Event())
    pipes = [spawn.Pipe(duplex=False) for _ in range(workers)]
    processes = [
        spawn.Process(target=parts.work, args=(redis_url, RUN, f"reward-{number}", signals, sender), daemon=True)
        for number, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            assert await asyncio.to_thread(signals.ready.acquire, timeout=READY_TIMEOUT_S), "a worker did not start"
        meter.start()
        signals.start.set()
        async with asyncio.timeout(POINT_TIMEOUT_S):
            while (await redis.streams.depth(StreamName.SCORED)).backlog < samples:  # noqa: ASYNC110 - the server's state
                await asyncio.sleep(0.2)
        meter.stop()
        signals.stop.set()
        return [await asyncio.to_thread(receiver.recv) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


async def _bare_hops(redis: RunRedis, *, meter: _Meter, samples: int) -> WorkerReport:
    """The payloads go from one stream to the next as they are."""
    commits_at_s: list[float] = []
    cpu_s = time.process_time()
    meter.start()
    while len(commits_at_s) < samples:
        taken = await redis.streams.claim(StreamName.ROLLOUTS, consumer="bare", max_count=BATCH, wait_s=1.0)
        hops = [Hop(delivery.entry_id, StreamName.SCORED, delivery.payload) for delivery in taken]
        assert all(await redis.streams.advance_many(StreamName.ROLLOUTS, hops))
        commits_at_s += [time.monotonic()] * len(taken)
    meter.stop()
    return WorkerReport(commits_at_s, time.process_time() - cpu_s)


# ---------------------------------------------------------------- models and cache


class ModelBench:
    """The models, loaded once, in the thread that runs them; a pass has its own run on the server, so its own store."""

    def __init__(self, server: EmbeddedServer, models: Models, *, thread: ForwardThread) -> None:
        self._server = server
        self._models = models
        self._thread = thread
        self._scorer: Scorer | None = None

    async def measure(self, number: int, *, batches: int) -> ModelPass:
        """Each pass has other answers. Half of the bare passes come before the service's, half after."""
        scorer = await self._loaded()
        rollouts = parts.answers(BATCH * batches, words=self._models.words, seed=number)
        known, unknown = rollouts[-BATCH:], parts.answers(BATCH, words=self._models.words, seed=-1 - number)
        half = len(rollouts) // 2
        bare = await self._in_thread(lambda: _bare_forward(scorer, rollouts[:half]))
        settings = CacheSettings(entries=len(rollouts), ttl_s=3600.0)
        async with RunRedis(self._server.url, run=f"{RUN}-{number}", lease_s=LEASE_S) as redis:
            cache = ScoreCache(settings, store=redis.scores)
            service = await _serve(redis, self._scoring(scorer, cache), rollouts)
            bare += await self._in_thread(lambda: _bare_forward(scorer, rollouts[half:]))
            assert cache.counts == {"misses": len(rollouts)}, cache.counts
            times = {"process": list[float](), "store": list[float](), "miss": list[float]()}
            for _ in range(CACHE_ROUNDS):  # in turn
                empty = ScoreCache(settings, store=redis.scores)
                times["process"].append(await _score_s(self._scoring(scorer, cache), known))
                times["store"].append(await _score_s(self._scoring(scorer, empty), known))
                times["miss"].append(await _score_s(self._scoring(scorer, empty), unknown))
                assert empty.counts == {"store_hits": BATCH, "misses": BATCH}, empty.counts
            assert cache.counts == {"misses": len(rollouts), "process_hits": CACHE_ROUNDS * BATCH}, cache.counts
        sample_us = {what: 1e6 * statistics.median(seconds) / BATCH for what, seconds in times.items()}
        return ModelPass(
            service_per_s=len(rollouts) / service.seconds,
            bare_per_s=len(rollouts) / bare.seconds,
            service_cpu_us=1e6 * service.cpu_s / len(rollouts),
            bare_cpu_us=1e6 * bare.cpu_s / len(rollouts),
            miss_us=sample_us["miss"],
            process_hit_us=sample_us["process"],
            store_hit_us=sample_us["store"],
        )

    async def _loaded(self) -> Scorer:
        if self._scorer is None:
            self._scorer = await self._in_thread(self._load)
        return self._scorer

    def _load(self) -> Scorer:
        from reward_service.scorer_transformers import ScorerSettings, TransformersScorer

        settings = ScorerSettings(batch_size=BATCH, threads=1)
        return TransformersScorer(
            self._models.reward_model, reference_dir=self._models.reference_dir, settings=settings
        )

    def _scoring(self, scorer: Scorer, cache: ScoreCache) -> BatchScoring:
        return BatchScoring(scorer, thread=self._thread, cache=cache, metrics=NoMetrics(), timeout_s=FORWARD_TIMEOUT_S)

    async def _in_thread(self, function: Callable[[], R]) -> R:
        return await self._thread.call(function, timeout_s=FORWARD_TIMEOUT_S)


async def model_passes(*, batches: int, repeats: int, members: int) -> list[ModelPass]:
    """`repeats` passes; the first, which warms everything up, is not among them."""
    thread = ForwardThread()
    try:
        with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "redis") as server:
            bench = ModelBench(server, parts.make_models(Path(folder), members=members), thread=thread)
            await bench.measure(0, batches=1)
            return [await bench.measure(1 + number, batches=batches) for number in range(repeats)]
    finally:
        thread.close()


def _bare_forward(scorer: Scorer, rollouts: Sequence[Rollout]) -> Cost:
    started = Cost.now()
    for start in range(0, len(rollouts), BATCH):
        scorer.score(rollouts[start : start + BATCH])
    return Cost.now().since(started)


async def _serve(redis: RunRedis, scoring: BatchScoring, rollouts: Sequence[Rollout]) -> Cost:
    """From the first claim until the last score is published."""
    await _fill(redis, [encode(item) for item in rollouts])
    times = CommitTimes(len(rollouts))
    worker = RewardWorker(redis.streams, scoring=scoring, metrics=times, settings=parts.worker_settings("reward-0"))
    started = Cost.now()
    run = asyncio.create_task(worker.run())
    async with asyncio.timeout(POINT_TIMEOUT_S):
        await times.done.wait()
    cost = Cost.now().since(started)
    await worker.stop()
    await run
    return cost


async def _score_s(scoring: BatchScoring, batch: Sequence[Rollout]) -> float:
    """Seconds for a batch; nothing is remembered."""
    started_s = time.perf_counter()
    await scoring.score(batch)
    return time.perf_counter() - started_s


# ---------------------------------------------------------------- all of it


async def measure(size: Size, *, members: int = 1) -> dict[str, Any]:
    """Everything; of transports the median by rate, of models the median of each figure."""
    points: list[Transport] = []
    for _ in range(size.repeats):
        for size_bytes, samples in size.samples.items():
            for workers in (0, *size.workers):
                points.append(await transport(size_bytes, workers=workers, samples=samples))
                print(json.dumps(asdict(points[-1])), flush=True)
    passes = await model_passes(batches=size.model_batches, repeats=size.repeats, members=members)
    kinds = sorted({(point.size_bytes, point.workers) for point in points})
    models = {name: statistics.median(asdict(one)[name] for one in passes) for name in asdict(passes[0])}
    return {
        "machine": {"cores": os.cpu_count(), "load_1_min": os.getloadavg()[0], "repeats": size.repeats},
        "transport": [
            asdict(_middle([point for point in points if (point.size_bytes, point.workers) == kind])) for kind in kinds
        ],
        "models": models
        | {
            "members": members,
            "share": statistics.median(one.share for one in passes),
            "cpu_share": statistics.median(one.cpu_share for one in passes),
            "process_hit_share": statistics.median(one.process_hit_us / one.miss_us for one in passes),
            "store_hit_share": statistics.median(one.store_hit_us / one.miss_us for one in passes),
        },
    }


def _middle(points: list[Transport]) -> Transport:
    return sorted(points, key=lambda point: point.per_s)[len(points) // 2]


def table(result: dict[str, Any]) -> str:
    """For people, and for docs/scaling.md."""
    lines = [
        "| rollout | workers | samples/s | worker CPU, µs a sample | server CPU, µs a sample | others' cores |",
        "|---|---|---|---|---|---|",
    ]
    for point in result["transport"]:
        lines.append(
            f"| {point['size_bytes']:,} B | {point['workers'] or 'bare hop'} | {point['per_s']:,.0f} "
            f"| {point['worker_cpu_us']:.0f} | {point['server_cpu_us']:.0f} | {point['others_cores']:.2f} |"
        )
    models = result["models"]
    lines += [
        "",
        f"Models ({models['members']} member): service {models['service_per_s']:.0f}/s, bare forward "
        f"{models['bare_per_s']:.0f}/s, share {models['share']:.3f} by the clock, {models['cpu_share']:.3f} by CPU.",
        f"Cache: a miss costs {models['miss_us']:.0f} µs a sample, "
        f"a hit in the process {models['process_hit_us']:.0f} µs ({models['process_hit_share']:.1%}), "
        f"a hit on the server {models['store_hit_us']:.0f} µs ({models['store_hit_share']:.1%}).",
        f"{result['machine']['cores']} cores, load {result['machine']['load_1_min']:.1f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short: whether it works, rough figures")
    parser.add_argument("--members", type=int, default=1, help="of the reward model's ensemble")
    parser.add_argument("--out", type=Path, help="write the medians here, as JSON")
    arguments = parser.parse_args()
    result = asyncio.run(measure(QUICK if arguments.quick else FULL, members=arguments.members))
    print(table(result))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
