"""The processes of the scaling benchmark: real workers and the real learner loop around parts that only take time.

Consumes and produces: the run's streams, as in a run. Waits for: what the roles wait for. Who unblocks it: `stop`.
Always holds: everything that is counted per sample (streams, leases, gate, ledger, scoring batches, weight notices) is
the code of a run; simulated are the engine's tokens, the models' scores and the update.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.engine import ScriptedEngine
from actors.rollout_worker import RolloutWorker
from actors.rollout_worker import WorkerSettings as RolloutSettings
from cluster.data_records import Prompt
from cluster.run_redis import RunRedis
from cluster.weights import WeightChannel, pack
from learner.deck import DeckPrompt, PromptDeck, TaskTemplate
from learner.guard.record import Decision
from learner.guarded import UNGUARDED
from learner.intake import Intake, IntakeSettings
from learner.ledger import Gate, Ledger
from learner.loop import train
from reward_service.batch_scoring import BatchScoring
from reward_service.forward_thread import ForwardThread
from reward_service.scorer import ScriptedScorer
from reward_service.worker import RewardWorker
from reward_service.worker import WorkerSettings as RewardSettings

VOCAB = 512
PROMPT_TOKENS = 16
LEASE_S = 60.0
DEADLINE_S = 300.0
WEIGHT_BYTES = 1 << 20


@dataclass(frozen=True)
class Load:
    """One point of the sweep. An actor answers `concurrent` requests at a time, each `tokens` long."""

    run: str
    redis_url: str
    actors: int
    batch_size: int
    concurrent: int
    tokens: int
    samples_per_actor_s: float
    learner_samples_s: float
    max_staleness: int

    @property
    def token_s(self) -> float:
        return self.concurrent / (self.samples_per_actor_s * self.tokens)


class Part:
    """What every process does: serve one load after another, and say how much CPU it has used."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._stack = AsyncExitStack()
        self._task: asyncio.Future[Any] | None = None

    async def cpu_s(self) -> float:
        """Of all threads of this process, Ray's among them, since it started."""
        return time.process_time()

    async def check(self) -> str:
        """What it is at. Raises what ended it."""
        if self._task is not None and self._task.done():
            self._task.result()
        return self.state()

    def state(self) -> str:
        return ""

    async def redis(self, load: Load) -> RunRedis:
        return await self._stack.enter_async_context(RunRedis(load.redis_url, run=load.run, lease_s=LEASE_S))


class SimulatedActors(Part):
    """Several rollout workers, each with an engine and connections of its own, in one process."""

    def __init__(self) -> None:
        super().__init__()
        self._workers: list[RolloutWorker] = []

    async def start(self, load: Load, channel: WeightChannel, numbers: list[int]) -> None:
        """Workers of these numbers, claiming from now on."""
        for number in numbers:
            engine = ScriptedEngine(
                vocab_size=VOCAB, eos_id=VOCAB, token_s=load.token_s, seed=number  # no token ends an answer early
            )  # fmt: skip
            settings = RolloutSettings(consumer=f"rollout-{number}", max_concurrent=load.concurrent, lease_s=LEASE_S)
            redis = await self.redis(load)
            self._workers.append(RolloutWorker(redis.streams, engine=engine, weights=channel, settings=settings))
        self._task = asyncio.ensure_future(asyncio.gather(*(worker.run() for worker in self._workers)))

    def state(self) -> str:
        return ", ".join(f"{worker.in_flight} in flight: {worker.meter.as_dict()}" for worker in self._workers)

    async def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        if self._task is not None:
            await self._task
        self._workers.clear()
        await self._stack.aclose()


class NoMetrics:
    """Nothing to report to."""

    def count(self, what: str) -> None: ...

    def cache_lookup(self, layer: str | None) -> None: ...

    def forward(self, *, rollouts: int, tokens: int, seconds: float) -> None: ...

    def progress(self) -> None: ...

    def model(self, version: str) -> None: ...


