"""The plan's view of a Ray that runs: what it lists, what its nodes see from within, and a wish to an autoscaler that
is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keel.planning.plan import request_from_ray
from keel.planning.view import ClusterView

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    # No token: Ray reads that setting when it is imported, which another test may have done before.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=128 << 20,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.mark.timeout(120)
def test_a_node_is_seen_from_without_and_from_within(ray: Any, tmp_path: Path) -> None:
    (node,) = ClusterView.from_ray(ray).nodes
    assert (node.cpus, node.gpus, node.has_run_dir, node.driver) == (2.0, 0.0, None, True)
    assert node.object_store_bytes == 128 << 20
    (probed,) = ClusterView.from_ray(ray, run_dir=tmp_path).nodes
    assert probed.has_run_dir is False
    (tmp_path / "config.yaml").touch()
    (probed,) = ClusterView.from_ray(ray, run_dir=tmp_path).nodes
    assert probed.has_run_dir is True
    assert probed.memory_bytes is not None
    assert probed.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.timeout(60)
def test_a_wish_for_nodes_needs_no_autoscaler(ray: Any) -> None:
    del ray
    request_from_ray([{"CPU": 100.0}])
    request_from_ray([])
