"""Held-out evaluation: the same prompts answered by the SFT policy, by PPO's final one and by DPO's, and scored; the
trained ones' answers compared with the SFT policy's by a judge, where a function judges in this run."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.files import atomic_write_text
from cluster.plugin import resolve
from cluster.reward_models import RewardModels
from cluster.supervise import RolePool
from configs.guard import WatchSection
from configs.run import RunConfig
from keel.background import in_background
from keel.comparison import Reference, function_judge, outcomes, reference_answers
from keel.roles import Roles
from keel.runtime import Runtime
from keel.sampling import Answer, Question, answer_all, load_questions
from keel.winrate import perplexity_ratio, versus_fields
from reward_service.preferences import Judge

log = logging.getLogger(__name__)

Tag = Literal["sft", "final", "dpo"]
"""Which policy: before training, PPO's last, DPO's."""
JUDGE_TIMEOUT_S = 1800.0
"""A judge that has not compared all answers by then costs the win rate, not the run."""
_POLL_S = 0.1


def evaluate_run(runtime: Runtime, roles: Roles) -> None:
    """Every trained policy that this run has, beside the SFT policy's answers to the same prompts."""
    run, stages = runtime.run.path, runtime.config.stages
    if not (run / "eval" / "sft.json").exists():
        _with_weights_of(run / "sft" / "model", runtime, roles, tag="sft")
        roles.stop("rollout")
    if (run / "policy" / "final").is_dir():
        evaluate_policy(runtime, roles, tag="final", model_dir=run / "policy" / "final")
    if "dpo" in stages:
        _with_weights_of(run / "dpo" / "model", runtime, roles, tag="dpo")


def _with_weights_of(model_dir: Path, runtime: Runtime, roles: Roles, *, tag: Tag) -> None:
    """Engines that are up hold another policy's weights: start them again."""
    roles.stop("rollout")
    evaluate_policy(runtime, roles, tag=tag, model_dir=model_dir)


def evaluate_policy(runtime: Runtime, roles: Roles, *, tag: Tag, model_dir: Path) -> None:
    """Answer the held-out prompts with the policy in `model_dir`, score them, and write eval/<tag>.json.

    Raises DeadlineError when a rollout actor does not come to hold those weights.
    """
    config, run = runtime.config, runtime.run
    rollout = roles.rollout(model_dir)
    rollout.wait_ready(runtime.tick)
    if tag == "final":
        _hold_final_weights(runtime, rollout)
    questions = load_questions(config, run.path, table="eval_prompts", limit=config.evaluation.prompts)
    answers = answer_all(
        runtime, rollout, questions, stage="evaluate", temperature=config.rollout.temperature, newest=tag == "final"
    )
    sequences = [(question.token_ids, answer.token_ids) for question, answer in zip(questions, answers, strict=True)]
    moved = {"kl_nats_per_sequence": 0.0, "kl_standard_error": 0.0}  # of the SFT policy to itself
    if tag != "sft":
        moved = runtime.call(distances, config, run.path, model_dir, sequences)
    rows: list[dict[str, Any]] = [
        {"prompt": question.text, "answer": answer.text, "truncated": answer.truncated}
        for question, answer in zip(questions, answers, strict=True)
    ]
    scores = _score(runtime, roles, sequences, rows)
    if config.evaluation.gold is not None:
        gold = resolve(config.evaluation.gold, key="evaluation.gold")
        for row, question in zip(rows, questions, strict=True):
            row["gold"] = float(gold(question.record.prompt, row["answer"]))
    summary = {
        "prompts": len(rows),
        "gold": _mean(rows, "gold"),
        "gold_standard_error": _standard_error(rows, "gold"),
        **scores,
        "response_tokens": statistics.fmean(len(answer.token_ids) for answer in answers),
        "truncated_fraction": statistics.fmean(answer.truncated for answer in answers),
        **moved,
        **({} if tag == "sft" else _against_reference(runtime, roles, questions, answers)),
    }
    (run.path / "eval").mkdir(exist_ok=True)
    write_rows(run.path / "eval" / f"{tag}.rows.jsonl", rows)
    atomic_write_text(run.path / "eval" / f"{tag}.json", json.dumps(summary, indent=1))


