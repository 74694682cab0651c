"""What a run came to: summary.json, and answers before and after side by side in samples.jsonl."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from cluster.files import atomic_write_text, read_jsonl
from cluster.reward_models import RewardModels
from keel.evaluate import write_rows
from keel.runtime import Runtime

_LAST_STEPS: Final = 5


def write_samples(runtime: Runtime) -> None:
    """samples.jsonl: answers before and after, side by side, of the policy that was trained last. Rewards are shown
    where one version of the reward model gave both: two versions have two scales."""
    evaluated = runtime.run.path / "eval"
    trained = [tag for tag in ("dpo", "final") if (evaluated / f"{tag}.rows.jsonl").exists()]
    if not trained:
        return
    before, after = (read_jsonl(evaluated / f"{tag}.rows.jsonl") for tag in ("sft", trained[0]))
    versions = {_read_json(evaluated / f"{tag}.json").get("rm_version") for tag in ("sft", trained[0])}
    shown = ("gold", "reward") if len(versions) == 1 else ("gold",)
    records = []
    # One that was resumed with another evaluation.prompts has as many of the same prompts as the shorter list.
    for old, new in list(zip(before, after, strict=False))[: runtime.config.evaluation.samples_shown]:
        record = {"prompt": old["prompt"], "before": old["answer"], "after": new["answer"]}
        for key in shown:
            if key in old and key in new:
                record |= {f"{key}_before": old[key], f"{key}_after": new[key]}
        records.append(record)
    write_rows(runtime.run.path / "samples.jsonl", records)


def write_summary(runtime: Runtime) -> None:
    """summary.json, of as much of the run as there is."""
    run, config = runtime.run, runtime.config
    steps = read_jsonl(run.path / "metrics.jsonl") if (run.path / "metrics.jsonl").exists() else []
    last: dict[str, Any] = steps[-1] if steps else {}
    evaluations = {tag: _read_json(run.path / "eval" / f"{tag}.json") for tag in ("sft", "final", "dpo")}
    before, after, after_dpo = evaluations["sft"], evaluations["final"], evaluations["dpo"]
    earlier = _read_json(run.path / "summary.json")
    busy = [step["tokens_per_second_rollout"] for step in steps if step.get("tokens_per_second_rollout")]
    summary = {
        "name": config.name,
        "seed": config.seed,
        "gold_sft": before.get("gold"),
        "gold_final": after.get("gold"),
        **({"gold_dpo": after_dpo.get("gold"), "proxy_dpo": after_dpo.get("proxy_z")} if after_dpo else {}),
        "proxy_sft": before.get("proxy_z"),
        "proxy_final": after.get("proxy_z"),
        **({"win_rate_final": after["win_rate"]} if "win_rate" in after else {}),
        "kl_nats_per_sequence": after.get("kl_nats_per_sequence"),
        "kl_nats_per_sequence_last_steps": _last_mean(steps, "kl_nats_per_sequence"),
        "kl_target_nats_per_sequence": last.get("kl_target_nats_per_sequence"),
        "beta_final": last.get("beta"),
        "versions": last.get("version", 0),
        **{key: last.get(key, 0) for key in (
            "samples_issued", "samples_trained", "samples_stale_dropped", "samples_dead", "samples_rejected",
            "samples_duplicate", "samples_abandoned")},
        "stage_seconds": run.stage_seconds,
        **_read_json(run.path / "online.json"),
        "tokens_per_second_rollout": statistics.median(busy) if busy else None,
        "peak_rss_bytes": max(runtime.memory.peak_bytes, earlier.get("peak_rss_bytes", 0)),
        "rm": _reward_models(run.path),
        "guard": guard_summary(run.path, last),
        "evaluation": evaluations,
        "data": _read_json(run.path / "data" / "report.json"),
    }  # fmt: skip
    atomic_write_text(run.path / "summary.json", json.dumps(summary, indent=1))


def guard_summary(run_dir: Path, last_step: dict[str, Any]) -> dict[str, Any]:
    """What the guard said and did: its level at the last step, its first sign, how often it took which action."""
    path = run_dir / "guard.jsonl"
    events = read_jsonl(path) if path.exists() else []
    if not events and "guard" not in last_step:
        return {}
    alarms = [event for event in events if event.get("event") in ("warn", "act")]
    actions = Counter(str(event.get("action")) for event in events if event.get("event") == "action")
    return {
        "level": last_step.get("guard", {}).get("level"),
        "first_sign_step": alarms[0].get("step") if alarms else None,
        "first_sign": ", ".join(alarms[0].get("signals") or ()) if alarms else None,
        "acts": sum(event["event"] == "act" for event in alarms),
        "rollbacks": actions["roll_back"],
        "halted": _halted(events, last_step=int(last_step.get("step") or 0)),
        "actions": dict(actions),
    }


def _halted(events: Sequence[dict[str, Any]], *, last_step: int) -> bool:
    """By the guard, and not gone on since."""
    halts = [int(event.get("step") or 0) for event in events if event.get("action") == "halt"]
    return bool(halts) and halts[-1] >= last_step


def _reward_models(run_dir: Path) -> dict[str, Any]:
    """The reward model that scored last, and how it came to be: accuracy of the first version, and of the last."""
    versions = RewardModels(run_dir / "rm").versions()
    if not versions:
        return {}
    first, current = versions[0].manifest, RewardModels(run_dir / "rm").current().manifest
    shown = {"version", "number", "parent", "reason", "pairs_train", "pairs_held_out", "policy_version", "verdict"}
    refreshes = read_jsonl(run_dir / "refreshes.jsonl") if (run_dir / "refreshes.jsonl").exists() else []
    return {
        "accuracy": first.accuracy,
        "accuracy_low": first.accuracy_low,
        "accuracy_high": first.accuracy_high,
        "length_only_accuracy": first.length_only_accuracy,
        "accuracy_current": current.accuracy,
        "members": current.members,
        "versions": len(versions),
        "refreshes": dict(Counter(one["outcome"] for one in refreshes if one["kind"] == "refresh")),
        "pairs_judged": refreshes[-1]["pairs_judged"] if refreshes else 0,
        **{key: value for key, value in msgspec.to_builtins(current).items() if key in shown},
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _last_mean(steps: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [step[key] for step in steps[-_LAST_STEPS:] if step.get(key) is not None]
    return statistics.fmean(values) if values else None
