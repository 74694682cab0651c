"""`keel plan`: reads the configuration and the machine or cluster, prints, starts nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from configs.run import RunConfig
from keel.planning.plan import make_plan
from keel.planning.table import plan_data, print_plan
from keel.planning.view import ClusterView


def print_plan_of(config: RunConfig, *, address: str | None, network_gbit_per_s: float, as_json: bool) -> bool:
    """Whether it fits. `address`: of a cluster, in place of the configuration's. Raises SupervisionError when it cannot
    be joined."""
    if address is not None:
        config = config.model_copy(update={"ray": config.ray.model_copy(update={"address": address})})
    if config.ray.address is None:
        cluster = ClusterView.of_this_machine(config)
    else:
        with _joined(config.ray.address) as ray:
            cluster = ClusterView.from_ray(ray)
    plan = make_plan(config, cluster=cluster, network_gbit_per_s=network_gbit_per_s)
    if as_json:
        print(json.dumps(plan_data(plan), indent=2))
    else:
        print_plan(plan)
    return not plan.impossible


@contextmanager
def _joined(address: str) -> Iterator[Any]:
    from keel.ray_environment import join_cluster, prepare_ray_environment

    prepare_ray_environment()
    import ray

    join_cluster(
        address, do="check the address and the cluster's token on this machine; leave it out to plan for this machine"
    )
    try:
        yield ray
    finally:
        ray.shutdown()
