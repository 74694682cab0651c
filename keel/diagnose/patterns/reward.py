"""Patterns of the reward itself: constant, on another scale than before, drifting, at odds with the judge."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keel.diagnose import advice
from keel.diagnose.evidence import correlation, departure, harm, known, ramp, start_and_end
from keel.diagnose.match import Kind, Match, Recommendation
from keel.diagnose.patterns.answers import present
from keel.diagnose.record import RunRecord, Values

_DEAD: Final = 1e-4
"""Standard deviation over the mean's size (or 1), under which a reward is one number and rounding."""
_RISEN: Final = 0.5
"""Standard deviations of the first step: a reward that is flat so far up was not dead, but all of it was had."""
_BEFORE, _AFTER = 5, 3
"""Steps that a jump is seen against, and on."""
_SETTLED: Final = 4
"""Steps after a rollback, in which the samples change over to its policy."""


class ConstantReward:
    """The reward says the same of every answer: there is nothing to learn from."""

    def match(self, record: RunRecord) -> Match | None:
        spread, mean = record.values("reward_std"), record.values("reward_mean")
        if not len(known(spread)):
            return None
        dead = spread <= _DEAD * np.maximum(1.0, np.abs(np.nan_to_num(mean)))
        low = record.values("reward_std_ratio") < (record.thresholds.reward_std_ratio.act or 0.05)
        flat = dead if int(dead.sum()) >= 2 else low
        if int(flat.sum()) < min(3, len(flat)):
            return None
        at = np.flatnonzero(flat)
        first, last = int(at[0]), int(at[-1])
        levels = mean[at]
        one_number = bool(dead[at].all()) and float(np.nanmax(levels) - np.nanmin(levels)) <= _DEAD * max(
            1.0, abs(float(np.nanmedian(levels)))
        )
        risen = (float(np.nanmedian(levels)) - start_and_end(mean)[0]) / max(float(known(spread)[0]), 1e-9)
        topped_out = risen > _RISEN and not dead[at].all()
        strength = 0.99 if one_number else 0.9 if dead[at].all() else 0.4 if topped_out else 0.7
        sentences = [
            f"in {len(at)} of {len(flat)} steps, from step {record.steps[first]} to {record.steps[last]}, the rewards "
            f"of a batch had a standard deviation of {np.nanmax(spread[at]):.2g}"
        ]
        if one_number:
            sentences.append(f"every answer was paid {np.nanmedian(levels):.4g}, whatever it said")
        if topped_out:
            sentences.append(
                f"it had risen by {risen:.1f} standard deviations: all answers are alike, and top its scale"
            )
        gradient = record.values("grad_norm_policy")[at]
        if len(known(gradient)):
            sentences.append(f"the policy's gradient norm was {np.nanmedian(gradient):.2g} meanwhile")
        return Match(
            "constant_reward",
            "Constant reward: nothing to learn from",
            Kind.CAUSE,
            strength,
            int(record.steps[first]),
            tuple(sentences),
            present(advice.without_other_sources(record), *_a_better_model(record), advice.refresh_the_rm(record)),
        )


def _a_better_model(record: RunRecord) -> tuple[Recommendation, ...]:
    epochs = 2 * record.setting_number("rm.epochs", 3.0)
    return (
        Recommendation(
            f"Train the reward model longer, {epochs:g} epochs, and let its card stop the run when it is red",
            "A new reward model; one that cannot tell answers apart stops the run before PPO.",
            (f"rm.epochs={epochs:g}", "rm.min_accuracy=0.6", "rm.accept_red=false"),
        ),
    )


