"""Ray's job server over HTTP, with a deadline on every call and errors in Keel's words.

Consumes: the server's address and the user's token (as Ray finds it). Produces: jobs, their state and their log.
Waits: at most REQUEST_TIMEOUT_S for an answer; in `follow`, for the job's end, asking for its state while the log is
silent. Always holds: what `follow` has written it does not write again, also after a broken connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from cluster.errors import ConfigError, DeadlineError, SupervisionError
from keel.background import in_background

CONNECT_TIMEOUT_S: Final = 10.0
REQUEST_TIMEOUT_S: Final = 120.0
RECONNECT_S: Final = 120.0
_SILENCE_S: Final = 15.0
_RETRY_S: Final = 1.0
_CLOSE_S: Final = 5.0
_ENDED: Final = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_TOKEN_HELP: Final = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (or RAY_AUTH_TOKEN); "
    "RAY_AUTH_MODE=disabled for a cluster without one"
)


_T = TypeVar("_T")


@dataclass(frozen=True)
class JobState:
    """status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. driver_exit_code: of the command, once it has ended by
    itself."""

    job: str
    status: str
    message: str
    driver_exit_code: int | None
    entrypoint: str

    @property
    def ended(self) -> bool:
        return self.status in _ENDED


class RayJobs:
    """One cluster's job server. The constructor raises ConfigError for an address or token that it does not take, and
    SupervisionError when nobody answers."""

    def __init__(
        self, address: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> None:
        self.address: Final = _checked_address(address, timeout_s=connect_timeout_s)
        # Ray lets these beat the address that the user gave.
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard_sdk", "job.sdk"):  # Uploads and closed sockets are not the user's news.
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

        class Client(JobSubmissionClient):  # type: ignore[misc]
            """Ray's client waits for ever; its requests pass through here."""

            def _do_request(self, *args: Any, **kwargs: Any) -> Any:
                return super()._do_request(*args, timeout=(connect_timeout_s, timeout_s), **kwargs)

        with self._translated():
            self._client: Any = Client(self.address)

    def submit(self, *, job: str, entrypoint: str, package: Path, env: dict[str, str]) -> None:
        """Upload the package where the cluster does not have it, and start the job."""
        with self._translated():
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                runtime_env={"working_dir": str(package), "env_vars": env},
            )

    def state(self, job: str) -> JobState:
        """Raises ConfigError for a job that the cluster does not know."""
        with self._translated(job):
            info = self._client.get_job_info(job)
        return JobState(
            job=job,
            status=str(info.status.value),
            message=info.message or "",
            driver_exit_code=info.driver_exit_code,
            entrypoint=info.entrypoint,
        )

    def log(self, job: str) -> str:
        """All that the job has printed."""
        with self._translated(job):
            text: str = self._client.get_job_logs(job)
        return text

    def stop(self, job: str) -> None:
        """Send the job SIGTERM; returns at once."""
        with self._translated(job):
            self._client.stop_job(job)

    def wait(self, job: str, *, timeout_s: float) -> JobState:
        """Wait for the job's end. Raises DeadlineError."""
        deadline_s = time.monotonic() + timeout_s
        while not (state := self.state(job)).ended:
            if time.monotonic() > deadline_s:
                raise DeadlineError(
                    f"job {job} has not ended", got=f"{state.status} after {timeout_s:.0f} s", do="look at its log"
                )
            time.sleep(_RETRY_S)
        return state

    async def follow(self, job: str, *, write: Callable[[str], object]) -> JobState:
        """Write the log until the job ends. A server that goes away is waited for, RECONNECT_S long."""
        written = 0
        answered_s = time.monotonic()
        while True:
            try:
                written = await self._tail(job, written=written, write=write)
                state = await self._asked(self.state, job)
                if state.ended:
                    write((await self._asked(self.log, job))[written:])
                    return state
                answered_s = time.monotonic()
            except SupervisionError:
                if time.monotonic() - answered_s > RECONNECT_S:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def _tail(self, job: str, *, written: int, write: Callable[[str], object]) -> int:
        """Write what the log holds beyond its first `written` characters, until the server ends the connection or the
        job ends. Returns how many characters are written then."""
        import aiohttp

        position = 0
        lines = aiter(self._client.tail_job_logs(job))
        pending: asyncio.Task[str] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(lines))
                done, _ = await asyncio.wait([pending], timeout=_SILENCE_S)
                if not done:
                    if (await self._asked(self.state, job)).ended:
                        return written
                    continue
                text, pending = pending.result(), None
                write(text[max(0, written - position) :])
                position += len(text)
                written = max(written, position)
        except (StopAsyncIteration, aiohttp.ClientError, OSError, RuntimeError):
            return written  # The state, asked for next, tells whether this was the end.
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.wait([pending], timeout=_CLOSE_S)

    async def _asked(self, call: Callable[[str], _T], job: str) -> _T:
        """Ctrl-C does not last as long as a slow server's answer."""
        return await asyncio.wrap_future(in_background(lambda: call(job), name="ray-jobs"))

    @contextmanager
    def _translated(self, job: str | None = None) -> Iterator[None]:
        """Ray's and the HTTP client's exceptions as Keel's."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"the cluster at {self.address} refuses us", got=first, do=_TOKEN_HELP) from None
        except requests.exceptions.Timeout:
            raise SupervisionError(
                f"the cluster at {self.address} does not answer", do="see whether its head node is overloaded or gone"
            ) from None
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise SupervisionError(
                f"the connection to {self.address} broke", got=f"{type(error).__name__}: {error}", do="try again"
            ) from None
        except RuntimeError as error:
            text = str(error)
            if job is not None and "does not exist" in text:
                raise ConfigError(
                    "no such job on this cluster", got=job, do="its id was printed when it was submitted"
                ) from None
            if "already exists" in text or "already been used" in text:
                raise ConfigError("a job of this id exists", got=text[-300:], do="give another --name") from None
            raise SupervisionError(
                "the cluster refused the request", got=text[-1000:], do="see the head node's logs/dashboard.log"
            ) from None


def _checked_address(address: str, *, timeout_s: float) -> str:
    """`address` as scheme://host:port, with somebody listening there."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(
            "--address is not the URL of a Ray dashboard",
            got=address,
            do="give http://HEAD:8265 (jobs go over HTTP; the ports of ray:// and of ray.address are others)",
        )
    port = port or (443 if parts.scheme == "https" else 8265)
    try:
        socket.create_connection((parts.hostname, port), timeout=timeout_s).close()
    except OSError as error:
        raise SupervisionError(
            "no Ray cluster answers",
            got=f"{parts.hostname}:{port}: {error}",
            do="check --address, that `ray start --head` has --dashboard-host, and a tunnel or port-forward if needed",
        ) from None
    return f"{parts.scheme}://{parts.hostname}:{port}{parts.path.rstrip('/')}"
