"""What a validation card's figures mean, what to do about them, and the verdict: every threshold has its name here.

Red is held-out accuracy under the run's rm.min_accuracy, and nothing else: a red model is refused. Everything else that
is wrong is amber: people should look. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from cluster.reward_models import Verdict
from reward_service.card.records import Card, Finding, Rate

FEW_PAIRS: Final = 100
"""Held-out pairs under which the interval of an accuracy is wider than ±10 points."""
CALIBRATION_ERROR_MAX: Final = 0.1
OVERFIT_GAP_MAX: Final = 0.15
"""Accuracy on training pairs less that on held-out ones."""
KS_POLICY_MAX: Final = 0.3
"""Distance of the policy's score distribution from the training answers'."""
KS_HELD_OUT_MAX: Final = 0.15
"""Held-out answers come from where the training ones do; more than this, and significant, is overfitting or a split
that is not random."""
SIGNIFICANT_P: Final = 0.01
RANK_WANTED: Final = 0.7
"""Spearman's correlation with human or gold scores."""
LENGTH_R2_MAX: Final = 0.25
"""Share of the margins that length explains."""
COIN: Final = 0.5
AGREEMENT_WANTED: Final = 0.7
"""Between members, on held-out pairs."""
DISCRIMINATOR_DISAGREES_MAX: Final = 0.3
PROBES_WANTED: Final = 0.8
"""Pass rate of each kind of probe,"""
FEW_PROBES: Final = 10
"""where there are at least so many."""

Level = Literal["green", "amber", "red", "unknown"]


def verdict_of(findings: tuple[Finding, ...]) -> tuple[Verdict, tuple[str, ...]]:
    """The worst level, and the findings that are red or amber in a few words each, the worst first."""
    reasons: dict[str, list[str]] = {"red": [], "amber": []}
    for finding in findings:
        if finding.level in reasons:
            reasons[finding.level].append(f"{finding.name}: {finding.value}. {finding.meaning}")
    verdict: Verdict = "red" if reasons["red"] else "amber" if reasons["amber"] else "green"
    return verdict, (*reasons["red"], *reasons["amber"])


def findings_of(card: Card) -> tuple[Finding, ...]:
    """Everything that was looked at, in the card's order."""
    return (
        _accuracy(card),
        *_length(card),
        _overfitting(card),
        *_annotators(card),
        _calibration(card),
        *_distributions(card),
        _rank(card),
        *_ensemble(card),
        *_probes(card),
    )


def rate_text(rate: Rate) -> str:
    """0.712 (0.66–0.76, n = 300)."""
    return f"{rate.share:.3f} ({rate.low:.2f}–{rate.high:.2f}, n = {rate.n})"


def _finding(name: str, *, amber: bool, value: str, good: str, bad: str, advice: str) -> Finding:
    if amber:
        return Finding(name=name, level="amber", value=value, meaning=bad, advice=advice)
    return Finding(name=name, level="green", value=value, meaning=good)


def _unknown(name: str, why: str) -> Finding:
    return Finding(name=name, level="unknown", value="not measured", meaning=why)


def _accuracy(card: Card) -> Finding:
    rate, least = card.accuracy, card.min_accuracy
    name, value = "held-out accuracy", rate_text(rate)
    if rate.share < least:
        return Finding(
            name=name,
            level="red",
            value=value,
            meaning=f"Under rm.min_accuracy, {least:.2f}: a policy would learn its mistakes.",
            advice="Give more or clearer pairs (keel data audit says which), or a larger model.",
        )
    meaning = f"The wanted {least:.2f} lies inside the interval: it may be worse than it looks."
    if rate.n < FEW_PAIRS:
        meaning = f"Measured on fewer than {FEW_PAIRS} pairs: it may be far from the truth."
    return _finding(
        name,
        amber=rate.low < least or rate.n < FEW_PAIRS,
        value=value,
        good=f"Surely above rm.min_accuracy, {least:.2f}.",
        bad=meaning,
        advice="Hold out or collect more pairs before trusting it.",
    )


