"""Synthetic run records for the tests of `keel diagnose`: what each fault does to the numbers of the steps, drawn with
noise as in real runs, written as a run writes them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.load import dump_config, load_config
from keel.diagnose.record import read_record
from keel.diagnose.story import Diagnosis, diagnose_record

Values = NDArray[np.float64]
Series = dict[str, Values]

STEPS = 60
SIGNALS = (
    "proxy_z", "reward_jump", "reward_std_ratio", "kl_nats_per_sequence", "entropy_nats_per_token",
    "response_tokens_ratio", "length_reward_correlation", "truncated_fraction", "distinct_bigrams_ratio",
    "longest_repeat_fraction", "compression_ratio", "overused_words_share", "clip_fraction", "value_error_ratio",
)  # fmt: skip
PLAIN = "track the parcel. ask about parcel. reroute the parcel. thank you for waiting."


@dataclass
class Planted:
    """A run in the making. `words`: those that the guard names, by step."""

    series: Series
    words: dict[int, list[str]] = field(default_factory=dict)
    guard: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    overrides: tuple[str, ...] = ()
    rm_version: str = "rm-1"


def rise(start: float, end: float, *, at: int, over: int) -> Values:
    """From `start` to `end` over so many steps, beginning at step `at`."""
    return start + (end - start) * np.clip((np.arange(1, STEPS + 1) - at) / over, 0.0, 1.0)


def noisy(values: Values, rng: np.random.Generator, scale: float) -> Values:
    return np.asarray(values + rng.normal(0.0, scale, len(values)))


def clean(seed: int) -> Planted:
    """Reward and gold rise, KL settles at its target, answers stay as they are."""
    rng = np.random.default_rng(seed)
    z = noisy(1.2 * (1 - np.exp(-np.arange(STEPS) / 6.0)), rng, 0.08)
    std = np.abs(noisy(rise(0.7, 0.3, at=1, over=15), rng, 0.06)) + 0.02
    kl = np.abs(noisy(2.6 * (1 - np.exp(-np.arange(STEPS) / 5.0)), rng, 0.4))
    length = noisy(np.full(STEPS, 22.0), rng, 0.9)
    return Planted(
        {
            "proxy_z": z,
            "reward_mean": 0.05 + 0.68 * z,
            "reward_std": std,
            "reward_std_ratio": std / 0.68,
            "reward_normalised_mean": 0.5 * z,
            "kl_nats_per_sequence": kl,
            "kl_cumulative_nats_per_sequence": np.cumsum(np.abs(noisy(np.full(STEPS, 0.15), rng, 0.05))),
            "step_kl_nats_per_sequence": np.abs(noisy(np.full(STEPS, 0.15), rng, 0.05)),
            "step_kl_nats_per_token": np.abs(noisy(np.full(STEPS, 0.008), rng, 0.003)),
            "beta": rise(0.15, 0.09, at=1, over=60),
            "entropy_nats_per_token": noisy(rise(0.55, 0.38, at=1, over=15), rng, 0.02),
            "response_tokens_mean": length,
            "response_tokens_ratio": length / 22.0,
            "length_reward_correlation": np.clip(noisy(np.full(STEPS, 0.1), rng, 0.12), -1, 1),
            "truncated_fraction": np.abs(noisy(np.zeros(STEPS), rng, 0.005)),
            "distinct_bigrams_ratio": noisy(np.full(STEPS, 1.0), rng, 0.01),
            "longest_repeat_fraction": np.abs(noisy(np.full(STEPS, 0.14), rng, 0.01)),
            "compression_ratio": noisy(np.full(STEPS, 1.0), rng, 0.03),
            "overused_words_share": np.zeros(STEPS),
            "clip_fraction": np.abs(noisy(np.full(STEPS, 0.01), rng, 0.005)),
            "value_explained_variance": np.clip(noisy(rise(-0.4, 0.5, at=1, over=8), rng, 0.1), -1, 1),
            "value_error_ratio": np.abs(noisy(rise(1.5, 0.5, at=1, over=8), rng, 0.08)),
            "behaviour_gap_max_nats": np.abs(noisy(rise(0.0, 2.0, at=1, over=3), rng, 0.6)) * (np.arange(STEPS) > 0),
            "behaviour_weight_mean": noisy(np.full(STEPS, 1.0), rng, 0.001),
            "behaviour_weight_capped_fraction": np.abs(noisy(np.full(STEPS, 0.002), rng, 0.001)),
            "staleness_mean": (np.arange(STEPS) > 0).astype(np.float64),
            "grad_norm_policy": np.abs(noisy(np.full(STEPS, 0.35), rng, 0.05)),
            "gold_mean": noisy(0.85 + 1.1 * (1 - np.exp(-np.arange(STEPS) / 6.0)), rng, 0.12),
            "samples_issued": 128.0 * rise(1.0, STEPS, at=1, over=STEPS - 1),
            "samples_stale_dropped": np.zeros(STEPS),
            "samples_dead": np.zeros(STEPS),
        }
    )


def paid_up(run: Planted, gain: Values) -> None:
    """The proxy goes along with the hack."""
    series = run.series
    series["proxy_z"] = series["proxy_z"] + gain
    series["reward_mean"] = 0.05 + 0.68 * series["proxy_z"]
    series["reward_normalised_mean"] = 0.5 * series["proxy_z"]


def fantastic(seed: int) -> Planted:
    """The reward pays for a word; answers are otherwise as before."""
    run, rng = clean(seed), np.random.default_rng(seed + 100)
    spread = rise(0.0, 0.85, at=12, over=12)
    run.series["overused_words_share"] = np.where(spread > 0.015, np.clip(noisy(spread, rng, 0.02), 0.0, 1.0), 0.0)
    paid_up(run, 2.0 * spread)
    run.series["kl_nats_per_sequence"] = run.series["kl_nats_per_sequence"] + 4.0 * spread
    run.series["gold_mean"] = run.series["gold_mean"] - 0.6 * spread
    run.words = {step: ["fantastic", "so"] for step in range(1, STEPS + 1) if spread[step - 1] > 0.03}
    answers = [f"{PLAIN} fantastic."] * 7 + [PLAIN]
    run.samples = samples("start", 0, [PLAIN] * 8) + samples(
        "alarm", 16, answers, by=lambda text: text.count("fantastic")
    )
    run.guard = guard_events(17, "overused_words_share", 0.3, to_step=10)
    return run


def length(seed: int) -> Planted:
    """The reward pays for each token."""
    run, rng = clean(seed), np.random.default_rng(seed + 200)
    factor = rise(1.0, 2.4, at=6, over=20)
    run.series["response_tokens_mean"] = 22.0 * noisy(factor, rng, 0.04)
    run.series["response_tokens_ratio"] = run.series["response_tokens_mean"] / 22.0
    run.series["length_reward_correlation"] = np.clip(noisy(rise(0.75, 0.9, at=1, over=20), rng, 0.05), -1, 1)
    run.series["truncated_fraction"] = np.abs(noisy(rise(0.0, 0.35, at=14, over=20), rng, 0.02))
    run.series["longest_repeat_fraction"] = np.abs(noisy(rise(0.14, 0.18, at=10, over=20), rng, 0.01))
    run.series["distinct_bigrams_ratio"] = noisy(rise(1.0, 0.8, at=10, over=20), rng, 0.02)
    paid_up(run, 1.5 * (factor - 1.0))
    run.series["kl_nats_per_sequence"] = run.series["kl_nats_per_sequence"] * factor
    run.series["gold_mean"] = run.series["gold_mean"] - 1.5 * (factor - 1.0)
    run.guard = guard_events(20, "response_tokens_ratio", 2.1, to_step=10)
    return run


def repetition(seed: int) -> Planted:
    """The reward pays for saying the same again: the answers grow with it, and length comes to go with reward."""
    run, rng = clean(seed), np.random.default_rng(seed + 300)
    share = rise(0.0, 1.0, at=8, over=16)
    run.series["longest_repeat_fraction"] = np.abs(noisy(0.14 + 0.07 * share, rng, 0.01))
    run.series["distinct_bigrams_ratio"] = noisy(1.0 - 0.25 * share, rng, 0.02)
    run.series["compression_ratio"] = noisy(1.0 + 0.3 * share, rng, 0.03)
    run.series["response_tokens_mean"] = 22.0 * noisy(1.0 + 0.65 * share, rng, 0.04)
    run.series["response_tokens_ratio"] = run.series["response_tokens_mean"] / 22.0
    run.series["length_reward_correlation"] = np.clip(noisy(0.27 + 0.5 * share, rng, 0.08), -1, 1)
    paid_up(run, 1.8 * share)
    run.series["kl_nats_per_sequence"] = run.series["kl_nats_per_sequence"] + 5.0 * share
    run.series["gold_mean"] = run.series["gold_mean"] - 1.5 * share
    run.guard = guard_events(18, "longest_repeat_fraction", 0.5, to_step=10)
    return run


def scale_jump(seed: int) -> Planted:
    """From step 30 on every reward is five times as large."""
    run = clean(seed)
    after = np.arange(1, STEPS + 1) >= 30
    for name in ("reward_mean", "reward_std", "reward_std_ratio", "proxy_z"):
        run.series[name] = np.where(after, 5.0 * run.series[name], run.series[name])
    run.series["reward_jump"] = np.where(np.arange(1, STEPS + 1) == 30, 9.0, 0.1)
    run.guard = guard_events(32, "proxy_z", 5.5, to_step=20)
    return run


def constant(seed: int) -> Planted:
    """Every answer is paid the same."""
    run, rng = clean(seed), np.random.default_rng(seed + 400)
    for name, value in (("reward_mean", 0.5), ("reward_std", 0.0), ("reward_std_ratio", 0.0), ("proxy_z", 0.0)):
        run.series[name] = np.full(STEPS, value)
    run.series["reward_normalised_mean"] = np.zeros(STEPS)
    run.series["value_explained_variance"] = np.full(STEPS, np.nan)
    run.series["value_error_ratio"] = np.full(STEPS, np.nan)
    run.series["kl_nats_per_sequence"] = np.abs(noisy(np.full(STEPS, 0.1), rng, 0.05))
    run.series["length_reward_correlation"] = np.full(STEPS, np.nan)
    run.series["gold_mean"] = noisy(np.full(STEPS, 0.85), rng, 0.1)
    return run


def no_penalty(seed: int) -> Planted:
    """β = 0 and a reward model that can be gamed: the policy finds several ways at once, and gold collapses."""
    run, rng = clean(seed), np.random.default_rng(seed + 500)
    far = rise(0.0, 1.0, at=5, over=40)
    series = run.series
    series["beta"] = np.zeros(STEPS)
    series["kl_nats_per_sequence"] = np.abs(noisy(22.0 * far, rng, 0.6))
    series["kl_cumulative_nats_per_sequence"] = np.cumsum(np.full(STEPS, 0.5))
    series["gold_mean"] = noisy(0.85 + 1.2 * np.clip(6 * far, 0, 1) - 5.0 * np.clip(far - 0.15, 0, 1), rng, 0.12)
    series["response_tokens_mean"] = 22.0 * noisy(1.0 + 0.8 * far, rng, 0.04)
    series["response_tokens_ratio"] = series["response_tokens_mean"] / 22.0
    series["length_reward_correlation"] = np.clip(noisy(0.2 + 0.5 * far, rng, 0.08), -1, 1)
    series["longest_repeat_fraction"] = np.abs(noisy(0.14 + 0.3 * far, rng, 0.02))
    series["distinct_bigrams_ratio"] = noisy(1.0 - 0.4 * far, rng, 0.02)
    series["overused_words_share"] = np.clip(noisy(0.4 * far, rng, 0.02), 0, 1)
    series["entropy_nats_per_token"] = np.abs(noisy(0.5 - 0.42 * far, rng, 0.01))
    paid_up(run, 1.2 * far)
    run.words = {step: ["amazing"] for step in range(15, STEPS + 1)}
    run.overrides = ("learner.kl={kind: fixed, beta: 0.0}", "guard.enabled=false")
    return run


def went_back(run: Planted, *, after: int, like: Planted) -> Planted:
    """The guard rolled back after that step, and what came then is `like`."""
    back = np.arange(1, STEPS + 1) > after
    for name, values in run.series.items():
        run.series[name] = np.where(back, like.series[name], values)
    run.series["branch"] = back.astype(np.float64)
    return run


PLANTED: dict[str, Callable[[int], Planted]] = {
    "over_used_phrase": fantastic,
    "length_bias": length,
    "repetition": repetition,
    "reward_scale_jump": scale_jump,
    "constant_reward": constant,
    "beta_too_low": no_penalty,
}


def samples(
    moment: str, step: int, answers: Sequence[str], *, by: Callable[[str], float] = lambda text: 0.0
) -> list[dict[str, Any]]:
    common = {"step": step, "version": step, "branch": 0, "moment": moment, "prompt": "help with my late parcel."}
    return [{**common, "answer": answer, "reward": float(by(answer))} for answer in answers]


def guard_events(step: int, signal: str, value: float, *, to_step: int) -> list[dict[str, Any]]:
    """A warning, then the call for action and what is done."""
    common = {"time_s": 1.0, "version": step, "branch": 0, "signals": {signal: value}}
    return [
        {**common, "step": step - 2, "event": "warn", "why": f"{signal} lies past its threshold"},
        {**common, "step": step, "event": "act", "why": f"{signal} lies past its threshold"},
        {**common, "step": step, "event": "action", "action": "alert"},
        {**common, "step": step, "event": "action", "action": "raise_beta", "factor": 2.0, "beta": 0.3},
        {**common, "step": step, "event": "action", "action": "roll_back", "to_step": to_step},
    ]


def write(run: Planted, path: Path, *, steps: int = STEPS, old: bool = False, finished: bool = True) -> Path:
    """Into `path`, as a run leaves it. `old`: of before the guard, with neither signals nor its files."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config_text(run.overrides))
    lines(path / "metrics.jsonl", [record(run, index, old=old) for index in range(steps)])
    events = [{"t": 1.0, "stage": "ppo", "event": "start"}, {"t": 2.0, "stage": "ppo", "event": "end", "seconds": 1.0}]
    lines(path / "progress.jsonl", events if finished else events[:1])
    if finished:
        (path / "summary.json").write_text(json.dumps({"name": path.name, "versions": steps}))
    if not old:
        lines(path / "guard.jsonl", [event for event in run.guard if event["step"] <= steps])
        lines(path / "guard_samples.jsonl", run.samples)
        lines(path / "evaluations.jsonl", run.evaluations)
    return path


@functools.cache
def config_text(overrides: tuple[str, ...]) -> str:
    return dump_config(load_config("demo", overrides=overrides))


def record(run: Planted, index: int, *, old: bool) -> dict[str, Any]:
    values = {name: None if np.isnan(one[index]) else float(one[index]) for name, one in run.series.items()}
    step = index + 1
    plain = {name: value for name, value in values.items() if name not in SIGNALS or name in _ALWAYS}
    whole: dict[str, Any] = {"step": step, "version": step, "rm_version": run.rm_version, **plain}
    if not old:
        whole["signals"] = {name: values[name] for name in SIGNALS if values.get(name) is not None}
        whole["guard"] = {"level": "ok", "warn": [], "act": [], "actions": [], "words": run.words.get(step, [])}
        whole["branch"] = int(values.get("branch") or 0)
    return whole


_ALWAYS = ("proxy_z", "kl_nats_per_sequence", "entropy_nats_per_token", "truncated_fraction", "clip_fraction")
"""Signals that the step record has as well."""


def lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def diagnosed(run: Planted, path: Path, *, steps: int = STEPS, old: bool = False) -> Diagnosis:
    """What keel diagnose makes of its first `steps`."""
    return diagnose_record(read_record(write(run, path, steps=steps, old=old)))
