"""What the loop does with the guard: makes it, and carries out what it decides.

Consumes: decisions. Produces: a state that is rolled back, at another β or learning rate, or about to end; and a
checkpoint. Waits for: the disk, the other ranks and, on a shared GPU, the turn, as publishing does.
Always holds: actions are carried out in their order, and the guard knows of each, before the checkpoint of that moment
is saved; what changes the state is followed by a checkpoint at once. So a run that is resumed stands behind all of
them or before all of them. What concerns the reward model and people is the driver's, who reads it in guard.jsonl.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from cluster.text import encode_answer, load_tokenizer
from configs.run import RunConfig
from learner.guard.record import (
    Action,
    Decision,
    Halt,
    LowerLearningRate,
    RaiseBeta,
    Reading,
    RollBack,
    Verdict,
)

if TYPE_CHECKING:
    from learner.guard.reading import SignalReader, StepView
    from learner.state import LearnerState
    from learner.telemetry import StepReport

log = logging.getLogger(__name__)

UNGUARDED: Final = Decision(reading=Reading(), verdict=Verdict(), actions=(), good=False)
_SECTIONS: Final = ("guard", "learner", "reward", "rm", "rollout")


class StepGuard(Protocol):
    """What the learner needs of a guard: learner/guard/guard.py has the meaning of each."""

    @property
    def halted(self) -> str: ...

    def observe(self, view: StepView, *, step: int, version: int, good_steps: Sequence[int] = ()) -> Decision: ...

    def applied(self, action: Action, *, why: str | None = None, **fields: Any) -> None: ...

    def measured(self, values: Mapping[str, float | None], version: int) -> None: ...

    def record(self) -> dict[str, Any]: ...

    def to_state(self) -> dict[str, Any]: ...

    def from_state(self, saved: Mapping[str, Any]) -> None: ...

    def go_on(self) -> None: ...

    def close(self) -> None: ...


class MakeGuard(Protocol):
    """The guard of a run whose newest checkpoint is that of `step`, after `branch` rollbacks; None: nobody watches
    it."""

    def __call__(self, config: RunConfig, run_dir: Path, *, step: int, branch: int) -> StepGuard | None: ...


async def carry_out(decision: Decision, state: LearnerState) -> None:
    """All that it asks for, and the step's checkpoint if one is due."""
    changed = False
    for action in decision.actions:
        fields = await _carry_out(action, state)
        changed |= isinstance(action, RollBack | RaiseBeta | LowerLearningRate)
        if state.guard is not None:
            state.guard.applied(action, **fields)
    await asyncio.to_thread(state.save if changed else state.save_if_due, good=decision.good)


async def _carry_out(action: Action, state: LearnerState) -> dict[str, Any]:
    """The learner's part of it. Returns what came of it."""
    match action:
        case RollBack():
            async with state.device_turn():
                to_step = await asyncio.to_thread(state.roll_back, action.to_step)
                await state.publish_weights()
            return {
                "to_step": to_step,
                "beta": state.kl.beta,
                "rm_version": state.scores.version,
                "new_version": state.version,
            }
        case RaiseBeta():
            return {"beta": state.raise_beta(factor=action.factor, floor=action.floor)}
        case LowerLearningRate():
            return {"lr_scale": state.lower_learning_rate(action.factor)}
        case Halt():
            log.error("the guard halts the run: %s", action.reason)
    return {}


def settings_digest(config: RunConfig) -> str:
    """Of what may be changed to let a run go on that the guard has halted. More steps are not among it."""
    shown = config.model_dump(mode="json")
    sections = {name: shown[name] for name in _SECTIONS}
    del sections["learner"]["steps"]
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()


def make_guard(config: RunConfig, run_dir: Path, *, step: int, branch: int = 0) -> StepGuard | None:
    """What the `guard` section asks for."""
    if not config.guard.enabled:
        return None
    from learner.guard.guard import Guard
    from learner.guard.journal import Journal

    return Guard(
        config.guard,
        reader=_LateReader(lambda: _make_reader(config, run_dir)),
        journal=Journal(run_dir, step=step),
        branch=branch,
        refreshes=config.rm.refresh is not None and config.reward.needs_model,
        sample_every_steps=config.checkpoint.every_steps,
    )


def _make_reader(config: RunConfig, run_dir: Path) -> SignalReader:
    from learner.guard.reading import SignalReader
    from learner.guard.reference import RewardScales, load_reference

    tokenizer = load_tokenizer(run_dir / "sft" / "model")

    def encode(answer: str) -> tuple[int, ...]:
        return encode_answer(tokenizer, answer, max_tokens=config.data.max_response_tokens).ids

    reference = load_reference(run_dir, encode=encode)
    return SignalReader(reference, scales=RewardScales(run_dir / "rm"), ceiling=config.guard.ceiling)


class _LateReader:
    """A SignalReader that is made when it is first needed: the answers that it compares with may be sampled while the
    learner starts."""

    def __init__(self, make: Callable[[], SignalReader]) -> None:
        self._make = make
        self._made: SignalReader | None = None
        self._saved: Mapping[str, Any] | None = None

    def read(self, view: StepView) -> Reading:
        return self._reader().read(view)

    def reset(self) -> None:
        self._reader().reset()

    def to_state(self) -> dict[str, Any]:
        return self._reader().to_state()

    def from_state(self, state: Mapping[str, Any]) -> None:
        self._made, self._saved = None, state

    def _reader(self) -> SignalReader:
        if self._made is None:
            self._made = self._make()
            if self._saved is not None:
                self._made.from_state(self._saved)
        return self._made


def step_view(report: StepReport) -> StepView:
    """What the guard reads of a step."""
    from learner.guard.reading import StepView

    return StepView.of(
        report.rollouts,
        prompts=report.prompts,
        texts=report.texts,
        step=report.record["step"],
        record=report.record,
    )
