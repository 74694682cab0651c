"""The other ranks' loop: do what rank 0 says.

Consumes: orders (learner/orders.py). Produces: this rank's part of sums, gathered weights and checkpoint shards.
Waits: for the next order; in each order for the other ranks. Who unblocks it: rank 0 (learner/team.py), or its loss.
Always holds: the same calls as rank 0's, in the same order, on this rank's trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cluster.errors import SupervisionError
from cluster.records import ScoredRollout, decode
from learner import orders
from learner.experience import Experience
from learner.trainer import Trainer


class Follower:
    """One a rank but the first. `beat` is called at every order: a sign of life."""

    def __init__(self, trainer: Trainer, *, beat: Callable[[], None]) -> None:
        self._trainer = trainer
        self._ranks = trainer.ranks
        self._beat = beat
        self._experience: Experience | None = None

    def until_ready(self) -> orders.Ready:
        """Follow until everything is loaded. Raises SupervisionError when the learner ends before."""
        order = self._follow()
        if not isinstance(order, orders.Ready):
            raise SupervisionError("the learner ended before it was ready", got=order.ending)
        return order

    def until_end(self) -> str:
        """Follow to the end; returns how the run ended. Raises what this rank's own work raised, what another
        rank gave up with, and SupervisionError when one is lost."""
        order = self._follow()
        if not isinstance(order, orders.End):
            raise SupervisionError("the learner started twice", got=repr(order))
        self._ranks.close()
        return order.ending

    def _follow(self) -> orders.Ready | orders.End:
        while True:
            order = orders.decode_order(self._ranks.listen())
            self._beat()
            if isinstance(order, orders.Ready | orders.End):
                return order
            with self._ranks.bounded(type(order).__name__):
                self._do(order)

    def _do(self, order: orders.Order) -> None:
        trainer = self._trainer
        match order:
            case orders.MakeExperience():
                self._experience = trainer.make_experience(
                    [decode(payload, ScoredRollout) for payload in order.rollouts],
                    scores_B=torch.from_numpy(np.frombuffer(order.scores_f32, dtype="<f4").copy()),
                    beta=order.beta,
                )
            case orders.Update():
                if self._experience is None:
                    raise SupervisionError("an update was ordered before its experience", got=repr(order))
                trainer.update(self._experience, step=order.step, lr_scale=order.lr_scale)
                self._experience = None
            case orders.GatherWeights():
                for _ in trainer.weights():
                    pass
            case orders.ProbeLogprobs():
                trainer.probe_logprobs(torch.from_numpy(np.frombuffer(order.token_ids_i32, dtype="<i4").copy()).long())
            case orders.SaveModel():
                trainer.save_model(Path(order.directory))
            case orders.Save():
                trainer.save(Path(order.directory))
            case orders.Load():
                trainer.load(Path(order.directory))
            case _:
                raise SupervisionError("an order that cannot be followed", got=repr(order))
