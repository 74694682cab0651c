"""The score cache: what makes two answers the same, what is forgotten, and that a broken store never fails a sample."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import pytest

from cluster.errors import StreamError
from cluster.records import PromptTask, Rollout, VersionRun, pack_floats, pack_ids
from reward_service.cache import CachedScores, CacheSettings, ScoreCache, cached_scores, reference_digest, text_key

DIGEST = b"d" * 16


class DictStore:
    """A store that can be told to fail or hang, and remembers what it was asked."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.ttl_s: list[float] = []
        self.asked: list[list[str]] = []
        self.error: Exception | None = None
        self.hangs = False

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        self.asked.append(list(keys))
        await self._misbehave()
        return [self.values.get(key) for key in keys]

    async def put_many(self, values: Mapping[str, bytes], *, ttl_s: float) -> None:
        await self._misbehave()
        self.values.update(values)
        self.ttl_s.append(ttl_s)

    async def _misbehave(self) -> None:
        if self.error is not None:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()


class ManualClock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def scores(*members: float) -> CachedScores:
    return cached_scores(members, ref_logprobs=np.array([-1.0, -2.0], dtype=np.float32), digest=DIGEST)


def make(store: DictStore | None, *, entries: int = 8) -> ScoreCache:
    return ScoreCache(CacheSettings(entries=entries, ttl_s=60.0), store=store, clock=ManualClock())


def rollout(*, prompt: Sequence[int] = (1, 2), response: Sequence[int] = (3, 4), temperature: float = 1.0) -> Rollout:
    task = PromptTask(
        task_id="t",
        prompt_id="p",
        group_id="g",
        prompt_ids_i32=pack_ids(prompt),
        max_new_tokens=8,
        temperature=temperature,
    )
    return Rollout(
        task=task,
        response_ids_i32=pack_ids(response),
        behaviour_logprobs_f32=pack_floats([-1.0] * len(response)),
        version_runs=(VersionRun(0, 0),),
        finish_reason="stop",
        actor="a",
        generate_s=0.1,
    )


# ---------------------------------------------------------------- keys


def test_white_space_alone_makes_no_difference() -> None:
    one = text_key("rm-1", prompt="my  router\n", answer="reset it .", finish_reason="stop")
    two = text_key("rm-1", prompt=" my router", answer="reset\tit  . ", finish_reason="stop")
    assert one == two
    assert one.startswith("rm-1:")


@pytest.mark.parametrize(
    ("version", "prompt", "answer", "finish_reason"),
    [
        ("rm-2", "a b", "c d", "stop"),
        ("rm-1", "a", "b c d", "stop"),
        ("rm-1", "a b", "c D", "stop"),
        ("rm-1", "a b", "c d", "length"),
    ],
)
def test_version_boundary_case_and_ending_make_a_difference(
    version: str, prompt: str, answer: str, finish_reason: str
) -> None:
    base = text_key("rm-1", prompt="a b", answer="c d", finish_reason="stop")
    assert text_key(version, prompt=prompt, answer=answer, finish_reason=finish_reason) != base


def test_key_is_the_hash_of_the_normalised_parts() -> None:
    body = b"\x93\xa3a b\xa1c\xa4stop"  # msgpack: array of three short strings
    assert text_key("v", prompt="a  b", answer=" c", finish_reason="stop") == f"v:{hashlib.sha256(body).hexdigest()}"


def test_reference_digest_names_tokens_temperature_and_model() -> None:
    base = reference_digest(rollout(), reference_id="ref")
    assert len(base) == 16
    assert reference_digest(rollout(), reference_id="ref") == base
    others = [
        reference_digest(rollout(), reference_id="other"),
        reference_digest(rollout(temperature=0.7), reference_id="ref"),
        reference_digest(rollout(response=(3, 5)), reference_id="ref"),
        reference_digest(rollout(prompt=(1, 2, 3), response=(4,)), reference_id="ref"),
    ]
    assert len({base, *others}) == 5


# ---------------------------------------------------------------- layers


