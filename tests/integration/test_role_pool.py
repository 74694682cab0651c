"""Pools of fake processes on a real Ray with several nodes: replaced, rebuilt, grown, drained, without room."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.errors import DataError, KeelError, SupervisionError
from cluster.supervise import Role, RolePool
from configs.run import DataSection, RunConfig
from keel.runtime import Runtime
from keel.sampling import Asking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DEADLINE_S = 60.0


@dataclass(frozen=True)
class Spec:
    index: int
    incarnation: int
    fails: bool = False


class Process:
    """Does nothing until it is told to end, to fail or to die."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._end = asyncio.Event()
        self._error: KeelError | None = None

    async def start(self) -> dict[str, Any]:
        if self.spec.fails:
            raise SupervisionError("this process does not start")
        return {"index": self.spec.index, "incarnation": self.spec.incarnation, "pid": os.getpid()}

    async def run(self) -> str:
        await self._end.wait()
        if self._error is not None:
            raise self._error
        return f"{self.spec.index} ended"

    async def drain(self) -> None:
        self._end.set()

    async def stop(self) -> None:
        self._end.set()

    async def fail(self, error: KeelError) -> None:
        self._error = error
        self._end.set()

    async def die(self) -> None:
        os._exit(1)


class Answerer(Process):
    """Answers each prompt with its incarnation; the first incarnation of each dies of it."""

    async def generate(self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float) -> list[Any]:
        del max_new_tokens, temperature
        if self.spec.incarnation == 0:
            await self.die()
        return [([self.spec.incarnation], "stop") for _ in prompts]

    async def sync_to_newest(self) -> int:
        return 0


class Undrainable(Process):
    async def drain(self) -> None:
        pass


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster with one node of 3 CPUs, to which tests add others."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 3, "include_dashboard": False, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, connect=False, head_node_args=head)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


MakePool = Callable[..., RolePool]


@pytest.fixture
def make_pool(cluster: Any) -> Iterator[MakePool]:
    """Pools by what differs in the role; running, and stopped after the test."""
    made: list[RolePool] = []

    def make(count: int, **changes: Any) -> RolePool:
        role = Role(name="fake", process=Process, spec=Spec, placement_wait_s=20.0, max_restarts=1)
        pool = RolePool(replace(role, **changes))
        made.append(pool)
        pool.grow_to(count)
        pool.wait_ready(lambda: None)
        pool.run()
        return pool

    yield make
    for pool in made:
        pool.stop(grace_s=5.0)


