"""A step's signals, by the names of configs.guard.Thresholds: from what the policy said, what it got, how it moved.

Consumes: one StepView a step, in order. Produces: a Reading, in which a signal that cannot be told is absent. Waits for
nothing. Always holds: the same views give the same readings, also where the state between them went through
`to_state` and `from_state`; the reference is no part of that state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cluster.data_records import Prompt
from cluster.records import ScoredRollout
from learner.guard import movement, reward_signals, text_signals
from learner.guard.copying import COPY_TOKENS, RunIndex
from learner.guard.overuse import Overuse, cusum
from learner.guard.record import Reading
from learner.guard.reference import Reference, RewardScale
from learner.guard.reward_signals import Floats
from learner.guard.reward_watch import RewardWatch
from learner.guard.spans import TokenIds

MAX_WORDS: Final = 10
"""Over-used words of a reading."""


@dataclass(frozen=True)
class StepView:
    """What the guard sees of a step: its batch of B answers and its record. All sequences have length B.

    `step`: updates done, this one included, from 1. `prompts`: as they were read; `prompt_ids`: their names. `texts`:
    the answers, decoded. `rewards`: raw. `spreads`: standard deviation over the ensemble's members, 0 for a single
    model. `record`: the numbers of ExperienceStats and UpdateStats by name, proxy_z, and kl_budget_share
    where there is a budget.
    """

    step: int
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    response_ids: tuple[TokenIds, ...]
    prompt_ids: tuple[str, ...]
    rewards: tuple[float, ...]
    spreads: tuple[float, ...]
    rm_versions: tuple[str, ...]
    truncated: tuple[bool, ...]
    record: Mapping[str, object]

    @classmethod
    def of(
        cls,
        rollouts: Sequence[ScoredRollout],
        *,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        step: int,
        record: Mapping[str, object],
    ) -> StepView:
        return cls(
            step=step,
            prompts=tuple(prompts),
            texts=tuple(texts),
            response_ids=tuple(scored.rollout.response_ids for scored in rollouts),
            prompt_ids=tuple(scored.rollout.task.prompt_id for scored in rollouts),
            rewards=tuple(scored.reward for scored in rollouts),
            spreads=tuple(scored.uncertainty for scored in rollouts),
            rm_versions=tuple(scored.rm_version for scored in rollouts),
            truncated=tuple(scored.rollout.finish_reason == "length" for scored in rollouts),
            record=record,
        )

    @property
    def lengths_B(self) -> Floats:
        """Response tokens."""
        return np.array([len(ids) for ids in self.response_ids], dtype=np.float64)


class SignalReader:
    """One a learner. `scales`: of a reward-model version (learner.guard.reference.RewardScales). `ceiling`: on the 0–1
    scale, configs.guard.GuardSection.ceiling."""

    def __init__(
        self,
        reference: Reference,
        *,
        scales: Callable[[str], RewardScale | None],
        ceiling: float,
        copy_tokens: int = COPY_TOKENS,
    ) -> None:
        ids = reference.token_ids
        self._rewards = RewardWatch(
            scales, ceiling=ceiling, rewards=reference.rewards, rewards_version=reference.rewards_version
        )
        self._words = Overuse(reference.answers, prompts=reference.prompts)
        self._words_cusum = 0.0
        self._compression = text_signals.Compression(reference.answers)
        self._rare_tokens = text_signals.RareTokens(ids)
        self._copies = RunIndex(reference.sft_ids, n=copy_tokens)
        self._copied_before = self._copies.copied_share(ids)
        self._bigrams_before = text_signals.distinct_bigrams(ids, repeated_B=text_signals.repeated_bigrams(ids))
        self._tokens_before = float(np.mean([len(one) for one in ids])) if ids else None
        self._kl: deque[tuple[int, float]] = deque(maxlen=movement.SLOPE_STEPS)
        self._norms: deque[float] = deque(maxlen=movement.NORM_STEPS)

    def read(self, view: StepView) -> Reading:
        """Take a step in. A batch without answers tells its record alone."""
        found: dict[str, float | None] = {**movement.recorded(view.record), **self._moved(view)}
        words: tuple[str, ...] = ()
        if view.texts:
            repeated_B = text_signals.repeated_bigrams(view.response_ids)
            found |= self._rewards.read(view) | self._said(view, repeated_B=repeated_B)
            found |= _lengths(view, tokens_before=self._tokens_before, repeated_B=repeated_B)
            overused = self._words.observe(view.texts, prompts=view.prompt_ids)
            words = tuple(one.term for one in overused[:MAX_WORDS])
            if self._words.has_reference:
                excess = max((one.share - one.reference_share for one in overused), default=0.0)
                self._words_cusum = cusum(self._words_cusum, excess)
                found |= {"overused_words_share": excess, "overused_words_cusum": self._words_cusum}
        return Reading(
            values={name: value for name, value in found.items() if value is not None and np.isfinite(value)},
            words=words,
        )

    def reset(self) -> None:
        """Windows start anew: after a rollback the policy is another one. What the run started from stays."""
        self._rewards.reset()
        self._words.reset()
        self._words_cusum = 0.0
        self._kl.clear()
        self._norms.clear()

    def to_state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "rewards": self._rewards.to_state(),
            "words": self._words.to_state(),
            "words_cusum": self._words_cusum,
            "kl": [list(one) for one in self._kl],
            "grad_norms": list(self._norms),
        }

    def from_state(self, state: Mapping[str, Any]) -> None:
        self._rewards.load_state(state["rewards"])
        self._words.load_state(state["words"])
        self._words_cusum = float(state.get("words_cusum", 0.0))  # Older checkpoints have none.
        self._kl = deque(((int(step), float(kl)) for step, kl in state["kl"]), maxlen=movement.SLOPE_STEPS)
        self._norms = deque(map(float, state["grad_norms"]), maxlen=movement.NORM_STEPS)

    def _moved(self, view: StepView) -> dict[str, float | None]:
        kl = movement.number(view.record, "kl_nats_per_sequence")
        norm = movement.number(view.record, "grad_norm_policy")
        ratio = None if norm is None else movement.norm_ratio(norm, earlier=self._norms)
        if kl is not None:
            self._kl.append((view.step, kl))
        if norm is not None:
            self._norms.append(norm)
        steps, values = [step for step, _ in self._kl], [value for _, value in self._kl]
        return {"kl_slope_nats_per_step": movement.theil_sen(steps, values=values), "grad_norm_ratio": ratio}

    def _said(self, view: StepView, *, repeated_B: Floats) -> dict[str, float | None]:
        ids = view.response_ids
        bigrams, copied = text_signals.distinct_bigrams(ids, repeated_B=repeated_B), self._copies.copied_share(ids)
        return {
            "distinct_bigrams_ratio": _over(bigrams, self._bigrams_before),
            "longest_repeat_fraction": text_signals.longest_repeat_fraction(ids),
            "compression_ratio": self._compression.ratio(view.texts),
            "rare_token_fraction": self._rare_tokens.fraction(ids),
            "copied_fraction": (
                None if copied is None or self._copied_before is None else max(0.0, copied - self._copied_before)
            ),
        }


def _lengths(view: StepView, *, tokens_before: float | None, repeated_B: Floats) -> dict[str, float | None]:
    """How long answers are, and whether that is paid, or what they say again."""
    lengths_B = view.lengths_B
    # Rewards of two versions are on two scales.
    rewards_B = np.array(view.rewards) if len(set(view.rm_versions)) == 1 else np.zeros(0)
    return {
        "response_tokens_ratio": _over(float(lengths_B.mean()), tokens_before),
        "truncated_fraction": float(np.mean(view.truncated)),
        "length_reward_correlation": reward_signals.spearman(lengths_B, rewards=rewards_B),
        "repetition_reward_correlation": reward_signals.spearman_partial(
            repeated_B, rewards=rewards_B, given=lengths_B
        ),
        "length_reward_correlation_within_prompt": (
            reward_signals.spearman_within(lengths_B, rewards=rewards_B, groups=view.prompt_ids)
            if len(rewards_B)
            else None
        ),
    }


def _over(value: float | None, before: float | None) -> float | None:
    return value / before if value is not None and before else None
