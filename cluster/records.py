"""The three records that travel the streams, and their wire format.

Wire format: 4-byte header (b"KL", schema version, record type) and a msgpack body (msgspec). Token ids travel as
int32, log-probabilities as float32, both raw little-endian bytes. Nothing is pickled.

Legend: P prompt tokens, T response tokens, M members of the reward-model ensemble.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.errors import CodecError

SCHEMA_VERSION: Final = 2
_MAGIC: Final = b"KL"
_INT32: Final = np.dtype("<i4")
_FLOAT32: Final = np.dtype("<f4")

Int32s = NDArray[np.int32]
Float32s = NDArray[np.float32]


def pack_ids(ids: ArrayLike) -> bytes:
    """Token ids → little-endian int32 bytes."""
    return np.asarray(ids, dtype=_INT32).tobytes()


def pack_floats(values: ArrayLike) -> bytes:
    """Floats → little-endian float32 bytes."""
    return np.asarray(values, dtype=_FLOAT32).tobytes()


class PromptTask(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt to answer once. Issued by the learner, consumed by a rollout actor.

    `task_id` names the place in the run that the answer fills: a re-issue keeps it and raises `attempt`.
    """

    task_id: str
    prompt_id: str
    group_id: str
    prompt_ids_i32: bytes
    max_new_tokens: int
    temperature: float
    attempt: int = 0
    issued_version: int = 0

    @property
    def prompt_ids(self) -> Int32s:
        """[P] token ids, read-only."""
        return np.frombuffer(self.prompt_ids_i32, dtype=_INT32)


class VersionRun(msgspec.Struct, frozen=True, array_like=True):
    """From response token `start` on (until the next run), tokens were sampled by policy `version`."""

    start: int
    version: int


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """An answer sampled by the behaviour policy. Produced by a rollout actor, consumed by the reward service."""

    task: PromptTask
    response_ids_i32: bytes
    behaviour_logprobs_f32: bytes
    version_runs: tuple[VersionRun, ...]
    finish_reason: str
    """"stop": the end-of-sequence token was sampled and is the last response id. "length": cut at max_new_tokens."""
    actor: str
    generate_s: float

    @property
    def response_ids(self) -> Int32s:
        """[T] token ids, with the end-of-sequence token when finish_reason is "stop"."""
        return np.frombuffer(self.response_ids_i32, dtype=_INT32)

    @property
    def behaviour_logprobs(self) -> Float32s:
        """[T] log-probability, in nats, of each sampled token under the policy (and temperature) that sampled it."""
        return np.frombuffer(self.behaviour_logprobs_f32, dtype=_FLOAT32)

    @property
    def oldest_version(self) -> int:
        """The lowest policy version that sampled any token: what staleness is counted from."""
        return min(run.version for run in self.version_runs)


class RuleVerdict(msgspec.Struct, frozen=True, array_like=True):
    """A rule of the constitution applied to an answer. `action`: flag, penalise or override."""

    rule: str
    action: str
    detail: str = ""


class ScoredRollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout with its reward. Produced by the reward service, consumed by the learner."""

    rollout: Rollout
    member_scores: tuple[float, ...]
    """[M] raw score of each ensemble member; empty where no reward model is asked."""
    reward: float
    """What the answer is worth: the members' aggregate, other sources and rules applied; raw, before normalisation,
    clipping and KL."""
    uncertainty: float
    """Standard deviation over members; 0.0 for a single model."""
    ref_logprobs_f32: bytes
    rm_version: str
    """Scores of one version are on one scale."""
    score_s: float = 0.0
    weight: float = 1.0
    """In the policy's loss; less where the members disagree."""
    parts: dict[str, float] = {}
    """Source → its own raw reward, where there are other sources than the reward model."""
    verdicts: tuple[RuleVerdict, ...] = ()

    @property
    def ref_logprobs(self) -> Float32s:
        """[T] log-probability of each response token under the frozen reference policy, at the task's temperature."""
        return np.frombuffer(self.ref_logprobs_f32, dtype=_FLOAT32)


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A task that was given up, with the reason. The learner counts it; it is never a reward of 0."""

    task: PromptTask
    stage: str
    """"rollout" or "reward"."""
    reason: str
    deliveries: int
    rejected: bool = False
    """Nothing failed: the reward service refused the answer as too uncertain."""


Record = PromptTask | Rollout | ScoredRollout | DeadLetter
_TYPES: Final[tuple[type[Any], ...]] = (PromptTask, Rollout, ScoredRollout, DeadLetter)
_CODES: Final = {kind: code for code, kind in enumerate(_TYPES)}
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODERS: Final = {kind: msgspec.msgpack.Decoder(kind) for kind in _TYPES}
_R = TypeVar("_R", bound=Record)


def encode(record: Record) -> bytes:
    """Record → bytes."""
    return _MAGIC + bytes((SCHEMA_VERSION, _CODES[type(record)])) + _ENCODER.encode(record)


def decode(payload: bytes, kind: type[_R]) -> _R:
    """Bytes → record of exactly `kind`. Raises CodecError on anything else, saying what the bytes are instead."""
    if len(payload) < 4 or payload[:2] != _MAGIC:
        raise CodecError(
            "not a Keel record",
            got=f"{len(payload)} bytes starting {payload[:8]!r}",
            do="check that nothing else writes to this run's streams",
        )
    version, code = payload[2], payload[3]
    if version != SCHEMA_VERSION:
        raise CodecError(
            "record of another schema version",
            got=f"version {version}, this build reads {SCHEMA_VERSION}",
            do="run one Keel version on every node",
        )
    if code != _CODES[kind]:
        name = _TYPES[code].__name__ if code < len(_TYPES) else f"type {code}"
        raise CodecError(f"expected a {kind.__name__} record", got=name, do="check which stream this consumer reads")
    try:
        record: _R = _DECODERS[kind].decode(payload[4:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CodecError(
            f"damaged {kind.__name__} record",
            got=f"{len(payload)} bytes: {error}",
            do="the entry is discarded and its task issued again; look for a truncating proxy or a full disk",
        ) from error
    _check(record)
    return record


def _check(record: Record) -> None:
    """Lengths that msgpack's types cannot express: one log-prob a token, version runs that cover from token 0."""
    if isinstance(record, DeadLetter):
        return _check(record.task)
    if isinstance(record, PromptTask):
        if not record.prompt_ids_i32 or len(record.prompt_ids_i32) % 4:
            raise CodecError("damaged PromptTask record", got=f"{len(record.prompt_ids_i32)} bytes of prompt ids")
        return None
    rollout = record.rollout if isinstance(record, ScoredRollout) else record
    _check(rollout.task)
    sizes = {len(rollout.response_ids_i32), len(rollout.behaviour_logprobs_f32)}
    if isinstance(record, ScoredRollout):
        sizes.add(len(record.ref_logprobs_f32))
    if len(sizes) != 1 or 0 in sizes or sizes.pop() % 4:
        raise CodecError(f"damaged {type(record).__name__} record", got="unequal or empty token and log-prob arrays")
    if not rollout.version_runs or rollout.version_runs[0].start != 0:
        raise CodecError(f"damaged {type(record).__name__} record", got=f"version runs {rollout.version_runs}")
    return None
