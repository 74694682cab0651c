"""A GPU that the learner's one rank and the engine share: their room, their turns, and what follows from a death.

Consumes: the configuration. Produces: one room for both, and the keeper of their turns. Waits: for the keeper's and the
board's answers, with their deadlines. Always holds: what a dead process held is free before its successor starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.placement import SharedRoom, bundle_of
from cluster.turns import RayTurns
from cluster.weights_ray import RayWeightChannel
from configs.run import RunConfig


def nothing() -> None:
    """What follows from a death where nothing is shared."""


@dataclass(frozen=True)
class SharedGpu:
    """Made with Ray up. `turns.close` ends it."""

    room: SharedRoom
    turns: RayTurns
    channel: RayWeightChannel

    @classmethod
    def create(cls, config: RunConfig, *, channel: RayWeightChannel) -> SharedGpu:
        learner, rollout = config.learner, config.rollout
        bundle = bundle_of(cpus=learner.cpus + rollout.cpus_per_actor, gpus=learner.gpus + rollout.gpus_per_actor)
        return cls(room=SharedRoom(bundle), turns=RayTurns.create(), channel=channel)

    def engine_replaced(self) -> None:
        self.turns.forget_now("engine")

    def learner_replaced(self) -> None:
        """The weights that the learner shared are gone with it; its successor publishes anew."""
        self.channel.lose_shared()
        self.turns.forget_now("learner")
