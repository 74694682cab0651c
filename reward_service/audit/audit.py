"""The audit of preference data, before a reward model learns from it: what could be learned in place of quality, what
is noise, what is missing. Every finding says what it means and what to do.

Reads nothing and writes nothing: pairs in, an Audit out. Deterministic from `seed`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.data_records import PreferencePair, Prompt, stable_prompt_id
from cluster.errors import DataError
from cluster.preference_table import Vote
from cluster.ratings import Rating
from reward_service.audit.agreement import votes_of
from reward_service.audit.annotators import annotators_of
from reward_service.audit.balance import rebalanced, topic_balance, topic_strata
from reward_service.audit.cues import Cue, lexical_cues
from reward_service.audit.duplicates import duplicates, prompt_overlap
from reward_service.audit.leakage import Shown, leakage, order_only
from reward_service.audit.lengths import (
    histogram,
    length_balance,
    length_bias,
    length_strata,
    length_unit,
    lengths_of,
    longer_preferred,
)
from reward_service.audit.rebalance import How
from reward_service.audit.records import Audit, Finding, Level, Number

OVERFITS: Final = 5_000
"""Fewer pairs: a reward model learns them by heart."""
FEW: Final = 10_000
MAX_CUE_PAIRS: Final = 20_000
"""Cues are sought in a random sample of so many pairs."""
_PROBLEMS_SHOWN: Final = 5
MAX_CUES: Final = 100
WARN_CUE: Final = 0.53
"""Accuracy of a judge who knows one term alone over which it warns,"""
BAD_CUE: Final = 0.60
BARE: Final = 0.7
"""A majority of fewer votes is a bare one."""
WARN_BARE: Final = 0.5
"""Share of such pairs that warns."""
WARN_UNCLEAR: Final = 0.2
"""Share of judged pairs without a clear majority that warns."""


@dataclass(frozen=True)
class Records:
    """How the data was read. `refused`: reason → count, of records or of pairs that they would give. `problems`: the
    malformed ones, each with its line."""

    read: int
    refused: Mapping[str, int]
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Around:
    """What is known besides the pairs with a clear label; what is empty is not looked at.

    `unclear`: judged pairs without a clear majority. `votes`: left out, those that the pairs carry. `shown`:
    comparisons in the order they were recorded in, where that is not the order of preference. `rebalance`: what it
    would do is told too.
    """

    unclear: Sequence[PreferencePair] = ()
    votes: Sequence[Vote] = ()
    ratings: Sequence[Rating] = ()
    records: Records | None = None
    shown: Shown = ()
    sft_prompts: Sequence[Prompt] = ()
    rl_prompts: Sequence[Prompt] = ()
    rebalance: How = "none"


def audit(pairs: Sequence[PreferencePair], *, around: Around | None = None, source: str = "", seed: int = 0) -> Audit:
    """All findings, in the order in which a person should read them. Raises DataError without a pair."""
    if not pairs:
        raise DataError("nothing to audit", got=f"no usable pair in {source or 'the data'}", do="check the column map")
    around = around or Around()
    unit = length_unit(pairs)
    lengths = lengths_of(pairs, unit=unit)
    strata = length_strata(lengths)
    longer = longer_preferred(lengths)
    topics = topic_strata(pairs, lengths, seed=seed)
    cues = lexical_cues(_sample(pairs, seed=seed), limit=MAX_CUES)
    judged = [*pairs, *around.unclear]
    people = annotators_of(judged, votes=around.votes or votes_of(judged), ratings=around.ratings, unit=unit)
    findings = [
        *([] if around.records is None else [records(around.records, pairs=len(pairs))]),
        size(pairs),
        *people.findings,
        *confidence(pairs, unclear=len(around.unclear)),
        length_bias(lengths, unit=unit),
        lexical(cues),
        *leakage(pairs, lengths, seed=seed),
        length_balance(strata),
        *topic_balance(topics, longer_chosen=None if longer is None else longer.share),
        *duplicates(pairs),
    ]
    if around.rebalance != "none":
        findings.append(rebalanced(pairs, lengths, how=around.rebalance, seed=seed))
    by_order = order_only(around.shown) if around.shown else None
    if by_order is not None:
        findings.append(by_order)
    if around.sft_prompts and around.rl_prompts:
        findings.append(prompt_overlap(around.sft_prompts, around.rl_prompts))
    return Audit(
        source=source,
        pairs=len(pairs),
        unclear=len(around.unclear),
        refused=dict(around.records.refused if around.records is not None else {}),
        findings=tuple(findings),
        cues=tuple(cues),
        annotators=people.facts,
        annotator_cues=people.cues[:MAX_CUES],
        lengths=histogram(lengths, unit=unit),
        length_strata=tuple(strata),
        topics=tuple(topics),
    )


# ---------------------------------------------------------------- amount and clarity


def records(read: Records, *, pairs: int) -> Finding:
    """What became of the records."""
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(read.refused.items()))
    shown = "; ".join(read.problems[:_PROBLEMS_SHOWN])
    malformed = len(read.problems)
    return Finding(
        name="records",
        level="warn" if malformed else "ok",
        value=f"{read.read:,} records gave {pairs:,} pairs with a clear label; {reasons or 'none refused'}"
        + (f". {shown}{'; …' if malformed > _PROBLEMS_SHOWN else ''}" if malformed else ""),
        numbers={"records": read.read, "pairs": pairs, "malformed": malformed},
        meaning=f"{malformed:,} malformed; they could be repaired." if malformed else "Every record is accounted for.",
        advice="Repair the lines named, or build without them: keel data build." if malformed else "",
    )


def size(pairs: Sequence[PreferencePair]) -> Finding:
    """How many pairs, on how many prompts."""
    prompts = len({stable_prompt_id(pair.prompt) for pair in pairs})
    level: Level = "bad" if len(pairs) < OVERFITS else "warn" if len(pairs) < FEW else "ok"
    if level == "bad":
        meaning = f"Under {OVERFITS:,} pairs a reward model learns the answers by heart and judges new ones poorly."
    elif level == "warn":
        meaning = f"Under {FEW:,} pairs a reward model still errs much on what it has not seen."
    else:
        meaning = "Enough to learn from."
    return Finding(
        name="size",
        level=level,
        value=f"{len(pairs):,} pairs on {prompts:,} prompts",
        numbers={"pairs": len(pairs), "prompts": prompts},
        meaning=meaning,
        advice="Collect more; until then an ensemble (rm.members: 3, reward.aggregation: mean_minus_std), fresh pairs "
        "while the policy trains (rm.refresh), or DPO." if level != "ok" else "",
    )  # fmt: skip


def confidence(pairs: Sequence[PreferencePair], *, unclear: int) -> list[Finding]:
    """How clear the majorities are; nothing where votes are not known."""
    known = [pair.confidence for pair in pairs if pair.confidence is not None]
    if not known:
        return []
    bare = sum(one < BARE for one in known) / len(known)
    unanimous = sum(one >= 1.0 for one in known) / len(known)
    judged = len(pairs) + unclear
    numbers: dict[str, Number] = {
        "mean": sum(known) / len(known), "bare": bare, "unanimous": unanimous, "unclear": unclear / judged,
    }  # fmt: skip
    warns = bare > WARN_BARE or unclear / judged > WARN_UNCLEAR
    return [
        Finding(
            name="confidence",
            level="warn" if warns else "ok",
            value=f"{unanimous:.0%} unanimous, {bare:.0%} by a bare majority; {unclear:,} of {judged:,} judged pairs "
            "without a clear one",
            numbers=numbers,
            meaning="Many labels could as well be the other way round." if warns else "Most labels are clear.",
            advice="Ask more annotators a pair, set rm.margin (clear pairs count more) or rm.label_smoothing."
            if warns else "",
        )
    ]  # fmt: skip


# ---------------------------------------------------------------- cues


def lexical(cues: Sequence[Cue]) -> Finding:
    """The strongest words that go with the label."""
    strongest = max((cue.accuracy for cue in cues), default=0.5)
    level: Level = "bad" if strongest > BAD_CUE else "warn" if strongest > WARN_CUE else "ok"
    named = ", ".join(
        f"“{cue.term}” ({cue.chosen_share:.0%} of chosen, {cue.rejected_share:.0%} of rejected)" for cue in cues[:5]
    )
    return Finding(
        name="cues",
        level=level,
        value=f"{len(cues)} words go with the label: {named}" if cues else "no word goes with the label",
        numbers={"count": len(cues), "strongest_accuracy": strongest},
        meaning="A reward model may reward these words wherever they stand." if level != "ok" else
        "None of them tells much by itself." if cues else
        "No single word gives the label away (false-discovery rate 1 %).",
        advice="Where a word is style and not quality, add pairs in which the answer with it is the worse one; the "
        "validation card probes the reward model with answers made of these words." if level != "ok" else "",
    )  # fmt: skip


def _sample(pairs: Sequence[PreferencePair], *, seed: int) -> Sequence[PreferencePair]:
    if len(pairs) <= MAX_CUE_PAIRS:
        return pairs
    return random.Random(f"cues {seed}").sample(pairs, MAX_CUE_PAIRS)
