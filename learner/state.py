"""Everything a run's learner is, in one object that can be saved whole and comes back exactly.

What the checkpoint holds: policy, critic, both optimisers, the KL controller, the score normaliser, the reward model's
version, the prompt cursor, the random state, the ledger of outstanding tasks, step and version (DESIGN §1).
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.errors import CheckpointError
from cluster.records import ScoredRollout
from cluster.streams import Streams
from cluster.text import load_tokenizer
from cluster.weights import Probe, WeightChannel, pack
from configs.run import RunConfig
from learner.algo.advantages import NEEDS_CRITIC
from learner.algo.kl import KlState
from learner.algo.normalise import ScoreNormaliser
from learner.batch import train_batch
from learner.best import BestPolicy
from learner.critic import Critic
from learner.deck import PromptDeck, TaskTemplate
from learner.experience import Experience, ExperienceStats, experience_stats, make_experience, normalised_scores
from learner.intake import Intake, IntakeSettings
from learner.kl_control import kl_budget, kl_controller
from learner.ledger import Gate, Ledger
from learner.policy import Policy
from learner.prompts import load_deck
from learner.schedule import ScheduledAdamW
from learner.update import Trainable, UpdateStats, ppo_update

log = logging.getLogger(__name__)

_PROBE_TOKENS = 24


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of the reward model's raw scores on the answers it was trained from."""

    rm_version: str
    mean: float
    std: float
    count: int

    @classmethod
    def read(cls, rm_dir: Path) -> Calibration:
        manifest = json.loads((rm_dir / "manifest.json").read_text())
        numbers = manifest["calibration"]
        return cls(manifest["version"], numbers["mean"], numbers["std"], numbers["count"])


