"""How the ranks of one incarnation of the learner find each other and become a group.

Consumes: an address under the run's Redis key, from rank 0. Produces: this rank's `Ranks`.
Waits for: rank 0's address, its server, and all other ranks; all of it for the collective time-out at most.
Who unblocks it: the other ranks starting. Always holds: a rank joins the group of its own incarnation or none, also
where an earlier first rank left its address behind; rank 0 listens on its node's address alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import psutil
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cluster.errors import StreamError, SupervisionError
from cluster.rendezvous import Rendezvous
from learner.ranks import GroupRanks, Ranks

log = logging.getLogger(__name__)

_PAUSE_S: Final = 0.2
_ATTEMPT_S: Final = 5.0
_NAME_KEY: Final = "name"


@dataclass(frozen=True)
class Place:
    """One rank's place in a group. `host`: this node's address. `group`: the incarnation."""

    rank: int
    size: int
    group: int
    host: str


async def meet(rendezvous: Rendezvous, *, place: Place, device: torch.device, timeout_s: float) -> Ranks:
    """Become a group with the other ranks. Raises SupervisionError, StreamError."""
    # gloo would otherwise go by the host's name, which on many nodes resolves to loopback; NCCL never takes loopback.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(place.host))
    deadline_s = time.monotonic() + timeout_s
    if place.rank == 0:
        store, address = open_store(place.host, timeout_s=timeout_s)
        await rendezvous.announce(place.group, address=address, ttl_s=timeout_s)
    else:
        store = await find_store(rendezvous, group=place.group, deadline_s=deadline_s)
    ranks = await asyncio.to_thread(
        GroupRanks, store, rank=place.rank, size=place.size, device=device, timeout_s=timeout_s
    )
    if place.rank == 0:
        with contextlib.suppress(StreamError):  # It is forgotten in time; the group stands and must not be left half.
            await rendezvous.withdraw(place.group)
    log.info("rank %d of %d is in group %d", place.rank, place.size, place.group)
    return ranks


def open_store(host: str, *, timeout_s: float) -> tuple[TCPStore, str]:
    """(the group's store, served by this process, and "host:port/name"). The name tells it from another's at the same
    port."""
    name = secrets.token_hex(8)
    with socket.create_server((host, 0)) as listener:
        port = int(listener.getsockname()[1])
        store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
    store.set(_NAME_KEY, name)
    return store, f"{host}:{port}/{name}"


async def find_store(rendezvous: Rendezvous, *, group: int, deadline_s: float) -> TCPStore:
    """The store that the first rank of this group serves. Raises SupervisionError at `deadline_s` (monotonic)."""
    seen: str | None = None
    while time.monotonic() < deadline_s:
        address = await rendezvous.find(group)
        if address is not None:
            seen = address
            store = await asyncio.to_thread(_join, address, timeout_s=max(1.0, deadline_s - time.monotonic()))
            if store is not None:
                return store
        await asyncio.sleep(_PAUSE_S)
    raise SupervisionError(
        f"the first rank of the learner's group {group} was not found in time",
        got="no address" if seen is None else f"no answer at {seen}",
        do="look at logs/learner-0.*.log; ranks on several nodes must reach each other",
    )


def _join(address: str, *, timeout_s: float) -> TCPStore | None:
    """The store at this address, or None when it does not answer or is another's."""
    place, _, name = address.partition("/")
    host, _, port = place.rpartition(":")
    try:
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=min(_ATTEMPT_S, timeout_s)))
        if store.get(_NAME_KEY).decode() != name:
            return None
        store.set_timeout(timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        log.info("no group at %s yet: %s", place, str(error).splitlines()[0])
        return None
    return store


def _interface_of(host: str) -> str:
    """The network interface that has this address; gloo's own choice where none has."""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return str(interface)
    return ""
