"""Patterns of a learner that is not in order: the critic, the age of the samples, the engine's arithmetic."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from keel.diagnose import advice
from keel.diagnose.evidence import known, ramp, sustained, worst_lasting
from keel.diagnose.match import Kind, Match, Recommendation
from keel.diagnose.patterns.answers import present
from keel.diagnose.record import RunRecord

_WARM_UP: Final = 5
"""Steps that a critic may take to learn."""
_STALE: Final = 0.5
"""Mean age, in versions, up to which behaviour and proximal policy are one but for arithmetic."""


class CriticFailure:
    """Values that are no better than the mean of the returns, after a warm-up."""

    def match(self, record: RunRecord) -> Match | None:
        values = record.values("value_error_ratio")
        late = values[_WARM_UP:]
        if len(known(late)) < 5:
            return None
        middle = float(np.nanmedian(late))
        share = float(np.mean(known(late) > 1.0))
        strength = 0.9 * max(ramp(middle, 0.95, 1.5), 0.6 * ramp(share, 0.4, 0.8))
        if strength == 0.0:
            return None
        with np.errstate(invalid="ignore"):
            over = np.concatenate([np.zeros(min(_WARM_UP, len(values)), dtype=bool), late > 1.0])
        rate = record.setting_number("learner.critic.learning_rate", 5e-4)
        batch = int(record.setting_number("learner.batch_size", 128))
        return Match(
            "critic_failure",
            "Critic failure: its values are no better than a constant",
            Kind.MACHINERY,
            strength,
            sustained(record, over),
            (
                f"squared error of the values over the variance of the returns: {middle:.2f} in the median step after "
                f"the first {_WARM_UP}, over 1 in {share:.0%} of them; 1 is no better than the returns' mean",
            ),
            present(
                Recommendation(
                    f"Halve the critic's learning rate, to {rate / 2:g}, with a longer warm-up",
                    "It follows a changing reward more slowly.",
                    (f"learner.critic.learning_rate={rate / 2:.3g}", "learner.critic.warmup_steps=10"),
                ),
                Recommendation(
                    "Do without a critic: compare four answers to each prompt",
                    "A quarter of the prompts a step; one advantage for a whole answer.",
                    ("learner.advantages=leave_one_out", "learner.samples_per_prompt=4"),
                )
                if batch % 4 == 0
                else None,
                Recommendation(
                    "Do without a critic: the batch's mean as the baseline",
                    "Noisier gradients than a critic that works.",
                    ("learner.advantages=reinforce",),
                ),
            ),
        )


class Staleness:
    """Samples are old when they are trained on, or too old to be."""

    def match(self, record: RunRecord) -> Match | None:
        age = record.values("staleness_mean")
        issued, dropped = (known(record.values(f"samples_{name}")) for name in ("issued", "stale_dropped"))
        lost = float(dropped[-1] / issued[-1]) if len(issued) and len(dropped) and issued[-1] > 0 else 0.0
        capped = worst_lasting(record.values("behaviour_weight_capped_fraction"))
        old = float(np.nanmedian(age)) if len(known(age)) else 0.0
        strength = max(0.9 * ramp(lost, 0.02, 0.2), 0.9 * ramp(old, 2.0, 6.0), 0.8 * ramp(capped, 0.03, 0.2))
        if strength == 0.0:
            return None
        sentences = [f"samples were {old:.1f} versions old on average"]
        if lost > 0:
            sentences.append(f"{lost:.0%} of all samples were dropped as too old, with the work that they took")
        if capped > 0.03:
            sentences.append(f"in up to {capped:.0%} of the tokens the correction for age was at its cap")
        with np.errstate(invalid="ignore"):
            first = sustained(record, age > 1.5)
        allowed = int(record.setting_number("learner.max_staleness", 1))
        actors = int(record.setting_number("rollout.actors", 1))
        return Match(
            "staleness",
            "Staleness: the policy learns from answers of earlier versions",
            Kind.MACHINERY,
            strength,
            first,
            tuple(sentences),
            present(
                Recommendation(
                    f"Let samples lag by {max(0, min(1, allowed - 1))} versions at most",
                    "The learner waits for rollouts more; with 0 it never overlaps with them.",
                    (f"learner.max_staleness={max(0, min(1, allowed - 1))}",),
                ),
                Recommendation(
                    f"More rollout actors: {2 * actors}",
                    "More machines or cores; helps where generation is the slow part.",
                    (f"rollout.actors={2 * actors}",),
                ),
                advice.half_the_learning_rate(record),
            ),
        )


class EngineMismatch:
    """Engine and learner give one policy's tokens different probabilities. Only steps whose samples are of the present
    policy can say so: the gap of older ones is the policy's own movement."""

    def match(self, record: RunRecord) -> Match | None:
        gap, age = record.values("behaviour_gap_max_nats"), record.values("staleness_mean")
        if not len(known(gap)):
            return None
        with np.errstate(invalid="ignore"):
            fresh = np.nan_to_num(age, nan=np.inf) < _STALE if len(known(age)) else np.zeros(len(gap), dtype=bool)
        here = known(gap[fresh])
        worst = float(np.median(here)) if len(here) else float("nan")
        weight = record.values("behaviour_weight_mean")[fresh]
        off = float(np.max(np.abs(known(weight) - 1.0))) if len(known(weight)) else 0.0
        bound = 0.5 if "bfloat16" in (record.setting("rollout.dtype"), record.setting("learner.dtype")) else 0.1
        strength = 0.95 * max(
            ramp(math.log(max(worst, 1e-9)), math.log(bound), math.log(10 * bound)), ramp(off, 0.1, 0.5)
        )
        if not len(here) or strength == 0.0:
            return None
        over = np.flatnonzero(fresh & (np.nan_to_num(gap) > bound))
        return Match(
            "engine_mismatch",
            "Engine and trainer part: they give the same policy different probabilities",
            Kind.MACHINERY,
            strength,
            int(record.steps[over[0]]) if len(over) else None,
            (
                f"log-probabilities of a token differ by up to {worst:.2g} nats in the {len(here)} steps whose samples "
                f"were of the present policy; arithmetic explains {bound:g} at most",
            ),
            present(
                Recommendation(
                    "Generate and train in the same arithmetic",
                    "float32 generation is slower and takes twice the memory of bfloat16.",
                    ("rollout.dtype=float32", "learner.dtype=float32"),
                ),
                Recommendation(
                    "Trust the correction less: cap its weight at 1.2",
                    "Tokens that the engine thought unlikely teach less; it treats the sign.",
                    ("learner.behaviour_weight_cap=1.2",),
                ),
                Recommendation(
                    "Do without the engine's short cuts while looking for the cause",
                    "Slower generation.",
                    ("rollout.prefix_caching=false", "rollout.chunked_prefill=false"),
                ),
            ),
        )