async def test_a_miss_then_a_hit_in_the_process_without_asking_the_store() -> None:
    store = DictStore()
    cache = make(store)
    assert await cache.get_many(["k"]) == [None]
    await cache.put_many({"k": scores(1.5)})
    assert await cache.get_many(["k"]) == [(scores(1.5), "process")]
    assert store.asked == [["k"]]
    assert store.ttl_s == [60.0]
    assert cache.counts == {"misses": 1, "process_hits": 1}


async def test_another_worker_finds_it_in_the_store_and_then_keeps_it() -> None:
    store = DictStore()
    await make(store).put_many({"k": scores(1.5, -0.5)})
    other = make(store)
    assert await other.get_many(["x", "k"]) == [None, (scores(1.5, -0.5), "store")]
    assert await other.get_many(["k"]) == [(scores(1.5, -0.5), "process")]
    assert other.counts == {"misses": 1, "store_hits": 1, "process_hits": 1}


async def test_the_least_recently_used_entry_goes_first() -> None:
    cache = make(None, entries=2)
    await cache.put_many({"a": scores(1), "b": scores(2)})
    await cache.get_many(["a"])
    await cache.put_many({"c": scores(3)})
    assert [hit is not None for hit in await cache.get_many(["a", "b", "c"])] == [True, False, True]


async def test_the_same_key_twice_is_asked_for_once() -> None:
    store = DictStore()
    assert await make(store).get_many(["k", "k"]) == [None, None]
    assert store.asked == [["k"]]


# ---------------------------------------------------------------- a store in trouble


@pytest.mark.parametrize("error", [StreamError("unreachable"), OSError("reset"), TimeoutError()])
async def test_a_failing_store_is_a_counted_miss(error: Exception) -> None:
    store = DictStore()
    store.error = error
    cache = make(store)
    assert await cache.get_many(["k"]) == [None]
    assert cache.counts == {"misses": 1, "store_failures": 1}


async def test_a_hanging_store_is_given_up_after_its_time_limit() -> None:
    store = DictStore()
    store.hangs = True
    settings = CacheSettings(entries=8, ttl_s=60.0, store_timeout_s=0.01)
    cache = ScoreCache(settings, store=store, clock=ManualClock())
    assert await cache.get_many(["k"]) == [None]
    assert cache.counts["store_failures"] == 1


async def test_a_failed_store_rests_and_is_then_asked_again() -> None:
    store, clock = DictStore(), ManualClock()
    cache = ScoreCache(CacheSettings(entries=8, ttl_s=60.0, store_pause_s=5.0), store=store, clock=clock)
    store.error = StreamError("unreachable")
    await cache.put_many({"k": scores(1)})
    store.error = None
    await cache.get_many(["x"])
    await cache.put_many({"y": scores(2)})
    assert store.asked == []
    assert store.values == {}
    assert [hit is not None for hit in await cache.get_many(["k", "y"])] == [True, True]  # the process still has both
    clock.now_s += 5.0
    await cache.get_many(["x"])
    assert store.asked == [["x"]]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        msgspec.msgpack.encode({"member_scores": [], "reference_digest": b"", "ref_logprobs_f32": b""}),
        msgspec.msgpack.encode({"member_scores": [float("nan")], "reference_digest": b"", "ref_logprobs_f32": b""}),
    ],
)
async def test_damaged_bytes_are_a_counted_miss(payload: bytes) -> None:
    store = DictStore()
    store.values["k"] = payload
    cache = make(store)
    assert await cache.get_many(["k"]) == [None]
    assert cache.counts == {"misses": 1, "damaged": 1}


async def test_what_is_stored_is_not_a_pickle_and_reads_back_exactly() -> None:
    store = DictStore()
    await make(store).put_many({"k": scores(0.1, 1e-30)})
    raw = msgspec.msgpack.decode(store.values["k"])
    assert raw["member_scores"] == [0.1, 1e-30]
    assert np.frombuffer(raw["ref_logprobs_f32"], dtype="<f4").tolist() == [-1.0, -2.0]
