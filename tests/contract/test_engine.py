"""One contract for every Engine: the scripted one, and vLLM with its core in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.engine import Engine, GenerationRequest, ScriptedEngine
from cluster.errors import ConfigError, EngineDeadError, WeightSyncError
from cluster.gloo_group import GlooLeader
from cluster.weight_group import GroupBrokenError, GroupPlan, GroupUpdate
from cluster.weights import UNSYNCED, WeightBlob, pack
from configs.run import RolloutSection
from tests.actors_support import EOS, VOCAB, Reference, contained_vllm, save_tiny_llama

KINDS = ["scripted", pytest.param("vllm", marks=pytest.mark.slow)]


class Case:
    """An engine with the weights to feed it."""

    def __init__(self, engine: Engine, reference: Reference | None) -> None:
        self.engine, self.reference = engine, reference

    def blob(self, version: int) -> WeightBlob:
        if self.reference is not None:
            return self.reference.blob(version)
        return pack(version, [("w", torch.zeros(2))])


@pytest.fixture(params=KINDS)
async def case(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Case]:
    if request.param == "scripted":
        scripted = ScriptedEngine(vocab_size=VOCAB, eos_id=EOS)
        scripted.expected_names = {"w"}
        yield Case(scripted, None)
        await scripted.shutdown()
        return
    from actors.engine_vllm import VllmEngine
    from actors.vllm_spec import VllmSpec

    model = save_tiny_llama(tmp_path)
    spec = VllmSpec(model_path=str(model), rollout=RolloutSection(), max_sequence_tokens=128, seed=3)
    with contained_vllm():
        engine = await VllmEngine.start(spec)
        yield Case(engine, Reference(model))
        await engine.shutdown()


def ask(name: str, *, tokens: int = 12) -> GenerationRequest:
    prompt = np.array([3, 5, 8], dtype=np.int32)
    return GenerationRequest(request_id=name, prompt_ids=prompt, max_new_tokens=tokens, temperature=1.0)


async def test_a_life_in_order(case: Case) -> None:
    """One test for the good path: an engine takes seconds to boot."""
    engine = case.engine
    assert engine.version == UNSYNCED
    await engine.check_health()

    answers = await asyncio.gather(*(engine.generate(ask(f"a{i}")) for i in range(16)))
    for answer in answers:
        ids = answer.response_ids.tolist()
        assert answer.response_ids.dtype == np.int32
        assert answer.logprobs.dtype == np.float32
        assert 1 <= len(ids) <= 12
        assert len(answer.logprobs) == len(ids)
        assert all(0 <= token < VOCAB for token in ids)
        assert (answer.logprobs <= 0).all()
        assert EOS not in ids[:-1]
        assert (answer.finish_reason == "stop") == (ids[-1] == EOS)
        assert answer.finish_reason == "stop" or len(ids) == 12
        assert [(run.start, run.version) for run in answer.version_runs] == [(0, UNSYNCED)]
    assert len({tuple(answer.response_ids.tolist()) for answer in answers}) > 1

    timings = await engine.load_weights(case.blob(4))
    assert engine.version == 4
    assert 0 <= timings.load_s <= timings.pause_s
    after = await engine.generate(ask("b"))
    assert [(run.start, run.version) for run in after.version_runs] == [(0, 4)]

    probe = await engine.probe(np.array([3, 9, 27, 17], dtype=np.int32))
    assert probe.shape == (3,)
    assert probe.dtype == np.float32
    assert np.isfinite(probe).all()

    for stale in (4, 3):
        with pytest.raises(WeightSyncError, match="not newer"):
            await engine.load_weights(case.blob(stale))
    assert engine.version == 4
    assert len((await engine.generate(ask("c"))).response_ids) >= 1

    cancelled = asyncio.create_task(engine.generate(ask("d", tokens=100)))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert len((await engine.generate(ask("d"))).response_ids) >= 1


async def test_weights_through_a_group_and_its_end(case: Case) -> None:
    """A version in two buckets from a leader; then a leader that goes, which leaves the engine as it was."""
    engine, leader = case.engine, GlooLeader("127.0.0.1", timeout_s=5.0)
    first, second = case.blob(1), case.blob(2)
    plan = GroupPlan(
        epoch=7,
        backend="gloo",
        address="127.0.0.1",
        port=leader.port,
        world_size=1 + engine.group_ranks,
        offsets={"engine": 1},
        bucket_bytes=max(1, first.size_bytes // 2),
        timeout_s=5.0,
    )

    def update(blob: WeightBlob, *, epoch: int = 7) -> GroupUpdate:
        return GroupUpdate(epoch, blob.version, blob.manifest, blob.size_bytes, blob.probe)

    with pytest.raises(GroupBrokenError, match="not in weight group"):
        await engine.receive_weights(update(first))
    await asyncio.gather(
        asyncio.to_thread(leader.form, plan.world_size), engine.join_group(plan, first_rank=plan.offsets["engine"])
    )
    await asyncio.gather(
        asyncio.to_thread(lambda: list(leader.send(first.buffer, bucket_bytes=plan.bucket_bytes))),
        engine.receive_weights(update(first)),
    )
    assert engine.version == 1
    if first.probe is not None:
        assert np.abs(await engine.probe(first.probe.token_ids) - first.probe.logprobs).max() < 1e-4

    waiting = asyncio.create_task(engine.receive_weights(update(second)))
    await asyncio.sleep(0.1)
    leader.close()
    with pytest.raises(GroupBrokenError):
        await waiting
    assert engine.version == 1
    assert len((await engine.generate(ask("a"))).response_ids) >= 1
    await engine.load_weights(second)
    assert engine.version == 2
    await engine.leave_group()
    await engine.leave_group()


async def test_a_group_that_does_not_form_leaves_the_engine_as_it_was(case: Case) -> None:
    leader = GlooLeader("127.0.0.1", timeout_s=1.0)
    plan = GroupPlan(
        epoch=1,
        backend="gloo",
        address="127.0.0.1",
        port=leader.port,
        world_size=3,
        offsets={"engine": 1, "another": 2},
        bucket_bytes=64,
        timeout_s=1.0,
    )
    joining = asyncio.create_task(case.engine.join_group(plan, first_rank=1))
    assert len((await case.engine.generate(ask("meanwhile"))).response_ids) >= 1
    with pytest.raises(GroupBrokenError):
        await joining
    leader.close()
    await case.engine.load_weights(case.blob(0))
    assert case.engine.version == 0


async def test_sleep_and_wake_or_a_clear_no(case: Case) -> None:
    """Asleep, nothing is generated; awake again, the version and the answers go on. On a CPU vLLM has nothing to give
    back, and says so without harm."""
    engine = case.engine
    await engine.load_weights(case.blob(3))
    if case.reference is not None:
        with pytest.raises(ConfigError, match="cannot sleep"):
            await engine.sleep()
    else:
        await engine.sleep()
        waiting = asyncio.create_task(engine.generate(ask("asleep")))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        await engine.wake()
        await waiting
    assert engine.version == 3
    assert [(run.start, run.version) for run in (await engine.generate(ask("awake"))).version_runs] == [(0, 3)]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's sleep mode gives a GPU's memory back")
async def test_a_sleeping_engine_s_memory_is_the_learner_s(tmp_path: Path) -> None:
    from actors.engine_vllm import VllmEngine
    from actors.vllm_spec import VllmSpec

    model = save_tiny_llama(tmp_path)
    rollout = RolloutSection(gpus_per_actor=0.5, gpu_memory_utilization=0.3)
    spec = VllmSpec(model_path=str(model), rollout=rollout, max_sequence_tokens=128, seed=3, can_sleep=True)
    reference = Reference(model)
    with contained_vllm():
        engine = await VllmEngine.start(spec)
        blob = reference.blob(0)
        assert blob.probe is not None
        await engine.load_weights(blob)
        awake_bytes, _ = torch.cuda.mem_get_info()
        await engine.sleep()
        asleep_bytes, total_bytes = torch.cuda.mem_get_info()
        assert asleep_bytes - awake_bytes > 0.2 * total_bytes
        await engine.wake()
        assert np.abs(await engine.probe(blob.probe.token_ids) - blob.probe.logprobs).max() < 1e-3
        await engine.shutdown()


async def test_a_partial_update_ends_the_engine_for_ever(case: Case) -> None:
    whole = case.blob(0)
    partial = WeightBlob(version=0, manifest=whole.manifest[1:], buffer=whole.buffer)
    with pytest.raises(WeightSyncError, match="missing"):
        await case.engine.load_weights(partial)
    for call in (case.engine.generate(ask("a")), case.engine.check_health(), case.engine.load_weights(case.blob(1))):
        with pytest.raises(EngineDeadError):
            await call
    assert case.engine.version == UNSYNCED


async def test_shutdown_ends_calls_in_flight_and_may_be_repeated(case: Case) -> None:
    waiting = asyncio.create_task(case.engine.generate(ask("a", tokens=100)))
    await asyncio.sleep(0)
    await case.engine.shutdown()
    await case.engine.shutdown()
    with pytest.raises(EngineDeadError):
        await waiting
    with pytest.raises(EngineDeadError):
        await case.engine.generate(ask("b"))
