"""Which method fits: RLHF, DPO, rules or SFT, with the reasons and what would change the answer.

Pure: an audit (or none) and a few answers in, advice out. Reasons are weighed in a fixed order, the strongest first;
the first that settles the matter decides, the others are named too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from reward_service.audit.annotators import BAD_AGREEMENT
from reward_service.audit.audit import OVERFITS
from reward_service.audit.leakage import BAD_LENGTH
from reward_service.audit.records import Audit

Method = Literal["rlhf", "dpo", "rules", "sft", "nothing"]

ALREADY_GOOD: Final = 0.95
"""Baseline over which there is little to win."""
FEWEST_PAIRS: Final = 500
"""Under this no method learns from preferences."""
SHORT_LATENCY_MS: Final = 200.0
"""Under this time for an answer there is room for one short pass of a small model."""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What a person says of the task; None: not known.

    `factual`: answers are right or wrong, and people judge by looking them up. `verifiable`: a program can check an
    answer (tests pass, the number is right). `baseline`: share of answers that are good already. `latency_ms`: most
    time for an answer.
    """

    factual: bool | None = None
    verifiable: bool | None = None
    baseline: float | None = None
    latency_ms: float | None = None


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """`reasons`: for the decision, the one that settled it first. `also`: what else to keep in mind. `would_change`:
    what would lead to another decision. `next_steps`: Keel's commands and configuration lines."""

    method: Method
    title: str
    reasons: tuple[str, ...]
    also: tuple[str, ...] = ()
    would_change: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Facts:
    """What the rules look at."""

    answers: Answers
    pairs: int | None
    agreement: float | None
    length_only: float | None
    strongest_cue: float | None
    unclear: float | None

    @property
    def leak(self) -> str | None:
        """The shortcut to the label, in words."""
        if self.length_only is not None and self.length_only > BAD_LENGTH:
            return f"length alone tells {self.length_only:.0%} of the pairs right"
        if self.strongest_cue is not None and self.strongest_cue > BAD_LENGTH:
            return f"one word alone tells {self.strongest_cue:.0%} of the pairs right"
        return None


def advise(audit: Audit | None, answers: Answers) -> Advice:
    """Advice on `answers` and on the audited preferences, where there are some."""
    facts = _facts(audit, answers)
    fired = [(method, reason) for rule in _RULES if (found := rule(facts)) is not None for method, reason in [found]]
    method, _ = fired[0] if fired else ("rlhf", "")
    agreeing = [reason for other, reason in fired if other == method]
    reasons = agreeing or _for_rlhf(facts)
    also = [
        f"{reason.rstrip('.')} (this alone would speak for {_NAMES[other]})."
        for other, reason in fired
        if other != method
    ]
    return Advice(
        method=method,
        title=_TITLES[method],
        reasons=tuple(reasons),
        also=(*also, *_cautions(facts, method)),
        would_change=tuple(_would_change(facts, method)),
        next_steps=_NEXT[method],
    )


def _facts(audit: Audit | None, answers: Answers) -> _Facts:
    def number(name: str, key: str) -> float | None:
        return None if audit is None else audit.number(name, key)

    return _Facts(
        answers=answers,
        pairs=None if audit is None else audit.pairs,
        agreement=number("agreement", "pairwise"),
        length_only=number("length_only", "accuracy"),
        strongest_cue=number("cues", "strongest_accuracy"),
        unclear=number("confidence", "unclear"),
    )


# ---------------------------------------------------------------- rules, strongest first

_Rule = Callable[[_Facts], tuple[Method, str] | None]


def _already_good(facts: _Facts) -> tuple[Method, str] | None:
    baseline = facts.answers.baseline
    if baseline is None or baseline <= ALREADY_GOOD:
        return None
    return "nothing", f"{baseline:.0%} of the answers are good already: reward models err more often than that."


def _checkable(facts: _Facts) -> tuple[Method, str] | None:
    if not facts.answers.verifiable:
        return None
    return (
        "rules",
        "a program can check the answers: that is a reward without annotators' errors, and cannot be flattered.",
    )


def _facts_to_look_up(facts: _Facts) -> tuple[Method, str] | None:
    if not facts.answers.factual or facts.answers.verifiable:
        return None
    return (
        "sft",
        "the task is factual: preferences reward what sounds right, and a policy learns to sound sure. Right answers "
        "to imitate, or documents to look things up in, teach facts.",
    )


def _no_agreement(facts: _Facts) -> tuple[Method, str] | None:
    if facts.agreement is None or facts.agreement >= BAD_AGREEMENT:
        return None
    return (
        "sft",
        f"two annotators agree on {facts.agreement:.0%} of the pairs (under {BAD_AGREEMENT:.0%}): a reward model "
        "would learn their noise. Demonstrations by people who know the task are clearer.",
    )


def _too_little_for_anything(facts: _Facts) -> tuple[Method, str] | None:
    if facts.pairs is not None and facts.pairs >= FEWEST_PAIRS:
        return None
    if facts.pairs is None:
        return "sft", "there are no preferences yet: start from demonstrations, and collect comparisons of its answers."
    return (
        "sft",
        f"{facts.pairs:,} pairs are too few (under {FEWEST_PAIRS:,}): their chosen answers serve better as "
        "demonstrations.",
    )


def _leaky(facts: _Facts) -> tuple[Method, str] | None:
    if facts.leak is None:
        return None
    return (
        "dpo",
        f"{facts.leak}: PPO would find that shortcut and drive it to the end; DPO, which never samples, goes less far. "
        "Repair the data first (keel data build --rebalance).",
    )


