"""The online roles of a run, from configuration to processes: rollout actors, reward workers, the learner."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.rollout_actor import RolloutActor, RolloutSpec
from cluster.errors import StallError
from cluster.group import INPUT_ERRORS
from cluster.supervise import Role, RolePool
from keel.ray_environment import torch_environment
from keel.runtime import Runtime
from keel.shared_gpu import SharedGpu, nothing
from learner.learner_actor import LearnerActor, LearnerSpec
from reward_service.reward_actor import RewardActor, RewardSpec

log = logging.getLogger(__name__)

_REWARD_START_S = 660.0
"""Above what the worker itself allows for loading its models."""
_DRAIN_MARGIN_S = 30.0
"""For what follows the last answer: handing leases back, leaving the weight group."""


class Roles:
    """Pools are started when first asked for and stopped with the runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._pools: dict[str, RolePool] = {}
        self._channel: Any = None
        self._shared_gpu: SharedGpu | None = None
        self._headcount = (0, 0)

    @property
    def running(self) -> list[RolePool]:
        return list(self._pools.values())

    @property
    def channel(self) -> Any:
        """The weight channel of this run."""
        if self._channel is None:
            assert self._runtime.ray is not None
            from keel.weight_channel import make_channel

            self._channel = make_channel(self._runtime.config)
            self._runtime.on_exit(self._channel.close)
        return self._channel

    @property
    def shared_gpu(self) -> SharedGpu | None:
        """What learner and engine share, where they take turns on one GPU."""
        if self._shared_gpu is None and self._runtime.config.placement.colocate:
            assert self._runtime.ray is not None
            self._shared_gpu = SharedGpu.create(self._runtime.config, channel=self.channel)
            self._runtime.on_exit(self._shared_gpu.turns.close)
        return self._shared_gpu

    def rollout(self, model_dir: Path) -> RolePool:
        """The rollout actors; started with the weights in `model_dir` when they are not up yet."""
        config, channel, shared = self._runtime.config, self.channel, self.shared_gpu

        def spec(index: int, incarnation: int) -> RolloutSpec:
            return RolloutSpec(
                config=config,
                model_path=str(model_dir.resolve()),
                redis_url=self._runtime.redis_url,
                log_dir=str(self._log_dir),
                channel=channel,
                index=index,
                incarnation=incarnation,
                turns=None if shared is None else shared.turns,
            )

        role = Role(
            name="rollout",
            room=None if shared is None else shared.room,
            replaced=nothing if shared is None else shared.engine_replaced,
            process=RolloutActor,
            spec=spec,
            cpus=config.rollout.cpus_per_actor,
            gpus=config.rollout.gpus_per_actor,
            env=torch_environment(threads=1),
            max_restarts=config.rollout.max_restarts,
            start_timeout_s=config.rollout.boot_timeout_s,
            drain_timeout_s=config.rollout.generate_timeout_s + _DRAIN_MARGIN_S,
            placement_wait_s=config.placement.wait_s,
            explain=self._plan,
            spread=config.placement.spread == "spread",
            advice="lower rollout.actors, rollout.gpus_per_actor or rollout.cpus_per_actor, or add a node",
        )
        return self._pool(role, count=config.rollout.actors)

    def reward(self) -> RolePool:
        """The reward workers."""
        config = self._runtime.config

        def spec(index: int, incarnation: int) -> RewardSpec:
            return RewardSpec(
                config=config,
                redis_url=self._runtime.redis_url,
                run_dir=str(self._runtime.run.path.resolve()),
                index=index,
                incarnation=incarnation,
            )

        role = Role(
            name="reward",
            process=RewardActor,
            spec=spec,
            cpus=config.reward.cpus_per_worker,
            gpus=config.reward.gpus_per_worker,
            env=torch_environment(config.reward.threads),
            max_restarts=config.reward.max_restarts,
            start_timeout_s=_REWARD_START_S,
            placement_wait_s=config.placement.wait_s,
            explain=self._plan,
            advice="lower reward.workers, reward.gpus_per_worker or reward.cpus_per_worker, or add a node",
        )
        return self._pool(role, count=config.reward.workers)

    def learner(self) -> RolePool:
        """The learner's ranks. When one dies, all are replaced and go on from the newest checkpoint."""
        config, shared = self._runtime.config, self.shared_gpu

        def spec(index: int, incarnation: int) -> LearnerSpec:
            return LearnerSpec(
                config=config,
                redis_url=self._runtime.redis_url,
                run_dir=str(self._runtime.run.path.resolve()),
                channel=self.channel,
                rank=index,
                world_size=config.learner.ranks,
                incarnation=incarnation,
                turns=None if shared is None else shared.turns,
            )

        role = Role(
            name="learner",
            room=None if shared is None else shared.room,
            replaced=nothing if shared is None else shared.learner_replaced,
            process=LearnerActor,
            spec=spec,
            cpus=config.learner.cpus_per_rank,
            gpus=config.learner.gpus_per_rank,
            env=torch_environment(config.learner.threads),
            max_restarts=config.learner.max_restarts,
            start_timeout_s=config.learner.start_timeout_s,
            placement_wait_s=config.placement.wait_s,
            explain=self._plan,
            finite=True,
            together=True,
            final_errors=(*INPUT_ERRORS, StallError),
            advice="lower learner.ranks, learner.gpus_per_rank or learner.cpus_per_rank, or add a node",
        )
        return self._pool(role, count=config.learner.ranks)

    def watch(self, until: Callable[[], bool]) -> None:
        """See to all roles, redrawing the display, until the condition holds."""
        while not until():
            for pool in self.running:
                pool.poll(timeout_s=0.2 / len(self.running))
            self._note_headcount()
            self._runtime.check_server()
            self._runtime.refresh()

    def clear_gpu(self) -> None:
        """An offline stage needs the GPU that the engine has meanwhile: stop it; the next stage that asks starts it."""
        if self._runtime.config.placement.colocate:
            self.stop("rollout")

    def stop(self, *names: str) -> None:
        """Stop the named roles."""
        for name in names:
            pool = self._pools.pop(name, None)
            if pool is not None:
                pool.stop(grace_s=self._runtime.grace_s)

    def _pool(self, role: Role, *, count: int) -> RolePool:
        if role.name not in self._pools:
            # What the role stands on comes up first, so that it is taken down after it.
            assert self._runtime.redis_url
            assert self._runtime.ray is not None
            pool = RolePool(role, note=lambda event, text: self.note(role.name, event=event, text=text))
            self._pools[role.name] = pool
            self._runtime.on_exit(lambda: self.stop(role.name))
            pool.grow_to(count)
        return self._pools[role.name]

    def note(self, role: str, *, event: str, text: str) -> None:
        """Put what happened to a role into the run's record, for people."""
        self._runtime.run.emit(role=role, event=event, note=text)

    def _note_headcount(self) -> None:
        """Record how many rollout actors run whenever that changes."""
        pool = self._pools.get("rollout")
        headcount = None if pool is None else (pool.up, pool.wanted)
        if headcount is not None and headcount != self._headcount:
            self._headcount = headcount
            self._runtime.run.emit(role="rollout", event="workers", running=headcount[0], wanted=headcount[1])

    def _plan(self) -> str:
        """The table of the whole run, where the living nodes cannot hold all of it."""
        from keel.planning.plan import unplaceable
        from keel.planning.view import ClusterView

        return unplaceable(self._runtime.config, cluster=ClusterView.from_ray(self._runtime.ray)) or ""

    @property
    def _log_dir(self) -> Path:
        return (self._runtime.run.path / "logs").resolve()
