"""Which charts the report has, and how each is to be read. Drawn by keel/plots.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keel.plots import Chart, Series


@dataclass(frozen=True)
class ChartGroup:
    """`name` is a heading; the question that its charts answer."""

    name: str
    charts: tuple[Chart, ...]


def _evaluated(key: str, name: str, style: str = "-", *, low: str | None = None, high: str | None = None) -> Series:
    return Series(key, name, style, of="evaluations", low=low, high=high)


OVEROPTIMISATION_TITLE: Final = "Over-optimisation: what is wanted against distance"
OVEROPTIMISATION_CAPTION: Final = (
    "The policy starts at the left; each dot is a step. Good: it climbs and levels off. Bad: it turns and falls while "
    "the distance still grows, so more training buys less. A cross is where the guard rolled back, the dashed "
    "arrow leads to where it went on. (Axes of Gao et al. 2022.)"
)
_GAIN: Final = (
    Chart(
        "Reward against what is wanted", "reward, z",
        (Series("proxy_z", "reward (proxy, z)"),),
        "Blue: what the reward model says, in standard deviations from its calibration. Green: what is really wanted. "
        "Good: both rise. Bad: blue rises while green stands still or falls: the policy fools its reward model.",
        right=(Series("gold_mean", "gold"), _evaluated("win_rate", "win rate"), _evaluated("gold", "gold")),
        limit="proxy_z",
    ),
    Chart(
        "Win rate against the start", "share of held-out prompts",
        (_evaluated("win_rate", "win rate", low="win_rate_low", high="win_rate_high"),
         _evaluated("win_rate_length_controlled", "at equal length", "--"),
         _evaluated("win_rate_people", "by people", ":", low="win_rate_people_low", high="win_rate_people_high")),
        "How often the judge prefers the policy's answer to the reference's; bars are 95 % intervals. Bad: a whole bar "
        "under one half. A dashed curve far under the whole one: it wins by length.",
        even=0.5, limit="win_rate",
    ),
    Chart(
        "Gold on held-out prompts", "points",
        (_evaluated("gold", "policy"), _evaluated("gold_reference", "reference", "--")),
        "The same, by the gold reward that training never sees. Bad: under the dashed line.",
    ),
    Chart(
        "Reward model against judge", "agreement",
        (_evaluated("rm_judge_agreement", "agreement"),),
        "On how many pairs both prefer the same answer. One half is a coin. Falling: the policy has moved to where the "
        "reward model knows nothing; refresh it.",
        even=0.5, limit="rm_judge_agreement",
    ),
    Chart(
        "What is forgotten", "ratio to the start",
        (_evaluated("anchor_perplexity_ratio", "perplexity of held-out SFT text"),),
        "Perplexity of text that the policy once knew, over that before training. 1 is nothing lost. Rising fast: it "
        "unlearns its language.",
        even=1.0, limit="anchor_perplexity_ratio",
    ),
    Chart(
        "Canary", "KS distance",
        (_evaluated("canary_ks", "KS distance"),),
        "Rewards on a fixed set of prompts against those at the start. It rises as the policy learns; a jump between "
        "two measurements is a change that no single step explains.",
        right=(_evaluated("canary_z", "shift of the mean"),), right_unit="standard deviations", limit="canary_ks",
    ),
)  # fmt: skip
_MOVEMENT: Final = (
    Chart(
        "KL to the SFT policy", "nats per sequence",
        (Series("kl_nats_per_sequence", "KL"), Series("kl_target_nats_per_sequence", "target", "--")),
        "How far the policy is from where it started. Good: it settles at the dashed target, where there is one. Bad: "
        "it grows at a constant or rising pace.",
        limit="kl_nats_per_sequence",
    ),
    Chart(
        "KL budget spent", "nats per sequence",
        (Series("kl_cumulative_nats_per_sequence", "sum of the steps' own movement"),),
        "Each step's own movement, summed. A straight line is a steady pace; a bend upward: larger steps.",
    ),
    Chart(
        "KL coefficient β", "reward per nat",
        (Series("beta", "β"),),
        "The price of distance. An adaptive one rises while KL is over its target. A jump at a red line: the guard "
        "raised it. Bad: it climbs and KL climbs with it: the reward outbids the price.",
    ),
    Chart(
        "Entropy", "nats per token",
        (Series("entropy_nats_per_token", "entropy"),),
        "How open the policy is about its next token. A slow fall is learning. Near 0 it says one thing only, and "
        "there is nothing left to learn from.",
        limit="entropy_nats_per_token",
    ),
)  # fmt: skip
_ANSWERS: Final = (
    Chart(
        "Answer length", "tokens",
        (Series("response_tokens_mean", "mean length"),),
        "Blue: mean length. Green: share cut off at the limit. Bad: length that rises with the reward and not with "
        "gold; a rising share that never ends.",
        right=(Series("truncated_fraction", "truncated"),), right_unit="share",
    ),
    Chart(
        "Length and reward", "Spearman's ρ",
        (Series("signals.length_reward_correlation", "over the batch"),
         Series("signals.length_reward_correlation_within_prompt", "within a prompt", "--")),
        "Whether longer answers are paid better. About 0 is good. Over 0.6, and rising: the reward model pays for "
        "length itself.",
        even=0.0, limit="length_reward_correlation",
    ),
    Chart(
        "Over-used words", "share of answers",
        (Series("signals.overused_words_share", "in excess of the reference"),),
        "Blue: the largest share of answers that a significantly over-used word adds to the reference's. 0 is good. "
        "Green: what of it lies over 5 %, summed up: it rises while a word stays. Which words: see the answers, where "
        "they are marked.",
        right=(Series("signals.overused_words_cusum", "summed up"),), right_unit="share · steps",
        limit="overused_words_share",
    ),
    Chart(
        "Repetition", "ratio, share",
        (Series("signals.distinct_bigrams_ratio", "distinct bigrams"),
         Series("signals.longest_repeat_fraction", "longest repeat", "--")),
        "Distinct bigrams, over the reference's, and the share of an answer that its longest repeat takes up. Near 1 "
        "and small is good. Bad: the curves come near each other: answers repeat themselves.",
    ),
    Chart(
        "Spread of the rewards", "ratio, share",
        (Series("signals.reward_std_ratio", "std, to the calibration's"),
         Series("signals.score_ceiling_fraction", "share over the ceiling", "--")),
        "Learning needs differences: a spread that goes to 0 ends it. Many answers over the ceiling: the reward model "
        "is saturated, or fooled.",
        limit="reward_std_ratio",
    ),
)  # fmt: skip
_UPDATE: Final = (
    Chart(
        "Shares of the update", "share of tokens",
        (Series("clip_fraction", "clipped"), Series("signals.ratio_tail_fraction", "moved more than ×2", "--")),
        "Tokens whose update was clipped. Up to 0.2 is usual. Bad: over 0.4: the learning rate or the number of epochs "
        "is too large.",
        limit="clip_fraction",
    ),
    Chart(
        "Critic", "explained variance",
        (Series("value_explained_variance", "explained variance"),),
        "1: the critic foresees the returns; 0: no better than their mean. Bad: negative for long.",
        even=0.0,
    ),
    Chart(
        "Gradient norm", "norm",
        (Series("grad_norm_policy", "policy"), Series("grad_norm_critic", "critic", "--")),
        "Single spikes are usual. A level that keeps rising comes before divergence.",
    ),
    Chart(
        "Engine against learner", "nats",
        (Series("behaviour_gap_max_nats", "largest gap of a token"),),
        "The engine's log-probability of a token against the learner's. It grows with staleness. Large at staleness 0: "
        "the two compute different things.",
        limit="behaviour_gap_max_nats",
    ),
)  # fmt: skip
_MACHINE: Final = (
    Chart(
        "Throughput", "tokens per second",
        (Series("tokens_per_second_rollout", "rollout"),),
        "Tokens of answers trained a second. A fall: fewer actors, longer waits, or a refresh that takes the machine.",
    ),
    Chart(
        "Time of a step", "seconds",
        (Series("step_seconds", "step"), Series("idle_seconds", "waiting for samples", "--")),
        "Where both curves meet, the learner waits: more actors would help. Far apart, it is the bottleneck.",
    ),
    Chart(
        "Staleness", "versions",
        (Series("staleness_mean", "mean"),),
        "How many versions old the samples are. It may not pass learner.max_staleness.",
    ),
    Chart(
        "Samples that did not train", "samples so far",
        (Series("samples_stale_dropped", "stale"), Series("samples_abandoned", "abandoned", "--"),
         Series("samples_dead", "dead", ":"), Series("samples_rejected", "rejected", "-.")),
        "Each is replaced. Abandoned: in flight at a rollback. Dead: failed again and again; "
        "the logs say why.",
    ),
)  # fmt: skip
GROUPS: Final = (
    ChartGroup("Is it better, or only better scored?", _GAIN),
    ChartGroup("How far has the policy moved?", _MOVEMENT),
    ChartGroup("What the answers look like", _ANSWERS),
    ChartGroup("The update's health", _UPDATE),
    ChartGroup("The machine", _MACHINE),
)