def _short_of_pairs(facts: _Facts) -> tuple[Method, str] | None:
    if facts.pairs is None or facts.pairs >= OVERFITS:
        return None
    return (
        "dpo",
        f"{facts.pairs:,} pairs (under {OVERFITS:,}): a reward model learns them by heart, and PPO would exploit its "
        "errors. DPO trains on the pairs themselves.",
    )


_RULES: Final[Sequence[_Rule]] = (
    _already_good, _checkable, _facts_to_look_up, _no_agreement, _too_little_for_anything, _leaky, _short_of_pairs,
)  # fmt: skip


def _for_rlhf(facts: _Facts) -> list[str]:
    reasons = [f"{facts.pairs:,} pairs are enough for a reward model."] if facts.pairs is not None else []
    if facts.agreement is not None:
        reasons.append(f"two annotators agree on {facts.agreement:.0%} of the pairs.")
    reasons.append(
        "quality here is a matter of judgement that no program checks, and no shortcut gives the labels away."
    )
    return reasons


# ---------------------------------------------------------------- words

_NAMES: Final[dict[Method, str]] = {
    "rlhf": "RLHF", "dpo": "DPO", "rules": "rules as reward", "sft": "SFT", "nothing": "leaving it as it is",
}  # fmt: skip
_TITLES: Final[dict[Method, str]] = {
    "rlhf": "RLHF: a reward model from the preferences, then PPO",
    "dpo": "DPO: train on the pairs themselves, without a reward model",
    "rules": "Rules: a function as reward, then PPO",
    "sft": "SFT: imitate good answers",
    "nothing": "No reinforcement learning: the model is good enough",
}
_NEXT: Final[dict[Method, tuple[str, ...]]] = {
    "rlhf": (
        "keel data build PREFERENCES --out pairs.jsonl",
        "data: {preferences: {kind: file, path: pairs.jsonl}}",
        "rm: {members: 3}",
        "reward: {aggregation: mean_minus_std}",
        "keel train CONFIG",
    ),
    "dpo": (
        "keel data build PREFERENCES --out pairs.jsonl --rebalance stratified",
        "data: {preferences: {kind: file, path: pairs.jsonl}}",
        "keel dpo CONFIG",
    ),
    "rules": (
        "reward: {sources: [{kind: function, path: my_package.rewards:score}]}    # (prompt, answer) -> float",
        "reward: {constitution: rules.yaml}    # what must never be said",
        "keel rules rules.yaml --try 'an answer'",
        "keel train CONFIG",
    ),
    "sft": (
        "data: {sft: {kind: file, path: demonstrations.jsonl}}",
        "keel sft CONFIG",
        "keel data audit PREFERENCES    # again, when there are more",
    ),
    "nothing": (
        "reward: {constitution: rules.yaml}    # where single answers must be caught",
        "keel generate MODEL --best-of 8    # better answers from the model that there is",
    ),
}


def _cautions(facts: _Facts, method: Method) -> list[str]:
    said: list[str] = []
    latency = facts.answers.latency_ms
    if latency is not None and latency < SHORT_LATENCY_MS:
        said.append(
            f"{latency:g} ms for an answer leave no room for best-of-n or a second model: the policy itself must be "
            "small. Train it with the same method, or distil a larger one by SFT."
        )
    elif latency is not None and method in ("rlhf", "dpo", "nothing"):
        said.append("There is time for best-of-n with a reward model: try `keel generate --best-of 8` before training.")
    if method == "rlhf" and facts.unclear is not None and facts.unclear > 0.2:
        said.append(f"{facts.unclear:.0%} of the judged pairs have no clear majority: ask more annotators for each.")
    if facts.pairs is not None and facts.agreement is None and method in ("rlhf", "dpo"):
        said.append("Annotators are not named in the data, so nobody knows how far they agree: have some pairs judged "
                    "several times.")  # fmt: skip
    if method == "rlhf" and facts.pairs is not None and facts.pairs < 2 * OVERFITS:
        said.append("Under 10,000 pairs keep the KL target low and refresh the reward model (rm.refresh).")
    return said


def _would_change(facts: _Facts, method: Method) -> list[str]:
    said: list[str] = []
    if method in ("dpo", "sft") and (facts.pairs is None or facts.pairs < OVERFITS):
        said.append(f"{OVERFITS:,} clear pairs or more: RLHF.")
    if method == "dpo" and facts.leak is None:
        said.append("A judge, or people, for fresh pairs while the policy trains (rm.refresh): RLHF from fewer pairs.")
    if method == "sft" and facts.agreement is not None and facts.agreement < BAD_AGREEMENT:
        said.append(f"Clearer guidelines and agreement over {BAD_AGREEMENT:.0%}: DPO or RLHF.")
    if method == "dpo" and facts.leak is not None:
        said.append(f"Pairs in which no shortcut tells over {BAD_LENGTH:.0%} of the labels: RLHF.")
    if method in ("rlhf", "dpo", "sft") and not facts.answers.verifiable:
        said.append("A program that checks answers: rules as reward.")
    if method != "nothing":
        said.append(f"A baseline over {ALREADY_GOOD:.0%}: nothing needs training.")
    if method == "rlhf":
        said.append(f"Agreement under {BAD_AGREEMENT:.0%}, or a word or length that tells the label: SFT or DPO.")
    if method == "rules":
        said.append("If the check covers a part of quality only: a reward model beside it "
                    "(reward.sources: [{kind: function, …}, {kind: model}]).")  # fmt: skip
    if method == "nothing":
        said.append("A harder set of prompts, on which the baseline is lower: measure there.")
    return said
