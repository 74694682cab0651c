"""What an answer is worth in the end: the weighted sum of the reward's sources, and the rules of the constitution.

Consumes: samples as text, with the reward model's aggregated score of each. Produces: for each, in order, its reward
with what it is made of, or a ScoringError. Waits for: the sources, side by side, and the rules, each within its own
time limits. Who unblocks it: they, or their limits.
Always holds: one sample's failure is no other's; a sample that one source cannot score has no reward.

With r the model's score, μ and σ its calibration (mean and standard deviation), w weights, s the other sources:

    the model alone      reward = r                                     one unit of a rule is σ, counted from μ
    other sources        reward = w_model·(r − μ)/σ + Σ w·s             one unit of a rule is 1, counted from 0
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.errors import ConfigError, ScoringError
from cluster.plugin import resolve
from cluster.records import RuleVerdict
from cluster.reward_models import Calibration
from configs.reward import FunctionReward, HttpReward, ModelReward, RewardSection
from reward_service.rewards.constitution import Constitution, Hit, load_constitution, settled
from reward_service.rewards.sources import FunctionSource, RewardSource, public_url
from reward_service.rewards.sources import SourceDownError as SourceDownError
from reward_service.rewards.sources import TextSample as TextSample
from reward_service.rewards.text_function import TextFunction

MODEL: Final = "model"
"""The reward model's key in `parts`."""


@dataclass(frozen=True)
class Composed:
    """`parts`: each source's own value, unweighted, the model's as it gave it; empty without other sources."""

    reward: float
    parts: dict[str, float]
    verdicts: tuple[RuleVerdict, ...]


@dataclass(frozen=True)
class WeightedSource:
    """A source and what it counts."""

    source: RewardSource
    weight: float


class Composer:
    """`compose`, as often as wanted, on one event loop; then `aclose`.

    `tag` names the scale of the rewards: "" is the reward model's own (rules do not change it), anything else another.
    `model_weight`: None where the model is not asked.
    """

    def __init__(
        self,
        *,
        sources: Sequence[WeightedSource],
        model_weight: float | None,
        constitution: Constitution | None,
        tag: str,
    ) -> None:
        self.tag = tag
        self.counts: Counter[str] = Counter()
        """Since start: hits by "rule NAME", "failed rules", and samples "failed SOURCE", "away SOURCE" among them."""
        self._sources = tuple(sources)
        self._model_weight = model_weight
        self._constitution = constitution

    async def compose(
        self, samples: Sequence[TextSample], *, model_rewards: Sequence[float] | None, calibration: Calibration | None
    ) -> list[Composed | ScoringError]:
        """One outcome a sample, in order. `model_rewards`: the members' aggregate for each; None without a model.
        `calibration`: of the version that gave them.

        SourceDownError in the list: the sample may come again, it is not to blame. Raises StuckError when the process
        must be replaced.
        """
        if (model_rewards is None) != (self._model_weight is None):
            raise ValueError("model_rewards are needed exactly where the model is a source")
        found = await self._asked(samples)
        hits = await self._judged(samples)
        models: Sequence[float | None] = [None] * len(samples) if model_rewards is None else model_rewards
        outcomes: list[Composed | ScoringError] = []
        for model_reward, values, hit in zip(models, found, hits, strict=True):
            outcomes.append(self._outcome(model_reward, values, hit, calibration=calibration))
        return outcomes

    async def aclose(self) -> None:
        """Close all sources. Repeatable."""
        for weighted in self._sources:
            await weighted.source.aclose()
        if self._constitution is not None:
            self._constitution.close()

    async def _asked(self, samples: Sequence[TextSample]) -> list[dict[str, float | ScoringError]]:
        """Source → outcome, for each sample."""
        answers = await asyncio.gather(*(weighted.source.rewards(samples) for weighted in self._sources))
        found: list[dict[str, float | ScoringError]] = [{} for _ in samples]
        for weighted, rewards in zip(self._sources, answers, strict=True):
            name = weighted.source.name
            for values, reward in zip(found, rewards, strict=True):
                values[name] = reward
                self.counts[f"failed {name}"] += isinstance(reward, ScoringError)
                self.counts[f"away {name}"] += isinstance(reward, SourceDownError)
        return found

    async def _judged(self, samples: Sequence[TextSample]) -> list[list[Hit] | ScoringError]:
        if self._constitution is None:
            return [[] for _ in samples]
        judged = await self._constitution.judge(samples)
        for hits in judged:
            if isinstance(hits, ScoringError):
                self.counts["failed rules"] += 1
            else:
                self.counts.update(f"rule {hit.verdict.rule}" for hit in hits)
        return judged

    def _outcome(
        self,
        model_reward: float | None,
        values: Mapping[str, float | ScoringError],
        hits: list[Hit] | ScoringError,
        *,
        calibration: Calibration | None,
    ) -> Composed | ScoringError:
        if isinstance(hits, ScoringError):
            return hits
        parts: dict[str, float] = {}
        if model_reward is not None:
            if not math.isfinite(model_reward):
                return ScoringError("the reward model gave no finite number", got=repr(model_reward))
            parts[MODEL] = model_reward
        for name, value in values.items():
            if isinstance(value, ScoringError):
                return value
            parts[name] = value
        if not self.tag:
            assert model_reward is not None
            mean, std = _scale(calibration) or (0.0, 1.0)
            return _finite(settled(model_reward, hits, mean=mean, std=std), {}, hits)
        total = sum(weighted.weight * parts[weighted.source.name] for weighted in self._sources)
        if model_reward is not None and self._model_weight is not None:
            scale = _scale(calibration)
            if scale is None:
                return _no_calibration(calibration)
            total += self._model_weight * (model_reward - scale[0]) / scale[1]
        return _finite(settled(total, hits, mean=0.0, std=1.0), parts, hits)


