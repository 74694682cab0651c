"""Patterns of what should have held the policy back, and did not."""

from __future__ import annotations

import math

from keel.diagnose import advice
from keel.diagnose.evidence import (
    Objective,
    correlation,
    crossing,
    departure,
    harm,
    known,
    objective,
    ramp,
    start_and_end,
    worst_lasting,
)
from keel.diagnose.match import Kind, Match
from keel.diagnose.patterns.answers import present, told
from keel.diagnose.record import RunRecord


def outweighed(found: Objective) -> str:
    """The decomposition in one sentence."""
    if found.penalty <= 0 or found.ratio == float("inf"):
        return (
            f"β is {found.beta:g}: nothing in the objective speaks against distance, and the score's gain of "
            f"{found.score_gain:.2f} standard deviations was to be had at {found.kl:.1f} nats (step {found.step})"
        )
    return (
        f"at step {found.step} the score's gain, {found.score_gain:.2f} standard deviations, outweighed β·KL = "
        f"{found.beta:.3g} × {found.kl:.1f} nats = {found.penalty:.2f} by {found.ratio:.0f}:1"
        if found.ratio >= 1.5
        else f"at step {found.step} the score's gain was {found.score_gain:.2f} standard deviations, and β·KL = "
        f"{found.beta:.3g} × {found.kl:.1f} nats = {found.penalty:.2f}"
    )


class BetaTooLow:
    """The score outweighs β·KL, and the policy goes where the reward model is wrong. Also when the reward's scale is
    what is too large: only their ratio can be seen."""

    def match(self, record: RunRecord) -> Match | None:
        found = objective(record)
        if found is None:
            return None
        hurt = harm(record)
        free = found.free
        weight = 1.0 if free else ramp(math.log(max(found.ratio, 1e-9)), math.log(1.5), math.log(8.0))
        far = ramp(found.kl, 3.0, 8.0) if free else ramp(found.kl, 5.0, 10.0)
        # Without a second opinion the distance alone speaks; where one says that all is well, it is no fault.
        blame = (0.6 + 0.4 * hurt.size) if hurt.known else 0.9
        if free:
            blame = max(blame, 0.95 if record.acted() else 0.75)
        strength = weight * far * blame
        if strength == 0.0:
            return None
        sentences = [outweighed(found), *hurt.sentences]
        steps = worst_lasting(record.values("step_kl_nats_per_sequence"))
        cumulative = known(record.values("kl_cumulative_nats_per_sequence"))
        if len(cumulative) and not math.isnan(steps):
            sentences.append(
                f"the clip bounds each step (at most {steps:.2f} nats per answer) but not their sum "
                f"({cumulative[-1]:.1f} nats over {len(cumulative)} steps)"
            )
        return Match(
            "beta_too_low",
            "β too low, or the reward's scale too large: nothing holds the policy",
            Kind.CAUSE,
            0.98 * strength,
            departure(record, "kl_nats_per_sequence"),
            tuple(sentences),
            present(
                advice.hold_by_adaptive_kl(record),
                advice.hold_by_fixed_beta(record),
                advice.guard_that_acts(record),
                advice.refresh_the_rm(record),
            ),
        )


class KlRunaway:
    """The policy moves away although β is there."""

    def match(self, record: RunRecord) -> Match | None:
        values = record.values("kl_nats_per_sequence")
        worst, end = worst_lasting(values), start_and_end(values)[1]
        found = crossing(record, "kl_nats_per_sequence")
        if found is None:
            return None
        sentences = [told(found, what="KL to the reference, nats per answer", form="{:.1f}")]
        first, last = start_and_end(record.values("beta"))
        if last > 0:
            rises = last > 1.2 * first
            course = f"β went from {first:.3g} to {last:.3g}" if first != last else f"β stayed at {last:.3g}"
            sentences.append(course + (": the controller pulled, more slowly than the score pushed" if rises else ""))
        step_kl = worst_lasting(record.values("step_kl_nats_per_token"))
        bound = record.setting_number("learner.max_step_kl_nats_per_token", 0.05)
        if step_kl > bound:
            sentences.append(f"single updates moved {step_kl:.3f} nats per token, past their bound of {bound:g}")
        pull = correlation(values, record.values("reward_mean"))
        if pull > 0.5:
            sentences.append(f"KL and reward rise together (ρ = {pull:.2f})")
        settled = 0.7 if end < found.threshold else 1.0
        return Match(
            "kl_runaway",
            "KL runaway: the policy leaves the reference",
            Kind.SYMPTOM,
            settled * (0.5 + 0.4 * ramp(worst, found.threshold, 2 * found.threshold)),
            found.first_sign,
            tuple(sentences),
            present(
                advice.hold_by_adaptive_kl(record),
                advice.half_the_learning_rate(record),
                advice.smaller_steps(record),
                advice.movement_budget(record),
            ),
        )
