"""The changes that patterns recommend, each with what it costs and the lines to set, fitted to the run's own settings;
and how several patterns' changes become one list in which no two set the same key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from configs.errors import ConfigError
from configs.load import load_config
from configs.yaml_text import dump_yaml
from keel.diagnose.evidence import crossing, known, objective
from keel.diagnose.match import Match, Recommendation
from keel.diagnose.record import RunRecord

_TARGET: Final = 3.0
"""Nats per sequence, where the record does not say which distance was good."""


def hold_by_adaptive_kl(record: RunRecord) -> Recommendation:
    """β steered to the KL at which the answers were best, where that is known."""
    target = good_distance(record)
    kind = record.setting("learner.kl.kind")
    if kind == "adaptive":
        lines: tuple[str, ...] = (f"learner.kl.target_nats_per_sequence={target:g}",)
        change = f"Lower the KL target to {target:g} nats per answer"
    elif kind == "constrained":
        lines = (f"learner.kl.limit_nats_per_sequence={target:g}",)
        change = f"Lower the KL limit to {target:g} nats per answer"
    else:
        horizon = max(2000, 2 * int(record.setting_number("learner.batch_size", 128)))
        section = (
            f"{{kind: adaptive, beta_init: 0.15, target_nats_per_sequence: {target:g}, horizon_samples: {horizon}}}"
        )
        lines = (f"learner.kl={section}",)
        change = f"Let β follow the KL, to a target of {target:g} nats per answer"
    return Recommendation(
        change,
        "The policy stays closer to the reference: the reward model's score ends lower, and true gains that lie "
        "farther away are out of reach.",
        lines,
    )


def hold_by_fixed_beta(record: RunRecord) -> Recommendation:
    """A constant β that outweighs the gain in score at the distance where the run went wrong."""
    found = objective(record)
    now = found.beta if found else record.setting_number("learner.kl.beta", 0.0)
    wanted = found.score_gain / found.kl if found and found.kl > 1.0 else 0.1
    beta = round(min(max(wanted, 2 * now, 0.05), 1.0), 2)
    return Recommendation(
        f"Fix β at {beta:g}, at which the penalty weighs as much as the score's gain where the run ended up",
        "One number for the whole run: too strong at the start, when the reward model can still be trusted, and no "
        "answer to a reward whose scale changes.",
        (f"learner.kl={{kind: fixed, beta: {beta:g}}}",),
    )


def good_distance(record: RunRecord) -> float:
    """The KL at which gold (else the judge's win rate) was best, within 1 and 6 nats; 3 where neither is known."""
    import numpy as np

    kl, gold = record.values("kl_nats_per_sequence"), record.values("gold_mean")
    both = np.flatnonzero(~(np.isnan(kl) | np.isnan(gold)))
    if len(both) < 6:
        return _TARGET
    width = 3
    means = np.convolve(gold[both], np.ones(width) / width, mode="valid")
    best = int(np.argmax(means)) + width // 2
    return round(float(np.clip(kl[both[best]], 1.0, 6.0)), 1)


def half_the_learning_rate(record: RunRecord) -> Recommendation:
    rate = record.setting_number("learner.policy.learning_rate", 2e-4) / 2
    return Recommendation(
        f"Halve the policy's learning rate, to {rate:g}",
        "Twice as many steps for the same distance.",
        (f"learner.policy.learning_rate={rate:.3g}",),
    )


def smaller_steps(record: RunRecord) -> Recommendation:
    bound = record.setting_number("learner.max_step_kl_nats_per_token", 0.05) / 2
    return Recommendation(
        f"Stop each update at {bound:g} nats per token from where it began",
        "More updates end early; a batch teaches less.",
        (f"learner.max_step_kl_nats_per_token={bound:.3g}",),
    )


def movement_budget(record: RunRecord) -> Recommendation:
    total = _moved_before_it_was_far(record)
    lines = [f"learner.kl_budget.cumulative_nats_per_sequence={total:g}"]
    widen = record.setting("learner.kl.kind") in ("adaptive", "constrained")
    if widen:
        lines += ["learner.kl_budget.start=0.5", "learner.kl_budget.widen_steps=30"]
    return Recommendation(
        f"End training when the policy has moved {total:g} nats in all" + (", and widen the KL target slowly" * widen),
        "The clip bounds each step, this bounds their sum; a run that still improves ends too.",
        tuple(lines),
    )


def _moved_before_it_was_far(record: RunRecord) -> float:
    """What the updates moved before the KL passed its threshold; four good distances where that is unknown."""
    found = crossing(record, "kl_nats_per_sequence")
    moved = record.values("kl_cumulative_nats_per_sequence")
    here = known(moved[record.steps < found.first_step]) if found is not None else moved[:0]
    return round(float(here[-1]), 1) if len(here) and here[-1] >= 1.0 else 4 * good_distance(record)


def guard_that_acts(record: RunRecord) -> Recommendation:
    return Recommendation(
        "Let the guard raise β and go back to the last good checkpoint",
        "Steps after that checkpoint are lost, and a false alarm costs them too.",
        ("guard.enabled=true", "guard.actions=[alert, raise_beta, roll_back]"),
    )


def firmer_guard(record: RunRecord) -> Recommendation:
    factor = max(4.0, 2 * record.setting_number("guard.beta_factor", 2.0))
    floor = max(0.1, 2 * record.setting_number("guard.beta_floor", 0.05))
    return Recommendation(
        f"Raise β more after each alarm: by {factor:g}, to {floor:g} at least",
        "The policy learns less after a rollback.",
        (f"guard.beta_factor={factor:g}", f"guard.beta_floor={floor:g}"),
    )


def refresh_the_rm(record: RunRecord) -> Recommendation:
    judge = "" if record.setting("collect.judge") or record.setting("rm.refresh.judge") else "judge: review, "
    return Recommendation(
        "Refresh the reward model on judged answers of the current policy, as soon as it and the judge part",
        "Each refresh asks for judgements and takes time; training waits for it.",
        (f"rm.refresh={{{judge}every_versions: 8, disagreement_over: 0.35, wait_after_versions: 2}}",),
    )


def ensemble(record: RunRecord) -> Recommendation:
    return Recommendation(
        "Three reward models instead of one, and their mean less their spread as the reward",
        "Three times the work of training and scoring; what all of them like wrongly still passes.",
        ("rm.members=3", "reward.aggregation=mean_minus_std"),
    )


def length_penalty(record: RunRecord) -> Recommendation:
    return Recommendation(
        "Take 0.01 off the normalised score for each token",
        "Long answers that are right lose too; it treats the sign, not the reward model.",
        ("learner.length_penalty_per_token=0.01",),
    )


def balance_length(record: RunRecord) -> Recommendation:
    return Recommendation(
        "Train the reward model on pairs balanced by which answer is longer",
        "A new reward model, and fewer distinct pairs in each epoch.",
        ("rm.rebalance=stratified",),
    )


def constitution(record: RunRecord, *, what: str) -> Recommendation:
    return Recommendation(
        f"A hard rule against it, in a constitution, rules.yaml, which you write: {what}",
        "The policy looks for the next gap; answers in which it is right are punished too.",
        ("reward.constitution=rules.yaml",),
    )


def entropy_bonus(record: RunRecord) -> Recommendation:
    bonus = max(0.005, 2 * record.setting_number("learner.entropy_bonus", 0.0))
    return Recommendation(
        f"An entropy bonus of {bonus:g}",
        "Noisier answers; too much of it, and the policy rambles.",
        (f"learner.entropy_bonus={bonus:g}",),
    )


def without_other_sources(record: RunRecord) -> Recommendation | None:
    """Leave out the functions and servers among the reward's sources. None where there are none."""
    sources = record.setting("reward.sources", [])
    others = [one for one in sources if isinstance(one, dict) and one.get("kind") != "model"] if sources else []
    if not others:
        return None
    names = ", ".join(str(one.get("path") or one.get("url") or one.get("kind")) for one in others)
    kept: list[Any] = [one for one in sources if isinstance(one, dict) and one.get("kind") == "model"]
    return Recommendation(
        f"Look at what {names} pays for, and train without it until it is mended",
        "What it was there to reward is not rewarded meanwhile.",
        (f"reward.sources={json.dumps(kept or [{'kind': 'model'}])}",),
    )


def lower_score_clip(record: RunRecord) -> Recommendation:
    clip = min(3.0, record.setting_number("learner.score_clip", 5.0) / 2)
    return Recommendation(
        f"Clip normalised scores at ±{clip:g}",
        "Outstanding answers count no more than good ones.",
        (f"learner.score_clip={clip:g}",),
    )


def freeze_the_rm(record: RunRecord) -> Recommendation:
    """Where it is refreshed at all."""
    if record.setting("rm.refresh") is None:
        return guard_that_acts(record)
    return Recommendation(
        "Have the guard freeze the reward model when its scale moves, and go back",
        "A reward model that is not refreshed can be gamed; the freeze ends after guard.freeze_versions.",
        ("guard.enabled=true", "guard.actions=[alert, freeze_rm, raise_beta, roll_back]"),
    )


def longer_answers(record: RunRecord) -> Recommendation:
    most = int(record.setting_number("data.max_response_tokens", 64))
    prompt = int(record.setting_number("data.max_prompt_tokens", 16))
    lines = [f"data.max_response_tokens={2 * most}"]
    positions = int(record.setting_number("model.max_position_embeddings", 256))
    if record.setting("model.kind", "new") == "new" and positions < prompt + 2 * most:
        lines.append(f"model.max_position_embeddings={prompt + 2 * most}")
    return Recommendation(
        f"Allow answers of {2 * most} tokens",
        "A new run: the fine-tuned model and its data change. Generation and updates take longer.",
        tuple(lines),
    )


def missing_end_penalty(record: RunRecord) -> Recommendation:
    penalty = 2 * max(record.setting_number("learner.missing_eos_penalty", 1.0), 0.5)
    return Recommendation(
        f"Take {penalty:g} off the normalised score of an answer that was cut off",
        "Answers get shorter, also where length is needed.",
        (f"learner.missing_eos_penalty={penalty:g}",),
    )


# ---------------------------------------------------------------- merging


def merged(matches: Sequence[Match], record: RunRecord) -> list[tuple[Recommendation, list[str]]]:
    """(recommendation, names of the patterns it is for), those of the first match first. One that sets a key that an
    earlier one sets otherwise is left out, and so is one that the run's own settings do not take."""
    chosen: list[tuple[Recommendation, list[str]]] = []
    lines: list[str] = []
    for match in matches:
        for recommendation in match.recommendations:
            same = next((names for one, names in chosen if one.lines == recommendation.lines), None)
            if same is not None:
                same.append(match.name)
            elif not _contradicts(recommendation.lines, lines) and fits(record, [*lines, *recommendation.lines]):
                chosen.append((recommendation, [match.name]))
                lines += [line for line in recommendation.lines if line not in lines]
    return chosen


def _contradicts(new: Iterable[str], old: Sequence[str]) -> bool:
    """A key set to something else, or a section set as a whole beside a key in it."""
    for line in new:
        key = line.partition("=")[0]
        for other in old:
            earlier = other.partition("=")[0]
            overlap = key == earlier or key.startswith(f"{earlier}.") or earlier.startswith(f"{key}.")
            if overlap and line != other:
                return True
    return False


def fits(record: RunRecord, lines: Sequence[str]) -> bool:
    """Whether the run's configuration takes these lines. Without a readable configuration: whether the demo's does."""
    try:
        if not record.config:
            load_config("demo", overrides=lines)
            return True
        with TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(dump_yaml(record.config), encoding="utf-8")
            load_config(path, overrides=lines)
    except ConfigError:
        return False
    return True
