"""A learner without a loop around it, for tests of rollbacks, and what has to be the same before and after one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from cluster.records import PromptTask, decode
from cluster.streams import StreamName
from cluster.streams_memory import MemoryStreams
from cluster.weights import MemoryWeightChannel
from configs.run import RunConfig
from learner.guard.record import Decision, RollBack
from learner.guarded import carry_out
from learner.state import LearnerState
from tests.guard_support import OK, ScriptedGuard
from tests.run_support import random_rollouts


class Run:
    """A learner without a loop around it. `channel`: of the run's actors, where they outlived another learner."""

    def __init__(
        self,
        config: RunConfig,
        script: Mapping[int, Decision] | None = None,
        *,
        channel: MemoryWeightChannel | None = None,
    ) -> None:
        self.guard = ScriptedGuard(script)
        self.streams = MemoryStreams()
        self.channel = channel or MemoryWeightChannel()
        self.tasks: list[PromptTask] = []
        """With an actor."""
        self.state = LearnerState.build(
            config, run_dir=config.run_dir, streams=self.streams, channel=self.channel, guarded_by=self.guard
        )

    async def step(self, seed: int, decision: Decision = OK) -> None:
        state = self.state
        state.begin()
        await state.intake.issue(step=state.step, version=state.version)
        self.tasks += await self.issued()
        for answer in random_rollouts(seed=seed):
            rollout = msgspec.structs.replace(answer.rollout, task=self.tasks.pop(0))
            assert state.intake.ledger.accept(msgspec.structs.replace(answer, rollout=rollout))
        rollouts = state.intake.ledger.take(8)
        assert rollouts is not None
        experience = state.make_experience(rollouts)
        state.advance(experience, state.update(experience))
        await state.publish_weights()
        await carry_out(decision, state)
        if any(isinstance(action, RollBack) for action in decision.actions):
            self.tasks.clear()

    async def issued(self) -> list[PromptTask]:
        """Tasks that actors would get now."""
        entries = await self.streams.claim(StreamName.PROMPTS, consumer="actor", max_count=100, wait_s=0.0)
        await self.streams.settle(StreamName.PROMPTS, [entry.entry_id for entry in entries])
        return [decode(entry.payload, PromptTask) for entry in entries]

    def good(self) -> list[int]:
        return list(self.state.good.steps)

    def restored(self) -> dict[str, Any]:
        """All that a rollback brings back, in plain values."""
        state = self.state
        return {
            "kl": state.kl.to_dict(),
            "lr_scale": state.lr_scale,
            "scores": state.scores.to_state(),
            "cursor": state.deck.position,
            "tensors": {
                f"{group}/{name}": tensor.detach().clone()
                for group, named in state.checkpoint_tensors().items()
                for name, tensor in named.items()
            },
        }


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Bit for bit."""
    assert {name: ours[name] for name in ours if name != "tensors"} == {
        name: theirs[name] for name in theirs if name != "tensors"
    }
    mine, others = ours["tensors"], theirs["tensors"]
    assert mine.keys() == others.keys()
    assert {name.partition("/")[0] for name in mine} >= {"policy", "critic", "rng"}
    different = [name for name in mine if not torch.equal(mine[name], others[name])]
    assert different == []


def identity(state: LearnerState) -> None:
    ledger = state.intake.ledger
    counts = ledger.counts
    places = counts.trained + counts.stale_dropped + counts.dead + counts.rejected + counts.abandoned
    assert counts.issued == places + ledger.outstanding + ledger.held
