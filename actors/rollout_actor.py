"""One rollout actor: an engine, its worker, and its answers on request. Made into a Ray actor by the composition root.

Consumes and produces: see actors/rollout_worker.py; and prompts by `generate`, outside the streams. Waits: in `run`,
until `stop` or the first error; in `sync_to`, for weights, with a deadline. Who unblocks it: see the worker.
Always holds: one engine per process, of this incarnation's own seed; whatever ends `run`, the engine is shut down.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from actors.engine import Engine, GenerationRequest, ScriptedEngine
from actors.engine_vllm import VllmEngine
from actors.rollout_meter import RolloutMeter
from actors.rollout_worker import RolloutWorker, WorkerSettings, first_cause
from actors.vllm_spec import VllmSpec, engine_seed, model_eos_ids
from cluster.errors import DeadlineError, EngineDeadError
from cluster.turns import Turns
from cluster.weights import WeightChannel
from configs.run import RunConfig

if TYPE_CHECKING:
    from cluster.metrics import Heartbeat

_log = logging.getLogger(__name__)
SYNC_TIMEOUT_S = 60.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class RolloutSpec:
    """What the composition root gives an actor. `incarnation` counts the restarts of actor `index`."""

    config: RunConfig
    model_path: str
    redis_url: str
    log_dir: str
    channel: WeightChannel
    index: int
    incarnation: int
    turns: Turns | None = None
    """Of the GPU that the engine shares with the learner."""

    @property
    def name(self) -> str:
        """Of this process, in streams, metrics and logs."""
        return f"rollout-{self.index}.{self.incarnation}"


class RolloutActor:
    """`start`, then any of the others. Everything runs on one event loop."""

    def __init__(self, spec: RolloutSpec) -> None:
        self._spec = spec
        self._stack = AsyncExitStack()
        self._engine: Engine | None = None
        self._worker: RolloutWorker | None = None
        self._running = False
        self._direct = 0
        """Calls of `generate` that are under way."""
        self._slots = asyncio.Semaphore(spec.config.rollout.max_concurrent_requests)
        self._request_numbers = itertools.count()

    async def start(self) -> dict[str, Any]:
        """Boot the engine and connect. Returns boot_s, pid and what the engine is."""
        from cluster.metrics import RolloutMetrics
        from cluster.process import start_process

        spec, started_s = self._spec, time.monotonic()
        process = await self._stack.enter_async_context(
            start_process(
                spec.config,
                role="rollout",
                instance=f"{spec.index}.{spec.incarnation}",
                redis_url=spec.redis_url,
                log_dir=Path(spec.log_dir),
            )
        )
        if spec.turns is not None:
            # One that replaces another may find the learner on the GPU.
            await spec.turns.take("engine", spec.config.learner.stall_timeout_s)
        seed = engine_seed(run_seed=spec.config.seed, actor_index=spec.index, incarnation=spec.incarnation)
        self._engine = await boot_engine(spec.config, model_path=spec.model_path, seed=seed)
        self._stack.push_async_callback(self._engine.shutdown)
        self._worker = RolloutWorker(
            process.redis.streams,
            engine=self._engine,
            weights=spec.channel,
            settings=_settings(spec),
            turns=spec.turns,
            meter=RolloutMeter(RolloutMetrics(process.registry), heartbeat=process.heartbeat),
        )
        idle = asyncio.create_task(self._beat_while_idle(process.heartbeat))
        self._stack.callback(idle.cancel)
        boot_s = round(time.monotonic() - started_s, 2)
        return {"boot_s": boot_s, "pid": os.getpid(), "engine": spec.config.rollout.engine, "name": spec.name}

    async def _beat_while_idle(self, heartbeat: Heartbeat) -> None:
        """Between stages nobody asks for anything: that is no lack of progress."""
        while True:
            if not self._running and self._direct == 0:
                heartbeat.beat()
            await asyncio.sleep(heartbeat.silence_limit_s / 4)

    async def run(self) -> None:
        """Answer prompts from the streams until `stop`. Raises what ended it otherwise."""
        _, worker = self._parts()
        self._running = True
        try:
            await worker.run()
        except Exception:
            _log.exception("the rollout actor failed")
            await self._stack.aclose()
            raise
        finally:
            self._running = False

    async def stop(self) -> None:
        """End `run` within its grace time, then the engine. May be called again, and before `start`."""
        if self._worker is not None:
            self._worker.stop()
            await self._worker.wait_ended()
        await self._stack.aclose()

    async def drain(self) -> int:
        """Claim no more, finish what is in flight within rollout.generate_timeout_s, put the rest back for others and
        leave the weight group: `run` then ends without an error. Returns how many entries were put back. The engine
        stays up until `stop`; calls of `generate` under way are not waited for."""
        _, worker = self._parts()
        worker.drain()
        await worker.wait_ended()
        return worker.meter.tally.handed_back

    async def status(self) -> dict[str, Any]:
        """Totals of the worker, with idle_s: seconds that `run` had nothing in flight; and version, in_flight and
        running now."""
        engine, worker = self._parts()
        now = {
            "version": engine.version,
            "in_flight": worker.in_flight,
            "idle_s": worker.idle_s,
            "running": self._running,
        }
        return {"name": self._spec.name, **worker.meter.as_dict(), **now}

    async def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float
    ) -> list[tuple[list[int], str]]:
        """One (response ids, finish reason) for each prompt, in order: for collection and evaluation. While `run` runs,
        by no older weights than are published now. Any failure fails the call."""
        engine, worker = self._parts()
        timeout_s = self._spec.config.rollout.generate_timeout_s

        async def answer(prompt: Sequence[int]) -> tuple[list[int], str]:
            request = GenerationRequest(
                request_id=f"direct-{next(self._request_numbers)}",
                prompt_ids=np.asarray(prompt, dtype=np.int32),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
            async with self._slots, asyncio.timeout(timeout_s):
                generation = await engine.generate(request)
            worker.meter.beat()
            return generation.response_ids.tolist(), generation.finish_reason

        await self._catch_up()
        return await self._directly([answer(prompt) for prompt in prompts])

    async def response_nats(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, int]]:
        """(−Σ log p, count) of the response's tokens, for each (prompt ids, response ids), at temperature 1 under the
        weights that the engine has, while `run` runs no older ones than are published now. What would fill the model's
        context is cut. Any failure fails the call."""
        engine, worker = self._parts()
        longest = self._spec.config.max_sequence_tokens - 1  # an engine samples a token after what it reads

        async def read(prompt: Sequence[int], response: Sequence[int]) -> tuple[float, int]:
            ids = np.asarray([*prompt, *response][:longest], dtype=np.int32)
            if len(ids) < 2:
                return 0.0, 0
            async with self._slots, asyncio.timeout(self._spec.config.rollout.generate_timeout_s):
                logprobs = await engine.probe(ids)
            worker.meter.beat()
            known = logprobs[max(len(prompt) - 1, 0) :]
            return -float(known.astype(np.float64).sum()), len(known)

        await self._catch_up()
        return await self._directly([read(prompt, response) for prompt, response in sequences])

    async def _catch_up(self) -> None:
        """An actor that has just taken another's place holds the weights that it booted with."""
        if self._running:
            await self.sync_to_newest(timeout_s=self._spec.config.rollout.generate_timeout_s)

    async def _directly(self, calls: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
        """Their results, in order; the first failure ends the others and is raised."""
        self._direct += 1
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(call) for call in calls]
        except BaseExceptionGroup as errors:
            error = first_cause(errors)
            if isinstance(error, TimeoutError):
                limit_s = self._spec.config.rollout.generate_timeout_s
                raise DeadlineError("a generation took too long", got=f"more than {limit_s:g} s") from errors
            raise error from errors
        finally:
            self._direct -= 1
        return [task.result() for task in tasks]

    async def sync_to(self, version: int, *, timeout_s: float = SYNC_TIMEOUT_S) -> int:
        """Wait until the engine holds `version` or a later one, and return which. Loads it itself when `run` is not
        running. Raises DeadlineError after `timeout_s`."""
        engine, worker = self._parts()
        if not self._running and engine.version < version:
            blob = await self._spec.channel.wait_newer(version - 1, timeout_s=timeout_s)
            if blob is None:
                raise DeadlineError(f"weights of version {version} were not published", got=f"none in {timeout_s:g} s")
            await worker.versions.load(blob)
        return await worker.versions.wait(version, timeout_s=timeout_s)

    async def sync_to_newest(self, *, timeout_s: float = SYNC_TIMEOUT_S) -> int:
        """`sync_to` what is published now. Returns the engine's version; without publications, the one it has."""
        engine, _ = self._parts()
        newest = await self._spec.channel.newest_version()
        return engine.version if newest is None else await self.sync_to(newest, timeout_s=timeout_s)

    def _parts(self) -> tuple[Engine, RolloutWorker]:
        if self._engine is None or self._worker is None:
            raise EngineDeadError("the rollout actor has not started", do="await start() first")
        return self._engine, self._worker


