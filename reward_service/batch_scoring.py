"""A batch of rollouts → outcomes: what the cache has, one forward pass for the rest, and what becomes of the scores.

Consumes: rollouts. Produces: an outcome each, in order, and what the cache should learn from them. Waits for: the score
store (bounded, see cache.py), the forward thread (at most `timeout_s` a call), other sources (see serving.py).
Always holds: every score and log-prob that leaves here is finite and of the right length; otherwise ScoringError names
the task. A batch is scored by one version of the reward model from beginning to end: `install` counts from the next.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ScoringError
from cluster.records import Float32s, Rollout, ScoredRollout
from cluster.reward_models import NO_MODEL
from reward_service.cache import CachedScores, ScoreCache, cached_scores, reference_digest, text_key
from reward_service.forward_thread import ForwardThread
from reward_service.review.feed import ReviewFeed
from reward_service.scorer import Scorer, Scores
from reward_service.serving import Measured, Outcome, Rewarding, Serving
from reward_service.worker_metrics import WorkerMetrics

CacheUpdate = dict[str, CachedScores]


@dataclass(frozen=True)
class _Lookup:
    """One rollout and what the cache knows. `cached` without `exact`: same text, other tokens."""

    rollout: Rollout
    text: tuple[str, str] | None
    key: str
    digest: bytes
    cached: CachedScores | None

    @property
    def tokens(self) -> int:
        return (len(self.rollout.task.prompt_ids_i32) + len(self.rollout.response_ids_i32)) // 4  # int32

    @property
    def exact(self) -> bool:
        cached = self.cached
        return (
            cached is not None
            and cached.reference_digest == self.digest
            and len(cached.ref_logprobs_f32) == len(self.rollout.response_ids_i32)
        )


class BatchScoring:
    """Scorer, cache and forward thread together. `cache=None`: every rollout goes through the models. `rewarding=None`:
    the mean over members is the reward. `feed=None`: people see nothing."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        thread: ForwardThread,
        cache: ScoreCache | None,
        metrics: WorkerMetrics,
        timeout_s: float,
        rewarding: Rewarding | None = None,
        feed: ReviewFeed | None = None,
    ) -> None:
        self._serving = Serving(scorer)
        self._thread = thread
        self._cache = cache
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._rewarding = rewarding or Rewarding()
        self._feed = feed
        self.counts: Counter[str] = Counter()
        """swaps, down_weighted: since start."""

    @property
    def serving(self) -> Serving:
        """What the next batch is scored by."""
        return self._serving

    @property
    def reward_counts(self) -> Mapping[str, int]:
        """Of other sources and rules, since start."""
        return self._rewarding.counts

    def install(self, serving: Serving) -> None:
        """Score by `serving` from the next batch on. A batch under way ends with what it began with, which is then let
        go of."""
        if serving.version != self._serving.version:
            self._count("swaps")
        self._serving = serving
        self._metrics.model(serving.version)

    async def score(self, batch: Sequence[Rollout]) -> tuple[list[Outcome], CacheUpdate]:
        """One outcome each, in order. Raises whatever the scorer raises; ScoringError for a result that is not finite
        or of the wrong length, or that takes too long; StuckError as the forward thread does."""
        serving = self._serving  # once: after each wait below, `install` may have put another in its place
        lookups = await self._look_up(batch, serving.scorer)
        absent = [lookup for lookup in lookups if lookup.cached is None]
        text_hits = [lookup for lookup in lookups if lookup.cached is not None and not lookup.exact]
        computed, seconds = await self._forward(absent, text_hits, scorer=serving.scorer)
        measured: list[Measured] = []
        learned: CacheUpdate = {}
        for lookup, scores in zip(lookups, self._merged(lookups, computed), strict=True):
            _check(lookup.rollout, scores, version=serving.version)
            measured.append(Measured(lookup.rollout, scores, lookup.text, 0.0 if lookup.exact else seconds))
            if not lookup.exact and self._cache is not None:
                learned[lookup.key] = cached_scores(
                    scores.member_scores, ref_logprobs=scores.ref_logprobs, digest=lookup.digest
                )
        outcomes = await self._rewarding.outcomes(measured, serving=serving)
        if any(isinstance(outcome, ScoringError) for outcome in outcomes):
            await self.remember(learned)  # at once: those come again, and the models need not run again for them
        for outcome in outcomes:
            if isinstance(outcome, ScoredRollout) and outcome.weight != 1.0:
                self._count("down_weighted")
        if self._feed is not None:
            self._feed.offer(measured, outcomes)
        return outcomes, learned

    async def model_rewards(self, batch: Sequence[Rollout], *, serving: Serving) -> list[float]:
        """The reward model's own word by `serving`, before other sources and rules; past the cache. Raises as `score`
        does."""
        scorer = serving.scorer
        members = await self._thread.call(lambda: scorer.member_scores(batch), timeout_s=self._timeout_s)
        return [self._rewarding.model_reward(scores_M, serving=serving) for scores_M in members]

    async def remember(self, learned: CacheUpdate) -> None:
        """Put what `score` learned into the cache."""
        if self._cache is not None and learned:
            await self._cache.put_many(learned)

    async def _look_up(self, batch: Sequence[Rollout], scorer: Scorer) -> list[_Lookup]:
        if self._cache is None and not self._rewarding.reads_text and self._feed is None:
            return [_Lookup(rollout, None, "", b"", None) for rollout in batch]
        texts = await self._thread.call(lambda: scorer.texts(batch), timeout_s=self._timeout_s)
        if self._cache is None:
            return [_Lookup(rollout, text, "", b"", None) for rollout, text in zip(batch, texts, strict=True)]
        keys = [
            text_key(scorer.version, prompt=prompt, answer=answer, finish_reason=rollout.finish_reason)
            for (prompt, answer), rollout in zip(texts, batch, strict=True)
        ]
        hits = await self._cache.get_many(keys)
        lookups = []
        for rollout, text, key, hit in zip(batch, texts, keys, hits, strict=True):
            self._metrics.cache_lookup(None if hit is None else hit[1])
            digest = reference_digest(rollout, reference_id=scorer.reference_id)
            lookups.append(_Lookup(rollout, text, key, digest, None if hit is None else hit[0]))
        return lookups

    async def _forward(
        self, absent: Sequence[_Lookup], text_hits: Sequence[_Lookup], *, scorer: Scorer
    ) -> tuple[dict[int, Scores], float]:
        """Scores by id() of the lookup, and the seconds it took."""
        if not absent and not text_hits:
            return {}, 0.0

        def run() -> tuple[list[Scores], list[Float32s]]:
            scores = scorer.score([lookup.rollout for lookup in absent]) if absent else []
            references = scorer.reference_logprobs([lookup.rollout for lookup in text_hits]) if text_hits else []
            return scores, references

        started_s = time.perf_counter()
        scores, references = await self._thread.call(run, timeout_s=self._timeout_s)
        seconds = time.perf_counter() - started_s
        tokens = sum(lookup.tokens for lookup in (*absent, *text_hits))
        self._metrics.forward(rollouts=len(absent) + len(text_hits), tokens=tokens, seconds=seconds)
        computed = {id(lookup): answer for lookup, answer in zip(absent, scores, strict=True)}
        for lookup, values_T in zip(text_hits, references, strict=True):
            assert lookup.cached is not None
            computed[id(lookup)] = Scores(lookup.cached.member_scores, values_T)
        return computed, seconds

    @staticmethod
    def _merged(lookups: Sequence[_Lookup], computed: dict[int, Scores]) -> list[Scores]:
        merged = []
        for lookup in lookups:
            if lookup.exact:
                assert lookup.cached is not None
                values_T = np.frombuffer(lookup.cached.ref_logprobs_f32, dtype="<f4")
                merged.append(Scores(lookup.cached.member_scores, values_T))
            else:
                merged.append(computed[id(lookup)])
        return merged

    def _count(self, what: str) -> None:
        self.counts[what] += 1
        self._metrics.count(what)


def _check(rollout: Rollout, scores: Scores, *, version: str) -> None:
    if (not scores.member_scores and version != NO_MODEL) or not all(map(math.isfinite, scores.member_scores)):
        problem = f"scores {scores.member_scores}"
    elif scores.ref_logprobs.shape != rollout.response_ids.shape:
        problem = f"{scores.ref_logprobs.shape} reference log-probs for {rollout.response_ids.shape} tokens"
    elif not np.isfinite(scores.ref_logprobs).all():
        problem = "reference log-probs with NaN or infinity"
    else:
        return
    raise ScoringError(
        f"task {rollout.task.task_id} has no usable score", got=problem, do="check the models' weights and dtype"
    )
