"""The learner's settings, and those of what it is made of: KL control, optimisers, adapters. Units are in the names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from configs.section import Fraction, Section


class FixedKl(Section):
    kind: Literal["fixed"] = "fixed"
    beta: Annotated[float, Field(ge=0.0)] = 0.1


class AdaptiveKl(Section):
    """β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon): Ziegler et al. 2019, with n·0.2/horizon bounded below 1."""

    kind: Literal["adaptive"] = "adaptive"
    beta_init: PositiveFloat = 0.1
    target_nats_per_sequence: PositiveFloat = 3.0
    horizon_samples: PositiveInt = 2000
    beta_min: PositiveFloat = 1e-4
    beta_max: PositiveFloat = 10.0


class ConstrainedKl(Section):
    """β as the Lagrange multiplier of KL ≤ limit, by dual ascent on log β."""

    kind: Literal["constrained"] = "constrained"
    beta_init: PositiveFloat = 0.1
    limit_nats_per_sequence: PositiveFloat = 3.0
    dual_learning_rate: PositiveFloat = 0.05
    beta_min: PositiveFloat = 1e-4
    beta_max: PositiveFloat = 10.0


KlSection = Annotated[FixedKl | AdaptiveKl | ConstrainedKl, Field(discriminator="kind")]


class KlBudget(Section):
    """Scale of the KL target over training: from `start` × target to the whole target over `widen_steps` steps; and
    a bound on the sum over steps of each step's own KL movement."""

    start: Fraction = 1.0
    widen_steps: Annotated[int, Field(ge=0)] = 0
    cumulative_nats_per_sequence: PositiveFloat | None = None
    """Training ends, cleanly, when the summed per-step policy movement passes this. The guard's signal kl_budget_share
    warns beforehand."""


class OptimizerSection(Section):
    learning_rate: PositiveFloat = 2e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    decay: Literal["constant", "linear", "cosine"] = "linear"
    final_fraction: Fraction = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: PositiveFloat = 1.0


class LoraSection(Section):
    """Train low-rank adapters (Hu et al. 2021) in place of the policy's weights. The reference policy is the base model
    with the adapter off."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: tuple[str, ...] = ()
    """Names of linear layers, e.g. q_proj. Empty: all linear layers but the head."""
    broadcast: Literal["merged", "adapter"] = "merged"
    """merged: engines get whole weights with the adapter added in. adapter: engines get the adapter alone, through
    vLLM's LoRA loading: little to send, a little slower to generate with."""


class LearnerSection(Section):
    """The PPO learner. One step trains on `batch_size` rollouts and publishes one new policy version."""

    steps: PositiveInt = 60
    batch_size: PositiveInt = 128
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """Versions that a sample may lag behind the policy it trains. 0: synchronous, on-policy."""
    advantages: Literal["gae", "group_relative", "leave_one_out", "reinforce"] = "gae"
    samples_per_prompt: PositiveInt = 1
    """Group size for group_relative and leave_one_out."""
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    epochs: PositiveInt = 2
    minibatches: PositiveInt = 2
    token_budget: PositiveInt = 8192
    """Most tokens (padding included) in one forward pass; mini-batches are split into micro-batches to fit."""
    clip_epsilon: PositiveFloat = 0.2
    value_clip: PositiveFloat = 0.2
    entropy_bonus: Annotated[float, Field(ge=0.0)] = 0.0
    behaviour_weight_cap: PositiveFloat = 2.0
    max_step_kl_nats_per_token: PositiveFloat = 0.05
    """The update stops early when the new policy has moved this far from the proximal policy."""
    score_clip: PositiveFloat = 5.0
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] = 1.0
    """Subtracted from the normalised score of a truncated answer."""
    length_penalty_per_token: Annotated[float, Field(ge=0.0)] = 0.0
    policy: OptimizerSection = OptimizerSection()
    critic: OptimizerSection = OptimizerSection(learning_rate=5e-4)
    kl: KlSection = AdaptiveKl()
    kl_budget: KlBudget = KlBudget()
    lora: LoraSection | None = None
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward passes. Parameters, gradient reductions and optimiser state are float32."""
    sequence_packing: Literal["auto", "off"] = "auto"
    """auto: where the attention kernel takes sequences of different lengths (GPU), they are packed without padding."""
    optimizer_offload: bool = False
    """Keep parameters' shards, gradients and optimiser state in host memory, and step there. GPU only."""
    ranks: PositiveInt = 1
    """Processes that the learner is sharded over (FSDP2), over nodes if need be; one a GPU where there are GPUs."""
    collective_timeout_s: PositiveFloat = 600.0
    """A rank that waits longer than this for the others counts as lost."""
    start_timeout_s: PositiveFloat = 1800.0
    """For the ranks to meet, and to read the models and the newest checkpoint."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """When a rank dies, all ranks are replaced and go on from the newest checkpoint, so many times in a run."""
    task_deadline_s: PositiveFloat = 120.0
    """A task issued and not scored for so long is issued again."""
    stall_timeout_s: PositiveFloat = 300.0
    """No scored rollout for so long ends the run with an error."""
    threads: PositiveInt = 1
    """Of each rank."""
    cpus_per_rank: PositiveFloat = 1.0
    gpus_per_rank: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0

    @property
    def on_gpu(self) -> bool:
        return self.gpus_per_rank > 0

    @property
    def gpus(self) -> float:
        """Of all ranks."""
        return self.ranks * self.gpus_per_rank

    @property
    def cpus(self) -> float:
        """Of all ranks."""
        return self.ranks * self.cpus_per_rank