def _settings(spec: RolloutSpec) -> WorkerSettings:
    rollout = spec.config.rollout
    return WorkerSettings(
        consumer=spec.name,
        max_concurrent=rollout.max_concurrent_requests,
        lease_s=spec.config.redis.lease_s,
        generate_timeout_s=rollout.generate_timeout_s,
        max_deliveries=spec.config.reward.max_deliveries,
        probe_tolerance_nats=rollout.probe_tolerance,
        turn_timeout_s=spec.config.learner.stall_timeout_s,
    )


async def boot_engine(config: RunConfig, *, model_path: str, seed: int) -> Engine:
    """The engine of this configuration with the weights in `model_path`. Raises EngineDeadError."""
    if config.rollout.engine == "scripted":
        model = json.loads((Path(model_path) / "config.json").read_text())
        eos_id = model_eos_ids(model_path)[0]
        return ScriptedEngine(vocab_size=model["vocab_size"], eos_id=eos_id, seed=seed)
    return await VllmEngine.start(
        VllmSpec(
            model_path=model_path,
            rollout=config.rollout,
            max_sequence_tokens=config.max_sequence_tokens,
            seed=seed,
            update_timeout_s=config.weights.timeout_s,
            lora=config.learner.lora,
            log_stats=config.metrics.enabled,
            can_sleep=config.placement.colocate,
        )
    )
