"""The learner as a process: builds its parts, resumes from the newest checkpoint, runs the loop, serves metrics.

Consumes and produces: see learner/loop.py. Waits: in run(). Who unblocks it: see learner/intake.py.
Always holds: run() returns only after a checkpoint of its last step is on disk; every other way out is an exception.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.weights import WeightChannel
from configs.run import RunConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnerSpec:
    """What the composition root gives the learner."""

    config: RunConfig
    redis_url: str
    run_dir: str
    channel: WeightChannel


class LearnerActor:
    """Made into a Ray actor by the composition root."""

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._stop = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self._stack = AsyncExitStack()
        self._state: Any = None
        self._telemetry: Any = None

    async def start(self) -> dict[str, Any]:
        """Load or resume everything. Returns where the run stands."""
        import torch

        from cluster.process import start_process
        from learner.state import LearnerState
        from learner.telemetry import Telemetry

        spec = self._spec
        torch.set_num_threads(spec.config.learner.threads)
        process = await self._stack.enter_async_context(
            start_process(
                spec.config, role="learner", instance="0", redis_url=spec.redis_url, log_dir=Path(spec.run_dir) / "logs"
            )
        )
        self._state = await asyncio.to_thread(
            LearnerState.build,
            spec.config,
            run_dir=Path(spec.run_dir),
            streams=process.redis.streams,
            channel=spec.channel,
        )
        self._telemetry = Telemetry(spec.config, run_dir=Path(spec.run_dir), process=process, state=self._state)
        return {"step": self._state.step, "version": self._state.version}

    async def run(self) -> str:
        """The loop. Returns how it ended (learner.loop.Ending)."""
        from learner.loop import train

        self._ended.clear()
        try:
            ending = await train(self._state, self._telemetry, stop=self._stop)
            log.info("ended: %s at step %d", ending, self._state.step)
            return str(ending)
        except Exception:
            log.exception("the learner failed")
            raise
        finally:
            self._ended.set()
            await self._stack.aclose()

    async def stop(self) -> None:
        """Finish the step at hand, save, and end run(); returns when that is done."""
        self._stop.set()
        await self._ended.wait()
