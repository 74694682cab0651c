"""A run that goes on, as another process sees it: its configuration and its queue server."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cluster.errors import ConfigError
from cluster.run_redis import RunRedis
from configs.load import load_config
from configs.run import RunConfig

URL_VARIABLE = "KEEL_REDIS_URL"


def config_of(run_dir: Path) -> RunConfig:
    """The configuration that the run was started with. Raises ConfigError where there is none."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            "not a run directory", got=str(run_dir), do="give a directory that `keel train` made, e.g. runs/demo"
        )
    return load_config(str(run_dir / "config.yaml"))


def redis_url_of(run_dir: Path, config: RunConfig, *, given: str | None = None) -> str:
    """The URL of the run's server: `given`; or the one in KEEL_REDIS_URL; or the configured one, if it holds no secret
    that was left out; or the run's own server on this machine, from its configuration file. Raises ConfigError."""
    url = given or os.environ.get(URL_VARIABLE) or config.redis.url
    if url is None:
        url = _embedded_url(run_dir / "redis" / "server.conf")
        if url is None:
            raise ConfigError(
                f"{config.name} does not run on this machine",
                got=f"no server in {run_dir / 'redis'}",
                do="start it with `keel train`; for a run on another machine give --redis",
            )
    if "***" in url:
        raise ConfigError(
            "the password of the run's Redis is not on disk",
            got=url,
            do=f"give the whole URL with --redis or in {URL_VARIABLE}",
        )
    return url


def connect(run_dir: Path, config: RunConfig, *, given: str | None = None) -> RunRedis:
    """Use as an async context; entering raises StreamError where the server cannot be used."""
    url = redis_url_of(run_dir, config, given=given)
    return RunRedis(url, run=config.name, command_timeout_s=config.redis.command_timeout_s)


def _embedded_url(settings: Path) -> str | None:
    """From the configuration file of a server that the run has started; it is removed when the server stops."""
    try:
        found = dict(re.findall(r"^(\w+) (\S+)$", settings.read_text(), flags=re.MULTILINE))
    except OSError:
        return None
    host = found.get("bind", "127.0.0.1")
    address = f"[{host}]" if ":" in host else host
    return f"redis://:{found['requirepass']}@{address}:{found['port']}/0"
