"""The online loop: the one place where a run's steps happen in order.

Consumes: scored rollouts (through the intake). Produces: policy versions, checkpoints, metrics.
Waits: for a full batch; on a shared GPU also for the turn. Who unblocks it: see learner/intake.py and cluster/turns.py.
Always holds: `step` updates are done; those of abandoned branches apart, all of them are in the parameters that
`version` names; a checkpoint holds exactly what the next step needs.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

from learner.guarded import carry_out
from learner.state import LearnerState
from learner.telemetry import StepTimes, Telemetry


class Ending(StrEnum):
    """Why the loop ended; each leaves a checkpoint."""

    STEPS_DONE = "steps_done"
    STOPPED = "stopped"
    KL_BUDGET_SPENT = "kl_budget_spent"
    HALTED = "halted"


async def train(state: LearnerState, telemetry: Telemetry, *, stop: asyncio.Event) -> Ending:
    """Run PPO steps until the last one, until `stop` is set, the KL budget is spent, or the guard halts the run."""
    async with state.device_turn():
        await state.publish_weights()
    await asyncio.to_thread(state.begin)
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
        report = await asyncio.to_thread(telemetry.report, state, rollouts, stats, update, times)
        decision = await asyncio.to_thread(state.judge, report)
        # Before the checkpoint: a resumed run cuts its record back to the checkpoint, and so has no gap.
        await telemetry.emit(state, report)
        await carry_out(decision, state)
    await asyncio.to_thread(state.save_final)
    await state.leave_device()
    return ending


def _ending(state: LearnerState, stop: asyncio.Event) -> Ending | None:
    if state.halted:
        return Ending.HALTED
    if state.step >= state.total_steps:
        return Ending.STEPS_DONE
    if state.kl_budget_spent:
        return Ending.KL_BUDGET_SPENT
    return Ending.STOPPED if stop.is_set() else None
