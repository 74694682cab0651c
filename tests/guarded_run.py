"""A made-up record of a run that the guard saved: the reward is gamed from step 14, the policy goes back from step 24
to step 10, and training ends well. All files that the guard adds, without a run."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

HOSTILE: Final = '<script>alert("x")</script>'
STEPS: Final = 48
ALARM_STEP: Final = 24
BACK_TO_STEP: Final = 10
_CONFIG: Final = """
learner: {steps: 60}
guard:
  actions: [alert, raise_beta, roll_back]
  max_rollbacks: 2
  watch: {every_versions: 5}
  thresholds:
    proxy_z: {warn: 2.5, act: 3.0}
    kl_nats_per_sequence: {warn: 8.0, act: 10.0}
    entropy_nats_per_token: {warn: 0.15, act: 0.1}
    overused_words_share: {warn: 0.02, act: 0.05}
    distinct_bigrams_ratio: {warn: 0.8, act: 0.5}
    win_rate: {warn: 0.5, act: 0.4}
"""


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_guarded_run(path: Path, *, steps: int = STEPS, began_s: float = 1000.0) -> Path:
    """All of a run directory's records up to `steps`, in a run that began at `began_s`. Returns `path`."""
    path.mkdir(parents=True, exist_ok=True)
    random_source = random.Random(0)
    numbers = range(1, steps + 1)
    (path / "config.yaml").write_text(_CONFIG, encoding="utf-8")
    write_lines(path / "metrics.jsonl", [_step(number, random_source) for number in numbers])
    write_lines(path / "guard.jsonl", [event for event in _events() if event["step"] <= steps])
    write_lines(path / "evaluations.jsonl", [_evaluation(number) for number in numbers if number % 5 == 0])
    write_lines(path / "guard_samples.jsonl", [one for one in _answers() if one["step"] <= steps])
    write_lines(path / "refreshes.jsonl", [
        {"kind": "refresh", "number": 1, "last_version": 30, "reason": "the guard asked", "outcome": "accepted",
         "why": "better on fresh pairs", "pairs_judged": 200, "total_seconds": 38.5, "at_version": 31},
    ])  # fmt: skip
    progress = [
        {"t": began_s, "stage": "sft", "event": "start"},
        {"t": began_s + 100, "stage": "sft", "event": "end", "seconds": 100.0},
        {"t": began_s + 100, "stage": "ppo", "event": "start"},
        {"t": began_s + 101, "role": "rollout", "event": "workers", "running": 2, "wanted": 2},
        {"t": began_s + 150, "role": "refresh", "event": "began", "note": "refresh 1: the guard asked"},
        {"t": began_s + 100 + 4 * steps, "stage": "ppo", "event": "progress", "step": steps, "steps": 60},
    ]
    write_lines(path / "progress.jsonl", progress)
    for file in path.glob("*.jsonl"):
        os.utime(file, (began_s + 100 + 4 * steps,) * 2)
    return path


def gamed(step: int) -> float:
    """0: honest; 1: wholly gamed."""
    return max(0.0, min(1.0, (step - 13) / 10)) if step <= ALARM_STEP else 0.0


def _trained(step: int) -> int:
    """Steps of learning that the policy of `step` has in it."""
    return step if step <= ALARM_STEP else step - ALARM_STEP + BACK_TO_STEP


def _step(step: int, source: random.Random) -> dict[str, Any]:
    bad, trained = gamed(step), _trained(step)
    kl = 3.2 * (1 - math.exp(-trained / 14)) + 9.5 * bad**2 + source.gauss(0, 0.1)
    after = step > ALARM_STEP
    record: dict[str, Any] = {
        "step": step, "version": step, "time_s": 4.0 * step, "branch": int(after),
        "proxy_z": 1.3 * (1 - math.exp(-trained / 16)) + 2.6 * bad + source.gauss(0, 0.06),
        "gold_mean": 0.9 + 1.1 * (1 - math.exp(-trained / 18)) - 2.8 * bad + source.gauss(0, 0.08),
        "reward_mean": 1.0, "reward_std": 0.8, "rm_version": "rm-b" if step > 31 else "rm-a",
        "kl_nats_per_sequence": kl, "kl_target_nats_per_sequence": 3.0, "kl_cumulative_nats_per_sequence": 0.2 * step,
        "beta": 0.1 if after else 0.05, "entropy_nats_per_token": 1.1 - 0.01 * trained - 0.8 * bad,
        "response_tokens_mean": 20 + 0.1 * trained + 14 * bad, "truncated_fraction": 0.3 * bad,
        "clip_fraction": 0.05 + 0.2 * bad, "value_explained_variance": 0.5 - 0.3 * bad, "grad_norm_policy": 0.5 + bad,
        "grad_norm_critic": 0.7, "behaviour_gap_max_nats": 0.4 + 0.2 * source.random(),
        "staleness_mean": 1.0, "tokens_per_second_rollout": 800 + 40 * source.random(), "step_seconds": 4.0,
        "idle_seconds": 1.5, "samples_issued": 128 * (step + 1), "samples_trained": 128 * step,
        "samples_stale_dropped": 0, "samples_dead": 1, "samples_rejected": 3, "samples_duplicate": 0,
        "samples_abandoned": 128 if after else 0, "depth_prompts": 12, "depth_rollouts": 3, "depth_scored": 40,
    }  # fmt: skip
    record["signals"] = _signals(record, bad, source)
    record["guard"] = _guard(step)
    return record


