"""Learner and engine in turns on one GPU, over Ray: one room on one node and one GPU, deaths, and a whole run without
a GPU."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import SupervisionError
from cluster.placement import SharedRoom
from cluster.supervise import Role, RolePool
from cluster.turns import RayTurns
from cluster.weight_sharing import SharedWeights
from cluster.weights import UNSYNCED
from cluster.weights_ray import RayWeightChannel
from keel.shared_gpu import SharedGpu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

DEADLINE_S = 60.0
WHOLE_RUN_S = 400.0


@dataclass(frozen=True)
class Spec:
    index: int
    incarnation: int
    turns: RayTurns | None = None


class Process:
    """Says which GPU it was given, takes turns as it is told to, and dies when it is told to."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._end = asyncio.Event()

    async def start(self) -> dict[str, Any]:
        import ray

        context = ray.get_runtime_context()
        return {"node": context.get_node_id(), "gpus": ray.get_gpu_ids(), "incarnation": self._spec.incarnation}

    async def run(self) -> None:
        await self._end.wait()

    async def take(self, side: Any) -> None:
        assert self._spec.turns is not None
        await self._spec.turns.take(side, DEADLINE_S)

    async def give(self, side: Any) -> None:
        assert self._spec.turns is not None
        await self._spec.turns.give(side)

    async def die(self) -> None:
        os._exit(1)

    async def stop(self) -> None:
        self._end.set()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes that claim two GPUs each; nobody uses them."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, connect=False, head_node_args=head)
    made.add_node(num_cpus=4, num_gpus=2)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def shared(cluster: Any) -> Iterator[SharedGpu]:
    channel = RayWeightChannel.create()
    made = SharedGpu(SharedRoom({"CPU": 2.0, "GPU": 1.0}), RayTurns.create(), channel)
    yield made
    made.turns.close()
    channel.close()


MakePool = Callable[..., RolePool]


@pytest.fixture
def make_pool(shared: SharedGpu) -> Iterator[MakePool]:
    made: list[RolePool] = []

    def make(name: str, **changes: Any) -> RolePool:
        role = Role(
            name=name,
            process=Process,
            spec=lambda index, incarnation: Spec(index, incarnation, shared.turns),
            gpus=0.5,
            room=shared.room,
            replaced=shared.learner_replaced if name == "learner" else shared.engine_replaced,
            placement_wait_s=20.0,
            max_restarts=2,
        )
        pool = RolePool(replace(role, **changes))
        made.append(pool)
        pool.grow_to(1)
        return pool

    yield make
    for pool in made:
        pool.stop(grace_s=5.0)


def started(pool: RolePool) -> dict[str, Any]:
    (info,) = pool.wait_ready(lambda: None)
    pool.run()
    return info