class RewardScaleJump:
    """From one step to the next, rewards come on another scale."""

    def match(self, record: RunRecord) -> Match | None:
        spread, mean = record.values("reward_std"), record.values("reward_mean")
        jump = _largest_jump(spread, mean, branch=record.branches())
        if jump is None:
            return None
        at, factor, shift = jump
        versions = record.rm_versions()
        changed = versions[at] != versions[at - 1]
        z = record.values("proxy_z")
        if changed and abs(float(np.nan_to_num(z[at] - z[at - 1]))) < 1.0:
            return None  # Another version, on its own scale, which the learner takes from its calibration.
        size = max(ramp(abs(math.log(factor)), math.log(2.0), math.log(4.0)), 0.8 * ramp(abs(shift), 2.0, 5.0))
        if size == 0.0:
            return None
        why = f"when {versions[at]} took over" if changed else "with no new version of the reward model"
        before = slice(max(0, at - _BEFORE), at)
        after = slice(at, at + _AFTER)
        was, now = ((_middle(spread, part), _middle(mean, part)) for part in (before, after))
        sentences = [
            f"at step {record.steps[at]}, {why}, the rewards' standard deviation went from {was[0]:.2f} to "
            f"{now[0]:.2f} (×{now[0] / max(was[0], 1e-9):.1f}) and their mean from {was[1]:+.2f} to {now[1]:+.2f}, "
            f"which is {(now[1] - was[1]) / max(was[0], 1e-9):+.1f} of the earlier standard deviations"
        ]
        length = record.values("response_tokens_mean")
        if abs(_middle(length, after) / max(_middle(length, before), 1e-9) - 1) < 0.15:
            sentences.append("the answers' length did not jump with it: the reward changed, not the policy")
        return Match(
            "reward_scale_jump",
            "Reward scale jump: the same answers are paid on another scale",
            Kind.CAUSE,
            0.98 * (0.3 + 0.7 * size),
            int(record.steps[at]),
            tuple(sentences),
            present(
                advice.without_other_sources(record),
                advice.lower_score_clip(record),
                advice.freeze_the_rm(record),
                advice.hold_by_adaptive_kl(record),
            ),
        )


def _middle(values: Values, where: slice) -> float:
    """Median of the known values there; NaN without any."""
    here = known(values[where])
    return float(np.median(here)) if len(here) else float("nan")


def _largest_jump(spread: Values, mean: Values, *, branch: NDArray[np.int64]) -> tuple[int, float, float] | None:
    """(index, factor of the standard deviation, shift of the mean in the earlier deviations) where level or scale
    changed most within a step or two, and stayed. Not across a rollback: another policy answers after it."""
    found = []
    logs = np.diff(np.log(known(spread[spread > 0])))
    noise = 1.4826 * float(np.median(np.abs(logs))) if len(logs) else 0.0
    for at in range(3, len(spread) - 1):
        window = branch[max(0, at - _BEFORE) : at + _AFTER]
        if window.min() != window.max() or (at >= _SETTLED and branch[at - _SETTLED] != branch[at]):
            continue
        factor, shift = _scale_change(spread, mean, at, noise=noise), _level_change(spread, mean, at)
        if factor is not None and shift is not None:
            found.append((max(abs(math.log(factor)), 0.35 * abs(shift)), at, factor, shift))
    return max(found)[1:] if found else None


def _scale_change(spread: Values, mean: Values, at: int, *, noise: float) -> float | None:
    """By what factor the standard deviation changed at this step; 1 for a change that is gradual, or within the noise
    of its logarithm between steps, or that the mean does not share: another scale multiplies both, while a policy that
    gets better or worse moves them apart. None where rewards do not vary on either side: they have no scale."""
    before, after = slice(max(0, at - _BEFORE), at), slice(at, at + _AFTER)
    old, new, level = _middle(spread, before), _middle(spread, after), _middle(mean, before)
    if not min(old, new) > 1e-3 * max(abs(level), 1e-3) or not min(spread[at - 1], spread[at]) > 0:
        return None
    size = abs(math.log(new / old))
    if size < 3.0 * noise or _at_once(spread, at) < 0.6 * size:
        return 1.0
    shared = _middle(mean, after) / level if abs(level) > 0.5 * old else new / old
    together = shared > 0 and math.copysign(1.0, new - old) * math.log(shared) > 0.4 * size
    return new / old if together else 1.0


def _at_once(values: Values, at: int) -> float:
    """The change of the logarithm within this step, or within it and the next: a batch may be of both scales."""
    later = [value for value in values[at : at + 2] if value > 0]
    return max((abs(math.log(value / values[at - 1])) for value in later), default=0.0)


