"""One contract for every Engine: the scripted one, and vLLM with its core in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.engine import Engine, GenerationRequest, ScriptedEngine
from cluster.errors import EngineDeadError, WeightSyncError
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
    from actors.engine_vllm import VllmEngine, VllmSpec

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