def until(pool: RolePool, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        pool.poll(timeout_s=0.1)
        assert time.monotonic() < deadline_s, pool.states


def infos(pool: RolePool) -> list[tuple[int, int]]:
    """(index, incarnation) of those that are up."""
    import ray

    found = ray.get([handle.start.remote() for handle in pool.handles])
    return sorted((info["index"], info["incarnation"]) for info in found)


def test_each_process_has_its_own_restarts(make_pool: MakePool) -> None:
    notes: list[str] = []
    pool = make_pool(3)
    pool._note = lambda event, text: notes.append(f"{event}: {text}")
    for handle in pool.handles:
        handle.die.remote()
    until(pool, lambda: pool.restarts == 3 and pool.up == 3)
    assert infos(pool) == [(0, 1), (1, 1), (2, 1)]
    assert len(notes) == 3
    assert notes[0].startswith("restart: fake")
    pool.handles[0].die.remote()
    with pytest.raises(SupervisionError, match=r"fake 0 died \(restarts used: 1 of 1\)"):
        until(pool, lambda: False)


def test_a_clean_end_is_a_death_too(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.handles[0].stop.remote()
    until(pool, lambda: pool.restarts == 1 and pool.up == 1)


def test_when_one_of_a_group_dies_all_are_replaced(make_pool: MakePool) -> None:
    pool = make_pool(3, together=True, finite=True)
    before = pool.handles
    before[1].die.remote()
    until(pool, lambda: pool.restarts == 1 and pool.up == 3)
    assert infos(pool) == [(0, 1), (1, 1), (2, 1)]
    assert not set(before) & set(pool.handles)
    assert not pool.finished
    for handle in pool.handles:
        handle.stop.remote()
    until(pool, lambda: pool.finished)
    assert pool.results == ["0 ended", "1 ended", "2 ended"]


def test_bad_input_of_a_group_ends_the_run_though_an_echo_came_first(make_pool: MakePool) -> None:
    pool = make_pool(2, together=True, finite=True, max_restarts=3)
    pool.handles[1].fail.remote(SupervisionError("the other process is gone"))
    until(pool, lambda: True)
    pool.handles[0].fail.remote(DataError("row 7 is no number"))
    with pytest.raises(DataError, match="row 7"):
        until(pool, lambda: False)


def test_what_has_no_room_at_the_start_fails_in_time_and_says_why(make_pool: MakePool) -> None:
    started_s = time.monotonic()
    with pytest.raises(SupervisionError) as caught:
        make_pool(2, cpus=2.0, placement_wait_s=2.0, advice="ask for less")
    assert time.monotonic() - started_s < DEADLINE_S
    text = str(caught.value)
    assert "no room for fake after 2 s" in text
    assert "2 CPU asked for; the cluster has 3 CPU on 1 node, of which" in text
    assert "of 2 are up" in text
    assert "ask for less" in text


def test_a_process_that_fits_no_node_is_told_apart(make_pool: MakePool) -> None:
    with pytest.raises(SupervisionError, match="no single node is big enough"):
        make_pool(1, cpus=1.0, gpus=1.0, placement_wait_s=1.0)


def test_an_addition_without_room_is_withdrawn_and_the_rest_goes_on(make_pool: MakePool) -> None:
    pool = make_pool(2, placement_wait_s=2.0)
    pool.grow_to(4, tentative=True)
    until(pool, lambda: bool(pool.withdrawn) and pool.up == 3)
    assert "no room" in pool.withdrawn[0]
    assert (pool.wanted, pool.up, pool.restarts) == (3, 3, 0)


def test_an_addition_that_does_not_start_is_withdrawn(make_pool: MakePool) -> None:
    pool = make_pool(1, spec=lambda index, incarnation: Spec(index, incarnation, fails=index > 0))
    pool.grow_to(2, tentative=True)
    until(pool, lambda: bool(pool.withdrawn))
    assert "does not start" in pool.withdrawn[0]
    assert (pool.wanted, pool.up) == (1, 1)


def test_the_newest_drain_and_are_not_replaced(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.grow_to(3)
    until(pool, lambda: pool.up == 3)
    pool.shrink_to(1)
    assert (pool.wanted, pool.draining) == (1, 2)
    assert pool.states["draining"] == 2
    until(pool, lambda: pool.draining == 0)
    assert infos(pool) == [(0, 0)]
    pool.grow_to(2)
    until(pool, lambda: pool.up == 2)
    assert infos(pool) == [(0, 0), (1, 1)], "an index that is used again counts on: its seed and name are new"
    assert pool.restarts == 0


def test_an_addition_that_may_fail_goes_before_a_process_that_comes_back(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.grow_to(2, tentative=True)
    pool.handles[0].die.remote()
    until(pool, lambda: pool.restarts == 1)
    pool.shrink_to(1)
    until(pool, lambda: pool.up == 1)
    assert infos(pool) == [(0, 1)]


def test_what_does_not_drain_in_time_or_dies_of_it_is_gone_all_the_same(make_pool: MakePool) -> None:
    pool = make_pool(3, process=Undrainable, drain_timeout_s=2.0)
    pool.shrink_to(1)
    draining = [group.handles[0] for group in pool._groups.values() if group.draining]
    draining[0].die.remote()
    until(pool, lambda: pool.draining == 0)
    assert (pool.wanted, pool.up, pool.restarts) == (1, 1, 0)


def test_spread_puts_processes_on_all_nodes(cluster: Any, make_pool: MakePool) -> None:
    node = cluster.add_node(num_cpus=3)
    try:
        pool = make_pool(4, spread=True)
        pool.poll(timeout_s=1.2)
        nodes = [group.placement.nodes[0] for group in pool._groups.values()]
        assert sorted(nodes.count(name) for name in set(nodes)) == [2, 2]
        pool.stop(grace_s=5.0)
    finally:
        cluster.remove_node(node)


def test_a_lost_host_costs_no_restart_and_its_processes_wait_for_a_node(cluster: Any, make_pool: MakePool) -> None:
    node = cluster.add_node(num_cpus=3)
    notes: list[str] = []
    pool = make_pool(4, max_restarts=1, placement_wait_s=2.0)
    pool._note = lambda event, text: notes.append(event)
    pool.poll(timeout_s=1.2)
    cluster.remove_node(node, allow_graceful=False)
    until(pool, lambda: pool.up == 3 and pool.states["pending"] == 1)
    since_s = time.monotonic()
    until(pool, lambda: time.monotonic() - since_s > 4.0)
    assert pool.waiting_for_room == 1, "a replacement may wait for longer than a first start"
    assert notes.count("pending") == 1
    node = cluster.add_node(num_cpus=3)
    until(pool, lambda: pool.up == 4)
    until(pool, lambda: not any(group.restarts for group in pool._groups.values()))
    pool.stop(grace_s=5.0)
    cluster.remove_node(node)


def test_a_process_without_restarts_left_survives_its_host(cluster: Any, make_pool: MakePool) -> None:
    node = cluster.add_node(num_cpus=3)
    pool = make_pool(4, max_restarts=0)
    pool.poll(timeout_s=1.2)
    cluster.remove_node(node, allow_graceful=False)
    node = cluster.add_node(num_cpus=3)
    until(pool, lambda: pool.restarts > 0 and pool.up == 4)
    pool.stop(grace_s=5.0)
    cluster.remove_node(node)


def test_what_a_dead_actor_was_asked_is_asked_again(make_pool: MakePool) -> None:
    import ray

    pool = make_pool(2, process=Answerer)
    runtime = SimpleNamespace(
        ray=ray, wait=ray.get, tick=lambda: None, config=RunConfig(name="t", data=DataSection(max_response_tokens=4))
    )
    asking = Asking(cast(Runtime, runtime), pool, temperature=1.0)
    for start in range(3):
        asking.ask(start, [[1, 2]])
    answers: dict[int, Any] = {}
    while asking.pending:
        answers.update(asking.answered())
    assert answers == {start: [([1], "stop")] for start in range(3)}
    assert pool.restarts == 2


def test_what_kills_one_actor_after_another_ends_the_run(make_pool: MakePool) -> None:
    import ray

    spec = lambda index, incarnation: Spec(index, 0)  # noqa: E731
    pool = make_pool(1, process=Answerer, spec=spec, max_restarts=10)
    runtime = SimpleNamespace(
        ray=ray, wait=ray.get, tick=lambda: None, config=RunConfig(name="t", data=DataSection(max_response_tokens=4))
    )
    asking = Asking(cast(Runtime, runtime), pool, temperature=1.0)
    asking.ask(0, [[1, 2]])
    with pytest.raises(SupervisionError, match="a process of the run died"):  # noqa: PT012
        while asking.pending:
            asking.answered()
    assert pool.restarts == 2
