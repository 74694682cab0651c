"""What every role's process does around its work: log to the run directory, connect to the run's Redis, serve metrics
and be found by Prometheus.

Consumes: the configuration and the server's URL. Produces: a `Process` for the time of the `with` block.
Waits: for Redis to answer, within its command time-out. Always holds: after the block the exporter is closed, the
announcement withdrawn and the connections returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from cluster.discovery import announce_forever
from cluster.metrics import Heartbeat, MetricsServer
from cluster.run_redis import RunRedis
from cluster.stores import Member
from configs.run import RunConfig

SILENCE_LIMIT_S: Final = 120.0
"""No progress for so long makes /healthz fail."""


@dataclass(frozen=True)
class Process:
    """One role's surroundings."""

    redis: RunRedis
    registry: CollectorRegistry
    heartbeat: Heartbeat


@asynccontextmanager
async def start_process(
    config: RunConfig, *, role: str, instance: str, redis_url: str, log_dir: Path
) -> AsyncIterator[Process]:
    """Raises StreamError when the server is not to be used, ConfigError when the exporter cannot bind."""
    log_to_file(log_dir / f"{role}-{instance}.log")
    registry, heartbeat = CollectorRegistry(), Heartbeat(silence_limit_s=SILENCE_LIMIT_S)
    redis = RunRedis(
        redis_url,
        run=config.name,
        lease_s=config.redis.lease_s,
        command_timeout_s=config.redis.command_timeout_s,
    )
    async with redis:
        process = Process(redis=redis, registry=registry, heartbeat=heartbeat)
        if not config.metrics.enabled:
            yield process
            return
        with MetricsServer(registry, host=node_address(config), heartbeat=heartbeat) as server:
            member = Member(role=role, instance=instance, address=server.address)
            announcing = asyncio.create_task(announce_forever(redis.directory, member=member))
            try:
                yield process
            finally:
                announcing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await announcing


def node_address(config: RunConfig) -> str:
    """Where this process's exporter listens: loopback for a local Ray, else this node's own address."""
    if config.ray.address is None:
        return "127.0.0.1"
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # TEST-NET-1: nothing is sent, the kernel only picks the outgoing address.
        address: str = probe.getsockname()[0]
        return address
    return "127.0.0.1"


def log_to_file(path: Path) -> None:
    """Send this process's log, INFO and up, to a file of the run; once, however often it is asked for."""
    root = logging.getLogger()
    if any(isinstance(known, logging.FileHandler) and known.baseFilename == str(path.resolve())
           for known in root.handlers):  # fmt: skip
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path.resolve())
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s [{os.getpid()}] %(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
