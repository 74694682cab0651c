"""From what the models say of a rollout to what leaves the reward service: one score from the members, what becomes of
it where they disagree, and what other sources and rules make of it.

Consumes: measured rollouts. Produces: for each, in order, a scored rollout, a dead letter for an answer that is refused
as too uncertain, or the error of a source that could not value it. Waits for: the other sources and rules, within their
own time limits. Who unblocks it: they, or their limits.
Always holds: one sample's failure is no other's; a failure is never a number; a record names the version of the reward
model that all its numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import ScoringError
from cluster.records import DeadLetter, Rollout, RuleVerdict, ScoredRollout, pack_floats
from cluster.reward_models import Calibration, StoredRm
from configs.reward import RewardSection
from reward_service.aggregate import MemberScales, aggregate, judge_spread, on_one_scale, spread, spread_limit
from reward_service.rewards.sources import TextSample
from reward_service.scorer import Scorer, Scores

if TYPE_CHECKING:
    from reward_service.rewards.compose import Composer

Verdicts = tuple[RuleVerdict, ...]
Outcome = ScoredRollout | DeadLetter | ScoringError
"""A DeadLetter here is an answer that was refused (`rejected`); whoever publishes it knows its deliveries, this does
not. A ScoringError is that sample's alone, of a source other than the models: the batch around it is good. Where it is
a SourceDownError, the sample is not to blame and the models are not broken."""


@dataclass(frozen=True, eq=False)
class Serving:
    """Everything that scores and goes with one version of the reward model: replaced as one, never in part."""

    scorer: Scorer
    calibration: Calibration | None = None
    spread_percentiles: tuple[float, ...] = ()
    """As RmManifest has them; empty for a single model."""
    members: int = 0
    member_scales: MemberScales = ()

    @classmethod
    def of(cls, scorer: Scorer, stored: StoredRm | None) -> Serving:
        """`stored`: where the scorer's reward model comes from; None without one."""
        if stored is None:
            return cls(scorer)
        known = stored.manifest
        return cls(scorer, known.calibration, known.spread_percentiles, known.members, known.member_scales)

    @property
    def version(self) -> str:
        return self.scorer.version


@dataclass(frozen=True, eq=False)
class Measured:
    """A rollout and what the models say of it. `text`: prompt and answer, None where nobody reads them. `seconds`: what
    its forward pass took."""

    rollout: Rollout
    scores: Scores
    text: tuple[str, str] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Draft:
    """On the way to a record."""

    measured: Measured
    reward: float | None
    """The members' aggregate; None without a reward model."""
    spread: float
    weight: float


class Rewarding:
    """The run's settings, put to use. `composer=None`: the reward model's score is the reward."""

    def __init__(self, settings: RewardSection | None = None, *, composer: Composer | None = None) -> None:
        self._settings = settings or RewardSection()
        self._composer = composer

    @property
    def reads_text(self) -> bool:
        """`Measured.text` must be given."""
        return self._composer is not None

    @property
    def counts(self) -> Mapping[str, int]:
        """Of sources and rules, since start: failed, away, hit."""
        return {} if self._composer is None else self._composer.counts

    async def outcomes(self, batch: Sequence[Measured], *, serving: Serving) -> list[Outcome]:
        """One for each of `batch`, all of whose scores are `serving`'s."""
        limit = spread_limit(serving.spread_percentiles, quantile=self._settings.uncertain_quantile)
        drafts = [self._draft(measured, serving=serving, limit=limit) for measured in batch]
        kept = [draft for draft in drafts if isinstance(draft, _Draft)]
        records = iter(await self._records(kept, serving=serving))
        return [next(records) if isinstance(draft, _Draft) else draft for draft in drafts]

    def model_reward(self, member_scores: Sequence[float], *, serving: Serving) -> float:
        """The reward model's own word for `serving`'s raw scores: their aggregate, before other sources and rules."""
        scores_M = on_one_scale(member_scores, serving.member_scales)
        return aggregate(scores_M, how=self._settings.aggregation, std_coefficient=self._settings.std_coefficient)

    async def aclose(self) -> None:
        """Close the sources. Repeatable."""
        if self._composer is not None:
            await self._composer.aclose()

    def _draft(self, measured: Measured, *, serving: Serving, limit: float | None) -> _Draft | DeadLetter:
        settings, scores_M = self._settings, measured.scores.member_scores
        if not scores_M:
            return _Draft(measured, None, 0.0, 1.0)
        spread_now = spread(on_one_scale(scores_M, serving.member_scales))
        verdict = judge_spread(spread_now, limit=limit, uncertain=settings.uncertain)
        if verdict == "reject":
            reason = f"members disagree: spread {spread_now:.3g} over {limit:.3g}"
            return DeadLetter(task=measured.rollout.task, stage="reward", reason=reason, deliveries=1, rejected=True)
        weight = settings.uncertain_weight if verdict == "down_weight" else 1.0
        return _Draft(measured, self.model_reward(scores_M, serving=serving), spread_now, weight)

    async def _records(self, drafts: Sequence[_Draft], *, serving: Serving) -> list[ScoredRollout | ScoringError]:
        if not drafts:
            return []
        if self._composer is None:
            return [_model_alone(draft, version=serving.version) for draft in drafts]
        rewards = [draft.reward for draft in drafts if draft.reward is not None]
        composed = await self._composer.compose(
            [_text_sample(draft.measured) for draft in drafts],
            model_rewards=rewards or None,
            calibration=serving.calibration,
        )
        version = f"{serving.version}~{self._composer.tag}" if self._composer.tag else serving.version
        return [
            outcome
            if isinstance(outcome, ScoringError)
            else _record(draft, reward=outcome.reward, version=version, parts=outcome.parts, verdicts=outcome.verdicts)
            for draft, outcome in zip(drafts, composed, strict=True)
        ]


def _text_sample(measured: Measured) -> TextSample:
    assert measured.text is not None
    prompt, answer = measured.text
    rollout = measured.rollout
    return TextSample(
        task_id=rollout.task.task_id,
        prompt=prompt,
        answer=answer,
        finish_reason=rollout.finish_reason,
        response_tokens=len(rollout.response_ids_i32) // 4,  # int32
    )


def _model_alone(draft: _Draft, *, version: str) -> ScoredRollout | ScoringError:
    if draft.reward is None:
        task_id = draft.measured.rollout.task.task_id
        return ScoringError(
            f"task {task_id} has no reward", got="no reward model and no other source", do="set reward.sources"
        )
    return _record(draft, reward=draft.reward, version=version)


def _record(
    draft: _Draft, *, reward: float, version: str, parts: dict[str, float] | None = None, verdicts: Verdicts = ()
) -> ScoredRollout:
    measured = draft.measured
    return ScoredRollout(
        rollout=measured.rollout,
        member_scores=measured.scores.member_scores,
        reward=reward,
        uncertainty=draft.spread,
        ref_logprobs_f32=pack_floats(measured.scores.ref_logprobs),
        rm_version=version,
        score_s=measured.seconds,
        weight=draft.weight,
        parts=parts or {},
        verdicts=verdicts,
    )
