"""One rank of the learner as a process: meets the other ranks, builds its parts, serves metrics; rank 0 runs the loop,
resuming from the newest checkpoint, the others follow it.

Consumes and produces: see learner/loop.py and learner/follow.py. Waits: in start() for the other ranks; in run().
Who unblocks it: see learner/meet.py, learner/intake.py and learner/follow.py.
Always holds: run() returns only after a checkpoint of the last step is on disk, the same on every rank; every other way
out is an exception, after which no other rank waits for this one.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.turns import Turns
from cluster.weights import WeightChannel
from configs.run import RunConfig

if TYPE_CHECKING:
    from cluster.process import Process
    from learner.follow import Follower
    from learner.ranks import Ranks
    from learner.state import LearnerState
    from learner.telemetry import Telemetry

log = logging.getLogger(__name__)
_CLOSE_S: Final = 30.0


@dataclass(frozen=True)
class LearnerSpec:
    """What the composition root gives each rank. `incarnation`: of the group; one more at each restart."""

    config: RunConfig
    redis_url: str
    run_dir: str
    channel: WeightChannel
    rank: int = 0
    world_size: int = 1
    incarnation: int = 0
    turns: Turns | None = None
    """Of the GPU that this one rank shares with the engine."""


class LearnerActor:
    """Made into a Ray actor by the composition root. All ranks' start() run at the same time, then all ranks' run()."""

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._stop = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self._stack = AsyncExitStack()
        self._ranks: Ranks | None = None
        self._leading: tuple[LearnerState, Telemetry] | None = None
        self._following: Follower | None = None

    async def start(self) -> dict[str, Any]:
        """Meet the other ranks, then load or resume everything. Returns where the run stands."""
        import torch

        from cluster.process import start_process
        from learner.trainer import Trainer

        spec = self._spec
        torch.set_num_threads(spec.config.learner.threads)
        process = await self._stack.enter_async_context(
            start_process(
                spec.config,
                role="learner",
                instance=f"{spec.rank}.{spec.incarnation}",
                redis_url=spec.redis_url,
                log_dir=self._run_dir / "logs",
            )
        )
        self._ranks = ranks = await self._meet(process)
        try:
            trainer = await asyncio.to_thread(Trainer, spec.config, run_dir=self._run_dir, ranks=ranks)
            return await (self._lead(process, trainer) if spec.rank == 0 else self._follow(process, trainer))
        except Exception as error:
            log.exception("the learner cannot start")
            ranks.abort(error)
            raise

    async def run(self) -> str:
        """The loop, or following it. Returns how it ended (learner.loop.Ending), on every rank."""
        self._ended.clear()
        try:
            ending = await self._run()
            log.info("ended: %s", ending)
            return ending
        except Exception as error:
            log.exception("the learner failed")
            if self._ranks is not None:
                self._ranks.abort(error)
            raise
        finally:
            await self._close_publisher()
            self._ended.set()
            await self._stack.aclose()

    async def stop(self) -> None:
        """Rank 0: finish the step at hand, save, and end run(). The others end when rank 0 does. Returns when this
        rank's run() has ended."""
        self._stop.set()
        await self._ended.wait()

    async def hold_from(self, version: int | None) -> None:
        """Rank 0: train no batch at this policy version or a later one, until told None; no longer than the stall
        time-out. A learner that takes this one's place is not held."""
        if self._leading is not None:
            self._leading[0].intake.hold_from = version

    async def measured(self, values: dict[str, float | None], version: int) -> None:
        """Rank 0: signals measured beside training, of this policy version, for the guard."""
        if self._leading is not None and (guard := self._leading[0].guard) is not None:
            guard.measured(values, version)

    async def _close_publisher(self) -> None:
        """So that no group waits for a rank 0 that is gone. Not beyond a time: the process ends soon anyway."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.to_thread(self._spec.channel.close_publisher)
        except TimeoutError:
            log.warning("the last broadcast was not over %g s after the end", _CLOSE_S)

    @property
    def _run_dir(self) -> Path:
        return Path(self._spec.run_dir)

    async def _meet(self, process: Process) -> Ranks:
        from cluster.process import node_address
        from learner.meet import Place, meet
        from learner.models import learner_device
        from learner.ranks import SOLO

        spec = self._spec
        if spec.world_size == 1 and not spec.config.learner.optimizer_offload:
            return SOLO
        return await meet(
            process.redis.rendezvous,
            place=Place(rank=spec.rank, size=spec.world_size, group=spec.incarnation, host=node_address(spec.config)),
            device=learner_device(spec.config),
            timeout_s=spec.config.learner.collective_timeout_s,
        )

    async def _lead(self, process: Process, trainer: Any) -> dict[str, Any]:
        from learner.state import LearnerState
        from learner.team import Team
        from learner.telemetry import Telemetry

        spec = self._spec
        state = await asyncio.to_thread(
            LearnerState.build,
            spec.config,
            run_dir=self._run_dir,
            streams=process.redis.streams,
            channel=spec.channel,
            team=Team(trainer),
            turns=spec.turns,
        )
        if state.guard is not None:
            self._stack.callback(state.guard.close)
        self._leading = state, Telemetry(spec.config, run_dir=self._run_dir, process=process, state=state)
        return {"step": state.step, "version": state.version, "rm_version": state.scores.version}

    async def _follow(self, process: Process, trainer: Any) -> dict[str, Any]:
        from learner.follow import Follower

        self._following = Follower(trainer, beat=process.heartbeat.beat)
        ready = await asyncio.to_thread(self._following.until_ready)
        return {"step": ready.step, "version": ready.version}

    async def _run(self) -> str:
        from learner.loop import train

        if self._following is not None:
            return await asyncio.to_thread(self._following.until_end)
        assert self._leading is not None
        state, telemetry = self._leading
        ending = str(await train(state, telemetry, stop=self._stop))
        await asyncio.to_thread(state.team.end, ending)
        return ending