def _level_change(spread: Values, mean: Values, at: int) -> float | None:
    """By how many of the earlier standard deviations the mean changed at this step; 0 for a gradual change."""
    before, after = slice(max(0, at - _BEFORE), at), slice(at, at + _AFTER)
    old, jump = _middle(spread, before), float(mean[at] - mean[at - 1])
    if not old > 0 or math.isnan(jump):
        return None
    shift = (_middle(mean, after) - _middle(mean, before)) / old
    steps = known(np.diff(mean[before]))
    noise = float(np.std(steps)) if len(steps) else 0.0
    return shift if abs(jump) > max(0.6 * abs(shift) * old, 5 * noise) else 0.0


class RmDrift:
    """The reward model changes under the policy: its versions pay the same answers otherwise."""

    def match(self, record: RunRecord) -> Match | None:
        changes = _version_changes(record)
        canary = [
            (int(line.get("step") or 0), float(z))
            for line in record.evaluations
            if isinstance(z := line.get("canary_z"), int | float)
        ]
        refused = [line for line in record.refreshes if line.get("outcome") == "refused"]
        worst = max(((abs(z), step) for step, z, _ in changes), default=(0.0, None))
        strength = 0.9 * ramp(worst[0], 0.75, 2.5)
        sentences = [
            f"when {version} took over at step {step}, z moved by {z:+.2f} within one step"
            for step, z, version in changes
            if abs(z) > 0.75
        ]
        if changes and canary:
            step, z = max(canary, key=lambda one: abs(one[1]))
            sentences.append(
                f"the canary's mean reward lay {z:+.1f} standard deviations from its baseline at step {step}"
            )
        if strength and refused:
            sentences.append(f"{len(refused)} of {len(record.refreshes)} refreshes of the reward model were refused")
        if strength == 0.0:
            return None
        return Match(
            "rm_drift",
            "Reward model drift: its versions do not agree on what is good",
            Kind.CAUSE,
            strength,
            worst[1],
            tuple(sentences),
            present(advice.freeze_the_rm(record), advice.ensemble(record), advice.hold_by_adaptive_kl(record)),
        )


def _version_changes(record: RunRecord) -> list[tuple[int, float, str]]:
    """(step, change of z, version) of each new version."""
    versions, z = record.rm_versions(), record.values("proxy_z")
    found = []
    for at in range(1, len(versions)):
        old, new = versions[at - 1], versions[at]
        if old is not None and new is not None and old != new and not np.isnan(z[[at - 1, at]]).any():
            found.append((int(record.steps[at]), float(z[at] - z[at - 1]), new))
    return found


class RmJudgeDisagreement:
    """The reward model says better, the judge (or gold) says worse: over-optimisation, whatever it is that is gamed."""

    def match(self, record: RunRecord) -> Match | None:
        hurt = harm(record)
        start, end = start_and_end(record.values("proxy_z"))
        if math.isnan(end):
            start, end = start_and_end(record.values("reward_mean"))
        sentences, strength = list(hurt.sentences), 0.8 * hurt.size
        if hurt.size and end > start:
            sentences.append(f"the reward rose from {start:+.2f} to {end:+.2f} all the same")
        rho = correlation(record.values("reward_mean"), record.values("gold_mean"))
        if rho < -0.3 and hurt.size:
            strength = max(strength, 0.8 * ramp(-rho, 0.0, 0.7))
            sentences.append(f"from step to step, reward and gold move against each other (ρ = {rho:.2f})")
        agreements = [
            (int(line.get("step") or 0), float(share))
            for line in record.evaluations
            if isinstance(share := line.get("rm_judge_agreement"), int | float)
        ]
        low = [one for one in agreements if one[1] < (record.thresholds.rm_judge_agreement.warn or 0.6)]
        if low:
            step, share = min(low, key=lambda one: one[1])
            strength = max(strength, 0.5 + 0.35 * ramp(share, 0.6, 0.5))
            sentences.append(
                f"reward model and judge order {share:.0%} of the pairs alike at step {step} "
                f"({agreements[0][1]:.0%} at step {agreements[0][0]}); a coin would 50 %"
            )
        if strength == 0.0:
            return None
        firsts = [step for step in (hurt.first_step, low[0][0] if low else None) if step is not None]
        return Match(
            "rm_judge_disagreement",
            "Reward model and judge part: the score is over-optimised",
            Kind.SYMPTOM,
            strength,
            min(firsts, default=departure(record, "reward_mean")),
            tuple(sentences),
            present(advice.refresh_the_rm(record), advice.hold_by_adaptive_kl(record), advice.ensemble(record)),
        )
