"""Held-out evaluation: the same prompts answered by the SFT policy, by PPO's final one and by DPO's, and scored."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.files import atomic_write_text
from cluster.plugin import resolve
from cluster.reward_models import RewardModels
from cluster.supervise import RolePool
from keel.roles import Roles
from keel.runtime import Runtime
from keel.sampling import answer_all, load_questions

Tag = Literal["sft", "final", "dpo"]
"""Which policy: before training, PPO's last, DPO's."""


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
    kl = {"kl_nats_per_sequence": 0.0, "kl_standard_error": 0.0}  # of the SFT policy to itself
    if tag != "sft":
        reference = str(run.path / "sft" / "model")
        kl = runtime.call(_sequence_kl, str(model_dir), reference, sequences, config.rollout.temperature)
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
        **kl,
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
    reward = roles.reward()
    reward.wait_ready(runtime.tick)
    rewards: list[float] = runtime.wait(reward.handles[0].score.remote(sequences, version=scoring.version))
    for row, raw in zip(rows, rewards, strict=True):
        row["reward"] = raw
    calibration = scoring.manifest.calibration
    z = None if calibration is None else (statistics.fmean(rewards) - calibration.mean) / max(calibration.std, 1e-8)
    return {"reward_raw": _mean(rows, "reward"), "proxy_z": z, "rm_version": scoring.version}


def _sequence_kl(
    model_dir: str, ref_dir: str, sequences: Sequence[tuple[list[int], list[int]]], temperature: float
) -> dict[str, float]:
    from learner.evaluate import sequence_kl

    return sequence_kl(model_dir, ref_dir=ref_dir, sequences=sequences, temperature=temperature)


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
