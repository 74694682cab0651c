"""What a person asks of a run that is going on, and what the run answers: the number of rollout actors.

Consumes and produces: one request and one report, the newest of each. Waits for: the server's answer. Who unblocks it:
the client's deadline. Always holds: a report names the request that it answers; both are of the run's present driver,
which clears them when it starts.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import msgspec

from cluster.errors import CodecError
from cluster.keys import Keys
from cluster.redis_client import RedisClient

_REQUEST, _REPORT = "request", "report"
_T = TypeVar("_T", bound=msgspec.Struct)


class ScaleRequest(msgspec.Struct, frozen=True):
    """`actors`: how many there should be; None hands the number back to autoscaling."""

    actors: int | None
    number: str = msgspec.field(default_factory=lambda: secrets.token_hex(8))
    """Of this request."""


class ScaleReport(msgspec.Struct, frozen=True):
    """How the run stands to the request `number` ("" before the first)."""

    number: str
    state: Literal["working", "done", "refused"]
    wanted: int
    running: int
    note: str = ""


class Control(Protocol):
    """The newest request and the newest report of a run. Each method of a networked version may raise StreamError,
    and CodecError for what cannot be read."""

    async def ask(self, request: ScaleRequest) -> None: ...

    async def asked(self) -> ScaleRequest | None: ...

    async def tell(self, report: ScaleReport) -> None: ...

    async def told(self) -> ScaleReport | None: ...

    async def clear(self) -> None: ...


class RedisControl:
    """Control on Redis: one hash of JSON texts."""

    def __init__(self, client: RedisClient, *, keys: Keys) -> None:
        self._client = client
        self._key = keys.control

    async def ask(self, request: ScaleRequest) -> None:
        await self._client.command("HSET", self._key, _REQUEST, msgspec.json.encode(request))

    async def asked(self) -> ScaleRequest | None:
        text = await self._get(_REQUEST)
        return None if text is None else _decode(text, ScaleRequest)

    async def tell(self, report: ScaleReport) -> None:
        await self._client.command("HSET", self._key, _REPORT, msgspec.json.encode(report))

    async def told(self) -> ScaleReport | None:
        text = await self._get(_REPORT)
        return None if text is None else _decode(text, ScaleReport)

    async def clear(self) -> None:
        await self._client.command("HDEL", self._key, _REQUEST, _REPORT)

    async def _get(self, field: str) -> bytes | None:
        # HGETALL, which the run's access rules grant; the hash has two fields.
        reply = await self._client.command("HGETALL", self._key)
        found = dict(reply) if isinstance(reply, dict) else _pairs(reply)
        return found.get(field.encode())


def _pairs(reply: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(reply[::2], reply[1::2], strict=True))


def _decode(text: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        do = "use the version of Keel that the run uses"
        raise CodecError(f"no {kind.__name__}", got=repr(text[:80]), do=do) from error
