"""vLLM behind the engine seam, against Hugging Face's forward pass on the same weights."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import Generation, GenerationRequest
from actors.engine_vllm import VllmEngine
from actors.vllm_spec import VllmSpec, engine_options, engine_seed, lora_room, model_eos_ids
from cluster.errors import ConfigError, EngineDeadError, KeelError, ModelError, WeightSyncError
from cluster.weights import UNSYNCED, AdapterInfo, Probe, WeightBlob, pack
from configs.run import LoraSection, RolloutSection
from tests.actors_support import EOS, Reference, contained_vllm, save_tiny_llama

TOLERANCE_NATS = 1e-4
MAX_TOKENS = 240


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path)


@asynccontextmanager
async def booted(
    model: Path, *, seed: int = 5, rollout: RolloutSection | None = None, lora: LoraSection | None = None
) -> AsyncIterator[VllmEngine]:
    section = rollout or RolloutSection()
    spec = VllmSpec(model_path=str(model), rollout=section, max_sequence_tokens=MAX_TOKENS, seed=seed, lora=lora)
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
    monkeypatch.setattr("actors.engine_vllm.checkpoint_shapes", lambda path: None)
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


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraSection(rank=4, alpha=8.0, target_modules=TARGETS, broadcast="adapter")


def with_adapter(model: Path, version: int) -> tuple[WeightBlob, Reference]:
    """The adapter of a version as the learner sends it, and a reference with that adapter merged in."""
    from peft import LoraConfig, get_peft_model

    reference = Reference(model)
    wrapped = get_peft_model(reference.model, LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS)))
    generator, tensors = torch.Generator().manual_seed(version), []
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            tensors.append((name.replace(".default", ""), parameter.data.clone()))
    reference.model = wrapped.merge_and_unload()
    ids = [3, 9, 27, 17, 51, 25]
    probe = Probe(token_ids=np.array(ids, dtype=np.int32), logprobs=reference.logprobs(ids))
    info = AdapterInfo(rank=4, alpha=8.0, target_modules=TARGETS)
    return pack(version, tensors, probe=probe, adapter=info), reference


@pytest.mark.slow
async def test_an_adapter_alone_gives_the_merged_model_s_logprobs_in_mid_answer_too(model: Path) -> None:
    pytest.importorskip("peft")
    blobs, snapshots = {}, {UNSYNCED: Reference(model)}
    for version in range(3):
        blobs[version], snapshots[version] = with_adapter(model, version)
    long_prompt = [2 + (7 * i) % 60 for i in range(200)]
    async with booted(model, lora=LORA) as engine:
        base = await engine.generate(ask("base", [3, 9, 27]))
        assert worst_error_nats(snapshots, [3, 9, 27], base) < TOLERANCE_NATS
        mixed = 0
        for version in range(3):
            running = {
                i: asyncio.create_task(engine.generate(ask(f"v{version}-{i}", [3 + i, 9, 27], tokens=120)))
                for i in range(8)
            }
            await engine.generate(ask(f"v{version}-warm", long_prompt, tokens=3))
            await engine.load_weights(blobs[version])
            for i, task in running.items():
                answer = await task
                mixed += len(answer.version_runs) > 1
                assert worst_error_nats(snapshots, [3 + i, 9, 27], answer) < TOLERANCE_NATS
            again = await engine.generate(ask(f"v{version}-again", long_prompt, temperature=0.7))
            assert [run.version for run in again.version_runs] == [version]
            assert worst_error_nats(snapshots, long_prompt, again, temperature=0.7) < TOLERANCE_NATS
            probe = blobs[version].probe
            assert probe is not None
            assert np.abs(await engine.probe(probe.token_ids) - probe.logprobs).max() < TOLERANCE_NATS
        assert mixed > 0, "no answer was caught in the middle by an update"
        assert [name for name in os.listdir("/dev/shm") if name.startswith("keel-adapter-")] == []
        with pytest.raises(WeightSyncError, match="a whole model"):
            await engine.load_weights(snapshots[2].blob(9))


def test_options_come_from_the_configuration() -> None:
    def options(**settings: Any) -> dict[str, Any]:
        lora = settings.pop("lora", None)
        section = RolloutSection(**settings)
        return engine_options(VllmSpec(model_path="m", rollout=section, max_sequence_tokens=64, seed=1, lora=lora))

    plain = options()
    assert (plain["tensor_parallel_size"], plain["enable_chunked_prefill"], plain["enable_prefix_caching"]) == (1, 1, 1)
    assert "max_num_batched_tokens" not in plain
    assert "enable_lora" not in plain
    other = options(tensor_parallel_size=4, chunked_prefill=False, prefix_caching=False, max_batched_tokens=2048)
    assert (other["tensor_parallel_size"], other["max_num_batched_tokens"]) == (4, 2048)
    assert other["distributed_executor_backend"] == "mp", "in a placement group vLLM would choose Ray's executor"
    assert "distributed_executor_backend" not in plain, "one GPU: vLLM's uni-process executor"
    assert not other["enable_chunked_prefill"]
    assert not other["enable_prefix_caching"]
    assert options(lora=LORA)["max_lora_rank"] == 8
    assert "enable_lora" not in options(lora=LoraSection(broadcast="merged"))
    assert [lora_room(rank) for rank in (1, 2, 16, 17, 512)] == [1, 8, 16, 32, 512]
    with pytest.raises(ConfigError, match="rank"):
        lora_room(513)


@pytest.mark.slow
async def test_options_reach_vllm_and_change_no_logprob(model: Path) -> None:
    snapshots = {0: trained(model, versions=1)}
    section = RolloutSection(max_batched_tokens=64, prefix_caching=False, max_concurrent_requests=16)
    long_prompt = [2 + (7 * i) % 60 for i in range(200)]  # enters in four pieces
    async with booted(model, rollout=section) as engine:
        config = engine._llm.vllm_config
        assert config.scheduler_config.max_num_batched_tokens == 64
        assert not config.cache_config.enable_prefix_caching
        await engine.load_weights(snapshots[0].blob(0))
        answer = await engine.generate(ask("a", long_prompt))
        assert worst_error_nats(snapshots, long_prompt, answer) < TOLERANCE_NATS


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
