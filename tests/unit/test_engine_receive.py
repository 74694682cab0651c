"""How the vLLM engine takes a version through a group, on a vLLM that only keeps a record: order, failure, recovery."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from actors.engine_vllm import VllmEngine
from actors.vllm_spec import VllmSpec
from cluster.errors import EngineDeadError
from cluster.weight_group import Backend, GroupBrokenError, GroupPlan, GroupUpdate
from cluster.weights import pack
from configs.run import RolloutSection

BLOB = pack(1, [("w", torch.ones(4))])
LOAD = ["pause, cache cleared", "start", "load staged", "finish 1", "resume"]


@dataclass
class Recorder:
    """`says`: what a worker says of a job, "done" when not named; `stuck`: calls that never end."""

    calls: list[str] = field(default_factory=list)
    says: dict[str, str] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)
    job: str = ""
    errored: bool = False

    async def _do(self, call: str) -> None:
        self.calls.append(call)
        if call in self.stuck:
            await asyncio.Event().wait()

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert mode == "keep"
        await self._do("pause, cache cleared" if clear_cache else "pause")

    async def resume_generation(self) -> None:
        await self._do("resume")

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "keel_begin":
            self.job = args[0]
            await self._do(self.job)
            return [None]
        return [self.says.get(self.job, "done")]

    async def check_health(self) -> None:
        await self._do("check")

    async def start_weight_update(self) -> None:
        await self._do("start")

    async def update_weights(self, request: Any) -> None:
        await self._do(f"load {request.update_info['location'].partition(':')[0]}")

    async def finish_weight_update(self, *, weight_version: str) -> None:
        await self._do(f"finish {weight_version}")


async def engine_in_group(tmp_path: Path, llm: Recorder, *, backend: Backend, timeout_s: float = 20.0) -> VllmEngine:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    spec = VllmSpec(str(tmp_path), RolloutSection(), max_sequence_tokens=8, seed=1, update_timeout_s=timeout_s)
    engine = VllmEngine(llm, spec, in_thread=True)
    plan = GroupPlan(1, backend, "127.0.0.1", 1, 2, {"a": 1}, bucket_bytes=64, timeout_s=timeout_s)
    await engine.join_group(plan, first_rank=1)
    llm.calls.clear()
    return engine


def update() -> GroupUpdate:
    return GroupUpdate(1, 1, BLOB.manifest, BLOB.size_bytes)


@pytest.mark.parametrize(("backend", "before"), [("gloo", ["receive"]), ("nccl", ["pause", "receive"])])
async def test_a_version_is_received_whole_and_then_loaded(tmp_path: Path, backend: Backend, before: list[str]) -> None:
    """Over NCCL with the engine's own groups at rest, its cache kept until the weights change."""
    llm = Recorder()
    engine = await engine_in_group(tmp_path, llm, backend=backend)
    timings = await engine.receive_weights(update())
    assert llm.calls == before + LOAD
    assert engine.version == 1
    assert timings.pause_s >= timings.load_s


async def test_a_broken_nccl_broadcast_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    llm = Recorder(says={"receive": "RuntimeError: NCCL"})
    engine = await engine_in_group(tmp_path, llm, backend="nccl")
    with pytest.raises(GroupBrokenError, match="receive failed"):
        await engine.receive_weights(update())
    assert llm.calls == ["pause", "receive", "leave", "resume"]
    assert engine.version < 1
    with pytest.raises(GroupBrokenError, match="not in weight group"):
        await engine.receive_weights(update())
    await engine.load_weights(BLOB)
    assert engine.version == 1, "the version comes from the store"


async def test_a_dead_leader_costs_the_deadline_and_not_the_engine(tmp_path: Path) -> None:
    llm = Recorder(says={"receive": "busy"})
    engine = await engine_in_group(tmp_path, llm, backend="nccl", timeout_s=0.2)
    with pytest.raises(GroupBrokenError, match="took too long"):
        await engine.receive_weights(update())
    assert llm.calls == ["pause", "receive", "leave", "resume"]
    await engine.load_weights(BLOB)
    assert engine.version == 1


async def test_a_cancelled_broadcast_leaves_the_engine_running(tmp_path: Path) -> None:
    llm = Recorder(says={"receive": "busy"})
    engine = await engine_in_group(tmp_path, llm, backend="nccl")
    receiving = asyncio.create_task(engine.receive_weights(update()))
    async with asyncio.timeout(20):
        while "receive" not in llm.calls:  # noqa: ASYNC110 - the recorder has no events
            await asyncio.sleep(0.01)
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    assert llm.calls == ["pause", "receive", "leave", "resume"]


async def test_an_engine_that_does_not_go_on_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine_vllm._LEAVE_S", 0.2)
    llm = Recorder(says={"receive": "RuntimeError: NCCL"}, stuck={"resume"})
    engine = await engine_in_group(tmp_path, llm, backend="nccl")
    with pytest.raises(EngineDeadError):
        await engine.receive_weights(update())
    with pytest.raises(EngineDeadError, match="did not go on"):
        await engine.check_health()
