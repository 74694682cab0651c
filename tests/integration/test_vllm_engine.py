"""vLLM behind the engine seam, against Hugging Face's forward pass on the same weights."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from actors.engine import Generation, GenerationRequest
from actors.engine_vllm import VllmEngine, VllmSpec, engine_seed, model_eos_ids
from cluster.errors import EngineDeadError, KeelError, ModelError, WeightSyncError
from cluster.weights import UNSYNCED, pack
from configs.run import RolloutSection
from tests.actors_support import EOS, Reference, contained_vllm, save_tiny_llama

TOLERANCE_NATS = 1e-4
MAX_TOKENS = 240


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path)


@asynccontextmanager
async def booted(model: Path, *, seed: int = 5, rollout: RolloutSection | None = None) -> AsyncIterator[VllmEngine]:
    spec = VllmSpec(
        model_path=str(model), rollout=rollout or RolloutSection(), max_sequence_tokens=MAX_TOKENS, seed=seed
    )
    with contained_vllm():
        engine = await VllmEngine.start(spec)
        try:
            yield engine
        finally:
            await engine.shutdown()


def ask(name: str, prompt: list[int], *, tokens: int = 24, temperature: float = 1.0) -> GenerationRequest:
    ids = np.array(prompt, dtype=np.int32)
    return GenerationRequest(request_id=name, prompt_ids=ids, max_new_tokens=tokens, temperature=temperature)


def worst_error_nats(
    snapshots: dict[int, Reference], prompt: list[int], answer: Generation, *, temperature: float = 1.0
) -> float:
    """Of each token against the reference of the version that the engine says sampled it."""
    ids = prompt + answer.response_ids.tolist()
    versions = np.empty(len(answer.response_ids), dtype=int)
    for run in answer.version_runs:
        versions[run.start :] = run.version
    worst = 0.0
    for version in set(versions.tolist()):
        expected = snapshots[version].logprobs(ids, temperature=temperature)[len(prompt) - 1 :]
        worst = max(worst, float(np.abs(expected - answer.logprobs)[versions == version].max()))
    return worst


def trained(model: Path, *, versions: int) -> Reference:
    """A reference after updates 1 … versions."""
    reference = Reference(model)
    for version in range(1, versions + 1):
        reference.train(version)
    return reference


@pytest.mark.slow
async def test_logprobs_follow_every_version_in_mid_answer_and_on_cached_prompts(model: Path) -> None:
    snapshots = {version: trained(model, versions=version) for version in range(4)}
    snapshots[UNSYNCED] = snapshots[0]
    long_prompt = [2 + (7 * i) % 60 for i in range(200)]  # longer than a cache block: 128 tokens on a CPU
    async with booted(model) as engine:
        assert engine.core_in_thread
        mixed = 0
        for version in range(4):
            running = {}
            for i in range(8):
                prompt = [3 + i, 9, 27]
                request = ask(f"v{version}-{i}", prompt, tokens=120)
                running[i] = (prompt, asyncio.create_task(engine.generate(request)))
            await engine.generate(ask(f"v{version}-warm", long_prompt, tokens=3))
            await engine.load_weights(snapshots[version].blob(version))
            for prompt, task in running.values():
                answer = await task
                mixed += len(answer.version_runs) > 1
                assert worst_error_nats(snapshots, prompt, answer) < TOLERANCE_NATS
            again = await engine.generate(ask(f"v{version}-again", long_prompt, temperature=0.7))
            assert [run.version for run in again.version_runs] == [version]
            assert worst_error_nats(snapshots, long_prompt, again, temperature=0.7) < TOLERANCE_NATS
            probe = snapshots[version].blob(version).probe
            assert probe is not None
            assert np.abs(await engine.probe(probe.token_ids) - probe.logprobs).max() < TOLERANCE_NATS
        assert mixed > 0, "no answer was caught in the middle by an update"


@pytest.mark.slow
async def test_weights_load_right_where_packing_cannot_be_switched_off(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fall-back: layer-wise reload, and the tied head's packed copy made anew."""
    import vllm._custom_ops as custom_ops

    import actors.vllm_worker as plugin

    monkeypatch.setattr(plugin, "_packing_is_off", False)
    monkeypatch.setattr(custom_ops, "_supports_onednn", True)
    snapshots = {version: trained(model, versions=version + 1) for version in range(2)}
    async with booted(model) as engine:
        for version in range(2):
            await engine.load_weights(snapshots[version].blob(version))
            answer = await engine.generate(ask(f"v{version}", [3, 9, 27]))
            assert worst_error_nats(snapshots, [3, 9, 27], answer) < TOLERANCE_NATS


