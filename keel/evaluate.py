"""Held-out evaluation: the same prompts answered by the SFT policy and by the final one, scored and compared."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.files import atomic_write_text, read_jsonl
from cluster.plugin import resolve
from cluster.supervise import RolePool
from keel.roles import Roles
from keel.runtime import Runtime
from keel.sampling import answer_all, load_questions

_LAST_STEPS = 5


def evaluate_policy(runtime: Runtime, roles: Roles, *, tag: str, model_dir: Path) -> None:
    """Answer the held-out prompts with the policy in `model_dir`, score them, and write eval/<tag>.json.

    Raises DeadlineError when a rollout actor does not come to hold those weights.
    """
    config, run = runtime.config, runtime.run
    rollout, reward = roles.rollout(model_dir), roles.reward()
    rollout.wait_ready(runtime.tick)
    reward.wait_ready(runtime.tick)
    if tag == "final":
        _hold_final_weights(runtime, rollout)
    questions = load_questions(config, run.path, table="eval_prompts", limit=config.evaluation.prompts)
    answers = answer_all(runtime, rollout, questions, stage="evaluate", temperature=config.rollout.temperature)
    sequences = [(question.token_ids, answer.token_ids) for question, answer in zip(questions, answers, strict=True)]
    rewards: list[float] = runtime.wait(reward.handles[0].score.remote(sequences))
    kl = {"kl_nats_per_sequence": 0.0, "kl_standard_error": 0.0}  # of the SFT policy to itself
    if tag == "final":
        reference = str(run.path / "sft" / "model")
        kl = runtime.call(_sequence_kl, str(model_dir), reference, sequences, config.rollout.temperature)
    rows = [
        {"prompt": question.text, "answer": answer.text, "truncated": answer.truncated, "reward": reward_raw}
        for question, answer, reward_raw in zip(questions, answers, rewards, strict=True)
    ]
    if config.evaluation.gold is not None:
        gold = resolve(config.evaluation.gold, key="evaluation.gold")
        for row, question in zip(rows, questions, strict=True):
            row["gold"] = float(gold(question.record.prompt, row["answer"]))
    calibration = json.loads((run.path / "rm" / "manifest.json").read_text())["calibration"]
    summary = {
        "prompts": len(rows),
        "gold": _mean(rows, "gold"),
        "gold_standard_error": _standard_error(rows, "gold"),
        "reward_raw": _mean(rows, "reward"),
        "proxy_z": (statistics.fmean(rewards) - calibration["mean"]) / max(calibration["std"], 1e-8),
        "response_tokens": statistics.fmean(len(answer.token_ids) for answer in answers),
        "truncated_fraction": statistics.fmean(answer.truncated for answer in answers),
        **kl,
    }
    (run.path / "eval").mkdir(exist_ok=True)
    _write_rows(run.path / "eval" / f"{tag}.rows.jsonl", rows)
    atomic_write_text(run.path / "eval" / f"{tag}.json", json.dumps(summary, indent=1))


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


def write_samples(runtime: Runtime) -> None:
    """samples.jsonl: answers before and after, side by side."""
    before = read_jsonl(runtime.run.path / "eval" / "sft.rows.jsonl")
    after = read_jsonl(runtime.run.path / "eval" / "final.rows.jsonl")
    records = []
    for old, new in list(zip(before, after, strict=True))[: runtime.config.evaluation.samples_shown]:
        record = {"prompt": old["prompt"], "before": old["answer"], "after": new["answer"]}
        for key in ("gold", "reward"):
            if key in old:
                record |= {f"{key}_before": old[key], f"{key}_after": new[key]}
        records.append(record)
    _write_rows(runtime.run.path / "samples.jsonl", records)


def write_summary(runtime: Runtime) -> None:
    """summary.json, of as much of the run as there is."""
    run, config = runtime.run, runtime.config
    steps = read_jsonl(run.path / "metrics.jsonl") if (run.path / "metrics.jsonl").exists() else []
    last: dict[str, Any] = steps[-1] if steps else {}
    evaluations = {tag: _read_json(run.path / "eval" / f"{tag}.json") for tag in ("sft", "final")}
    before, after = evaluations["sft"], evaluations["final"]
    earlier = _read_json(run.path / "summary.json")
    busy = [step["tokens_per_second_rollout"] for step in steps if step.get("tokens_per_second_rollout")]
    summary = {
        "name": config.name,
        "seed": config.seed,
        "gold_sft": before.get("gold"),
        "gold_final": after.get("gold"),
        "proxy_sft": before.get("proxy_z"),
        "proxy_final": after.get("proxy_z"),
        "kl_nats_per_sequence": after.get("kl_nats_per_sequence"),
        "kl_nats_per_sequence_last_steps": _last_mean(steps, "kl_nats_per_sequence"),
        "kl_target_nats_per_sequence": last.get("kl_target_nats_per_sequence"),
        "beta_final": last.get("beta"),
        "versions": last.get("version", 0),
        **{key: last.get(key, 0) for key in (
            "samples_issued", "samples_trained", "samples_stale_dropped", "samples_dead", "samples_duplicate")},
        "stage_seconds": run.stage_seconds,
        **_read_json(run.path / "online.json"),
        "tokens_per_second_rollout": statistics.median(busy) if busy else None,
        "peak_rss_bytes": max(runtime.memory.peak_bytes, earlier.get("peak_rss_bytes", 0)),
        "rm": {key: value for key, value in _read_json(run.path / "rm" / "manifest.json").items() if key != "members"},
        "evaluation": evaluations,
        "data": _read_json(run.path / "data" / "report.json"),
    }  # fmt: skip
    atomic_write_text(run.path / "summary.json", json.dumps(summary, indent=1))


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return statistics.fmean(values) if values else None


def _standard_error(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _last_mean(steps: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [step[key] for step in steps[-_LAST_STEPS:] if key in step]
    return statistics.fmean(values) if values else None
