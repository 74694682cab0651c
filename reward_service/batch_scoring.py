"""A batch of rollouts → scored rollouts: what the cache has, and one forward pass for the rest.

Consumes: rollouts. Produces: scored rollouts, in order, and what the cache should learn from them. Waits for: the score
store (bounded, see cache.py), the forward thread (at most `timeout_s` a call). Always holds: every score and log-prob
that leaves here is finite and of the right length; otherwise ScoringError names the task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ScoringError
from cluster.records import Float32s, Rollout, ScoredRollout, pack_floats
from reward_service.cache import CachedScores, ScoreCache, cached_scores, reference_digest, text_key
from reward_service.forward_thread import ForwardThread
from reward_service.scorer import Scorer, Scores, aggregate
from reward_service.worker_metrics import WorkerMetrics

CacheUpdate = dict[str, CachedScores]


@dataclass(frozen=True)
class _Lookup:
    """One rollout and what the cache knows. `cached` without `exact`: same text, other tokens."""

    rollout: Rollout
    key: str
    digest: bytes
    cached: CachedScores | None

    @property
    def tokens(self) -> int:
        return len(self.rollout.task.prompt_ids) + len(self.rollout.response_ids)

    @property
    def exact(self) -> bool:
        cached = self.cached
        return (
            cached is not None
            and cached.reference_digest == self.digest
            and len(cached.ref_logprobs_f32) == len(self.rollout.response_ids_i32)
        )


class BatchScoring:
    """Scorer, cache and forward thread together. `cache=None`: every rollout goes through the models."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        thread: ForwardThread,
        cache: ScoreCache | None,
        metrics: WorkerMetrics,
        timeout_s: float,
    ) -> None:
        self.scorer = scorer
        self._thread = thread
        self._cache = cache
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def score(self, batch: Sequence[Rollout]) -> tuple[list[ScoredRollout], CacheUpdate]:
        """One scored rollout each, in order. Raises whatever the scorer raises; ScoringError for a result that is not
        finite or of the wrong length, or that takes too long; StuckError as the forward thread does."""
        lookups = await self._look_up(batch)
        absent = [lookup for lookup in lookups if lookup.cached is None]
        text_hits = [lookup for lookup in lookups if lookup.cached is not None and not lookup.exact]
        computed, seconds = await self._forward(absent, text_hits)
        scored: list[ScoredRollout] = []
        learned: CacheUpdate = {}
        for lookup, scores in zip(lookups, self._merged(lookups, computed), strict=True):
            _check(lookup.rollout, scores)
            scored.append(_record(lookup.rollout, scores, self.scorer.version, 0.0 if lookup.exact else seconds))
            if not lookup.exact and self._cache is not None:
                learned[lookup.key] = cached_scores(
                    scores.member_scores, ref_logprobs=scores.ref_logprobs, digest=lookup.digest
                )
        return scored, learned

    async def remember(self, learned: CacheUpdate) -> None:
        """Put what `score` learned into the cache."""
        if self._cache is not None and learned:
            await self._cache.put_many(learned)

    async def _look_up(self, batch: Sequence[Rollout]) -> list[_Lookup]:
        if self._cache is None:
            return [_Lookup(rollout, "", b"", None) for rollout in batch]
        scorer = self.scorer
        texts = await self._thread.call(lambda: scorer.texts(batch), timeout_s=self._timeout_s)
        keys = [
            text_key(scorer.version, prompt=prompt, answer=answer, finish_reason=rollout.finish_reason)
            for (prompt, answer), rollout in zip(texts, batch, strict=True)
        ]
        lookups = []
        for rollout, key, hit in zip(batch, keys, await self._cache.get_many(keys), strict=True):
            self._metrics.cache_lookup(None if hit is None else hit[1])
            digest = reference_digest(rollout, reference_id=scorer.reference_id)
            lookups.append(_Lookup(rollout, key, digest, None if hit is None else hit[0]))
        return lookups

    async def _forward(
        self, absent: Sequence[_Lookup], text_hits: Sequence[_Lookup]
    ) -> tuple[dict[int, Scores], float]:
        """Scores by id() of the lookup, and the seconds it took."""
        if not absent and not text_hits:
            return {}, 0.0
        scorer = self.scorer

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


def _check(rollout: Rollout, scores: Scores) -> None:
    if not scores.member_scores or not all(map(math.isfinite, scores.member_scores)):
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


def _record(rollout: Rollout, scores: Scores, version: str, seconds: float) -> ScoredRollout:
    reward, uncertainty = aggregate(scores.member_scores)
    return ScoredRollout(
        rollout=rollout,
        member_scores=scores.member_scores,
        reward=reward,
        uncertainty=uncertainty,
        ref_logprobs_f32=pack_floats(scores.ref_logprobs),
        rm_version=version,
        score_s=seconds,
    )
