"""`keel eval RUN`: a policy of a run, finished or going on, on held-out prompts against the policy before training.

Everything happens in this process, outside Ray, one thing after the other: the rollout engine answers, the judge
compares, the reward model scores, and the policy's distance is measured. Nothing of the run itself is touched.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.errors import DataError, ModelError
from cluster.files import atomic_write_text
from cluster.plugin import resolve
from cluster.reward_models import RewardModels
from cluster.text import load_tokenizer
from configs.run import RunConfig
from keel.comparison import REFERENCE_ROWS, Reference, function_judge, reference_answers
from keel.evaluate import both_sides, compare, distances, token_differences, write_rows
from keel.living import config_of
from keel.online.watch_people import people_win_rate
from keel.sampling import Answer, decoded
from keel.winrate import versus_fields

Pairs = Sequence[tuple[Answer, Reference]]
_ENGINE_INDEX = 1_000_000
"""Of an actor that no run has: its sampling is seeded otherwise."""


def evaluate_now(
    run_dir: Path,
    *,
    prompts: int | None = None,
    judge: str | None = None,
    policy: str | None = None,
    console: Console | None = None,
) -> Path:
    """Print a table with 95 % intervals and write eval/eval-<policy>.json with its rows beside it; returns its path.

    `prompts`: how many of the held-out prompts that the reference has answered; left out, all. `judge`: a function as
    collect.judge; left out, the run's. `policy`: "final", "best" or a directory; left out, the final one, or the best
    up to now. Raises ConfigError, DataError (no reference answers), ModelError (no policy).
    """
    console = console or Console()
    config = config_of(run_dir)
    compared_by = function_judge(config, named=judge)
    model_dir, tag = policy_dir(run_dir, policy)
    references = reference_answers(config, run_dir, limit=prompts)
    if not references:
        raise DataError(
            "nothing to compare with: the policy before training has not answered the held-out prompts yet",
            got=f"no {run_dir / REFERENCE_ROWS}",
            do="let the run come to its ppo or evaluate stage first",
        )
    console.print(f"{model_dir}: {len(references)} held-out prompts", highlight=False)
    answers = asyncio.run(_answers(config, run_dir, model_dir=model_dir.resolve(), references=references))
    pairs = list(zip(answers, references, strict=True))
    rows: list[dict[str, Any]] = [
        {
            "prompt": one.question.text,
            "answer": answer.text,
            "truncated": answer.truncated,
            "reference": one.text,
        }
        for answer, one in pairs
    ]
    result: dict[str, Any] = {"policy": str(model_dir), "prompts": len(pairs)}
    result |= _gold(config, pairs, rows)
    margins, rewarded = _rewards(config, run_dir, pairs, rows)
    result |= rewarded
    if compared_by is not None:
        found = compare(pairs, judge=compared_by, seed=config.seed)
        result |= versus_fields(found, token_differences=token_differences(pairs), reward_margins=margins)
        for row, won in zip(rows, found, strict=True):
            row["outcome"] = won
    result |= _people(run_dir)
    sequences = [(one.question.token_ids, answer.token_ids) for answer, one in pairs]
    result |= distances(config, run_dir, model_dir, sequences)
    result["response_tokens"] = statistics.fmean(len(answer.token_ids) for answer in answers)
    result["truncated_fraction"] = statistics.fmean(answer.truncated for answer in answers)
    path = run_dir / "eval" / f"{tag}.json"
    write_rows(path.with_suffix(".rows.jsonl"), rows)
    atomic_write_text(path, json.dumps(result, indent=1))
    console.print(table_of(result))
    if compared_by is None:
        console.print("No win rate: no function judges. Name one: --judge package.module:function", highlight=False)
    console.print(f"{path}", highlight=False, soft_wrap=True)
    return path


def policy_dir(run_dir: Path, policy: str | None) -> tuple[Path, str]:
    """The policy's directory, and the name that its results go by. Raises ModelError."""
    known = {name: run_dir / "policy" / name for name in ("final", "best")}
    if policy is None:
        chosen = next((path for path in known.values() if (path / "config.json").is_file()), None)
        if chosen is None:
            raise ModelError(
                "this run has no trained policy yet",
                got=f"nothing in {run_dir / 'policy'}",
                do="wait for its first checkpoint, or give --policy DIRECTORY",
            )
        return chosen, f"eval-{chosen.name}"
    chosen = known.get(policy, Path(policy))
    if not (chosen / "config.json").is_file():
        raise ModelError("no policy here", got=str(chosen), do="give final, best or a Hugging Face directory")
    return chosen, "eval-" + (re.sub(r"[^\w.-]+", "-", policy).strip("-.") or "policy")


