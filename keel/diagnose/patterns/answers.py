"""Patterns of what the answers became: long, full of a phrase, repetitive, all alike, cut off."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from keel.diagnose import advice
from keel.diagnose.evidence import (
    Crossing,
    correlation,
    crossing,
    departure,
    known,
    ramp,
    start_and_end,
    thrives,
    worst_lasting,
)
from keel.diagnose.match import Kind, Match, Recommendation
from keel.diagnose.record import RunRecord
from keel.diagnose.texts import (
    first_answers,
    identical_share,
    repeated_fraction,
    reward_goes_with,
    rising_words,
    worst_answers,
)

_NAMED: Final = 3
"""Words that a sentence names."""


def present(*recommendations: Recommendation | None) -> tuple[Recommendation, ...]:
    return tuple(one for one in recommendations if one is not None)


def told(found: Crossing, *, what: str, form: str = "{:.2f}") -> str:
    """The crossing in one sentence."""
    start, worst, limit = (form.format(value) for value in (found.start, found.worst, found.threshold))
    text = f"{what}: {start} at the start, {worst} at worst, past {limit} from step {found.first_step} on"
    if found.departed is not None and found.departed < found.first_step:
        text += f" (leaving its baseline at step {found.departed})"
    return text


class LengthBias:
    """Answers grow, and longer ones are paid more."""

    def match(self, record: RunRecord) -> Match | None:
        ratio = worst_lasting(record.values("response_tokens_ratio"))
        within = worst_lasting(record.values("length_reward_correlation_within_prompt"))
        raw = worst_lasting(record.values("length_reward_correlation"))
        paid = within if not math.isnan(within) else raw
        read = reward_goes_with(record).get("length", float("nan"))
        together = correlation(record.values("response_tokens_mean"), record.values("reward_mean"))
        growth = ramp(ratio, 1.1, 1.5)
        link = max(ramp(paid, 0.3, 0.75), 0.9 * ramp(read, 0.3, 0.75), 0.75 * ramp(together, 0.5, 0.95))
        # Paid for that closely from the start, length need not have grown yet: a guard may have held it.
        strength = max(0.97 * math.sqrt(growth * link), 0.85 * ramp(_steady(record, paid=paid), 0.45, 0.75))
        if strength == 0.0:
            return None
        start, end = start_and_end(record.values("response_tokens_mean"))
        sentences = []
        if growth > 0:
            sentences.append(
                f"answers grew to {ratio:.2f} times the reference's length ({start:.0f} → {end:.0f} tokens)"
            )
        if not math.isnan(paid):
            where = "within a prompt's answers" if not math.isnan(within) else "over a batch"
            first, last = start_and_end(record.values("length_reward_correlation"))
            course = f" ({first:.2f} at the start, {last:.2f} at the end)" if not math.isnan(first) else ""
            sentences.append(f"length and reward go together, ρ = {paid:.2f} {where} at most{course}")
        if not math.isnan(read) and abs(read) > 0.3:
            sentences.append(f"over the recorded answers of one moment their reward goes with length at ρ = {read:.2f}")
        if not math.isnan(together) and together > 0.5:
            sentences.append(f"from step to step, mean reward and mean length rise together (ρ = {together:.2f})")
        sentences += _win_rates_part(record)
        return Match(
            "length_bias",
            "Length bias: the reward pays for length",
            Kind.CAUSE,
            strength,
            _first(departure(record, "response_tokens_mean"), crossing(record, "response_tokens_ratio")),
            tuple(sentences),
            present(
                advice.without_other_sources(record),
                advice.length_penalty(record),
                advice.balance_length(record),
                advice.refresh_the_rm(record),
            ),
        )


def _steady(record: RunRecord, *, paid: float) -> float:
    """The correlation of length and reward in the median step; at most what lasted."""
    middle = known(record.values("length_reward_correlation"))
    return min(float(np.median(middle)), paid) if len(middle) and not math.isnan(paid) else float("nan")


def _win_rates_part(record: RunRecord) -> list[str]:
    """The judge's own liking for length."""
    for line in reversed(record.evaluations):
        plain, controlled = line.get("win_rate"), line.get("win_rate_length_controlled")
        if isinstance(plain, int | float) and isinstance(controlled, int | float) and plain - controlled > 0.05:
            return [f"the judge's win rate is {plain:.0%}, but {controlled:.0%} with length taken out"]
    return []