@pytest.mark.slow
async def test_a_missing_part_of_a_fused_parameter_is_refused(model: Path) -> None:
    reference = Reference(model)
    named = [
        (name, tensor) for name, tensor in reference.model.named_parameters() if "layers.1.self_attn.k" not in name
    ]
    async with booted(model) as engine:
        waiting = asyncio.create_task(engine.generate(ask("a", [3, 9], tokens=120)))
        await asyncio.sleep(0)
        with pytest.raises(WeightSyncError, match=r"layers\.1\.self_attn\.k_proj"):
            await engine.load_weights(pack(0, named))
        with pytest.raises(EngineDeadError):
            await waiting


@pytest.mark.slow
async def test_the_worker_refuses_a_partial_update_by_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model directory has no safetensors to compare with."""
    monkeypatch.setattr("actors.engine_vllm._checkpoint_shapes", lambda path: None)
    reference = Reference(model)
    named = [(name, tensor) for name, tensor in reference.model.named_parameters() if name != "model.norm.weight"]
    async with booted(model) as engine:
        with pytest.raises(WeightSyncError, match=r"model\.norm\.weight"):
            await engine.load_weights(pack(0, named))
        with pytest.raises(EngineDeadError):
            await engine.generate(ask("a", [3, 9]))


@pytest.mark.slow
async def test_an_overlong_prompt_fails_its_request_alone(model: Path) -> None:
    async with booted(model) as engine:
        with pytest.raises(KeelError) as caught:
            await engine.generate(ask("long", [5] * (MAX_TOKENS + 1)))
        assert not isinstance(caught.value, EngineDeadError)
        await engine.check_health()
        assert len((await engine.generate(ask("short", [5, 6]))).response_ids) > 0


@pytest.mark.slow
async def test_a_core_process_stands_in_for_a_thread_and_its_death_is_reported(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_seam() -> None:
        raise AttributeError("this vLLM starts its core in another way")

    monkeypatch.setattr("actors.engine_core_thread.core_in_thread", no_seam)
    snapshots = {0: trained(model, versions=1)}
    async with booted(model) as engine:
        assert not engine.core_in_thread
        await engine.load_weights(snapshots[0].blob(0))
        answer = await engine.generate(ask("a", [3, 9, 27]))
        assert worst_error_nats(snapshots, [3, 9, 27], answer) < TOLERANCE_NATS
        (core,) = [child for child in multiprocessing.active_children() if child.name == "EngineCore"]
        waiting = asyncio.create_task(engine.generate(ask("b", [3, 9], tokens=150)))
        await asyncio.sleep(0)
        core.kill()
        with pytest.raises(EngineDeadError):
            await waiting
        with pytest.raises(EngineDeadError):
            await engine.check_health()


def test_every_life_of_every_actor_has_its_own_seed() -> None:
    seeds = {
        engine_seed(run_seed=run, actor_index=actor, incarnation=life)
        for run in range(3)
        for actor in range(8)
        for life in range(4)
    }
    assert len(seeds) == 3 * 8 * 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_eos_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="end-of-sequence"):
        model_eos_ids(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    assert model_eos_ids(str(tmp_path)) == (EOS,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert model_eos_ids(str(tmp_path)) == (4, 5)
