"""Best of n at inference: several answers a prompt, and the one that the reward model likes best.

How far that moves from the policy is known in advance: KL(best of n‖policy) ≤ log n − (n − 1)/n nats (Beirami et al.
2024): 1.2 nats for n = 8, at n times the cost of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError, ModelError
from cluster.reward_models import RewardModels, StoredRm
from cluster.text import load_tokenizer
from configs.load import load_config
from configs.run import RewardSection
from keel.generate import Sampler
from reward_service.rm.measure import Ensemble


@dataclass(frozen=True)
class Scored:
    """An answer and its raw reward."""

    answer: str
    reward: float


def kl_bound_nats(n: int) -> float:
    """Of best of n from the policy, per sequence. Example: n = 1: 0; n = 8: 1.204."""
    return math.log(n) - (n - 1) / n


def best_of(
    model_dir: Path,
    prompts: Sequence[str],
    *,
    n: int,
    rm: Path | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[tuple[str, list[Scored]]]:
    """(prompt, its n answers, best first). `rm`: a run's rm/ directory; left out, that of the run that `model_dir` lies
    in. Raises ConfigError, ModelError."""
    if n > 1 and temperature == 0.0:
        raise ConfigError("the best of n answers that are all the same", got="temperature 0", do="raise --temperature")
    sampler = Sampler(model_dir, seed=seed)
    stored, reward = _reward_model(model_dir, rm)
    ensemble = Ensemble.of(stored, reward=reward, tokenizer=load_tokenizer(stored.member_dirs[0]), device="cpu")
    for prompt in prompts:
        sampled = sampler.sample(prompt, count=n, max_new_tokens=max_new_tokens, temperature=temperature)
        scores_NM = ensemble.member_scores([one.token_ids for one in sampled])
        found = [
            Scored(one.answer, ensemble.aggregate(scores_M)) for one, scores_M in zip(sampled, scores_NM, strict=True)
        ]
        yield prompt, sorted(found, key=lambda one: -one.reward)


def _reward_model(model_dir: Path, rm: Path | None) -> tuple[StoredRm, RewardSection]:
    """The version that scores, and how its run aggregates members."""
    if rm is None:
        parents = [parent for parent in model_dir.resolve().parents if RewardModels(parent / "rm").exists()]
        if not parents:
            raise ModelError(
                "no reward model to choose answers by",
                got=f"{model_dir} lies in no run that has one",
                do="name one: --rm runs/demo/rm",
            )
        rm = parents[0] / "rm"
    stored, saved = RewardModels(rm).current(), rm.resolve().parent / "config.yaml"
    return stored, load_config(saved).reward if saved.is_file() else RewardSection()
