"""`keel scale`: ask a run that goes on for another number of rollout actors, and wait for its answer.

Consumes: the run's reports. Produces: one request. Waits: for the run to carry it out or to refuse it. Who unblocks it:
the run's driver, its end, another request in this one's place, or the deadline. Always holds: nothing is changed in a
run that is not online.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from cluster.control import Control, ScaleReport, ScaleRequest
from cluster.errors import ConfigError, DeadlineError, SupervisionError
from cluster.run_redis import RunRedis
from configs.run import RunConfig
from keel.living import config_of, connect

_POLL_S = 0.25
_MARGIN_S = 60.0


def scale_run(
    run_dir: Path, *, actors: int | None, redis_url: str | None = None, say: Callable[[str], None] = print
) -> ScaleReport:
    """Wait until `actors` rollout actors run; None hands the number back to autoscaling. `say` gets each change.

    Raises ConfigError (no such run, a number below 1), SupervisionError (the run is not online, or refused),
    DeadlineError."""
    if actors is not None and actors < 1:
        raise ConfigError("a run needs at least one actor", got=str(actors), do="give --actors 1 or more")
    config = config_of(run_dir)
    return asyncio.run(_scale(run_dir, config, actors=actors, redis_url=redis_url, say=say))


async def _scale(
    run_dir: Path, config: RunConfig, *, actors: int | None, redis_url: str | None, say: Callable[[str], None]
) -> ScaleReport:
    async with connect(run_dir, config, given=redis_url) as redis:
        await _check_online(redis, config)
        return await ask(
            redis.control,
            ScaleRequest(actors),
            timeout_s=deadline_s(config),
            say=say,
            check_online=lambda: _check_online(redis, config),
        )


async def _assumed() -> None:
    pass


async def ask(
    control: Control,
    request: ScaleRequest,
    *,
    timeout_s: float,
    say: Callable[[str], None],
    check_online: Callable[[], Awaitable[None]] = _assumed,
) -> ScaleReport:
    """Send `request` and see it through. `check_online` raises when the run has ended."""
    await control.ask(request)
    until_s, said = time.monotonic() + timeout_s, ""
    while time.monotonic() < until_s:
        report = await control.told()
        if report is not None and report.number == request.number:
            if report.state == "refused":
                raise SupervisionError("the run did not scale", got=report.note, do="see the run's logs/driver-0.log")
            if report.note != said:
                say(report.note)
                said = report.note
            if report.state == "done":
                return report
        else:
            await _check_stands(control, request)
        await check_online()
        await asyncio.sleep(_POLL_S)
    raise DeadlineError(
        "the run did not finish scaling",
        got=f"{said or 'no answer'} after {timeout_s:.0f} s",
        do="the request stands; see the run's logs/driver-0.log",
    )


async def _check_stands(control: Control, request: ScaleRequest) -> None:
    """Raise SupervisionError when nobody will answer `request`: another took its place, or the run's driver, which
    forgets what was asked of the one before it, is a new one."""
    newest = await control.asked()
    if newest is None or newest.number != request.number:
        raise SupervisionError(
            "the request was dropped",
            got="the run was started again" if newest is None else "another request came after it",
            do="see the run's logs/driver-0.log, and ask again",
        )


def deadline_s(config: RunConfig) -> float:
    """Room, boot and drain, one after another, and some more."""
    rollout = config.rollout
    return config.placement.wait_s + rollout.boot_timeout_s + rollout.generate_timeout_s + _MARGIN_S


async def _check_online(redis: RunRedis, config: RunConfig) -> None:
    if await redis.lock.holder() is None:
        raise SupervisionError(
            f"{config.name} is not online",
            got=f"nobody holds its lock on {redis.address}",
            do="actors can be added and removed in the ppo stage; start it with `keel train`",
        )