def _first(departed: int | None, found: Crossing | None) -> int | None:
    steps = [step for step in (departed, found.first_step if found else None) if step is not None]
    return min(steps, default=None)


class OverUsedPhrase:
    """A word or phrase that the reference hardly uses spreads over the answers: a bug that pays for it, or flattery."""

    def match(self, record: RunRecord) -> Match | None:
        share = worst_lasting(record.values("overused_words_share"))
        found = crossing(record, "overused_words_share")
        named = record.words()
        # Words of better answers are what training is for, and those that are paid less nobody is after.
        rising = [
            one
            for one in rising_words(record)
            if (one.gold is None or one.gold < 0.0) and (one.paid is None or one.paid > 0.0)
        ]
        in_texts = max((one.after - one.before for one in rising), default=0.0)
        # The guard's share is of significant words that the reference rarely uses; texts alone say less.
        strength = max(ramp(share, 0.0, 0.25), 0.85 * ramp(in_texts, 0.1, 0.6))
        if strength == 0.0:
            return None
        words = _most_named(named) or tuple(one.word for one in rising)
        quoted = ", ".join(f"“{word}”" for word in words[:_NAMED])
        sentences = []
        if found is not None and quoted:
            sentences.append(f"{quoted}: over-used against the reference's answers from step {found.first_step} on")
        if not math.isnan(share) and share > 0:
            sentences.append(f"the most over-used word is in {share:.0%} more of the answers than of the reference's")
        for one in rising[:_NAMED]:
            pay = "" if one.paid is None else f"; answers with it are paid {one.paid:.1f} standard deviations more"
            pay += "" if one.gold is None else f", and worth {-one.gold:.1f} less by gold"
            sentences.append(
                f"“{one.word}” is in {one.after:.0%} of the later answers, {one.before:.0%} at the start{pay}"
            )
        first = _first(None, found) or (named[0][0] if named else None)
        return Match(
            "over_used_phrase",
            f"Over-used phrase: the reward pays for {quoted or 'certain words'}",
            Kind.CAUSE,
            0.4 + 0.57 * strength if strength > 0.08 else strength,
            first,
            tuple(sentences),
            present(
                advice.without_other_sources(record),
                advice.constitution(
                    record, what=f"flag answers with {quoted or 'the phrase'} and take a deviation off"
                ),
                advice.refresh_the_rm(record),
                advice.ensemble(record),
            ),
            words=words,
        )


def _most_named(named: list[tuple[int, tuple[str, ...]]]) -> tuple[str, ...]:
    """By how often the guard named them, the worst place counting most."""
    counts: dict[str, float] = {}
    for _, words in named:
        for place, word in enumerate(words):
            counts[word] = counts.get(word, 0.0) + 1.0 / (1 + place)
    return tuple(sorted(counts, key=lambda word: -counts[word]))[:5]