def until(pool: RolePool, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        pool.poll(timeout_s=0.1)
        assert time.monotonic() < deadline_s, pool.states


def reborn(pool: RolePool) -> dict[str, Any]:
    """Kill the pool's process; what its successor says."""
    import ray

    pool.handles[0].die.remote()
    until(pool, lambda: pool.restarts == 1 and pool.up == 1)
    info: dict[str, Any] = ray.get(pool.handles[0].start.remote(), timeout=DEADLINE_S)
    return info


def test_both_are_on_one_gpu_of_one_node_also_after_a_death(make_pool: MakePool) -> None:
    engine, learner = make_pool("rollout"), make_pool("learner")
    first, second = started(engine), started(learner)
    assert (first["node"], first["gpus"]) == (second["node"], second["gpus"])
    assert len(first["gpus"]) == 1
    for pool in (learner, engine):
        successor = reborn(pool)
        assert successor["incarnation"] == 1
        assert (successor["node"], successor["gpus"]) == (first["node"], first["gpus"])


def test_the_room_is_given_back_when_the_last_has_left(cluster: Any, make_pool: MakePool) -> None:
    import ray

    engine, learner = make_pool("rollout"), make_pool("learner")
    started(engine), started(learner)
    assert ray.available_resources()["GPU"] == 3.0
    engine.stop(grace_s=5.0)
    info = ray.get(learner.handles[0].start.remote(), timeout=DEADLINE_S)
    assert info["incarnation"] == 0, "the other lives on in it"
    learner.stop(grace_s=5.0)
    deadline_s = time.monotonic() + DEADLINE_S
    while ray.available_resources().get("GPU") != 4.0:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert len(started(make_pool("rollout"))["gpus"]) == 1, "and asked for anew"


def test_a_pair_that_does_not_fit_says_what_it_needs(shared: SharedGpu, make_pool: MakePool) -> None:
    wide = SharedRoom({"CPU": 6.0, "GPU": 1.0})
    pool = make_pool("rollout", room=wide, placement_wait_s=1.0)
    with pytest.raises(SupervisionError, match="6 CPU, 1 GPU asked for"):
        pool.wait_ready(lambda: None)
    with pytest.raises(SupervisionError, match="more than one"):
        SharedRoom({"GPU": 1.5})


def test_a_dead_holder_s_turn_is_free_and_what_it_waited_for_is_not_granted(make_pool: MakePool) -> None:
    import ray

    engine, learner = make_pool("rollout"), make_pool("learner")
    started(engine), started(learner)
    waiting = learner.handles[0].take.remote("learner")
    reborn(engine)
    ray.get(waiting, timeout=DEADLINE_S)
    engines = engine.handles[0].take.remote("engine")
    assert ray.wait([engines], timeout=0.5) == ([], [engines]), "the learner has it"
    reborn(learner)
    ray.get(engines, timeout=DEADLINE_S)
    lost = learner.handles[0].take.remote("learner")
    assert ray.wait([lost], timeout=0.5) == ([], [lost])
    learner.handles[0].die.remote()
    until(learner, lambda: learner.restarts == 2 and learner.up == 1)
    ray.get(engine.handles[0].give.remote("engine"), timeout=DEADLINE_S)
    ray.get(engine.handles[0].take.remote("engine"), timeout=DEADLINE_S)


async def test_what_a_dead_learner_shared_is_not_handed_out(shared: SharedGpu) -> None:
    publisher = SharedWeights(torch.device("cpu"))
    channel = shared.channel
    await asyncio.to_thread(channel.publish, publisher.share(3, [("w", torch.ones(4))]))
    got = await channel.wait_newer(UNSYNCED, timeout_s=30.0)
    assert got is not None
    assert got.shared is not None
    assert np.array_equal(got.buffer, np.empty(0, dtype=np.uint8))
    publisher.close()
    await asyncio.to_thread(shared.learner_replaced)
    assert await channel.wait_newer(UNSYNCED, timeout_s=0.1) is None


COLOCATED = """
import sys
import configs.checks
from configs.load import load_config
from keel.pipeline import run_pipeline

configs.checks._colocation = lambda config: ()  # it asks for a GPU to share; here the turns are on nothing
config = load_config("demo_ci", overrides=["placement.colocate=true", *sys.argv[1:]])
sys.exit(run_pipeline(config, resume=False, fresh=True))
"""


def test_a_whole_run_in_turns(tmp_path: Path) -> None:
    """With the scripted engine: it is stopped for the reward model's training, sleeps while the learner trains, and
    answers with the last version when the learner is gone."""
    import json
    import subprocess
    import sys

    settings = ["rollout.engine=scripted", f"runs_dir={tmp_path}", "learner.max_staleness=0", "learner.steps=3",
                "evaluation.prompts=32"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COLOCATED, *settings],
        capture_output=True,
        text=True,
        timeout=WHOLE_RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "demo-ci"
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(record["staleness_mean"] == 0.0 for record in steps)
    assert (run_dir / "eval" / "final.json").exists()