class SimulatedReward(Part):
    """One reward worker; its models answer at once."""

    async def start(self, load: Load) -> None:
        redis = await self.redis(load)
        thread = ForwardThread(name="scale-forward")
        self._stack.callback(thread.close)
        metrics = NoMetrics()
        scoring = BatchScoring(ScriptedScorer(), thread=thread, cache=None, metrics=metrics, timeout_s=60.0)
        self._worker = RewardWorker(
            redis.streams,
            scoring=scoring,
            metrics=metrics,
            settings=RewardSettings(consumer="reward-0", lease_s=LEASE_S),
        )
        self._task = asyncio.create_task(self._worker.run())

    def state(self) -> str:
        return f"{self._worker.in_flight} held, {dict(self._worker.counts)}"

    async def stop(self) -> None:
        await self._worker.stop()
        if self._task is not None:
            await self._task
        await self._stack.aclose()


class TimedState:
    """What `learner.loop.train` needs of a learner's state. An update takes its time and changes nothing."""

    total_steps = 1 << 30
    kl_budget_spent = False
    halted = False
    guard = None

    def __init__(self, load: Load, *, intake: Intake, channel: WeightChannel) -> None:
        self.step = self.version = 0
        self.intake = intake
        self._load, self._channel = load, channel
        self._tensor = torch.zeros(WEIGHT_BYTES // 4)

    def make_experience(self, rollouts: list[Any]) -> int:
        return len(rollouts)

    def update(self, experience: int) -> None:
        time.sleep(experience / self._load.learner_samples_s)

    def advance(self, experience: int, update: None) -> None:
        self.step += 1
        self.version += 1

    async def publish_weights(self) -> None:
        blob = await asyncio.to_thread(pack, self.version, [("weight", self._tensor)])
        await asyncio.to_thread(self._channel.publish, blob)

    def device_turn(self) -> AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    async def leave_device(self) -> None: ...

    def begin(self) -> None: ...

    def judge(self, report: None) -> Decision:
        return UNGUARDED

    def save_if_due(self, *, good: bool) -> None: ...

    def save_final(self) -> None: ...


class Timeline:
    """In the telemetry's place: when each step ended."""

    def __init__(self) -> None:
        self.ended_s: list[float] = []

    def report(self, *_step: Any) -> None: ...

    async def emit(self, *_step: Any) -> None:
        self.ended_s.append(time.monotonic())


class SimulatedLearner(Part):
    """The learner's loop with its intake, gate and ledger."""

    async def start(self, load: Load, channel: WeightChannel) -> None:
        redis = await self.redis(load)
        self._stop, self._timeline = asyncio.Event(), Timeline()
        random = np.random.default_rng(0)
        deck = PromptDeck(
            [
                DeckPrompt(f"p-{n}", tuple(random.integers(0, VOCAB, PROMPT_TOKENS).tolist()), _prompt(n))
                for n in range(256)
            ],
            seed=0,
        )
        self._ledger = Ledger(task_deadline_s=DEADLINE_S)
        intake = Intake(
            redis.streams,
            deck=deck,
            ledger=self._ledger,
            gate=Gate(batch_size=load.batch_size, max_staleness=load.max_staleness, total_steps=TimedState.total_steps),
            template=TaskTemplate("scale", max_new_tokens=load.tokens, temperature=1.0, samples_per_prompt=1),
            settings=IntakeSettings(load.batch_size, max_staleness=load.max_staleness, stall_timeout_s=DEADLINE_S),
        )
        state: Any = TimedState(load, intake=intake, channel=channel)
        timeline: Any = self._timeline
        self._task = asyncio.create_task(train(state, timeline, stop=self._stop))

    async def progress(self) -> tuple[list[float], dict[str, int], int]:
        """When each step ended, the ledger's totals, and how many tasks are out or held."""
        await self.check()
        return self._timeline.ended_s, vars(self._ledger.counts).copy(), self._ledger.outstanding + self._ledger.held

    async def stop(self) -> None:
        self._stop.set()
        if self._task is not None:
            await self._task
        await self._stack.aclose()


def _prompt(number: int) -> Prompt:
    return f"prompt {number}"