class Repetition:
    """Answers say the same again and again."""

    def match(self, record: RunRecord) -> Match | None:
        found = {
            name: one
            for name in ("longest_repeat_fraction", "distinct_bigrams_ratio", "compression_ratio")
            if (one := crossing(record, name)) is not None
        }
        longest = record.values("longest_repeat_fraction")
        grown = worst_lasting(longest) - start_and_end(longest)[0]
        distinct = ramp(worst_lasting(record.values("distinct_bigrams_ratio"), upward=False), 0.95, 0.7)
        worst = (
            ramp(grown, 0.05, 0.25),
            distinct,
            ramp(worst_lasting(record.values("compression_ratio")), 1.1, 1.6),
        )
        before, after = _mean_repeats(record)
        read = 0.9 * ramp(after - before, 0.1, 0.35)
        paid = reward_goes_with(record).get("repetition", 0.0)
        effect = max(float(np.mean(sorted(worst)[-2:])), 0.85 * distinct, read)
        strength = max(0.9 * effect, 0.95 * math.sqrt(effect * ramp(paid, 0.3, 0.7)))
        if strength == 0.0:
            return None
        forms = {
            "longest_repeat_fraction": "share of an answer that its longest repeated span takes up",
            "distinct_bigrams_ratio": "distinct bigrams over the reference's",
            "compression_ratio": "compression over the reference's",
        }
        sentences = [told(one, what=forms[name]) for name, one in found.items()]
        if after - before > 0.05:
            sentences.append(f"repeated word pairs: {before:.0%} of an answer at the start, {after:.0%} later")
        if paid > 0.3:
            sentences.append(f"over the recorded answers the reward goes with repetition at ρ = {paid:.2f}")
        batches = known(record.values("repetition_reward_correlation"))
        if len(batches):
            sentences.append(f"at equal length it does so at ρ = {np.median(batches):.2f} in the median batch")
        return Match(
            "repetition",
            "Repetition: the reward pays for saying the same again",
            Kind.CAUSE,
            strength,
            min((one.first_sign for one in found.values()), default=None),
            tuple(sentences),
            present(
                advice.without_other_sources(record),
                advice.constitution(record, what="a function that flags answers with a span said twice"),
                advice.refresh_the_rm(record),
                advice.ensemble(record),
            ),
        )


def _mean_repeats(record: RunRecord) -> tuple[float, float]:
    """Of the first and the worst answers; (0, 0) with fewer than 8 of either."""
    groups = first_answers(record), worst_answers(record)
    if min(map(len, groups)) < 8:
        return 0.0, 0.0
    before, after = (float(np.mean([repeated_fraction(answer.text) for answer in group])) for group in groups)
    return before, after


class ModeCollapse:
    """The policy is left with few answers: entropy gone, the same answer to different prompts."""

    def match(self, record: RunRecord) -> Match | None:
        entropy = record.values("entropy_nats_per_token")
        worst = worst_lasting(entropy, upward=False)
        start, end = start_and_end(entropy)
        alike = identical_share(worst_answers(record))
        at_first = identical_share(first_answers(record))
        fall = ramp(worst / start, 0.5, 0.2) if start > 0 else 0.0
        low = ramp(worst, 0.2, 0.05)
        same = ramp(alike - (0.0 if math.isnan(at_first) else at_first), 0.2, 0.6)
        strength = max(math.sqrt(low * max(fall, 0.3)), 0.9 * same)
        if strength == 0.0:
            return None
        sentences = []
        if not math.isnan(worst):
            sentences.append(f"entropy {start:.2f} → {end:.2f} nats per token, {worst:.2f} at the lowest")
        if same > 0:
            sentences.append(f"{alike:.0%} of the later answers, each to its own prompt, are one and the same")
        return Match(
            "mode_collapse",
            "Mode collapse: the policy is left with few answers",
            Kind.SYMPTOM,
            0.9 * strength * (0.55 if thrives(record) else 1.0),
            _first(
                departure(record, "entropy_nats_per_token", upward=False), crossing(record, "entropy_nats_per_token")
            ),
            tuple(sentences),
            present(
                advice.entropy_bonus(record),
                advice.hold_by_adaptive_kl(record),
                advice.half_the_learning_rate(record),
            ),
        )


class Truncation:
    """Answers are cut off at the limit."""

    def match(self, record: RunRecord) -> Match | None:
        values = record.values("truncated_fraction")
        worst = worst_lasting(values)
        strength = 0.9 * ramp(worst, 0.1, 0.4)
        if not len(known(values)) or strength == 0.0:
            return None
        start, end = start_and_end(values)
        most = record.setting("data.max_response_tokens")
        sentences = [
            f"{worst:.0%} of the answers were cut off at {most or 'the most'} tokens; {start:.0%} at the start, "
            f"{end:.0%} at the end"
        ]
        found = crossing(record, "truncated_fraction")
        return Match(
            "truncation",
            "Truncation: answers do not come to their end",
            Kind.SYMPTOM,
            strength,
            _first(departure(record, "truncated_fraction"), found) if start <= 0.1 else int(record.steps[0]),
            tuple(sentences),
            present(advice.missing_end_penalty(record), advice.longer_answers(record)),
        )
