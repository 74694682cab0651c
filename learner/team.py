"""The trainers of all ranks as rank 0 uses them: each method gives the other ranks the order, then does it here.

Consumes: calls, one at a time. Produces: orders, and results. Waits for: the other ranks, within each method, at most
the collective time-out. Who unblocks it: learner/follow.py on the other ranks.
Always holds: the other ranks make the same calls on their trainers in the same order. One rank alone gets no orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cluster.records import ScoredRollout, encode, pack_floats, pack_ids
from cluster.weights import AdapterInfo
from learner import orders
from learner.experience import Experience
from learner.trainer import Trainer
from learner.update import UpdateStats


class Team:
    """Led by this process, rank 0. Methods are those of `learner.trainer.Trainer`, on every rank at once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._ranks = trainer.ranks

    @property
    def vocab_size(self) -> int:
        return self._trainer.vocab_size

    @property
    def adapter_info(self) -> AdapterInfo | None:
        return self._trainer.adapter_info

    def make_experience(self, rollouts: Sequence[ScoredRollout], *, scores_B: Tensor, beta: float) -> Experience:
        self._tell(
            lambda: orders.MakeExperience(
                rollouts=[encode(rollout) for rollout in rollouts],
                scores_f32=pack_floats(scores_B.cpu().numpy()),
                beta=beta,
            )
        )
        with self._ranks.bounded("making experience"):
            return self._trainer.make_experience(rollouts, scores_B=scores_B, beta=beta)

    def update(self, experience: Experience, *, step: int, lr_scale: float = 1.0) -> UpdateStats:
        """`experience`: what `make_experience` gave last."""
        self._tell(lambda: orders.Update(step=step, lr_scale=lr_scale))
        with self._ranks.bounded("an update"):
            return self._trainer.update(experience, step=step, lr_scale=lr_scale)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time: the others go along, so take them all."""
        self._tell(orders.GatherWeights)
        with self._ranks.bounded("gathering weights"):
            yield from self._trainer.weights()

    def probe_logprobs(self, token_ids: Tensor) -> Tensor:
        self._tell(lambda: orders.ProbeLogprobs(pack_ids(token_ids.numpy())))
        with self._ranks.bounded("probing"):
            return self._trainer.probe_logprobs(token_ids)

    def move_to(self, device: torch.device) -> None:
        """Of rank 0 alone: a learner that shares its GPU has no other."""
        self._trainer.move_to(device)

    def save_model(self, directory: Path) -> None:
        self._tell(lambda: orders.SaveModel(str(directory)))
        with self._ranks.bounded("saving the policy"):
            self._trainer.save_model(directory)

    def save(self, directory: Path) -> None:
        self._tell(lambda: orders.Save(str(directory)))
        with self._ranks.bounded("saving a checkpoint"):
            self._trainer.save(directory)

    def load(self, directory: Path) -> None:
        self._tell(lambda: orders.Load(str(directory)))
        with self._ranks.bounded("loading a checkpoint"):
            self._trainer.load(directory)

    def checkpoint_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Rank 0's own."""
        return self._trainer.checkpoint_tensors()

    def ready(self, *, step: int, version: int) -> None:
        """Let the other ranks know that everything is loaded."""
        self._tell(lambda: orders.Ready(step=step, version=version))

    def end(self, ending: str) -> None:
        """Let the other ranks go, and leave the group."""
        self._tell(lambda: orders.End(ending))
        self._ranks.close()

    def _tell(self, order: Callable[[], orders.Order]) -> None:
        if self._ranks.size > 1:
            self._ranks.tell(orders.encode_order(order()))
