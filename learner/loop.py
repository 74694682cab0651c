"""The online loop: the one place where a run's steps happen in order.

Consumes: scored rollouts (through the intake). Produces: policy versions, checkpoints, metrics.
Waits: for a full batch; on a shared GPU also for the turn. Who unblocks it: see learner/intake.py and cluster/turns.py.
Always holds: `step` updates are done, all of them in the parameters that `version` names, and a checkpoint holds
exactly what the next step needs.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

from learner.state import LearnerState
from learner.telemetry import StepTimes, Telemetry


class Ending(StrEnum):
    """Why the loop ended; each leaves a checkpoint."""

    STEPS_DONE = "steps_done"
    STOPPED = "stopped"
    KL_BUDGET_SPENT = "kl_budget_spent"


async def train(state: LearnerState, telemetry: Telemetry, *, stop: asyncio.Event) -> Ending:
    """Run PPO steps until the last one, until `stop` is set, or until the KL budget is spent."""
    async with state.device_turn():
        await state.publish_weights()
    while (ending := _ending(state, stop)) is None:
        times = StepTimes.begin()
        await state.intake.issue(step=state.step, version=state.version)
        rollouts = await state.intake.take_batch(step=state.step, version=state.version, stop=stop)
        if rollouts is None:
            continue
        times.batch_taken()
        async with state.device_turn():
            experience = await asyncio.to_thread(state.make_experience, rollouts)
            update = await asyncio.to_thread(state.update, experience)
            times.updated()
            stats = state.advance(experience, update)
            await state.publish_weights()
            times.published()
        # Before the checkpoint: a resumed run cuts its record back to the checkpoint, and so has no gap.
        await telemetry.emit(state, rollouts, stats, update, times)
        await asyncio.to_thread(state.save_if_due)
    await asyncio.to_thread(state.save_final)
    await state.leave_device()
    return ending


def _ending(state: LearnerState, stop: asyncio.Event) -> Ending | None:
    if state.step >= state.total_steps:
        return Ending.STEPS_DONE
    if state.kl_budget_spent:
        return Ending.KL_BUDGET_SPENT
    return Ending.STOPPED if stop.is_set() else None