def make_composer(config: RewardSection) -> Composer | None:
    """None where the reward model's score is the reward. Raises ConfigError: no source, a weight that is no number, a
    function that is not there, a token's variable that is not set, a constitution with errors."""
    models = [source for source in config.sources if isinstance(source, ModelReward)]
    others = [source for source in config.sources if not isinstance(source, ModelReward)]
    if not config.sources or len(models) > 1:
        raise ConfigError(
            "reward.sources",
            got=f"{len(config.sources)} sources, {len(models)} of kind model",
            do="name at least one, the model at most once",
        )
    for place, source in enumerate(config.sources):
        if not math.isfinite(source.weight):
            raise ConfigError(
                f"reward.sources[{place}].weight", got=str(source.weight), do="write a finite number, such as 1.0"
            )
    alone = not others and models[0].weight == 1.0
    if alone and config.constitution is None:
        return None
    constitution = None if config.constitution is None else load_constitution(config.constitution)
    names = _names(others)
    return Composer(
        sources=[
            WeightedSource(_source(source, name, key=f"reward.sources[{config.sources.index(source)}]"), source.weight)
            for source, name in zip(others, names, strict=True)
        ],
        model_weight=models[0].weight if models else None,
        constitution=constitution,
        tag="" if alone else _tag(models, others, names),
    )


def check_rewards(config: RewardSection) -> None:
    """Raises what `make_composer` would, before a run starts; but for tokens, which only reward workers must have."""
    sources = tuple(
        source.model_copy(update={"token_env": None}) if isinstance(source, HttpReward) else source
        for source in config.sources
    )
    make_composer(config.model_copy(update={"sources": sources}))


def _source(config: FunctionReward | HttpReward, name: str, *, key: str) -> RewardSource:
    if isinstance(config, FunctionReward):
        return FunctionSource(
            TextFunction(resolve(config.path, key=f"{key}.path"), name=name, timeout_s=config.timeout_s)
        )
    from reward_service.rewards.http import HttpSource

    token = None
    if config.token_env is not None:
        token = os.environ.get(config.token_env, "")
        if not token:
            raise ConfigError(
                f"{key}.token_env: no token",
                got=f"the environment variable {config.token_env} is not set here",
                do="set it where the reward workers run, or leave token_env out",
            )
    return HttpSource(config, name=name, token=token)


def _names(sources: Sequence[FunctionReward | HttpReward]) -> list[str]:
    """Distinct, in order: a source named twice has its number behind it."""
    plain = [source.path if isinstance(source, FunctionReward) else public_url(source.url) for source in sources]
    return [
        name if plain[:place].count(name) == 0 else f"{name}#{plain[:place].count(name) + 1}"
        for place, name in enumerate(plain)
    ]


def _tag(models: Sequence[ModelReward], others: Sequence[FunctionReward | HttpReward], names: Sequence[str]) -> str:
    """8 hex digits over what the scale depends on: the sources and their weights."""
    weights = [[MODEL, model.weight] for model in models]
    weights += sorted([name, source.weight] for name, source in zip(names, others, strict=True))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:8]


def _finite(reward: float, parts: dict[str, float], hits: Sequence[Hit]) -> Composed | ScoringError:
    if math.isfinite(reward):
        return Composed(reward, parts, tuple(hit.verdict for hit in hits))
    return ScoringError("sources and rules together give no finite reward", got=f"{reward} of {parts}"[:300])


def _scale(calibration: Calibration | None) -> tuple[float, float] | None:
    """(mean, std) to count in; None where there is no usable one."""
    if calibration is None or not (math.isfinite(calibration.mean) and math.isfinite(calibration.std)):
        return None
    return (calibration.mean, calibration.std) if calibration.std > 0.0 else None


def _no_calibration(calibration: Calibration | None) -> ScoringError:
    return ScoringError(
        "the reward model's score cannot be put beside other sources",
        got=f"its calibration is {calibration}",
        do="train it again with keel rm CONFIG, so that it is measured on a calibration set",
    )
