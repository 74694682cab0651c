"""The wire format: every record comes back as it was; anything else is a CodecError and nothing but."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import CodecError
from cluster.records import (
    SCHEMA_VERSION,
    DeadLetter,
    PromptTask,
    Record,
    Rollout,
    ScoredRollout,
    VersionRun,
    decode,
    encode,
    pack_floats,
    pack_ids,
)

KINDS: tuple[type[Any], ...] = (PromptTask, Rollout, ScoredRollout, DeadLetter)
names = st.text(max_size=20)
counts = st.integers(0, 2**40)
reals = st.floats(allow_nan=False)
ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20)

tasks = st.builds(
    PromptTask,
    task_id=names,
    prompt_id=names,
    group_id=names,
    prompt_ids_i32=ids.map(pack_ids),
    max_new_tokens=counts,
    temperature=reals,
    attempt=counts,
    issued_version=counts,
)


def _floats(size: int) -> st.SearchStrategy[bytes]:
    return st.lists(st.floats(width=32), min_size=size, max_size=size).map(pack_floats)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    response = draw(ids)
    starts = sorted(draw(st.sets(st.integers(1, 50), max_size=3)))
    return Rollout(
        task=draw(tasks),
        response_ids_i32=pack_ids(response),
        behaviour_logprobs_f32=draw(_floats(len(response))),
        version_runs=tuple(VersionRun(start, draw(counts)) for start in [0, *starts]),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        actor=draw(names),
        generate_s=draw(reals),
    )


@st.composite
def scored(draw: st.DrawFn) -> ScoredRollout:
    rollout = draw(rollouts())
    return ScoredRollout(
        rollout=rollout,
        member_scores=tuple(draw(st.lists(reals, max_size=4))),
        reward=draw(reals),
        uncertainty=draw(reals),
        ref_logprobs_f32=draw(_floats(len(rollout.response_ids))),
        rm_version=draw(names),
        score_s=draw(reals),
    )


dead_letters = st.builds(DeadLetter, task=tasks, stage=names, reason=names, deliveries=counts)
records: st.SearchStrategy[Record] = st.one_of(tasks, rollouts(), scored(), dead_letters)


@given(records)
def test_round_trip(record: Record) -> None:
    assert decode(encode(record), type(record)) == record


@given(records, st.data())
def test_truncated_bytes_are_refused(record: Record, data: st.DataObject) -> None:
    payload = encode(record)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(CodecError):
        decode(payload[:cut], type(record))


@given(st.binary(max_size=300), st.sampled_from(KINDS))
def test_garbage_is_refused(payload: bytes, kind: type[Any]) -> None:
    with pytest.raises(CodecError):
        decode(payload, kind)


@given(st.binary(max_size=300), st.integers(0, 3))
def test_garbage_after_a_good_header_is_refused(body: bytes, code: int) -> None:
    with pytest.raises(CodecError):
        decode(b"KL" + bytes((SCHEMA_VERSION, code)) + body, KINDS[code])


@given(records, st.integers(0, 255), st.data())
def test_a_changed_byte_is_refused_or_gives_a_record_that_can_be_used(
    record: Record, value: int, data: st.DataObject
) -> None:
    payload = bytearray(encode(record))
    payload[data.draw(st.integers(0, len(payload) - 1))] = value
    try:
        found = decode(bytes(payload), type(record))
    except CodecError:
        return
    assert type(found) is type(record)
    if isinstance(found, Rollout):
        assert found.response_ids.shape == found.behaviour_logprobs.shape
        assert isinstance(found.oldest_version, int)
    if isinstance(found, ScoredRollout):
        assert found.ref_logprobs.shape == found.rollout.response_ids.shape


@given(records, st.integers(0, 255).filter(lambda version: version != SCHEMA_VERSION))
def test_another_schema_version_is_refused_by_its_number(record: Record, version: int) -> None:
    payload = bytearray(encode(record))
    payload[2] = version
    with pytest.raises(CodecError, match=f"version {version}"):
        decode(bytes(payload), type(record))


@given(records, st.sampled_from(KINDS))
def test_another_record_type_is_refused_by_its_name(record: Record, kind: type[Any]) -> None:
    if kind is type(record):
        return
    with pytest.raises(CodecError, match=type(record).__name__):
        decode(encode(record), kind)


def _task(**changes: Any) -> PromptTask:
    task = PromptTask(
        task_id="t", prompt_id="p", group_id="g", prompt_ids_i32=pack_ids([1, 2]), max_new_tokens=4, temperature=1.0
    )
    return msgspec.structs.replace(task, **changes)


def _rollout(**changes: Any) -> Rollout:
    rollout = Rollout(
        task=_task(),
        response_ids_i32=pack_ids([3, 4, 5]),
        behaviour_logprobs_f32=pack_floats([-0.5, -1.0, -1.5]),
        version_runs=(VersionRun(0, 7), VersionRun(2, 8)),
        finish_reason="stop",
        actor="a",
        generate_s=0.1,
    )
    return msgspec.structs.replace(rollout, **changes)


def test_arrays_are_little_endian_and_read_only() -> None:
    assert pack_ids([1, 258]) == b"\x01\x00\x00\x00\x02\x01\x00\x00"
    assert pack_floats([1.0, -2.0]) == struct.pack("<2f", 1.0, -2.0)
    rollout = decode(encode(_rollout()), Rollout)
    assert rollout.response_ids.tolist() == [3, 4, 5]
    assert rollout.behaviour_logprobs.tolist() == [-0.5, -1.0, -1.5]
    assert rollout.oldest_version == 7
    assert not rollout.response_ids.flags.writeable
    assert rollout.response_ids.dtype == np.dtype("<i4")


def test_ids_beyond_int32_are_refused_when_packed() -> None:
    with pytest.raises(OverflowError):
        pack_ids([2**31])


def test_infinite_log_probs_survive() -> None:
    rollout = decode(encode(_rollout(behaviour_logprobs_f32=pack_floats([-math.inf, 0, 0]))), Rollout)
    assert rollout.behaviour_logprobs[0] == -math.inf


@pytest.mark.parametrize(
    "broken",
    [
        _task(prompt_ids_i32=b""),
        _task(prompt_ids_i32=b"\0\0\0"),
        _rollout(response_ids_i32=b"", behaviour_logprobs_f32=b""),
        _rollout(response_ids_i32=pack_ids([3])),
        _rollout(response_ids_i32=b"\0" * 6, behaviour_logprobs_f32=b"\0" * 6),
        _rollout(version_runs=()),
        _rollout(version_runs=(VersionRun(1, 7),)),
        _rollout(task=_task(prompt_ids_i32=b"\0")),
        DeadLetter(task=_task(prompt_ids_i32=b""), stage="reward", reason="r", deliveries=3),
    ],
)
def test_arrays_that_cannot_be_right_are_refused(broken: Record) -> None:
    with pytest.raises(CodecError, match="damaged"):
        decode(encode(broken), type(broken))