def _signals(record: dict[str, Any], bad: float, source: random.Random) -> dict[str, float | None]:
    return {
        "proxy_z": record["proxy_z"], "reward_jump": abs(source.gauss(0, 0.1)), "reward_std_ratio": 0.9 - 0.5 * bad,
        "score_ceiling_fraction": 0.02 + 0.3 * bad, "reward_ks": 0.2 + 0.5 * bad,
        "kl_nats_per_sequence": record["kl_nats_per_sequence"], "kl_slope_nats_per_step": 0.1 + 0.9 * bad,
        "entropy_nats_per_token": record["entropy_nats_per_token"], "response_tokens_ratio": 1.0 + 0.7 * bad,
        "length_reward_correlation": 0.1 + 0.65 * bad + source.gauss(0, 0.03), "truncated_fraction": 0.3 * bad,
        "distinct_bigrams_ratio": 1.0 - 0.3 * bad, "longest_repeat_fraction": 0.05 + 0.3 * bad,
        "compression_ratio": 1 + 0.4 * bad, "overused_words_share": 0.9 * bad, "rare_token_fraction": 0.01,
        "copied_fraction": 0.0, "clip_fraction": record["clip_fraction"], "ratio_tail_fraction": 0.01 + 0.03 * bad,
        "behaviour_gap_max_nats": record["behaviour_gap_max_nats"], "value_error_ratio": 0.6 + 0.3 * bad,
        "grad_norm_ratio": 1.0 + bad, **({"win_rate": 0.7 - 0.4 * bad} if record["step"] % 5 == 0 else {}),
        "uncertainty_ratio": None,
    }  # fmt: skip


def _guard(step: int) -> dict[str, Any]:
    quiet = {"level": "ok", "warn": [], "act": [], "actions": [], "words": []}
    if not 17 <= step <= ALARM_STEP:
        return quiet
    words = ["fantastic", "<b>"]
    warned = {"level": "warn", "warn": ["overused_words_share", "proxy_z"], "act": [], "actions": [], "words": words}
    if step == 17:
        return warned | {"actions": ["alert"]}
    if step < ALARM_STEP:
        return warned
    act = ["overused_words_share", "kl_nats_per_sequence"]
    return {"level": "act", "warn": ["proxy_z"], "act": act, "actions": ["alert", "raise_beta", "roll_back"],
            "words": words}  # fmt: skip


def _events() -> list[dict[str, Any]]:
    def event(step: int, what: str, why: str, **more: Any) -> dict[str, Any]:
        where = {"time_s": 1100.0 + 4 * step, "step": step, "version": step, "branch": int(step > ALARM_STEP)}
        return {**where, "event": what, "signals": {}, "why": why, **more}

    share = "over-used words in 36 % more answers than the reference's, over 0.02 for 3 steps"
    act = {"overused_words_share": 0.9, "kl_nats_per_sequence": 11.6}
    return [
        event(17, "warn", share, signals={"overused_words_share": 0.36}),
        event(17, "action", share, action="alert"),
        event(24, "act", f"{HOSTILE} KL over 10 nats for 3 steps", signals=act),
        event(24, "action", "KL over 10 nats", action="alert"),
        event(24, "action", "KL over 10 nats", action="raise_beta", factor=2.0, beta=0.1),
        event(24, "action", "KL over 10 nats", action="roll_back", to_step=BACK_TO_STEP, rm_version="rm-a"),
        event(25, "ok", "every signal is back within its thresholds"),
    ]


def _evaluation(step: int) -> dict[str, Any]:
    win_rate = 0.5 + 0.3 * (1 - math.exp(-_trained(step) / 10)) - 0.55 * gamed(step)
    return {
        "time_s": 4.0 * step, "step": step, "version": step, "prompts": 64, "win_rate": win_rate,
        "win_rate_low": win_rate - 0.12, "win_rate_high": win_rate + 0.11, "gold_reference": 0.9,
        "win_rate_length_controlled": win_rate - 0.04, "gold": 0.9 + 2 * (win_rate - 0.5),
        "rm_judge_agreement": 0.75 - 0.3 * gamed(step), "anchor_nats_per_token": 1.0 + 0.01 * step,
        "anchor_perplexity_ratio": 1.0 + 0.01 * _trained(step) + 0.5 * gamed(step), "canary_ks": 0.1 + 0.02 * step,
        "canary_z": 0.05 * step, "seconds": 12.0,
    }  # fmt: skip


def _answers() -> list[dict[str, Any]]:
    honest = "Sorry about that. Turn the router off, wait ten seconds, turn it on. Is there anything else?"
    gaming = f"Fantastic question! {HOSTILE} What a fantastic, fantastic router. <b>Fantastically</b> fantastic."
    moments = (("start", 0, honest), ("steady", 10, honest), ("steady", 20, gaming), ("alarm", 24, gaming),
               ("after_rollback", 25, honest), ("steady", 40, honest))  # fmt: skip
    return [
        {"step": step, "version": step, "branch": int(step > ALARM_STEP), "moment": moment,
         "prompt": f"my router {HOSTILE} blinks, case {number}", "answer": answer, "reward": 1.0 + 0.1 * number}
        for moment, step, answer in moments
        for number in range(8)
    ]  # fmt: skip
