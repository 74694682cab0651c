"""How a run scales with its rollout actors: `python -m benchmarks.scale`, on a CPU, in about five minutes.

Real: Ray, Valkey, streams and leases, rollout and reward workers, the learner's loop with gate and ledger, the weight
board. Simulated: the engine's tokens (an actor gives so many samples a second), the scores, the update's time. Several
actors share a process, as 64 processes do not fit a small machine; each has its own engine, consumer and connections.

The batch grows with the actors, so that a step always takes about as long; a point is measured between step ends,
after the queues have filled. Measured for each point: trained samples/s, and CPU seconds a sample of each role. The
points are visited `--repeats` times in turn; the table shows medians. docs/scaling.md says what follows from them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.scale_parts import Load, SimulatedActors, SimulatedLearner, SimulatedReward
from cluster.errors import DeadlineError
from cluster.redis_server import EmbeddedServer
from keel.ray_environment import prepare_ray_environment, torch_environment

ACTORS_PER_PROCESS = 16
SAMPLES_PER_ACTOR_S = 3.0
LEARNER_SAMPLES_S = 400.0
BAR = 0.95
CALL_TIMEOUT_S = 60.0
STEPS_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Point:
    """One measurement."""

    actors: int
    trained_per_s: float
    offered_per_s: float
    """What the engines would give if nothing held them up, at most what the learner takes."""
    cpu_ms_per_sample: dict[str, float]
    idle_cores: float
    """Cores that were free meanwhile: without any, a point says nothing about scaling."""

    @property
    def efficiency(self) -> float:
        return self.trained_per_s / self.offered_per_s


class Bench:
    """The processes, started once; `measure` gives them one load after another."""

    def __init__(self, redis: EmbeddedServer, *, most_actors: int) -> None:
        import ray

        self._redis = redis
        self._ray = ray
        options = {"num_cpus": 0, "max_concurrency": 100, "runtime_env": {"env_vars": torch_environment(threads=1)}}
        self._rollout = [
            ray.remote(SimulatedActors).options(**options).remote()
            for _ in range(-(-most_actors // ACTORS_PER_PROCESS))
        ]
        self._reward = ray.remote(SimulatedReward).options(**options).remote()
        self._learner = ray.remote(SimulatedLearner).options(**options).remote()
        self._runs = 0

    def measure(self, actors: int, *, settle: int, window: int, learner_samples_s: float) -> Point:
        from cluster.weights_ray import RayWeightChannel

        self._runs += 1
        load = Load(
            run=f"scale-{self._runs}",
            redis_url=self._redis.url,
            actors=actors,
            # So many that a step takes about a second, and that all actors are busy a step ahead.
            batch_size=max(2, round(actors * SAMPLES_PER_ACTOR_S)),
            concurrent=4,
            tokens=8,
            samples_per_actor_s=SAMPLES_PER_ACTOR_S,
            learner_samples_s=learner_samples_s,
            max_staleness=4,
        )
        channel = RayWeightChannel.create()
        shares = [list(range(actors))[number :: len(self._rollout)] for number in range(len(self._rollout))]
        hosts = [(host, share) for host, share in zip(self._rollout, shares, strict=True) if share]
        self._get(self._reward.start.remote(load), self._learner.start.remote(load, channel))
        self._get(*(host.start.remote(load, channel, share) for host, share in hosts))
        try:
            self._wait_for_step(settle)
            return self._window(load, [host for host, _ in hosts], steps=window)
        finally:
            self._get(self._learner.stop.remote())
            self._get(*(host.stop.remote() for host, _ in hosts))
            self._get(self._reward.stop.remote())
            channel.close()

    def _window(self, load: Load, hosts: list[Any], *, steps: int) -> Point:
        before, cpu_before, machine_before = self._progress(), self._cpu_s(hosts), psutil.cpu_times()
        self._wait_for_step(len(before[0]) + steps)
        after, cpu_after, machine_after = self._progress(), self._cpu_s(hosts), psutil.cpu_times()
        ended_s, counts, open_tasks = after
        assert counts["issued"] == counts["trained"] + counts["stale_dropped"] + counts["dead"] + open_tasks
        first, last = len(before[0]), len(ended_s)
        seconds = ended_s[last - 1] - ended_s[first - 1]
        samples = counts["trained"] - before[1]["trained"]
        return Point(
            actors=load.actors,
            trained_per_s=(last - first) * load.batch_size / seconds,
            offered_per_s=min(load.actors * load.samples_per_actor_s, load.learner_samples_s),
            cpu_ms_per_sample={role: 1e3 * (cpu_after[role] - cpu_before[role]) / samples for role in cpu_after},
            idle_cores=(machine_after.idle - machine_before.idle) / seconds,
        )

    def _wait_for_step(self, step: int) -> None:
        deadline_s = time.monotonic() + STEPS_TIMEOUT_S
        while len(self._progress()[0]) < step:
            if time.monotonic() > deadline_s:
                states = self._get(*(part.check.remote() for part in (self._learner, self._reward, *self._rollout)))
                raise DeadlineError(f"the simulated run did not come to step {step}", got="\n".join(states))
            time.sleep(0.1)

    def _progress(self) -> tuple[list[float], dict[str, int], int]:
        ended_s, counts, open_tasks = self._get(self._learner.progress.remote())[0]
        return ended_s, counts, open_tasks

    def _cpu_s(self, hosts: list[Any]) -> dict[str, float]:
        learner, reward, *rollout = self._get(*(part.cpu_s.remote() for part in (self._learner, self._reward, *hosts)))
        server = psutil.Process(self._redis.pid).cpu_times()
        return {
            "learner": learner,
            "queue server": server.user + server.system,
            "reward": reward,
            "actor": sum(rollout),
        }

    def _get(self, *references: Any) -> list[Any]:
        answers: list[Any] = self._ray.get(list(references), timeout=CALL_TIMEOUT_S)
        return answers


def sweep(counts: list[int], *, repeats: int, settle: int, window: int, saturate: bool) -> dict[str, Any]:
    """All points, `repeats` times in turn; with `saturate` also the largest one against a learner of half its rate."""
    prepare_ray_environment()
    import ray

    points: list[Point] = []
    slow_rate = max(counts) * SAMPLES_PER_ACTOR_S / 2
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "redis") as redis:
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
        try:
            bench = Bench(redis, most_actors=max(counts))
            loads = [(count, LEARNER_SAMPLES_S) for count in counts] + ([(max(counts), slow_rate)] if saturate else [])
            for _ in range(repeats):
                for count, rate in loads:
                    point = bench.measure(count, settle=settle, window=window, learner_samples_s=rate)
                    points.append(point)
                    print(json.dumps(asdict(point)), flush=True)
        finally:
            ray.shutdown()
    return {
        "machine": {"cores": os.cpu_count(), "samples_per_actor_s": SAMPLES_PER_ACTOR_S, "repeats": repeats},
        "points": [_median(points, key) for key in sorted({(p.actors, p.offered_per_s) for p in points})],
    }


def _median(points: list[Point], key: tuple[int, float]) -> dict[str, Any]:
    same = [point for point in points if (point.actors, point.offered_per_s) == key]
    roles = same[0].cpu_ms_per_sample
    middle = Point(
        actors=key[0],
        trained_per_s=statistics.median(point.trained_per_s for point in same),
        offered_per_s=key[1],
        cpu_ms_per_sample={r: statistics.median(p.cpu_ms_per_sample[r] for p in same) for r in roles},
        idle_cores=statistics.median(point.idle_cores for point in same),
    )
    return asdict(middle) | {"efficiency": middle.efficiency}


def table(result: dict[str, Any]) -> str:
    """For people, and for docs/scaling.md."""
    roles = list(result["points"][0]["cpu_ms_per_sample"])
    lines = [
        "| actors | offered /s | trained /s | share | "
        + " | ".join(f"{role} ms" for role in roles)
        + " | idle cores |",
        "|" + "---|" * (5 + len(roles)),
    ]
    for point in result["points"]:
        costs = " | ".join(f"{point['cpu_ms_per_sample'][role]:.2f}" for role in roles)
        lines.append(
            f"| {point['actors']} | {point['offered_per_s']:.0f} | {point['trained_per_s']:.1f} "
            f"| {point['efficiency']:.3f} | {costs} | {point['idle_cores']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1, 2 and 4 actors, short: whether it works, no figures")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the medians here, as JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        result = sweep([1, 2, 4], repeats=1, settle=3, window=4, saturate=True)
    else:
        result = sweep(arguments.actors, repeats=arguments.repeats, settle=8, window=20, saturate=True)
    print(table(result))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