def _score(
    runtime: Runtime, roles: Roles, sequences: Sequence[tuple[list[int], list[int]]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The reward model's view of the answers, put into their rows too; nothing where none is asked in this run."""
    models = RewardModels(runtime.run.path / "rm")
    if not runtime.config.reward.needs_model or not models.exists():
        return {}
    scoring = models.current()
    rewards = _rewards(runtime, roles, sequences, version=scoring.version)
    for row, raw in zip(rows, rewards, strict=True):
        row["reward"] = raw
    calibration = scoring.manifest.calibration
    z = None if calibration is None else (statistics.fmean(rewards) - calibration.mean) / max(calibration.std, 1e-8)
    return {"reward_raw": _mean(rows, "reward"), "proxy_z": z, "rm_version": scoring.version}


def _rewards(
    runtime: Runtime, roles: Roles, sequences: Sequence[tuple[list[int], list[int]]], *, version: str
) -> list[float]:
    reward = roles.reward()
    reward.wait_ready(runtime.tick)
    rewards: list[float] = runtime.wait(reward.handles[0].score.remote(sequences, version=version))
    return rewards


def _against_reference(
    runtime: Runtime, roles: Roles, questions: Sequence[Question], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Win rate over the SFT policy's answers, and what else a comparison tells. A judge that fails costs a run no more
    than that."""
    config = runtime.config
    judge = function_judge(config)
    known = {one.question.record.prompt_id: one for one in reference_answers(config, runtime.run.path)}
    pairs = [
        (answer, known[question.record.prompt_id])
        for question, answer in zip(questions, answers, strict=True)
        if question.record.prompt_id in known
    ]
    if judge is None or not pairs:
        return {}
    job = in_background(lambda: compare(pairs, judge=judge, seed=config.seed), name="judge")
    until_s = time.monotonic() + JUDGE_TIMEOUT_S
    while not job.done() and time.monotonic() < until_s:
        runtime.tick()
        time.sleep(_POLL_S)
    try:
        found = job.result(timeout=0.0)
    except TimeoutError:
        note = f"no win rate: the judge did not answer {len(pairs)} questions in {JUDGE_TIMEOUT_S:.0f} s"
        runtime.run.emit(role="evaluate", event="failed", note=note)
        return {}
    except Exception as error:  # The judge is the user's function: it may raise anything.
        log.exception("the judge failed")
        runtime.run.emit(role="evaluate", event="failed", note=f"no win rate: the judge failed: {error}")
        return {}
    models = RewardModels(runtime.run.path / "rm")
    margins: list[float] | None = None
    if config.reward.needs_model and models.exists():
        sequences = both_sides(pairs)
        rewards = _rewards(runtime, roles, sequences, version=models.current().version)
        margins = [mine - other for mine, other in zip(rewards[::2], rewards[1::2], strict=True)]
    return versus_fields(found, token_differences=token_differences(pairs), reward_margins=margins)


def compare(pairs: Sequence[tuple[Answer, Reference]], *, judge: Judge, seed: int) -> list[float | None]:
    """Outcomes, by the judge, of answers against the reference's to the same prompts."""
    return outcomes(
        [reference.question.record.prompt for _, reference in pairs],
        answers=[answer.text for answer, _ in pairs],
        references=[reference.text for _, reference in pairs],
        judge=judge,
        seed=seed,
    )


def both_sides(pairs: Sequence[tuple[Answer, Reference]]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of each answer, and next to it of the reference's."""
    return [
        (reference.question.token_ids, ids)
        for answer, reference in pairs
        for ids in (answer.token_ids, reference.token_ids)
    ]


def token_differences(pairs: Sequence[tuple[Answer, Reference]]) -> list[float]:
    """Length of each answer less the reference's."""
    return [float(len(answer.token_ids) - len(reference.token_ids)) for answer, reference in pairs]


def distances(
    config: RunConfig, run_dir: Path, model_dir: Path, sequences: Sequence[tuple[list[int], list[int]]]
) -> dict[str, Any]:
    """How far the policy in `model_dir` is from the SFT policy: KL on its own answers, and perplexity of held-out
    demonstrations. Loads both; the driver calls it in a process of its own."""
    from learner.evaluate import nats_per_token, sequence_kl
    from learner.held_out import held_out_texts

    reference = run_dir / "sft" / "model"
    found: dict[str, Any] = sequence_kl(
        model_dir, ref_dir=reference, sequences=sequences, temperature=config.rollout.temperature
    )
    watch = config.guard.watch or WatchSection()
    texts = held_out_texts(config, run_dir, limit=watch.anchor_texts)
    if texts is not None:
        now, before = (nats_per_token(one, sequences=texts.sequences) for one in (model_dir, reference))
        found |= {"anchor_nats_per_token": now, "anchor_perplexity_ratio": perplexity_ratio(now, before=before)}
    return found


def _hold_final_weights(runtime: Runtime, rollout: RolePool) -> None:
    """Actors that ran online still take updates: wait until each has the newest. Others booted from the directory."""
    waiting = [handle.sync_to_newest.remote() for handle in rollout.handles]
    for reference in waiting:
        runtime.wait(reference)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return statistics.fmean(values) if values else None


def _standard_error(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
