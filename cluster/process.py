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
import math
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from prometheus_client import REGISTRY, CollectorRegistry, ProcessCollector

from cluster.discovery import announce_forever
from cluster.errors import ConfigError
from cluster.metrics import Heartbeat, MetricsServer
from cluster.run_redis import RunRedis
from cluster.stores import Member
from configs.reward import RewardSection
from configs.run import RunConfig

log = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
SILENCE_LIMIT_S: Final = 120.0
"""No progress for so long makes /healthz fail, or for longer where a role's unit of work may take longer."""
_HTTP_AT_A_TIME: Final = 4
_HTTP_PAUSE_S: Final = 8.0
"""Requests to a reward model behind HTTP, and the longest pause between two tries."""


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
    if config.ray.address is not None:
        _check_run_dir(log_dir.parent)
    log_to_file(log_dir / f"{role}-{instance}.log")
    registry, heartbeat = CollectorRegistry(), Heartbeat(silence_limit_s=silence_limit_s(config, role=role))
    ProcessCollector(registry=registry)
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
        host = node_address(config, redis_url=redis_url)
        # vLLM, and whoever else measures in this process, records into the client's default registry.
        with MetricsServer(registry, host=host, heartbeat=heartbeat, extra=(REGISTRY,)) as server:
            member = Member(role=role, instance=instance, address=server.address)
            announcing = asyncio.create_task(announce_forever(redis.directory, member=member))
            try:
                yield process
            finally:
                announcing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await announcing


def silence_limit_s(config: RunConfig, *, role: str) -> float:
    """How long a process of this role may be busy with one answer, batch or step before it counts as stuck."""
    longest_s = {
        "rollout": config.rollout.generate_timeout_s,
        "reward": _scoring_s(config.reward),
        "learner": config.learner.stall_timeout_s,
    }
    return max(SILENCE_LIMIT_S, longest_s.get(role, 0.0))


def _scoring_s(reward: RewardSection) -> float:
    """The longest that models and sources may take for one batch, each within its limits."""
    longest_s = reward.score_timeout_s
    for source in reward.sources:
        if source.kind == "function":  # one call at a time
            longest_s = max(longest_s, reward.batch_size * source.timeout_s)
        elif source.kind == "http":
            rounds = math.ceil(reward.batch_size / source.batch_size / _HTTP_AT_A_TIME)
            tries_s = (1 + source.retries) * source.timeout_s + source.retries * _HTTP_PAUSE_S
            longest_s = max(longest_s, rounds * tries_s)
    return longest_s


def node_address(config: RunConfig, *, redis_url: str | None = None) -> str:
    """Where this process's exporter listens. In a process of Ray: loopback for a local Ray, on a cluster the address by
    which Ray knows the node, right on a node with several. Outside Ray (a reward worker started by hand): the address
    from which this machine reaches the queue server. The server's own machine is loopback to itself."""
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        return LOOPBACK if config.ray.address is None else str(ray.util.get_node_ip_address())
    return _address_towards(redis_url) if redis_url is not None else LOOPBACK


def _address_towards(url: str) -> str:
    """This machine's address on the way to the host of `url`; loopback where there is no way."""
    parts = urlsplit(url)
    if not parts.hostname:
        return LOOPBACK  # A socket file.
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            parts.hostname, parts.port or 6379, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # Of a datagram socket: nothing is sent, the kernel only picks the way.
            return str(probe.getsockname()[0])
    except OSError as error:
        log.warning("metrics are served on loopback alone: no way to %s: %s", parts.hostname, error)
        return LOOPBACK


def _check_run_dir(run_dir: Path) -> None:
    """Before anything is written there: a node without the shared storage would make a directory of its own."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            "this node does not see the run directory",
            got=f"no {run_dir / 'config.yaml'} on {socket.gethostname()}",
            do="set runs_dir to storage that all nodes share, at the same path",
        )


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
