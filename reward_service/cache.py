"""Scores that need not be computed again: a least-recently-used map in the process, then the run's score store.

Key: version of the reward model, and SHA-256 of the whitespace-normalised prompt and answer and how the answer ended.
The ending counts because a cut answer and a finished one are different inputs to the reward model with the same text.

Value: the member scores and, with a digest of what they depend on (token ids, temperature, reference model), the
reference log-probs. Texts that match while tokens differ are a *text hit*: member scores are taken from the cache, and
only the reference model runs. An exact match is a *full hit*: no model runs.

Consumes: keys and values. Produces: hits, or misses. Waits for: the store, at most `store_timeout_s` a call.
Always holds: the cache never fails a sample. A store that errs, hangs or answers with damaged bytes is a counted miss,
and is left alone for `store_pause_s`, so that a dead store does not slow down scoring.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from cluster.errors import KeelError
from cluster.keys import score_key
from cluster.records import Float32s, Rollout, pack_floats
from cluster.reward_models import NO_MODEL
from cluster.stores import ScoreStore

log = logging.getLogger(__name__)

Layer = Literal["process", "store"]


class CachedScores(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept for one text. T response tokens, M ensemble members."""

    member_scores: tuple[float, ...]
    """[M]"""
    reference_digest: bytes
    """What `ref_logprobs_f32` depends on: see `reference_digest`."""
    ref_logprobs_f32: bytes
    """[T] float32, raw."""


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(CachedScores)
_NO_MODEL: Final = score_key(NO_MODEL, "")
"""How the keys begin whose values have no member scores."""


@dataclass(frozen=True)
class CacheSettings:
    """entries: size of the map in the process. ttl_s: lifetime in the store. The rest: see the module docstring."""

    entries: int
    ttl_s: float
    store_timeout_s: float = 1.0
    store_pause_s: float = 5.0


def text_key(rm_version: str, *, prompt: str, answer: str, finish_reason: str) -> str:
    """`<rm_version>:<64 hex digits>`, equal for texts that differ in white space alone."""
    parts = (" ".join(prompt.split()), " ".join(answer.split()), finish_reason)
    # msgpack puts lengths in front: moving the boundary between prompt and answer gives another key.
    return score_key(rm_version, hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest())


def reference_digest(rollout: Rollout, *, reference_id: str) -> bytes:
    """16 bytes naming everything that the reference log-probs of a rollout depend on."""
    task = rollout.task
    parts = (reference_id, task.temperature, task.prompt_ids_i32, rollout.response_ids_i32)
    return hashlib.sha256(msgspec.msgpack.encode(parts)).digest()[:16]


def cached_scores(member_scores: Sequence[float], *, ref_logprobs: Float32s, digest: bytes) -> CachedScores:
    """A value for the cache."""
    return CachedScores(
        member_scores=tuple(member_scores), reference_digest=digest, ref_logprobs_f32=pack_floats(ref_logprobs)
    )


class ScoreCache:
    """Both layers. `store=None`: the map in the process alone. For one event loop; not thread-safe."""

    def __init__(
        self, settings: CacheSettings, *, store: ScoreStore | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._entries: OrderedDict[str, CachedScores] = OrderedDict()
        self._store_rests_until_s = -math.inf
        self.counts: Counter[str] = Counter()
        """process_hits, store_hits, misses, store_failures, damaged: since start."""

    async def get_many(self, keys: Sequence[str]) -> list[tuple[CachedScores, Layer] | None]:
        """For each key its value and the layer that had it, or None."""
        found: dict[str, tuple[CachedScores, Layer]] = {}
        for key in keys:
            if key in self._entries:
                self._entries.move_to_end(key)
                found[key] = (self._entries[key], "process")
        absent = list(dict.fromkeys(key for key in keys if key not in found))
        for key, value in (await self._from_store(absent)).items():
            self._remember(key, value)
            found[key] = (value, "store")
        for key in keys:
            self.counts[f"{found[key][1]}_hits" if key in found else "misses"] += 1
        return [found.get(key) for key in keys]

    async def put_many(self, values: Mapping[str, CachedScores]) -> None:
        """Keep values in both layers. Never raises for the store's sake."""
        for key, value in values.items():
            self._remember(key, value)
        if self._store is None or not values or self._store_rests():
            return
        payloads = {key: _ENCODER.encode(value) for key, value in values.items()}
        try:
            async with asyncio.timeout(self._settings.store_timeout_s):
                await self._store.put_many(payloads, ttl_s=self._settings.ttl_s)
        except (KeelError, TimeoutError, OSError) as error:
            self._rest_store(error)

    async def _from_store(self, keys: Sequence[str]) -> dict[str, CachedScores]:
        if self._store is None or not keys or self._store_rests():
            return {}
        try:
            async with asyncio.timeout(self._settings.store_timeout_s):
                payloads = await self._store.get_many(keys)
        except (KeelError, TimeoutError, OSError) as error:
            self._rest_store(error)
            return {}
        decoded = {
            key: self._decode(key, payload) for key, payload in zip(keys, payloads, strict=True) if payload is not None
        }
        return {key: value for key, value in decoded.items() if value is not None}

    def _decode(self, key: str, payload: bytes) -> CachedScores | None:
        try:
            value = _DECODER.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = None
        empty = value is not None and not value.member_scores and not key.startswith(_NO_MODEL)
        if value is None or empty or not all(map(math.isfinite, value.member_scores)):
            self.counts["damaged"] += 1
            return None
        return value

    def _remember(self, key: str, value: CachedScores) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > self._settings.entries:
            self._entries.popitem(last=False)

    def _store_rests(self) -> bool:
        return self._clock() < self._store_rests_until_s

    def _rest_store(self, error: BaseException) -> None:
        self.counts["store_failures"] += 1
        self._store_rests_until_s = self._clock() + self._settings.store_pause_s
        log.warning("score store failed, going on without it for %.0f s: %r", self._settings.store_pause_s, error)