def _length(card: Card) -> Iterator[Finding]:
    alone, part = card.length_only_accuracy, card.length
    if alone is not None:
        yield _finding(
            "against length alone",
            amber=card.accuracy.low <= alone,
            value=f"{card.accuracy.share:.3f} against {alone:.3f}",
            good="It knows more than which answer is longer.",
            bad="Not surely better than looking at lengths alone: it may have learned nothing else.",
            advice="Rebalance by length (rm.rebalance), or collect pairs of like length.",
        )
    matched = part.matched
    if matched is None or matched.n < 20:
        yield _unknown("accuracy on pairs of like length", "Fewer than 20 held-out pairs are of like length.")
    else:
        yield _finding(
            "accuracy on pairs of like length",
            amber=matched.low <= COIN,
            value=rate_text(matched),
            good="It tells answers apart where length cannot.",
            bad="Where length gives no hint it is not surely better than a coin.",
            advice="Collect pairs of like length, or rebalance by length.",
        )
    yield _finding(
        "share of margins that length explains",
        amber=part.margin_r2 > LENGTH_R2_MAX,
        value=f"{part.margin_r2:.2f} ({part.margin_per_token:+.3f} a token); accuracy without it "
        f"{part.partialled.share:.3f}",
        good="Scores are mostly about something else.",
        bad="Much of what it pays for is length: a policy will find that out.",
        advice="Rebalance by length (rm.rebalance: inverse_frequency), and watch the answers' length in training.",
    )
    worse = [bucket for bucket in part.by_difference if bucket.rate.high < COIN]
    yield _finding(
        "accuracy by length difference",
        amber=bool(worse),
        value="; ".join(f"{bucket.name} {bucket.rate.share:.2f}" for bucket in part.by_difference).replace(
            "preferred is ", ""
        ),
        good="No bucket is surely worse than a coin.",
        bad=f"Surely worse than a coin where {' and where '.join(bucket.name for bucket in worse)}.",
        advice="It judges by length there; rebalance by length.",
    )


def _overfitting(card: Card) -> Finding:
    if card.train_accuracy is None:
        return _unknown("overfitting", "No training pairs were scored.")
    gap = card.train_accuracy.share - card.accuracy.share
    return _finding(
        "overfitting",
        amber=gap > OVERFIT_GAP_MAX and card.train_accuracy.low > card.accuracy.high,
        value=f"{card.train_accuracy.share:.3f} on training pairs, {card.accuracy.share:.3f} on held-out ones",
        good="It does about as well on pairs that it has not seen.",
        bad="It remembers training pairs rather than what makes them better.",
        advice="Fewer epochs, more pairs, or a lower rm.learning_rate.",
    )


def _annotators(card: Card) -> Iterator[Finding]:
    name = "held-out annotators"
    if card.held_out_annotators is None:
        yield _unknown(name, "No annotator was held out, or their votes are not known.")
    else:
        yield _finding(
            name,
            amber=card.held_out_annotators.low <= COIN,
            value=rate_text(card.held_out_annotators),
            good="It agrees with people whose votes it never saw.",
            bad="Not surely in line with people whose votes it never saw: it may have learned a few people's taste.",
            advice="Ask more annotators, and see keel data audit on how far they agree.",
        )
    against = [each.annotator for each in card.annotators if each.rate.high < COIN]
    if card.annotators:
        yield _finding(
            "each annotator",
            amber=bool(against),
            value="; ".join(f"{each.annotator} {each.rate.share:.2f}" for each in card.annotators),
            good="It is against nobody.",
            bad=f"It orders answers against {', '.join(against)}.",
            advice="Find out who is right; keel data audit says what drives an annotator.",
        )


def _calibration(card: Card) -> Finding:
    part = card.reliability
    over = "over-confident" if part.slope < 1 else "under-confident"
    return _finding(
        "calibration error",
        amber=part.error > CALIBRATION_ERROR_MAX and part.error > part.chance,
        value=f"{part.error:.3f} (by chance up to {part.chance:.3f}); slope {part.slope:.2f} ± {part.slope_error:.2f}",
        good="Margins mean about the probability that they say.",
        bad=f"It is {over}: margins do not mean the probability that they say.",
        advice="Label smoothing or fewer epochs; where members or sources are summed, mind the scale.",
    )


