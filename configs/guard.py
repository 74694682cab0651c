"""The guard's settings: what it looks at, from where on it warns and acts, and what it does then; and what is measured
beside training for it. Units are in the names.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.section import Fraction, Section

GuardAction = Literal["alert", "raise_beta", "lower_lr", "freeze_rm", "refresh_rm", "roll_back", "halt"]


class Above(Section):
    """Values over these warn, or call for action. null: never."""

    warn: float | None = None
    act: float | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.warn is not None and self.act is not None and self.warn > self.act:
            raise ValueError(f"warn ({self.warn:g}) must not lie over act ({self.act:g})")
        return self


class Below(Section):
    """Values under these warn, or call for action. null: never."""

    warn: float | None = None
    act: float | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.warn is not None and self.act is not None and self.warn < self.act:
            raise ValueError(f"warn ({self.warn:g}) must not lie under act ({self.act:g})")
        return self


class Thresholds(Section):
    """One for each signal; learner/guard/ has their formulas. `reference`: answers of the policy before training."""

    # Rewards of the step's batch.
    proxy_z: Above = Above(warn=2.5, act=3.0)
    """Mean reward in standard deviations from the mean of the reward model's calibration."""
    reward_jump: Above = Above(warn=1.5, act=2.5)
    """Change of the rewards' mean or standard deviation since the recent steps, whichever is larger, in the recent
    standard deviation."""
    reward_std_ratio: Below = Below(warn=0.1, act=0.03)
    """Standard deviation of the rewards over that of the calibration: its collapse ends all learning. A policy that has
    learned well comes down to a quarter."""
    score_ceiling_fraction: Above = Above(warn=0.10)
    """Share of answers over `guard.ceiling` on the 0–1 scale."""
    reward_ks: Above = Above(warn=0.95)
    """Kolmogorov–Smirnov distance of the rewards from the reference's."""
    uncertainty_ratio: Above = Above(warn=2.0, act=4.0)
    """Spread between the members of an ensemble over that on the reference's answers."""

    # The policy's movement.
    kl_nats_per_sequence: Above = Above(warn=8.0, act=10.0)
    kl_slope_nats_per_step: Above = Above(warn=1.0)
    """A run that goes well has up to 0.55 in its first steps."""
    kl_budget_share: Above = Above(warn=0.8)
    """Summed movement over learner.kl_budget.cumulative_nats_per_sequence; absent without such a budget. The run ends
    by itself past 1."""
    entropy_nats_per_token: Below = Below(warn=0.12, act=0.1)

    # Length.
    response_tokens_ratio: Above = Above(warn=1.5, act=2.0)
    """Mean length over the reference's."""
    length_reward_correlation: Above = Above(warn=0.6, act=0.8)
    """Spearman's, over the batch."""
    length_reward_correlation_within_prompt: Above = Above(warn=0.6, act=0.8)
    """The same with each prompt's own mean taken out; absent where no prompt has several answers."""
    truncated_fraction: Above = Above(warn=0.2, act=0.5)

    # What the answers say.
    distinct_bigrams_ratio: Below = Below(warn=0.8, act=0.7)
    """Distinct bigrams among an answer's bigrams, over the reference's."""
    repetition_reward_correlation: Above = Above(warn=0.8)
    """Spearman's rank correlation of repeated pairs of tokens and reward, at equal length. Thorough answers say some
    pairs again, so a good reward model comes to 0.6 on the test bed."""
    longest_repeat_fraction: Above = Above(warn=0.22, act=0.3)
    """Mean share of an answer that its longest repeated span takes up."""
    compression_ratio: Above = Above(warn=1.25, act=1.6)
    """How much better each answer compresses than as many bytes of the reference's answers."""
    overused_words_share: Above = Above(warn=0.02)
    """Largest share of answers by which a significantly over-used word exceeds the reference's."""
    overused_words_cusum: Above = Above(warn=0.1, act=0.25)
    """What of that share lies over 0.05, summed up since it last did not: five steps at 10 %, or one at 30 %."""
    rare_token_fraction: Above = Above(warn=0.05, act=0.15)
    """Tokens that the reference hardly ever uses."""
    copied_fraction: Above = Above(warn=0.5)
    """Answers with a long span that stands word for word in the SFT data, in excess of the reference's share."""

    # The update's health.
    clip_fraction: Above = Above(warn=0.4, act=0.6)
    ratio_tail_fraction: Above = Above(warn=0.05, act=0.2)
    """Tokens whose probability the update changed by more than a factor of two."""
    behaviour_gap_max_nats: Above = Above(warn=12.0)
    """Largest difference between the engine's log-probability of a token and the learner's. Where samples may be stale
    it is also the policy's own movement: with max_staleness 1, up to 7 in a run that goes well. With 0, set 0.5."""
    value_error_ratio: Above = Above(warn=1.5)
    """Mean squared error of the values over the variance of the returns; 1 is no better than their mean."""
    grad_norm_ratio: Above = Above(warn=5.0, act=20.0)
    """The policy's gradient norm over its median so far."""

    # Measured beside training, at intervals: evaluation and canary.
    win_rate: Below = Below(warn=0.5, act=0.4)
    """Against the reference, by the judge; the upper end of its 95 % interval has to lie below."""
    win_rate_length_controlled: Below = Below(warn=0.45)
    rm_judge_agreement: Below = Below(warn=0.6, act=0.5)
    anchor_perplexity_ratio: Above = Above(warn=1.5, act=3.0)
    """Perplexity of held-out SFT text over that before training: what the policy forgets."""
    canary_ks: Above = Above(warn=0.95)
    canary_z: Above = Above(warn=3.0)
    """Shift of the mean reward on the fixed prompts, in standard deviations of the baseline."""


