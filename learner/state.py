"""Everything a run's learner is, in one object that can be saved whole and comes back exactly.

What all ranks have, the models in training, is behind `team` (learner/team.py); the rest is rank 0's alone.
What the checkpoint holds: policy, critic, both optimisers, the KL controller, the score normaliser, the reward model's
version, the prompt cursor, the random state, the ledger of outstanding tasks, the guard, step and version (DESIGN §1).

Going back to a good checkpoint begins a new branch of the run: what is trained is the checkpoint's again, bit for bit;
steps, versions, the ledger's totals and the guard go on, and the prompts come in another order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.errors import CheckpointError
from cluster.records import ScoredRollout
from cluster.reward_models import RewardModels
from cluster.streams import Streams
from cluster.text import load_tokenizer
from cluster.turns import Turns
from cluster.weight_sharing import SharedWeights
from cluster.weights import Probe, Transport, WeightBlob, WeightChannel, pack
from cluster.weights_collective import CollectiveWeightChannel
from configs.run import RunConfig
from learner.algo.kl import KlState
from learner.batch import train_batch
from learner.best import BestPolicy
from learner.deck import Cut, PromptDeck, TaskTemplate
from learner.device_turns import DeviceTurns
from learner.experience import Experience, ExperienceStats, experience_stats
from learner.good_checkpoints import GoodCheckpoints
from learner.guard.record import Decision, Level, RollBack
from learner.guarded import UNGUARDED, MakeGuard, StepGuard, make_guard, settings_digest, step_view
from learner.intake import Intake, IntakeSettings
from learner.kl_control import kl_budget, kl_controller, raised
from learner.ledger import Gate, Ledger
from learner.models import learner_device
from learner.prompts import load_deck
from learner.ranks import SOLO
from learner.score_scale import ScoreScale
from learner.team import Team
from learner.trainer import Trainer
from learner.update_stats import UpdateStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from learner.telemetry import StepReport

log = logging.getLogger(__name__)

_PROBE_TOKENS = 24


class LearnerState:
    """Built by `build`, which resumes when there is a checkpoint."""

    def __init__(
        self, config: RunConfig, *, run_dir: Path, channel: WeightChannel, team: Team, incarnation: str
    ) -> None:
        self.config = config
        self.settings = config.learner
        self.run_dir = run_dir
        self.step = 0
        self.version = 0
        self.branch = 0
        """Rollbacks so far."""
        self.lr_scale = 1.0
        self.total_steps = config.learner.steps
        self.scores = ScoreScale(RewardModels(run_dir / "rm"))
        self.kl_controller = kl_controller(config.learner.kl)
        self.kl_budget = kl_budget(config.learner.kl_budget)
        self.kl = self.kl_controller.initial()
        self.team = team
        self.deck: PromptDeck
        self.intake: Intake
        self.best = BestPolicy(run_dir / "policy")
        self.guard: StepGuard | None = None
        self._incarnation = incarnation
        self._channel = channel
        self._turns: DeviceTurns | None = None
        self._shared: SharedWeights | None = None
        self._store = CheckpointStore(run_dir / "checkpoints", keep_last=config.checkpoint.keep_last)
        self.good = GoodCheckpoints(self._store, keep=config.guard.keep_good)
        self._saved_step = -1
        self._alarm = False
        """The guard's verdict on the last step was to act: a policy that it distrusts is not the best, whatever its
        score."""
        self._published_bytes: dict[Transport, int] = {}

    @classmethod
    def build(
        cls,
        config: RunConfig,
        *,
        run_dir: Path,
        streams: Streams,
        channel: WeightChannel,
        team: Team | None = None,
        turns: Turns | None = None,
        guarded_by: MakeGuard = make_guard,
    ) -> LearnerState:
        """A new learner, or the one that the newest checkpoint holds. `team`: as loaded from the offline stages; left
        out, this process alone. `turns`: of the GPU that it shares with the engine. Raises ModelError, DataError,
        CheckpointError."""
        team = team or Team(Trainer(config, run_dir=run_dir, ranks=SOLO))
        state = cls(config, run_dir=run_dir, channel=channel, team=team, incarnation=uuid.uuid4().hex[:8])
        checkpoint = state._store.load() if state._store.latest() is not None else None
        ledger, position, cuts = Ledger(task_deadline_s=config.learner.task_deadline_s), 0, list[Cut]()
        if checkpoint is not None:
            state._resume(checkpoint)
            ledger = state._ledger_of(checkpoint)
            position, cuts = _cursor(checkpoint)
        state.guard = guarded_by(config, run_dir, step=state.step, branch=state.branch)
        state.deck = load_deck(config, run_dir, position=position, cuts=cuts)
        state.intake = state._make_intake(streams, ledger)
        if checkpoint is not None:
            state._resume_guard(checkpoint.state.get("guard"))
        if turns is not None:
            state._share_device(turns)
        team.ready(step=state.step, version=state.version)
        return state

    # ------------------------------------------------------------ one step

    def make_experience(self, rollouts: Sequence[ScoredRollout]) -> Experience:
        """Batch, normalised scores, rewards, values, advantages: steps 2 to 4 of DESIGN §5."""
        scores_B = self.scores.normalised(train_batch(rollouts), score_clip=self.settings.score_clip)
        return self.team.make_experience(rollouts, scores_B=scores_B, beta=self.kl.beta)

    def update(self, experience: Experience) -> UpdateStats:
        """Train policy and critic on it."""
        return self.team.update(experience, step=self.step, lr_scale=self.lr_scale)

    def advance(self, experience: Experience, update: UpdateStats) -> ExperienceStats:
        """The step is done: next β, next version. Returns the batch in plain numbers."""
        stats = experience_stats(experience, settings=self.settings)
        scale = self.kl_budget.scale_at(self.step)
        self.kl = self.kl_controller.update(
            self.kl, kl_nats_per_sequence=stats.kl_nats_per_sequence, samples=len(experience.batch), scale=scale
        ).moved(update.step_kl_nats_per_sequence)
        self.best.observe(
            stats.score_normalised_mean,
            kl=stats.kl_nats_per_sequence,
            kl_target=self.kl_target,
            rm_version=self.scores.version,
        )
        self.step += 1
        self.version += 1
        return stats

    def judge(self, report: StepReport) -> Decision:
        """What the guard makes of the step that was just taken; the report gets the guard's part of the record."""
        if self.guard is None:
            return UNGUARDED
        begun_s = time.monotonic()
        decision = self.guard.observe(
            step_view(report), step=self.step, version=self.version, good_steps=self.good.steps
        )
        self._alarm = decision.verdict.level is Level.ACT
        report.record.update(self.guard.record())
        report.record["guard_seconds"] = time.monotonic() - begun_s
        return decision

    @property
    def kl_target(self) -> float | None:
        """KL target of this step in nats per sequence, the budget applied; None without one."""
        target = self.kl_controller.target_nats_per_sequence
        return None if target is None else target * self.kl_budget.scale_at(self.step)

    @property
    def kl_budget_spent(self) -> bool:
        return self.kl_budget.is_spent(self.kl)

    async def publish_weights(self) -> None:
        """Make the policy of this version the newest. Versions never go backwards, also when a resumed learner finds
        actors that know a later version of the branch it left."""
        newest = await self._channel.newest_version()
        if newest is not None and newest >= self.version:
            self.version = newest + 1
        blob = await asyncio.to_thread(self._pack)
        await asyncio.to_thread(self._channel.publish, blob)
        self._published_bytes[blob.transport] = self._published_bytes.get(blob.transport, 0) + blob.size_bytes

    @property
    def published(self) -> dict[Transport, tuple[int, int]]:
        """(bytes handed over, failures) since this process's start, by transport."""
        totals = {transport: (size_bytes, 0) for transport, size_bytes in self._published_bytes.items()}
        if isinstance(self._channel, CollectiveWeightChannel):
            totals["collective"] = self._channel.stats.bytes, self._channel.stats.failures
        return totals

    def _pack(self) -> WeightBlob:
        adapter, probe = self.team.adapter_info, self._probe()
        if self._shared is not None and adapter is None:
            return self._shared.share(self.version, self.team.weights(), probe=probe)
        return pack(self.version, self.team.weights(), probe=probe, adapter=adapter)

    def _probe(self) -> Probe:
        generator = torch.Generator().manual_seed(self.version)
        token_ids = torch.randint(self.team.vocab_size, (_PROBE_TOKENS,), generator=generator)
        return Probe(token_ids=token_ids.int().numpy(), logprobs=self.team.probe_logprobs(token_ids).numpy())

    # ------------------------------------------------------------ what the guard asks for

    def roll_back(self, to_step: int) -> int:
        """Back to the good checkpoint of this step, or to the one before it where that is damaged; the weights are to
        be published. Returns the step. Raises CheckpointError when there is none."""
        checkpoint = self._good_checkpoint(to_step)
        saved = checkpoint.state
        self._restore(checkpoint)
        self.best.rolled_back(saved["best"], to_step=checkpoint.step)
        self.branch += 1
        position, cuts = _cursor(checkpoint)
        self.deck.branch_off(position, branch=self.branch, cuts=cuts)
        abandoned = self.intake.abandon()
        # So far that whatever the policy of before has sampled, for any task, is over age.
        self.version += 1 + self.settings.max_staleness
        self.good.forget_after(checkpoint.step)
        self._saved_step, self._alarm = -1, False
        log.warning("rolled back from step %d to the checkpoint of step %d; %d samples are abandoned",
                    self.step, checkpoint.step, abandoned)  # fmt: skip
        return checkpoint.step

    def _good_checkpoint(self, to_step: int) -> Checkpoint:
        for step in [step for step in reversed(self.good.steps) if step <= to_step]:
            try:
                return self._store.load(step)
            except CheckpointError as error:
                log.error("cannot roll back to step %d, trying the good checkpoint before it: %s", step, error)
                self.good.forget(step)
        raise CheckpointError(
            f"no good checkpoint of step {to_step} or before",
            got=f"good ones: {list(self.good.steps)}",
            do="start over, or resume from a copy of a checkpoint",
        )

    @property
    def halted(self) -> bool:
        """The guard has ended the run."""
        return self.guard is not None and bool(self.guard.halted)

    def raise_beta(self, *, factor: float, floor: float) -> float:
        """Returns the new β."""
        self.kl = raised(self.kl, section=self.settings.kl, factor=factor, floor=floor)
        return self.kl.beta

    def lower_learning_rate(self, factor: float) -> float:
        """Of both models, from now on. Returns what the schedule is multiplied by."""
        self.lr_scale *= factor
        return self.lr_scale

    # ------------------------------------------------------------ a shared GPU

    def device_turn(self) -> AbstractAsyncContextManager[None]:
        """The GPU is this learner's inside; always, where it has its own. Raises DeadlineError when the engine does not
        give it in time."""
        return contextlib.nullcontext() if self._turns is None else self._turns.held()

    def _share_device(self, turns: Turns) -> None:
        device, settings = learner_device(self.config), self.settings
        self._turns = DeviceTurns(turns, self.team.move_to, device=device, timeout_s=settings.stall_timeout_s)
        self._shared = SharedWeights(device)

    async def leave_device(self) -> None:
        """Last of all: shared weights end with this process, so the engine gets them once more, by the channel."""
        if self._shared is not None:
            shared, self._shared = self._shared, None
            async with self.device_turn():
                await self.publish_weights()
                shared.close()

    # ------------------------------------------------------------ checkpoints

    def begin(self) -> None:
        """Before the first step: a checkpoint of a run that went back when it was resumed; what the guard needs, its
        reference; and, where it may go back, a checkpoint of the start, for as long as there is no better one."""
        if self._saved_step < 0 < self.step:
            self.save()
        if self.guard is None:
            return
        self.guard.to_state()  # Makes the reference, which no step's time should pay for.
        if "roll_back" in self.config.guard.actions and self.step == 0 and 0 not in self.good.steps:
            self._saved_step = -1  # One that was saved without being good does not count.
            self.save(good=True)

    def save_if_due(self, *, good: bool = False) -> None:
        """Save every `checkpoint.every_steps` steps."""
        if self.step % self.config.checkpoint.every_steps == 0:
            self.save(good=good)

    def save(self, *, good: bool = False) -> None:
        """Checkpoint, and the best policy when it got better. `good`: the run may come back to it. Raises
        CheckpointError; earlier checkpoints stay."""
        if self._saved_step != self.step:
            if not self._alarm:
                self.best.save_if_better(self.team.save_model, tokenizer=self._tokenizer(), step=self.step)
            self._store.save(self.step, state=self._json_state(good=good), write_tensors=self.team.save)
            self._saved_step = self.step
            if good:
                self.good.add(self.step)

    def save_final(self) -> None:
        """`save`, and the policy as it is now as a model directory, for the next user. Raises CheckpointError."""
        self.save()
        self.best.save_final(self.team.save_model, tokenizer=self._tokenizer(), step=self.step)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.run_dir / "sft" / "model")

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the state, by group and name, as this rank holds it. Live views."""
        return self.team.checkpoint_tensors()

    def _json_state(self, *, good: bool) -> dict[str, Any]:
        guard = None if self.guard is None else self.guard.to_state()
        return {
            "step": self.step,
            "version": self.version,
            "kl": self.kl.to_dict(),
            "beta_initial": self.kl_controller.initial().beta,
            **self.scores.to_state(),
            "prompt_position": self.deck.position,
            "prompt_cuts": list(self.deck.cuts),
            "ledger": self.intake.ledger.to_state(),
            "best": self.best.to_state(),
            "branch": self.branch,
            "lr_scale": self.lr_scale,
            "good_steps": self.good.to_come(self.step) if good else self.good.steps,
            "guard": {
                "good": good,
                "halted": self.halted,
                "settings": settings_digest(self.config),
                "state": guard,
            },
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        """What both a resumed run and a rollback take over; but a β to begin with that was set anew since comes first.
        Checkpoints of before the guard know neither that nor a learning-rate scale."""
        saved, initial = checkpoint.state, self.kl_controller.initial().beta
        self.scores.load_state(saved)
        self.kl = KlState.from_dict(saved["kl"])
        if saved.get("beta_initial", initial) != initial:
            self.kl = replace(self.kl, beta=initial)
        self.lr_scale = saved.get("lr_scale", 1.0)
        self.team.load(checkpoint.path)

    def _resume(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.state
        self._restore(checkpoint)
        self.step, self.version = saved["step"], saved["version"]
        self._saved_step = self.step
        self.best.from_state(saved["best"])
        self.branch = saved.get("branch", 0)
        self.good.restore(saved.get("good_steps", ()))
        log.info("resumed at step %d, version %d, beta %.4f", self.step, self.version, self.kl.beta)

    def _resume_guard(self, saved: dict[str, Any] | None) -> None:
        """A run that the guard halted stays so, until settings that matter for it are others: then it goes on from its
        last good checkpoint, also where there is no guard any more; one that there is begins anew."""
        if saved is None or saved["state"] is None:
            return
        if self.guard is not None:
            self.guard.from_state(saved["state"])
        if not saved.get("halted", self.halted) or saved["settings"] == settings_digest(self.config):
            return
        log.warning("the guard had halted this run; it goes on with other settings")
        if self.guard is not None:
            self.guard.go_on()
        if self.good.steps:
            to_step = self.roll_back(self.good.steps[-1])
            if self.guard is not None:
                facts = {"beta": self.kl.beta, "rm_version": self.scores.version, "new_version": self.version}
                self.guard.applied(RollBack(to_step), why="resumed with other settings after a halt", **facts)

    def _ledger_of(self, checkpoint: Checkpoint) -> Ledger:
        saved = checkpoint.state["ledger"]
        return Ledger.from_state(saved, task_deadline_s=self.settings.task_deadline_s, incarnation=self._incarnation)

    def _make_intake(self, streams: Streams, ledger: Ledger) -> Intake:
        settings, data = self.settings, self.config.data
        return Intake(
            streams,
            deck=self.deck,
            ledger=ledger,
            gate=Gate(batch_size=settings.batch_size, max_staleness=settings.max_staleness, total_steps=settings.steps),
            template=TaskTemplate(
                incarnation=self._incarnation,
                max_new_tokens=data.max_response_tokens,
                temperature=self.config.rollout.temperature,
                samples_per_prompt=settings.samples_per_prompt,
            ),
            settings=IntakeSettings(
                batch_size=settings.batch_size,
                max_staleness=settings.max_staleness,
                stall_timeout_s=settings.stall_timeout_s,
            ),
        )


def _cursor(checkpoint: Checkpoint) -> tuple[int, list[Cut]]:
    """Where the deck stands in it."""
    cuts = checkpoint.state.get("prompt_cuts", [])
    return checkpoint.state["prompt_position"], [(position, branch) for position, branch in cuts]
