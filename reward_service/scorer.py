"""The seam between the reward service and its models, and a scripted stand-in for tests.

A scorer is a plain, blocking object: the worker calls it from one thread, one forward at a time. It holds frozen
models only: the reward-model ensemble and the reference policy. The real one: reward_service/scorer_transformers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cluster.errors import ScoringError
from cluster.records import Float32s, Rollout


@dataclass(frozen=True, eq=False)
class Scores:
    """What the models say of one rollout. M members, T response tokens."""

    member_scores: tuple[float, ...]
    """[M] raw score of each ensemble member; empty where there is no reward model."""
    ref_logprobs: Float32s
    """[T] log-probability, in nats, of each response token under the reference policy, at the task's temperature."""


class Scorer(Protocol):
    """Frozen models. Every method returns one answer a rollout, in order, and raises ScoringError, naming the task, for
    a rollout it cannot score. Answers do not depend on what else is in the batch."""

    version: str
    """Of the ensemble; NO_MODEL (cluster/reward_models.py) without one, and then no answer has member scores."""
    reference_id: str
    """Names the reference model's weights."""

    @property
    def eos_id(self) -> int:
        """The policy's end-of-sequence token."""
        ...

    def texts(self, batch: Sequence[Rollout]) -> list[tuple[str, str]]:
        """(prompt, answer) as the reward model would read them."""
        ...

    def score(self, batch: Sequence[Rollout]) -> list[Scores]:
        """Members and reference model."""
        ...

    def member_scores(self, batch: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """The ensemble alone: [M] each."""
        ...

    def reference_logprobs(self, batch: Sequence[Rollout]) -> list[Float32s]:
        """The reference model alone: [T] each."""
        ...


@dataclass
class ScriptedScorer:
    """A scorer that does as told. Its score is the response length unless `members` says otherwise; every reference
    log-prob is −1. A task in `poison` cannot be scored. `before` runs first in each forward, in the worker's thread: a
    test may block or raise there."""

    version: str = "rm-scripted"
    reference_id: str = "ref-scripted"
    eos_id: int = 2
    members: Callable[[Rollout], tuple[float, ...]] = lambda rollout: (float(len(rollout.response_ids)),)
    poison: set[str] = field(default_factory=set)
    before: Callable[[Sequence[Rollout]], None] = lambda batch: None
    scored: list[list[str]] = field(default_factory=list)
    """Task ids of each call to `score`."""
    referenced: list[list[str]] = field(default_factory=list)
    """Task ids of each call to `reference_logprobs`."""

    def texts(self, batch: Sequence[Rollout]) -> list[tuple[str, str]]:
        return [
            (" ".join(map(str, rollout.task.prompt_ids)), " ".join(map(str, rollout.response_ids))) for rollout in batch
        ]

    def score(self, batch: Sequence[Rollout]) -> list[Scores]:
        self.scored.append([rollout.task.task_id for rollout in batch])
        self.before(batch)
        self._refuse_poison(batch)
        return [Scores(self.members(rollout), self._minus_ones(rollout)) for rollout in batch]

    def member_scores(self, batch: Sequence[Rollout]) -> list[tuple[float, ...]]:
        self.before(batch)
        self._refuse_poison(batch)
        return [self.members(rollout) for rollout in batch]

    def reference_logprobs(self, batch: Sequence[Rollout]) -> list[Float32s]:
        self.referenced.append([rollout.task.task_id for rollout in batch])
        self.before(batch)
        self._refuse_poison(batch)
        return [self._minus_ones(rollout) for rollout in batch]

    def _refuse_poison(self, batch: Sequence[Rollout]) -> None:
        for rollout in batch:
            if rollout.task.task_id in self.poison:
                raise ScoringError(f"cannot score task {rollout.task.task_id}", got="a poisoned sample")

    @staticmethod
    def _minus_ones(rollout: Rollout) -> Float32s:
        return np.full(len(rollout.response_ids), -1.0, dtype=np.float32)