class LearnerState:
    """Built by `build`, which resumes when there is a checkpoint."""

    def __init__(self, config: RunConfig, *, run_dir: Path, channel: WeightChannel, incarnation: str) -> None:
        self.config = config
        self.settings = config.learner
        self.run_dir = run_dir
        self.step = 0
        self.version = 0
        self.total_steps = config.learner.steps
        self.calibration = Calibration.read(run_dir / "rm")
        self.normaliser = ScoreNormaliser().calibrated(
            self.calibration.rm_version,
            mean=self.calibration.mean, std=self.calibration.std, count=self.calibration.count,
        )  # fmt: skip
        self.kl_controller = kl_controller(config.learner.kl)
        self.kl_budget = kl_budget(config.learner.kl_budget)
        self.kl = self.kl_controller.initial()
        self.trainable = _trainable(config, run_dir, self.calibration)
        self.rng = torch.Generator().manual_seed(config.seed)
        self.deck: PromptDeck
        self.intake: Intake
        self.best = BestPolicy(run_dir / "policy")
        self._incarnation = incarnation
        self._channel = channel
        self._store = CheckpointStore(run_dir / "checkpoints", keep_last=config.checkpoint.keep_last)
        self._saved_step = -1

    @classmethod
    def build(cls, config: RunConfig, *, run_dir: Path, streams: Streams, channel: WeightChannel) -> LearnerState:
        """A new learner, or the one that the newest checkpoint holds. Raises ModelError, DataError, CheckpointError."""
        state = cls(config, run_dir=run_dir, channel=channel, incarnation=uuid.uuid4().hex[:8])
        checkpoint = state._store.load() if state._store.latest() is not None else None
        ledger = Ledger(task_deadline_s=config.learner.task_deadline_s)
        position = 0
        if checkpoint is not None:
            ledger, position = state._restore(checkpoint)
        state.deck = load_deck(config, run_dir, position=position)
        state.intake = state._make_intake(streams, ledger)
        return state

    # ------------------------------------------------------------ one step

    def make_experience(self, rollouts: Sequence[ScoredRollout]) -> Experience:
        """Batch, normalised scores, rewards, values, advantages: steps 2 to 4 of DESIGN §5."""
        batch = train_batch(rollouts)
        scores_B, self.normaliser = normalised_scores(batch, self.normaliser, score_clip=self.settings.score_clip)
        return make_experience(
            batch,
            policy=self.trainable.policy,
            critic=self.trainable.critic,
            scores_B=scores_B,
            beta=self.kl.beta,
            settings=self.settings,
        )

    def update(self, experience: Experience) -> UpdateStats:
        """Train policy and critic on it."""
        self.trainable.set_step(self.step)
        return ppo_update(experience, trainable=self.trainable, settings=self.settings, rng=self.rng)

    def advance(self, experience: Experience, update: UpdateStats) -> ExperienceStats:
        """The step is done: next β, next version. Returns the batch in plain numbers."""
        stats = experience_stats(experience, settings=self.settings)
        scale = self.kl_budget.scale_at(self.step)
        self.kl = self.kl_controller.update(
            self.kl, kl_nats_per_sequence=stats.kl_nats_per_sequence, samples=len(experience.batch), scale=scale
        ).moved(update.step_kl_nats_per_sequence)
        self.best.observe(stats.score_normalised_mean, kl=stats.kl_nats_per_sequence, kl_target=self.kl_target)
        self.step += 1
        self.version += 1
        return stats

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
        newest = await self._channel.latest()
        if newest is not None and newest.version >= self.version:
            self.version = newest.version + 1
        blob = await asyncio.to_thread(pack, self.version, self.trainable.policy.named_tensors(), probe=self._probe())
        await asyncio.to_thread(self._channel.publish, blob)

    def _probe(self) -> Probe:
        policy = self.trainable.policy
        generator = torch.Generator().manual_seed(self.version)
        token_ids = torch.randint(policy.vocab_size, (_PROBE_TOKENS,), generator=generator)
        return Probe(token_ids=token_ids.int().numpy(), logprobs=policy.probe_logprobs(token_ids).float().cpu().numpy())

    # ------------------------------------------------------------ checkpoints

    def save_if_due(self) -> None:
        """Save every `checkpoint.every_steps` steps."""
        if self.step % self.config.checkpoint.every_steps == 0:
            self.save()

    def save(self) -> None:
        """Checkpoint, the best policy when it got better, and after the last step the final policy as a model
        directory. Raises CheckpointError; earlier checkpoints stay."""
        tokenizer = load_tokenizer(self.run_dir / "sft" / "model")
        if self._saved_step != self.step:
            self.best.save_if_better(self.trainable.policy, tokenizer=tokenizer, step=self.step)
            self._store.save(self.step, tensors=self.checkpoint_tensors(), state=self._json_state())
            self._saved_step = self.step
        self.best.save_final(self.trainable.policy, tokenizer=tokenizer, step=self.step)

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the state, by group and name. Live views: save them before the next step."""
        trainable = self.trainable
        groups = {
            "policy": dict(trainable.policy.named_tensors()),
            "policy_optimiser": trainable.policy_optimiser.state_tensors(),
            "rng": {"update": self.rng.get_state()},
        }
        if trainable.critic is not None and trainable.critic_optimiser is not None:
            groups["critic"] = dict(trainable.critic.named_tensors())
            groups["critic_optimiser"] = trainable.critic_optimiser.state_tensors()
        return groups

    def _json_state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "version": self.version,
            "kl": self.kl.to_dict(),
            "normaliser": self.normaliser.to_dict(),
            "rm_version": self.calibration.rm_version,
            "prompt_position": self.deck.position,
            "ledger": self.intake.ledger.to_state(),
            "best": self.best.to_state(),
        }

    def _restore(self, checkpoint: Checkpoint) -> tuple[Ledger, int]:
        saved = checkpoint.state
        if saved["rm_version"] != self.calibration.rm_version:
            raise CheckpointError(
                "the checkpoint was trained against another reward model",
                got=f"{saved['rm_version']}, rm/ holds {self.calibration.rm_version}",
                do="restore rm/, or start over with --fresh",
            )
        self.step, self.version = saved["step"], saved["version"]
        self._saved_step = self.step
        self.kl = KlState.from_dict(saved["kl"])
        self.normaliser = ScoreNormaliser.from_dict(saved["normaliser"])
        self.best.from_state(saved["best"])
        trainable, tensors = self.trainable, checkpoint.tensors
        _copy_into(dict(trainable.policy.named_tensors()), tensors["policy"], what="policy")
        trainable.policy_optimiser.load_state_tensors(tensors.get("policy_optimiser", {}))
        if trainable.critic is not None and trainable.critic_optimiser is not None:
            _copy_into(dict(trainable.critic.named_tensors()), tensors["critic"], what="critic")
            trainable.critic_optimiser.load_state_tensors(tensors.get("critic_optimiser", {}))
        self.rng.set_state(tensors["rng"]["update"])
        log.info("resumed at step %d, version %d, beta %.4f", self.step, self.version, self.kl.beta)
        ledger = Ledger.from_state(
            saved["ledger"], task_deadline_s=self.settings.task_deadline_s, incarnation=self._incarnation
        )
        return ledger, saved["prompt_position"]

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


def _trainable(config: RunConfig, run_dir: Path, calibration: Calibration) -> Trainable:
    settings = config.learner
    device = torch.device("cuda" if settings.on_gpu else "cpu")
    policy = Policy.load(
        run_dir / "sft" / "model", gradient_checkpointing=settings.gradient_checkpointing, dtype=settings.dtype
    ).to(device)
    policy_optimiser = ScheduledAdamW(policy, section=settings.policy, total_steps=settings.steps)
    if settings.advantages not in NEEDS_CRITIC:
        return Trainable(policy=policy, policy_optimiser=policy_optimiser)
    critic = Critic.load(
        run_dir / "rm" / "member_0",
        mean=calibration.mean,
        std=calibration.std,
        vocab_size=policy.vocab_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        dtype=settings.dtype,
    ).to(device)
    return Trainable(
        policy=policy,
        policy_optimiser=policy_optimiser,
        critic=critic,
        critic_optimiser=ScheduledAdamW(critic, section=settings.critic, total_steps=settings.steps),
    )


@torch.no_grad()
def _copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, what: str) -> None:
    if live.keys() != saved.keys() or any(live[name].shape != saved[name].shape for name in live):
        raise CheckpointError(
            f"the checkpoint's {what} does not fit the model",
            got=f"{len(saved)} tensors for {len(live)}; first difference {sorted(live.keys() ^ saved.keys())[:3]}",
            do="resume with the model that the checkpoint was written from",
        )
    for name, tensor in live.items():
        tensor.copy_(saved[name])
