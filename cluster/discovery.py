"""How Prometheus finds the processes of a run: HTTP service discovery and a file_sd file, from the run's Directory.

Consumes: the directory's members. Produces: target lists. Waits for: the directory, in `refresh`. Who unblocks it: the
stores' deadline. Always holds: the HTTP thread serves the last list that was read and never touches the directory; the
file is replaced whole; a directory that cannot be read keeps the last list, as a dead Redis does not kill the targets.

A process that serves metrics runs `announce_forever`; the driver runs `Discovery.run_forever`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Self

from cluster.errors import StreamError
from cluster.http_serve import HttpServer, Page
from cluster.stores import Directory, Member

_LOG = logging.getLogger(__name__)
ANNOUNCE_TTL_S: Final = 15.0
REFRESH_S: Final = 5.0
Sleep = Callable[[float], Awaitable[None]]


def target_groups(members: list[Member], *, run: str) -> list[dict[str, object]]:
    """Prometheus's service-discovery format: one group a member, with labels run, role and instance."""
    return [
        {"targets": [member.address], "labels": {"run": run, "role": member.role, "instance": member.instance}}
        for member in members
    ]


def write_file_sd(path: Path, *, groups: list[dict[str, object]]) -> None:
    """Write and rename, so that Prometheus never reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(groups, indent=1) + "\n")
    partial.replace(path)


class Discovery:
    """Serves `url` from construction to `close`; empty until the first `refresh`. `file_sd` is written as well where it
    is given. Raises ConfigError where the address cannot be bound."""

    def __init__(
        self, directory: Directory, *, run: str, host: str = "127.0.0.1", port: int = 0, file_sd: Path | None = None
    ) -> None:
        self._directory = directory
        self._run = run
        self._file_sd = file_sd
        self._groups: list[dict[str, object]] = []
        self._http = HttpServer({"/targets": self._targets, "/healthz": lambda: Page(b"ok\n")}, host=host, port=port)
        self.url: Final = f"http://{self._http.address}/targets"

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def refresh(self) -> None:
        """Read the directory once. Raises StreamError; the list then stays as it was."""
        groups = target_groups(await self._directory.members(), run=self._run)
        if self._file_sd is not None and (groups != self._groups or not self._file_sd.exists()):
            write_file_sd(self._file_sd, groups=groups)
        self._groups = groups

    async def run_forever(self, *, every_s: float = REFRESH_S, sleep: Sleep = asyncio.sleep) -> None:
        """Refresh until cancelled. Failures are logged: what has lost its metrics should still train."""
        while True:
            try:
                await self.refresh()
            except (StreamError, OSError) as error:
                _LOG.warning("metrics targets not refreshed: %s", error)
            await sleep(every_s)

    def _targets(self) -> Page:
        return Page(json.dumps(self._groups).encode(), content_type="application/json")


async def announce_forever(
    directory: Directory, *, member: Member, ttl_s: float = ANNOUNCE_TTL_S, sleep: Sleep = asyncio.sleep
) -> None:
    """Announce `member` three times in each time to live until cancelled; then withdraw it. Failures are logged."""
    try:
        while True:
            try:
                await directory.announce(member.role, instance=member.instance, address=member.address, ttl_s=ttl_s)
            except StreamError as error:
                _LOG.warning("metrics address not announced: %s", error)
            await sleep(ttl_s / 3)
    finally:
        # The entry expires by itself; withdrawing only makes it quicker.
        with contextlib.suppress(StreamError):
            await directory.withdraw(member.role, instance=member.instance)
