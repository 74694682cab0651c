"""What a user may set about rewards: collecting preferences, training and refreshing reward models, the reward service,
people. Re-exported by configs/run.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from configs.section import Fraction, Section

NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class CollectSection(Section):
    """Preference pairs sampled from the SFT policy and labelled by a judge. Skipped where preferences are given."""

    pairs: PositiveInt = 2000
    temperatures: tuple[PositiveFloat, ...] = (1.0,)
    judge: str | None = None
    """"package.module:function": (prompt, answer_a, answer_b, rng) → votes, True where A is preferred: a list, or a
    dict by annotator."""


class RefreshSection(Section):
    """Updating the reward model while the policy trains: fresh pairs of the current policy are judged, the model is
    fine-tuned on them and on old ones, and takes over if it is better on the new and not worse on the old."""

    judge: str | None = None
    """As collect.judge, which it is when left out; or "review": people, by `keel review RUN`."""
    every_versions: PositiveInt | None = 8
    """Refresh after so many policy versions. null: only for the reasons below, or when the guard asks for it."""
    kl_over_nats_per_sequence: PositiveFloat | None = None
    """Refresh when the policy's KL has grown by this much since the last one."""
    disagreement_over: Fraction | None = None
    """Refresh when the reward model and the judge order more than this share of freshly judged pairs differently."""
    probe_every_versions: PositiveInt = 4
    """How often that share is measured,"""
    probe_pairs: PositiveInt = 32
    """on so many pairs. They count to the budget, and train the next refresh."""
    plateau_versions: PositiveInt | None = None
    """Refresh when the mean normalised reward has not risen by plateau_gain over so many versions."""
    plateau_gain: PositiveFloat = 0.05
    wait_after_versions: PositiveInt | None = None
    """Training waits for a refresh that was begun so many policy versions ago (at most learner.stall_timeout_s), so
    that the policy cannot run away from the reward model. null: it never waits; right where people judge."""
    freeze_before_version: NonNegativeInt = 0
    """No refresh before this policy version,"""
    freeze_after_version: PositiveInt | None = None
    """nor after this one."""
    pairs: PositiveInt = 200
    """Pairs judged for a refresh."""
    budget_pairs: PositiveInt = 1500
    """Pairs judged over the whole run."""
    temperatures: tuple[PositiveFloat, ...] = (1.0, 1.2)
    """The two answers of a pair are sampled at these in turn."""
    earlier_fraction: Fraction = 0.3
    """Share of pairs whose other answer is one that an earlier policy gave to the same prompt."""
    old_pairs: PositiveInt = 600
    """Of the original preferences, drawn anew each time, in the mix with the newest fresh pairs"""
    earlier_fresh_pairs: NonNegativeInt | None = 400
    """and so many that earlier versions of the reward model learned from, drawn anew too, from many policy versions.
    null: all of them; a refresh then takes longer and longer."""
    caught_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """At most this share of the mix has an answer that people or rules caught as its rejected side."""
    epochs: PositiveFloat = 2.0
    learning_rate: PositiveFloat = 2e-4
    warmup_fraction: Fraction = 0.1
    held_out_fraction: Fraction = 0.15
    """Of the fresh pairs; never trained on."""
    old_accuracy_margin: Fraction = 0.05
    """The refreshed model is refused when its accuracy on old held-out pairs falls by more than this (on 300 pairs the
    difference of two models has a standard error of about 0.02), or when it is not better on fresh held-out pairs."""
    label_timeout_s: PositiveFloat = 3600.0
    """How long a refresh waits for labels; then it makes do with what people judged, and gives a function up."""
    cpus: PositiveFloat = 0.5
    """That the training process reserves, beside the online roles,"""
    gpus: NonNegativeFloat = 0.0
    threads: PositiveInt = 1


class RmSection(Section):
    """Training of the reward model, offline and online."""

    models: tuple[Path, ...] = ()
    """Trained reward models, taken as they are in place of training: Hugging Face sequence-classification directories
    with one label and the policy's tokenizer. The held-out pairs measure them; those must be new to them."""
    members: PositiveInt = 1
    """Ensemble size; each member has its own seed and split. With `models`: their number, or 1."""
    discriminator: bool = False
    """One more model is trained and kept out of the reward: where it parts from the others, they may be wrong."""
    parallel: PositiveInt = 1
    """Members trained side by side, each in a process of its own."""
    member_leaves_out: Fraction = 0.33
    """Share of the training pairs that each member of an ensemble does not see."""
    epochs: PositiveFloat = 3.0
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 3e-4
    held_out_fraction: Fraction = 0.15
    """Of the prompts."""
    held_out_annotators: Fraction = 0.2
    """Share of annotators, by id, whose votes are kept out of training and measure the model; rounded down, so that it
    takes five for one to be kept out."""
    centering: NonNegativeFloat = 0.01
    """Coefficient of the mean-reward penalty (r_w + r_l)²; keeps scores near 0."""
    margin: NonNegativeFloat = 0.0
    """Largest margin m in −log σ(r_w − r_l − m·(2c − 1)); c is the share of annotators who agree, 1 where unknown."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """ε: (1 − ε)·loss(chosen over rejected) + ε·loss(rejected over chosen), for labels that are wrong that often."""
    rebalance: Literal["none", "stratified", "inverse_frequency"] = "none"
    """Against lopsided data, by which answer is longer and the prompt's topic: draw strata evenly, or weigh pairs."""
    min_accuracy: Fraction = 0.6
    """Held-out accuracy under which the validation card is red,"""
    accept_red: bool = False
    """and `train` refuses the reward model, unless this is true."""
    refresh: RefreshSection | None = None
    """Absent: the reward model stays as it is."""
    threads: PositiveInt = 2

    @property
    def ensemble(self) -> int:
        """Members that there will be."""
        return len(self.models) or self.members


