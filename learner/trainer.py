"""What every rank of the learner has: the models, their optimisers and the update's random state, and what is done with
them. With several ranks, all call the same methods in the same order; results are the same on every rank.

Shapes: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cluster.checkpoint_tensors import read_tensors, saved_groups, write_tensors
from cluster.records import ScoredRollout
from cluster.weights import AdapterInfo
from configs.run import RunConfig
from learner.batch import train_batch
from learner.experience import Experience, make_experience
from learner.models import load_trainable
from learner.ranks import Ranks
from learner.sharding import whole_tensor
from learner.update import Trainable, UpdateStats, ppo_update


class Trainer:
    """One a rank."""

    def __init__(self, config: RunConfig, *, run_dir: Path, ranks: Ranks) -> None:
        """Loads the models as the offline stages left them. Raises ModelError."""
        self.ranks = ranks
        self._settings = config.learner
        self._engine_dtype: torch.dtype = getattr(torch, config.rollout.dtype)
        self._trainable: Trainable = load_trainable(config, run_dir=run_dir, ranks=ranks)
        self._rng = torch.Generator().manual_seed(config.seed)
        """Orders the update's rows: in the same state on every rank."""

    @property
    def vocab_size(self) -> int:
        return self._trainable.policy.vocab_size

    @property
    def adapter_info(self) -> AdapterInfo | None:
        """What `weights` are an adapter for; None when they are whole weights."""
        return self._trainable.policy.adapter_info

    def make_experience(self, rollouts: Sequence[ScoredRollout], *, scores_B: Tensor, beta: float) -> Experience:
        """Rewards, values and advantages of a batch with these normalised scores."""
        return make_experience(
            train_batch(rollouts),
            policy=self._trainable.policy,
            critic=self._trainable.critic,
            scores_B=scores_B,
            beta=beta,
            settings=self._settings,
            ranks=self.ranks,
        )

    def update(self, experience: Experience, *, step: int, lr_scale: float = 1.0) -> UpdateStats:
        """Train policy and critic on it, at the learning rates of `step` times `lr_scale`."""
        self._trainable.set_step(step, scale=lr_scale)
        return ppo_update(
            experience, trainable=self._trainable, settings=self._settings, rng=self._rng, ranks=self.ranks
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under their Hugging Face names, whole, in the engines' type (they would round to it all
        the same), gathered one by one as they are asked for. Every rank must take them all."""
        for name, tensor in self._trainable.policy.named_tensors():
            yield name, whole_tensor(tensor).to(self._engine_dtype)

    def probe_logprobs(self, token_ids: Tensor) -> Tensor:
        """[L] ids → [L − 1] log-probabilities: see Policy."""
        return self._trainable.policy.probe_logprobs(token_ids)

    def move_to(self, device: torch.device) -> None:
        """Weights and moments, between host memory and a GPU that others use as well; what a GPU kept for later is
        given back. Shards stay where they are: those of a rank that shares its GPU are in host memory."""
        if self.ranks.mesh is None:
            trainable = self._trainable
            trainable.policy.to(device)
            trainable.policy_optimiser.move_state(device)
            if trainable.critic is not None and trainable.critic_optimiser is not None:
                trainable.critic.to(device)
                trainable.critic_optimiser.move_state(device)
        torch.cuda.empty_cache()  # nothing to do before the GPU's first use

    def save_model(self, directory: Path) -> None:
        """Rank 0 writes the policy as a Hugging Face directory; the others lend their shards."""
        self._trainable.policy.save_pretrained(directory if self.ranks.rank == 0 else None)

    # ------------------------------------------------------------ checkpoints

    def save(self, directory: Path) -> None:
        """Write this rank's shards of everything that a resumed run needs. Raises OSError."""
        write_tensors(directory, self.checkpoint_tensors(), collective=self.ranks.mesh is not None)

    def load(self, directory: Path) -> None:
        """Take over what any number of ranks saved, whatever was here. Raises CheckpointError."""
        saved = saved_groups(directory)
        trainable = self._trainable
        trainable.policy_optimiser.reset_state(zeros="policy_optimiser" in saved)
        if trainable.critic_optimiser is not None:
            trainable.critic_optimiser.reset_state(zeros="critic_optimiser" in saved)
        tensors = self.checkpoint_tensors()
        read_tensors(directory, tensors, collective=self.ranks.mesh is not None)
        self._rng.set_state(tensors["rng"]["update"])

    def checkpoint_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the state, by group and name, as this rank holds it. Live views: save them before the next
        step. Frozen weights are not among them: they are as they were loaded."""
        trainable = self._trainable
        groups = {
            "policy": trainable.policy.checkpoint_tensors(),
            "policy_optimiser": trainable.policy_optimiser.state_tensors(),
            "rng": {"update": self._rng.get_state()},
        }
        if trainable.critic is not None and trainable.critic_optimiser is not None:
            groups["critic"] = dict(trainable.critic.named_tensors())
            groups["critic_optimiser"] = trainable.critic_optimiser.state_tensors()
        return groups
