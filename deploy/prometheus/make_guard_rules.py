"""Writes rules/guard.rules.yml and tests/guard.rules.test.yml beside it: an alert for each signal of the guard.

`python deploy/prometheus/make_guard_rules.py` from the repository's root, after a change here or of a default in
configs/guard.py; a test says when they differ. The numbers are that file's defaults. A run whose own threshold is laxer
is measured by its own; one whose own is stricter has the guard's verdict (KeelGuardWarns, KeelGuardActs) for that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from configs.guard import Above, Below, Thresholds  # noqa: E402

RULES: Final = Path("rules/guard.rules.yml")
CASES: Final = Path("tests/guard.rules.test.yml")
ACT_ELSEWHERE: Final = {
    "proxy_z": "KeelRewardZHigh",
    "kl_nats_per_sequence": "KeelKlHigh",
    "entropy_nats_per_token": "KeelEntropyLow",
}
"""Signals that every run exports, with a guard or without: rules/keel.rules.yml has their alerts for the act level."""
SEVERITIES: Final = {"warn": "warning", "act": "critical"}


@dataclass(frozen=True)
class Watched:
    """`says`: the alert's summary, after "Run NAME: "; `do`: its description, where to look and what to change.
    `series`: where the value comes from, if it is not the learner's keel_guard_signal. `signed`: a value far below 0 is
    as bad as one far above."""

    signal: str
    says: str
    do: str
    series: str = ""
    signed: bool = False

    @property
    def alert(self) -> str:
        return "KeelSignal" + "".join(part.capitalize() for part in self.signal.split("_"))

    @property
    def selector(self) -> str:
        return self.series or f'keel_guard_signal{{signal="{self.signal}"}}'

    @property
    def wait(self) -> str:
        """Measured at intervals, a value stands for long: no need to see whether it stays."""
        return "1m" if self.series else "2m"


VALUE: Final = "{{ $value | humanize }}"
SHARE: Final = "{{ $value | humanizePercentage }}"

WATCHED: Final = (
    Watched("proxy_z", f"mean reward {VALUE} standard deviations over the calibration's",
            "Better than the reward model was calibrated on. Does gold or the judge agree? Read guard_samples.jsonl."),
    Watched("reward_jump", f"the rewards' mean or spread moved by {VALUE} standard deviations in a few steps",
            "A hack was found, or the reward model's scale is another: compare rm_version with the step."),
    Watched("reward_std_ratio", f"the rewards' spread is down to {SHARE} of the calibration's",
            "Nothing is left to learn from: does the reward model live, do all answers read the same?"),
    Watched("score_ceiling_fraction", f"{SHARE} of the answers score over the ceiling",
            "The top of the scale tells no good answer from a better one. Read them; refresh the reward model."),
    Watched("reward_ks", f"rewards lie {VALUE} (Kolmogorov–Smirnov) from the reference's",
            "Hardly any reward that the reference would get is left. Progress or hack: ask the judge."),
    Watched("uncertainty_ratio", f"the ensemble disagrees {VALUE} times as much as on the reference's answers",
            "The policy is where the reward model knows nothing. Refresh it; see reward.uncertain."),
    Watched("kl_nats_per_sequence", f"{VALUE} nats an answer from the reference policy",
            "Close to the limit of 10. Is β at its bound? Lower the KL target or the learning rate."),
    Watched("kl_slope_nats_per_step", f"KL grows by {VALUE} nats a step",
            "At this pace it is far from the reference soon. Raise β, lower the learning rate."),
    Watched("kl_budget_share", f"{SHARE} of the KL budget is spent",
            "The run ends past 100 %. Lower the learning rate, or allow more: --resume with a larger "
            "learner.kl_budget.cumulative_nats_per_sequence goes on."),
    Watched("entropy_nats_per_token", f"{VALUE} nats of entropy a token are left",
            "The policy nears saying one thing only. Raise β or learner.entropy_bonus."),
    Watched("response_tokens_ratio", f"answers are {VALUE} times as long as the reference's",
            "Is length paid for? See length_reward_correlation; set learner.length_penalty_per_token."),
    Watched("length_reward_correlation", f"length and reward correlate by {VALUE}",
            "Length bias. learner.length_penalty_per_token, or pairs of balanced length for the reward model."),
    Watched("length_reward_correlation_within_prompt", f"within a prompt, length and reward correlate by {VALUE}",
            "Length bias, and not the prompts' own lengths. learner.length_penalty_per_token, or balanced pairs."),
    Watched("truncated_fraction", f"{SHARE} of the answers are cut at their token limit",
            "The policy does not end its answers. Raise learner.missing_eos_penalty or data.max_response_tokens."),
    Watched("distinct_bigrams_ratio", f"answers have {SHARE} of the reference's distinct bigrams",
            "They repeat themselves. Raise β; a constitution can flag repetition."),
    Watched("repetition_reward_correlation", f"at equal length, repetition and reward correlate by {VALUE}",
            "Repetition is paid for. A constitution can flag it; pairs with it for the reward model."),
    Watched("longest_repeat_fraction", f"{SHARE} of an answer is one repeated span",
            "They repeat themselves. Raise β; a constitution can flag repetition."),
    Watched("compression_ratio", f"answers compress {VALUE} times as well as the reference's",
            "Repetition, or all answers alike. Raise β or learner.entropy_bonus."),
    Watched("overused_words_share", f"a word stands in {SHARE} more of the answers than of the reference's",
            "metrics.jsonl names it. Is it paid for? Refresh the reward model with such pairs."),
    Watched("overused_words_cusum", f"a word's excess over the reference has come to {VALUE} share · steps",
            "metrics.jsonl names it. It has lasted: refresh the reward model with such pairs, or add a rule."),
    Watched("rare_token_fraction", f"{SHARE} more of the tokens than of the reference's are rare ones",
            "Gibberish or another language. Raise β; read samples."),
    Watched("copied_fraction", f"{SHARE} more of the answers than the reference's hold copied SFT text",
            "The policy recites. Is the SFT data what the reward model was trained on?"),
    Watched("clip_fraction", f"{SHARE} of the tokens are clipped",
            "Updates are larger than PPO trusts. Lower the learning rate or learner.epochs."),
    Watched("ratio_tail_fraction", f"the update more than doubled or halved {SHARE} of the tokens' probabilities",
            "Updates are too large. Lower the learning rate, learner.epochs or learner.max_step_kl_nats_per_token."),
    Watched("behaviour_gap_max_nats", f"engine and learner differ by {VALUE} nats on a token",
            "Stale samples, another precision, or weights that did not arrive: see staleness and weight updates."),
    Watched("value_error_ratio", f"the critic's error is {VALUE} times the returns' variance",
            "Worse than a constant. Lower learner.critic.learning_rate, or do without a critic (learner.advantages)."),
    Watched("grad_norm_ratio", f"the policy's gradient is {VALUE} times its median",
            "One bad batch, or the start of a divergence: look at the step's reward and ratio."),
    Watched("win_rate", f"the judge prefers the policy on at most {SHARE} of the held-out prompts",
            "Upper end of the 95 % interval: training has made it worse. Go back, and refresh the reward model.",
            series="keel_evaluation_win_rate_high"),
    Watched("win_rate_length_controlled", f"at equal length the judge prefers the policy on {SHARE} of the prompts",
            "What was won was won by length. See length_reward_correlation.",
            series="keel_evaluation_win_rate_length_controlled"),
    Watched("rm_judge_agreement", f"reward model and judge agree on {SHARE} of the pairs",
            "The reward model no longer says what the judge says: refresh it (rm.refresh).",
            series="keel_rm_judge_agreement"),
    Watched("anchor_perplexity_ratio", f"held-out SFT text has {VALUE} times the perplexity of the start",
            "The policy forgets what it knew. Raise β.", series="keel_anchor_perplexity_ratio"),
    Watched("canary_ks", f"the canary's rewards lie {VALUE} (Kolmogorov–Smirnov) from the baseline's",
            "Read the canary's answers: progress, or a hack?", series="keel_canary_ks"),
    Watched("canary_z", f"the canary's mean reward moved by {VALUE} standard deviations",
            "Read the canary's answers: progress, or a hack?", series="keel_canary_z", signed=True),
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One signal at one level."""

    watched: Watched
    level: str
    limit: float
    rises: bool
    """Whether values over the limit are the bad ones."""

    @property
    def expr(self) -> list[str]:
        worst, past, within = ("max", ">", "<=") if self.rises else ("min", "<", ">=")
        read = f"abs({self.watched.selector})" if self.watched.signed else self.watched.selector
        value = f"{worst} by (run) ({read})"
        own = f'keel_guard_threshold{{signal="{self.watched.signal}", level="{self.level}"}}'
        return [f"{value} {past} {self.limit:g}", f"unless {value} {within} {worst} by (run) ({own})"]

    @property
    def summary(self) -> str:
        return f"Run {{{{ $labels.run }}}}: {self.watched.says}"

    def beside(self, *, past: bool, by: float = 0.02) -> float:
        """A value just past the limit, or just short of it."""
        outward = by * max(abs(self.limit), 0.1) * (1 if self.rises else -1)
        value = round(self.limit + (outward if past else -outward), 6)
        return -value if self.watched.signed else value