# ---------------------------------------------------------------- reward service


class ModelReward(Section):
    """The reward model."""

    kind: Literal["model"] = "model"
    weight: float = 1.0


class FunctionReward(Section):
    """A Python function, e.g. of an answer that can be checked."""

    kind: Literal["function"] = "function"
    path: str
    """"package.module:function": (prompt, answer) → float, or a coroutine of it."""
    weight: float = 1.0
    timeout_s: PositiveFloat = 10.0


class HttpReward(Section):
    """A reward model behind HTTP: POST {"query": [text…], "prompts": […], "labels": […]} → {"rewards": […]}."""

    kind: Literal["http"] = "http"
    url: str
    weight: float = 1.0
    token_env: str | None = None
    """Environment variable that holds a bearer token."""
    batch_size: PositiveInt = 64
    timeout_s: PositiveFloat = 30.0
    retries: NonNegativeInt = 2
    breaker_failures: PositiveInt = 5
    """After so many failures in a row nothing is asked"""
    breaker_pause_s: PositiveFloat = 10.0
    """for this long; meanwhile its samples wait in the worker, and fail when it stays away for a minute."""


RewardSource = Annotated[ModelReward | FunctionReward | HttpReward, Field(discriminator="kind")]


class RewardSection(Section):
    """The asynchronous reward service."""

    workers: PositiveInt = 1
    batch_size: PositiveInt = 64
    """Most rollouts in a forward pass."""
    token_budget: PositiveInt = 8192
    """Most tokens (padding included) in a forward pass."""
    batch_wait_s: PositiveFloat = 0.05
    """How long a part-filled batch waits for more."""
    aggregation: Literal["mean", "median", "min", "mean_minus_std"] = "mean"
    """Ensemble members → one score."""
    std_coefficient: NonNegativeFloat = 1.0
    """k in mean − k·std."""
    uncertain: Literal["keep", "down_weight", "reject"] = "keep"
    """What becomes of an answer on which the members disagree more than on uncertain_quantile of the calibration set. A
    rejected one is counted, and another prompt takes its place."""
    uncertain_quantile: Fraction = 0.95
    uncertain_weight: Fraction = 0.25
    """Weight of a down-weighted answer in the policy's loss."""
    sources: tuple[RewardSource, ...] = (ModelReward(),)
    """The reward is their weighted sum. Beside others, the model counts in standard deviations from its mean on the
    calibration set, so that a new version does not shift the balance. Without a model no preferences are needed."""
    constitution: Path | None = None
    """Rules in YAML (regex, phrases, length, function) that flag, penalise or override an answer's reward."""
    cache_entries: PositiveInt = 4096
    cache_ttl_s: PositiveFloat = 3600.0
    max_deliveries: PositiveInt = 3
    """After so many failed tries a task is dead-lettered."""
    score_timeout_s: PositiveFloat = 60.0
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Of the weights; int8 is dynamic quantisation of the reward model, CPU only, with a float32 reference model.
    Scores and log-probs are float32 regardless."""
    cpus_per_worker: PositiveFloat = 0.5
    gpus_per_worker: NonNegativeFloat = 0.0
    threads: PositiveInt = 1
    max_restarts: NonNegativeInt = 3

    @property
    def needs_model(self) -> bool:
        """A reward model is among the sources."""
        return any(source.kind == "model" for source in self.sources)


class ReviewSection(Section):
    """People in the loop, by `keel review RUN`."""

    enabled: bool = False
    """Flagged and audited answers go to the review queue."""
    audit_fraction: Fraction = 0.1
    """Share of all answers that people may look at, drawn at random."""
    queue_limit: PositiveInt = 500
    """Most items of a kind that wait for people; past it, new ones are counted and left out."""
    votes: PositiveInt = 1
    """People who judge each item."""
    lease_s: PositiveFloat = 600.0
    """An item shown and not judged goes to somebody else after this long."""