class CanarySection(Section):
    """A fixed set of prompts, answered at the start and again at intervals."""

    prompts: PositiveInt = 64


class WatchSection(Section):
    """Evaluation while training goes on: the policy's answers to held-out prompts against the reference's."""

    every_versions: PositiveInt = 10
    prompts: PositiveInt = 64
    """At most evaluation.prompts: the reference's answers are those of the evaluation at the start."""
    judge: str | None = None
    """As collect.judge, which it is when left out: who prefers which answer. "review": pairs go to people, by `keel
    review RUN`, and their win rate is apart (win_rate_people). No judge: no win rate."""
    anchor_texts: NonNegativeInt = 64
    """Held-out SFT texts whose perplexity is followed."""
    canary: CanarySection | None = CanarySection()
    timeout_s: PositiveFloat = 600.0


class GuardSection(Section):
    """Signals → verdict → actions."""

    enabled: bool = True
    thresholds: Thresholds = Thresholds()
    ceiling: Fraction = 0.8
    """On the scale where 0 is four standard deviations under the calibration's mean, and 1 four over it."""
    warmup_steps: NonNegativeInt = 2
    """No verdict in these: running baselines fill up."""
    patience_steps: PositiveInt = 3
    """So many steps in a row over a threshold raise the level; as many back within it lower it again."""
    patience_measurements: PositiveInt = 2
    """The same for what is measured at intervals, counted in measurements."""
    hysteresis: Fraction = 0.1
    """Back within means: by this fraction of the threshold."""
    cool_down_steps: NonNegativeInt = 10
    """After an action no other is taken for so long: it has to show its effect."""
    actions: tuple[GuardAction, ...] = ("alert", "raise_beta", "roll_back")
    """Taken together when the verdict is to act. warn only ever alerts; without `alert` nobody is told. A rollback
    comes first, so that the others change what it restored."""
    beta_factor: Annotated[float, Field(ge=1.0)] = 2.0
    """raise_beta: β is multiplied by this,"""
    beta_floor: PositiveFloat = 0.05
    """and is at least so much then. With a further rollback before there is a new good checkpoint, both are multiplied
    by the factor once more: the checkpoint brings back the β of before."""
    learning_rate_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """lower_lr; further rollbacks as for β."""
    freeze_versions: PositiveInt = 20
    """freeze_rm: no refresh of the reward model for so many versions."""
    max_rollbacks: NonNegativeInt = 3
    """When another one would be due, the run halts, with a diagnosis."""
    keep_good: PositiveInt = 3
    """Good checkpoints that are kept, newest first, beside the one of the start. Good: the guard had nothing to say,
    and the last evaluation was passed."""
    webhook: str | None = None
    """URL that gets each alert, warning or action as a JSON POST: keel/online/guard_actions.py."""
    webhook_timeout_s: PositiveFloat = 5.0
    watch: WatchSection | None = None
    """null: nothing is measured beside training."""

    @model_validator(mode="after")
    def _actions_that_go_together(self) -> Self:
        actions = set(self.actions)
        if len(actions) < len(self.actions):
            raise ValueError(f"actions: {', '.join(self.actions)}: each at most once")
        if "halt" in actions and actions - {"halt", "alert"}:
            raise ValueError(
                "actions: halt ends the run at once, so that no other action but alert has an effect. After roll_back "
                "it comes by itself, when max_rollbacks are spent"
            )
        if {"freeze_rm", "refresh_rm"} <= actions:
            raise ValueError("actions: freeze_rm and refresh_rm: choose one")
        return self

    @field_validator("webhook")
    @classmethod
    def _is_a_web_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            right = False
        if not right:
            raise ValueError("write http://… or https://…")
        return url