def _distributions(card: Card) -> Iterator[Finding]:
    for found in card.ks:
        if (found.first, found.second) == ("train", "held_out"):
            yield _finding(
                "scores of held-out against training answers",
                amber=found.distance > KS_HELD_OUT_MAX and found.p < SIGNIFICANT_P,
                value=f"KS distance {found.distance:.3f} (p {found.p:.2g})",
                good="They are scored alike.",
                bad="Answers that it trained on are scored otherwise than like ones that it did not.",
                advice="Fewer epochs; check that the split is by prompt and nothing else.",
            )
        if found.second == "policy" and found.first == "train":
            yield _finding(
                "scores of the policy's against training answers",
                amber=found.distance > KS_POLICY_MAX and found.p < SIGNIFICANT_P,
                value=f"KS distance {found.distance:.3f} (p {found.p:.2g})",
                good="The policy still scores as the training answers do.",
                bad="The policy scores where few training answers did: there the model may be guessing.",
                advice="Judge fresh pairs of this policy and refresh the model (rm.refresh).",
            )
    if all(found.source != "policy" for found in card.distributions):
        yield _unknown("scores of the policy's answers", "No answers of the policy in training were given.")


def _rank(card: Card) -> Finding:
    name = "rank correlation with human or gold scores"
    found = [rank for rank in card.rank if rank.against == "human scores"]
    if not found:
        votes = "".join(f" With the share of votes on held-out pairs: {rank.spearman:.2f}." for rank in card.rank)
        return _unknown(name, f"Nobody scored single answers, and evaluation.gold is not set.{votes}")
    newest = found[-1]  # the policy's answers, where there are some
    return _finding(
        name,
        amber=newest.spearman < RANK_WANTED,
        value=f"Spearman {newest.spearman:.2f} ({newest.low:.2f}–{newest.high:.2f}), Kendall {newest.kendall:.2f}, on "
        f"{newest.n} {newest.source.replace('_', '-')} answers",
        good=f"At least {RANK_WANTED}.",
        bad=f"Under {RANK_WANTED}: a higher score often is not a better answer.",
        advice="More pairs, of the policy in training; or an ensemble with mean_minus_std.",
    )


def _ensemble(card: Card) -> Iterator[Finding]:
    part = card.ensemble
    if part is not None:
        yield _finding(
            "agreement of members",
            amber=part.agreement < AGREEMENT_WANTED,
            value=f"{part.agreement:.3f} of pairs ordered alike",
            good="The members learned the same thing.",
            bad="The members part on many pairs: which one is right is a guess.",
            advice="More pairs; until then reward.aggregation: mean_minus_std.",
        )
    other = card.discriminator
    if other is not None:
        yield _finding(
            "the discriminator's disagreement",
            amber=other.disagreement.low > DISCRIMINATOR_DISAGREES_MAX,
            value=f"{rate_text(other.disagreement)}; its own accuracy {other.accuracy.share:.3f}",
            good="A model that is kept out of the reward orders most pairs alike.",
            bad="A model that is kept out of the reward often orders otherwise.",
            advice="Look at the answers that it doubts, below.",
        )


def _probes(card: Card) -> Iterator[Finding]:
    if not card.probes:
        yield _unknown("probes", "The data gave nothing to make probes of.")
    for probe in card.probes:
        name = f"probe: {probe.kind.replace('_', ' ')}"
        if probe.rate.n < FEW_PROBES:
            yield _unknown(name, f"The data gave only {probe.rate.n}; passed {probe.rate.share:.2f}.")
            continue
        yield _finding(
            name,
            amber=probe.rate.share < PROBES_WANTED,
            value=f"passed {rate_text(probe.rate)}",
            good=f"Good answers score higher than {probe.what}.",
            bad=f"Good answers often score lower than {probe.what}.",
            advice="Add such answers as rejected ones to the pairs, or a rule to reward.constitution.",
        )