def rules() -> Iterator[Rule]:
    thresholds = Thresholds()
    for watched in WATCHED:
        limits: Above | Below = getattr(thresholds, watched.signal)
        for level, limit in (("warn", limits.warn), ("act", limits.act)):
            if limit is not None and not (level == "act" and watched.signal in ACT_ELSEWHERE):
                yield Rule(watched, level, limit, rises=isinstance(limits, Above))


def rendered_rules() -> str:
    lines = [
        "# An alert for each signal of the guard, at its default thresholds; those of the act level are critical. A",
        "# run with laxer thresholds is measured by its own. Written by ../make_guard_rules.py: change it there.",
        "# Tests: ../tests/guard.rules.test.yml.",
        "",
        "groups:",
        "  - name: keel-signals",
        "    rules:",
    ]
    for rule in rules():
        lines += [
            f"      - alert: {rule.watched.alert}",
            "        expr: >-",
            *(f"          {line}" for line in rule.expr),
            f"        for: {rule.watched.wait}",
            f"        labels: {{severity: {SEVERITIES[rule.level]}}}",
            "        annotations:",
            f'          summary: "{rule.summary}"',
            f'          description: "{rule.watched.do}"',
        ]
    return "\n".join(lines) + "\n"


def rendered_cases() -> str:
    lines = [
        "# promtool test rules deploy/prometheus/tests/guard.rules.test.yml. Written by ../make_guard_rules.py.",
        "#",
        "# From minute 3 on, `bad` is just past the default threshold and `good` just short of it; `lax` is past it",
        "# but within its own, `never` has none, `bare` tells none. `new` has measured nothing yet, nor has another",
        "# rank of `bad`. All alerts of the severity that fire are listed.",
        "",
        "rule_files: [../rules/guard.rules.yml]",
        "evaluation_interval: 1m",
        "",
        "tests:",
    ]
    for rule in rules():
        lines += _case(rule)
    return "\n".join(lines) + "\n"


