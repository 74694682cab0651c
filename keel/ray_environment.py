"""Environment variables of the processes that a run starts. Ray reads its own when it is imported."""

from __future__ import annotations

import logging
import os
from typing import Final

from cluster.errors import SupervisionError

RAY_ENVIRONMENT: Final = {
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}

NODE_ENVIRONMENT: Final = RAY_ENVIRONMENT | {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""Of `ray start` on a cluster's nodes. The head asks each node whether it lives: with these settings a host that went
without a word (power, network) is known to be lost after 15 s at most, with Ray's own after 65 s. Until then its actors
count as running: their leases go to others, but nobody takes their place. Give more where nodes stall for seconds."""


def torch_environment(threads: int) -> dict[str, str]:
    """Of a process that computes with torch. Idle OpenMP threads sleep: when roles share cores, spinning ones cost
    the others most of their speed. Freed memory stays with the process up to 128 MiB: a scorer on the CPU asks for the
    same buffers again with every batch, and spends a quarter of its time on page faults otherwise."""
    return {
        "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
        "MALLOC_MMAP_THRESHOLD_": str(128 << 20),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def prepare_ray_environment() -> None:
    """Set what the user has not set. Call before anything imports ray."""
    for key, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def join_cluster(address: str, *, do: str) -> None:
    """Connect this process to a running cluster. `do`: what to do where that fails. Raises SupervisionError."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SupervisionError("cannot join the Ray cluster", got=f"{address}: {error}", do=do) from error