async def _answers(
    config: RunConfig, run_dir: Path, *, model_dir: Path, references: Sequence[Reference]
) -> list[Answer]:
    from actors.engine import GenerationRequest
    from actors.rollout_actor import boot_engine
    from actors.vllm_spec import engine_seed

    seed = engine_seed(run_seed=config.seed, actor_index=_ENGINE_INDEX, incarnation=0)
    engine = await boot_engine(config, model_path=str(model_dir), seed=seed)
    slots = asyncio.Semaphore(config.rollout.max_concurrent_requests)

    async def answer(number: int, reference: Reference) -> tuple[list[int], str]:
        request = GenerationRequest(
            request_id=f"eval-{number}",
            prompt_ids=np.asarray(reference.question.token_ids, dtype=np.int32),
            max_new_tokens=config.data.max_response_tokens,
            temperature=config.rollout.temperature,
        )
        async with slots:
            generation = await engine.generate(request)
        return generation.response_ids.tolist(), generation.finish_reason

    try:
        found = await asyncio.gather(*(answer(number, one) for number, one in enumerate(references)))
    finally:
        await engine.shutdown()
    return decoded(load_tokenizer(run_dir / "sft" / "model"), found)


def _gold(config: RunConfig, pairs: Pairs, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean gold of either side, and the mean difference with its 95 % interval, prompt by prompt."""
    if config.evaluation.gold is None:
        return {}
    gold = resolve(config.evaluation.gold, key="evaluation.gold")
    now = [float(gold(one.question.record.prompt, answer.text)) for answer, one in pairs]
    before = [float(gold(one.question.record.prompt, one.text)) for _, one in pairs]
    for row, value in zip(rows, now, strict=True):
        row["gold"] = value
    return {
        "gold": statistics.fmean(now),
        "gold_reference": statistics.fmean(before),
        **_difference("gold", [mine - other for mine, other in zip(now, before, strict=True)]),
    }


def _rewards(
    config: RunConfig, run_dir: Path, pairs: Pairs, rows: list[dict[str, Any]]
) -> tuple[list[float] | None, dict[str, Any]]:
    """By the version of the reward model that scores now, in this process."""
    models = RewardModels(run_dir / "rm")
    if not config.reward.needs_model or not models.exists():
        return None, {}
    from reward_service.rm.measure import Ensemble, scoring_device

    stored = models.current()
    tokenizer = load_tokenizer(run_dir / "sft" / "model")  # reward models have the policy's
    ensemble = Ensemble.of(stored, reward=config.reward, tokenizer=tokenizer, device=scoring_device(config))
    scores_NM = ensemble.member_scores([[*prompt, *response] for prompt, response in both_sides(pairs)])
    rewards = [ensemble.aggregate(scores_M) for scores_M in scores_NM]
    now, before = rewards[::2], rewards[1::2]
    for row, value in zip(rows, now, strict=True):
        row["reward"] = value
    margins = [mine - other for mine, other in zip(now, before, strict=True)]
    calibration = stored.manifest.calibration
    z = None if calibration is None else (statistics.fmean(now) - calibration.mean) / max(calibration.std, 1e-8)
    return margins, {
        "reward_raw": statistics.fmean(now),
        "reward_reference": statistics.fmean(before),
        **_difference("reward", margins),
        "proxy_z": z,
        "rm_version": stored.version,
    }


def _people(run_dir: Path) -> dict[str, Any]:
    rate = people_win_rate(run_dir, after_version=0)
    if rate is None:
        return {}
    return {
        "win_rate_people": rate.share,
        "win_rate_people_low": rate.low,
        "win_rate_people_high": rate.high,
        "pairs_judged_by_people": rate.n,
    }


def _difference(name: str, differences: Sequence[float]) -> dict[str, float]:
    """Mean with its normal 95 % interval."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return {f"{name}_gain": mean}
    reach = 1.959964 * statistics.stdev(differences) / math.sqrt(len(differences))
    return {f"{name}_gain": mean, f"{name}_gain_low": mean - reach, f"{name}_gain_high": mean + reach}


_LINES = (
    ("win_rate", "win rate against the policy before training", "share"),
    ("win_rate_length_controlled", "the same at equal length", "share"),
    ("win_rate_people", "win rate by people, all versions", "share"),
    ("rm_judge_agreement", "reward model orders as the judge does", "share"),
    ("gold", "gold", "number"),
    ("gold_reference", "gold, before training", "number"),
    ("gold_gain", "gold, gain", "number"),
    ("reward_gain", "reward, gain", "number"),
    ("proxy_z", "reward, standard deviations over calibration", "number"),
    ("kl_nats_per_sequence", "KL, nats per answer", "number"),
    ("anchor_perplexity_ratio", "perplexity of held-out demonstrations, × before", "number"),
    ("response_tokens", "tokens an answer", "number"),
    ("truncated_fraction", "answers that were cut", "share"),
)


def table_of(result: dict[str, Any]) -> Table:
    """What there is of a result, with intervals."""
    table = Table("measure", "value", "95 % interval")
    for key, name, kind in _LINES:
        value = result.get(key)
        if value is None:
            continue
        low, high = result.get(f"{key}_low"), result.get(f"{key}_high")
        if key == "kl_nats_per_sequence" and "kl_standard_error" in result:
            reach = 1.959964 * result["kl_standard_error"]
            low, high = value - reach, value + reach
        interval = "" if low is None or high is None else f"{_shown(low, kind)} … {_shown(high, kind)}"
        table.add_row(name, _shown(value, kind), interval)
    return table


def _shown(value: float, kind: str) -> str:
    return f"{value:.0%}" if kind == "share" else f"{value:.3g}"
