"""One contract for weights that stay with their publisher: in host memory, and on a GPU through CUDA's handles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from actors.engine import ScriptedEngine
from actors.engine_versions import EngineVersions
from actors.rollout_meter import RolloutMeter
from cluster.errors import WeightSyncError
from cluster.weight_board_local import LocalBoardChannel
from cluster.weight_sharing import SharedWeights, is_shared, open_shared
from cluster.weights import SharedBytes, WeightBlob, unpack_storage
from tests.actors_support import Reference, contained_vllm, save_tiny_llama

READER = """
import json, sys, torch
from cluster.errors import WeightSyncError
from cluster.weight_sharing import open_shared
from cluster.weights import SharedBytes
for line in sys.stdin:
    try:
        storage = open_shared(SharedBytes(**json.loads(line)), device=torch.device(sys.argv[1]))
        print(json.dumps(storage[:40].view(torch.float32).tolist()), flush=True)
        del storage
    except WeightSyncError as error:
        print(json.dumps(str(error).splitlines()[0]), flush=True)
"""
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's inter-process handles need a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=[pytest.mark.gpu, NO_GPU])])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def publisher(device: torch.device) -> Iterator[SharedWeights]:
    made = SharedWeights(device)
    yield made
    made.close()


class Reader:
    """Another process, which opens what it is told of and says what it found."""

    def __init__(self, device: torch.device) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, str(device)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, shared: SharedBytes | None) -> list[float] | str:
        assert shared is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(shared)) + "\n")
        self.process.stdin.flush()
        found: list[float] | str = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture
def reader(device: torch.device) -> Iterator[Reader]:
    made = Reader(device)
    yield made
    made.process.kill()
    made.process.communicate()


def share(publisher: SharedWeights, version: int, device: torch.device) -> WeightBlob:
    return publisher.share(version, [("w", torch.arange(10.0, device=device) * version), ("b", torch.ones(3))])


def test_another_process_reads_each_version_in_place(
    publisher: SharedWeights, reader: Reader, device: torch.device
) -> None:
    for version in (1, 2):
        blob = share(publisher, version, device)
        assert (blob.version, len(blob.buffer), blob.size_bytes, blob.transport) == (version, 0, 128, "ipc")
        assert reader.read(blob.shared) == [float(version * number) for number in range(10)]
        assert reader.read(blob.shared) == [float(version * number) for number in range(10)], "more than once"


def test_what_was_written_over_or_closed_cannot_be_had(
    publisher: SharedWeights, reader: Reader, device: torch.device
) -> None:
    first, second = share(publisher, 1, device), share(publisher, 2, device)
    assert "version 1 are gone" in reader.read(first.shared)
    assert reader.read(second.shared) == [2.0 * number for number in range(10)]
    larger = publisher.share(3, [("w", torch.full((100,), 3.0, device=device))])
    assert reader.read(larger.shared) == [3.0] * 10
    if device.type == "cpu":
        publisher.close()
        assert "version 3 cannot be opened" in reader.read(larger.shared)


def test_tensors_are_found_again_by_name_type_and_shape(publisher: SharedWeights, device: torch.device) -> None:
    tensors = {"a": torch.rand(3, 5), "b": torch.rand(7).bfloat16(), "c": torch.rand(2, 2).half()}
    blob = publisher.share(0, tensors.items())
    assert blob.shared is not None
    if device.type == "cuda":
        pytest.skip("CUDA opens no handle in the process that made it")
    found = dict(unpack_storage(blob.manifest, open_shared(blob.shared, device=device)))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_location_is_plain_text(publisher: SharedWeights, device: torch.device) -> None:
    shared = share(publisher, 4, device).shared
    assert shared is not None
    assert is_shared(shared.location)
    assert shared.location.isascii()
    assert not is_shared("file:/proc/1/fd/3")


def test_names_are_unique_and_versions_not_negative(publisher: SharedWeights) -> None:
    with pytest.raises(WeightSyncError, match="occurs twice"):
        publisher.share(0, [("w", torch.ones(1)), ("w", torch.ones(1))])
    with pytest.raises(WeightSyncError, match="negative"):
        publisher.share(-1, [("w", torch.ones(1))])


# ---------------------------------------------------------------- through a board, to an engine


@pytest.fixture
async def board() -> AsyncIterator[LocalBoardChannel]:
    made = LocalBoardChannel()
    yield made
    made.close()


async def test_a_board_says_where_they_are_until_the_publisher_is_gone(board: LocalBoardChannel) -> None:
    publisher = SharedWeights(torch.device("cpu"))
    blob = share(publisher, 1, torch.device("cpu"))
    board.publish(blob)
    got = await board.wait_newer(-1, timeout_s=5.0)
    assert got is not None
    assert got.shared == blob.shared
    board.ask_now("lose_shared", timeout_s=5.0)
    assert await board.wait_newer(-1, timeout_s=0.01) is None
    newest = await board.latest()
    assert newest is not None
    assert newest.version == 1, "its successor counts on from there"
    board.publish(share(publisher, 2, torch.device("cpu")))
    got = await board.wait_newer(-1, timeout_s=5.0)
    assert got is not None
    assert got.version == 2
    publisher.close()


async def test_an_engine_that_slept_takes_what_is_there_now(board: LocalBoardChannel) -> None:
    """It had heard of a version before it slept, and the learner has put another in its place."""
    import contextlib

    publisher, engine = SharedWeights(torch.device("cpu")), ScriptedEngine()
    versions = EngineVersions(
        engine, weights=board, meter=RolloutMeter(), probe_tolerance_nats=1.0, awake=contextlib.nullcontext
    )
    heard = share(publisher, 1, torch.device("cpu"))
    board.publish(heard)
    board.publish(share(publisher, 2, torch.device("cpu")))
    await versions.load(heard)
    assert (engine.version, versions.ready) == (2, 2)
    publisher.close()
    await engine.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("core", ["thread", "process"])
async def test_vllm_loads_what_the_learner_keeps(core: str, tmp_path: Path) -> None:
    from actors.engine_vllm import VllmEngine
    from actors.vllm_spec import VllmSpec
    from cluster.weights import unpack
    from configs.run import RolloutSection

    model = save_tiny_llama(tmp_path)
    reference, publisher = Reference(model), SharedWeights(torch.device("cpu"))
    rollout = RolloutSection.model_validate({"engine_core": core})
    with contained_vllm():
        engine = await VllmEngine.start(
            VllmSpec(model_path=str(model), rollout=rollout, max_sequence_tokens=128, seed=3)
        )
        try:
            for version in (0, 1):
                packed = reference.blob(version)
                assert packed.probe is not None
                await engine.load_weights(publisher.share(version, unpack(packed), probe=packed.probe))
                assert engine.version == version
                error_nats = abs(await engine.probe(packed.probe.token_ids) - packed.probe.logprobs).max()
                assert error_nats < 1e-4
        finally:
            await engine.shutdown()
            publisher.close()
