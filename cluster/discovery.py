"""How Prometheus finds the processes of a run: HTTP service discovery and a file_sd file, from the run's Directory.

Consumes: the directory's members, and what else is to be scraped (`extra_targets`: Ray's own exporters on each node).
Produces: target lists. Waits for: the directory and `extra_targets`, in `refresh`. Who unblocks it: the stores'
deadline, and EXTRA_TIMEOUT_S. Always holds: the HTTP thread serves the last list that was read and never touches the
directory; the file is replaced whole; a source that cannot be read keeps its last targets, as a dead Redis does not
kill them.

Labels of every target: run, role, instance, node. A process that is replaced has another instance, as its incarnation
is part of it; the dead one's entry runs out by itself. An orderly end empties the file, so that Prometheus drops the
targets of a run that is over; it cannot learn that from an HTTP address that is gone.

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
from typing import Final, Self, TypedDict

from cluster.errors import StreamError
from cluster.http_serve import HttpServer, Page
from cluster.stores import Directory, Member

_LOG = logging.getLogger(__name__)
ANNOUNCE_TTL_S: Final = 15.0
REFRESH_S: Final = 5.0
EXTRA_TIMEOUT_S: Final = 10.0
Sleep = Callable[[float], Awaitable[None]]


class TargetGroup(TypedDict):
    """One entry of Prometheus's service-discovery format."""

    targets: list[str]
    labels: dict[str, str]


ExtraTargets = Callable[[], list[TargetGroup]]
"""Called in a thread of its own at each refresh."""


def target_group(address: str, *, run: str, role: str, instance: str) -> TargetGroup:
    """One process at "host:port"; its label `node` is the host."""
    node = address.rpartition(":")[0].strip("[]")
    return {"targets": [address], "labels": {"run": run, "role": role, "instance": instance, "node": node}}


def target_groups(members: list[Member], *, run: str) -> list[TargetGroup]:
    """One group a member."""
    return [target_group(member.address, run=run, role=member.role, instance=member.instance) for member in members]


def write_file_sd(path: Path, *, groups: list[TargetGroup]) -> None:
    """Write and rename, so that Prometheus never reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(groups, indent=1) + "\n")
    partial.replace(path)


class Discovery:
    """Serves `url` from construction to `close`; empty until the first `refresh`. `file_sd` is written as well where it
    is given. Raises ConfigError where the address cannot be bound."""

    def __init__(
        self,
        directory: Directory,
        *,
        run: str,
        host: str = "127.0.0.1",
        port: int = 0,
        file_sd: Path | None = None,
        extra_targets: ExtraTargets | None = None,
    ) -> None:
        self._directory = directory
        self._run = run
        self._file_sd = file_sd
        self._extra_targets = extra_targets
        self._members: list[TargetGroup] = []
        self._extra: list[TargetGroup] = []
        self._groups: list[TargetGroup] = []
        self._http = HttpServer({"/targets": self._targets, "/healthz": lambda: Page(b"ok\n")}, host=host, port=port)
        self.url: Final = f"http://{self._http.address}/targets"

    def close(self) -> None:
        """Stop serving; the file, if any, then names no targets."""
        self._http.close()
        if self._file_sd is not None:
            with contextlib.suppress(OSError):
                write_file_sd(self._file_sd, groups=[])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def refresh(self) -> None:
        """Read both sources once. Raises StreamError when the directory cannot be read; its part of the list then stays
        as it was, as the other's does when that fails."""
        await self._read_extra()
        try:
            self._members = target_groups(await self._directory.members(), run=self._run)
        finally:
            self._show([*self._members, *self._extra])

    async def _read_extra(self) -> None:
        if self._extra_targets is None:
            return
        try:
            async with asyncio.timeout(EXTRA_TIMEOUT_S):
                self._extra = await asyncio.to_thread(self._extra_targets)
        except Exception as error:  # Whatever it is, the run's own targets matter more.
            _LOG.warning("the other metrics targets were not read: %r", error)

    def _show(self, groups: list[TargetGroup]) -> None:
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