def _case(rule: Rule) -> list[str]:
    past, short, none = f"{rule.beside(past=True):g}", f"{rule.beside(past=False):g}", "NaN"
    values = {"bad": past, "lax": past, "never": past, "bare": past, "good": short, "new": none}
    lax, never = f"{abs(rule.beside(past=True, by=0.1)):g}", "Inf" if rule.rises else "-Inf"
    own = {"bad": f"{rule.limit:g}", "good": f"{rule.limit:g}", "new": f"{rule.limit:g}", "lax": lax, "never": never}
    alert, severity = rule.watched.alert, SEVERITIES[rule.level]
    firing = f'count by (alertname, run) (ALERTS{{alertstate="firing", severity="{severity}"}})'
    threshold = f'keel_guard_threshold{{signal="{rule.watched.signal}", level="{rule.level}"}}'

    def series(name: str, labels: str, value: str) -> str:
        base, _, others = name.rstrip("}").partition("{")
        selector = f"{base}{{{', '.join(filter(None, (labels, others)))}}}"
        return f"      - {{series: '{selector}', values: '{' '.join(['NaN'] * 3 + [value] * 8)}'}}"

    return [
        f"  - name: {alert}, {severity}",
        "    interval: 1m",
        "    input_series:",
        *(series(rule.watched.selector, f'run="{run}"', value) for run, value in values.items()),
        series(rule.watched.selector, 'run="bad", instance="1.0"', none),
        *(series(threshold, f'run="{run}"', value) for run, value in own.items()),
        "    promql_expr_test:",
        f"      - {{expr: '{firing}', eval_time: 3m, exp_samples: []}}",
        f"      - expr: '{firing}'",
        "        eval_time: 6m",
        "        exp_samples:",
        f"""          - {{labels: '{{alertname="{alert}", run="bad"}}', value: 1}}""",
        f"""          - {{labels: '{{alertname="{alert}", run="bare"}}', value: 1}}""",
    ]


if __name__ == "__main__":
    (HERE / RULES).write_text(rendered_rules(), encoding="utf-8")
    (HERE / CASES).write_text(rendered_cases(), encoding="utf-8")
