"""`keel review`: the web page on which people compare answers, of a run that goes on or from a file.

Consumes: the review queue. Produces: a page; judgements, in the queue and in the run's files (reward_service/
review/files.py). Waits: until Ctrl-C. Who unblocks it: SIGINT or SIGTERM. Always holds: it listens on loopback unless
told otherwise; the token is in no log and no URL that is sent anywhere.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.data_records import PREFERENCES_FILE
from cluster.errors import ConfigError, StreamError
from cluster.review_queue import Kind, Progress, ReviewItem, ReviewQueue
from configs.run import ReviewSection, RunConfig
from keel.living import config_of
from keel.review_queue import RunQueue, queue_from, read_pairs
from reward_service.review.files import CAUGHT_FILE, REVIEWS_FILE, ReviewFiles
from reward_service.review.page import PageSettings, ReviewPage, make_app
from reward_service.review.session import Access

TOKEN_VARIABLE = "KEEL_REVIEW_TOKEN"
DEFAULT_PORT = 8642
_LOOPBACK = ("127.0.0.1", "::1")
_STOP_S = 3
_NO_LIMIT = 10**9
_NAMES: dict[Kind, str] = {"pair": "pairs", "flagged": "flagged answers", "audit": "audits"}


@dataclass(frozen=True)
class PageAddress:
    """Where the page is served. `port` 0 takes a free one. `token_file` holds the token; without it the one in
    KEEL_REVIEW_TOKEN, else a random one."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    token_file: Path | None = None


def review(
    run_dir: Path | None,
    *,
    pairs: Path | None = None,
    redis_url: str | None = None,
    address: PageAddress | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C. `pairs`: a file of pairs to compare, in the run's queue if the run goes on; without
    a run, judgements go to the directory FILE.review.

    Raises ConfigError (no such run, nothing to review, a bad token, an address that cannot be used), DataError (the
    file), StreamError (the run's server)."""
    if run_dir is None and pairs is None:
        raise ConfigError("nothing to review", do="give a run's directory, or a file with --pairs, or both")
    address = address or PageAddress()
    config = None if run_dir is None else config_of(run_dir)
    items = [] if pairs is None else read_pairs(pairs)
    access, told_token = _access(address.token_file)
    section = ReviewSection() if config is None else config.review
    name = config.name if config is not None else str(pairs)
    settings = PageSettings(name=name, votes=section.votes, lease_s=section.lease_s, note=_why_empty(config))
    with closing(_bind(address)) as listening, ReviewFiles(run_dir or Path(f"{pairs}.review")) as files:
        scene = _Scene(run_dir, config, redis_url, items, files, settings, say)
        asyncio.run(_serve(scene, access, listening, invitation=_invitation(listening, told_token)))


@dataclass(frozen=True)
class _Scene:
    """What is reviewed, and where it goes."""

    run_dir: Path | None
    config: RunConfig | None
    redis_url: str | None
    items: Sequence[ReviewItem]
    files: ReviewFiles
    settings: PageSettings
    say: Callable[[str], None]


async def _serve(scene: _Scene, access: Access, listening: socket.socket, *, invitation: str) -> None:
    import uvicorn

    files, settings, say = scene.files, scene.settings, scene.say
    run_queue = await _run_queue(scene)
    queue: ReviewQueue = run_queue or await queue_from(files.log, votes=settings.votes)
    try:
        await queue.push(scene.items, limit=_NO_LIMIT)
        page = ReviewPage(queue, files=files, access=access, settings=settings)
        await page.write_files()
        say(invitation)
        say(_standing(await queue.progress(), settings))
        config = uvicorn.Config(
            make_app(page),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=_STOP_S,
        )
        with _signals_end_quietly():
            await uvicorn.Server(config).serve(sockets=[listening])
        say(f"stopped. What people said is in {files.directory}: {PREFERENCES_FILE}, {CAUGHT_FILE}, {REVIEWS_FILE}")
    finally:
        if run_queue is not None:
            await run_queue.close()


async def _run_queue(scene: _Scene) -> RunQueue | None:
    """The queue of the run, if it goes on. A run that has ended is no error where there are pairs from a file."""
    if scene.run_dir is None or scene.config is None:
        return None
    files = scene.files

    def start_over() -> None:
        files.position = 0

    queue = RunQueue(scene.run_dir, scene.config, redis_url=scene.redis_url, on_connect=start_over)
    try:
        await queue.open()
    except (ConfigError, StreamError) as error:
        if not scene.items:
            raise ConfigError(
                f"nothing to review: {scene.config.name} has no queue that can be reached",
                got=str(error),
                do="review while the run goes on, or give pairs from a file with --pairs",
            ) from error
        scene.say(f"{scene.config.name} does not go on: only the pairs of the file are reviewed")
        return None
    return queue


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn ends by SIGINT and SIGTERM, and then raises them again for those who listened before it: nobody."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _access(token_file: Path | None) -> tuple[Access, str | None]:
    """And the token to print, where it is ours."""
    if token_file is not None:
        try:
            return Access(token_file.read_text(encoding="utf-8").strip()), None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {token_file}", got=str(error), do="write the token into it") from error
    if TOKEN_VARIABLE in os.environ:
        return Access(os.environ[TOKEN_VARIABLE].strip()), None
    token = secrets.token_urlsafe(18)
    return Access(token), token


def _bind(address: PageAddress) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address.host, address.port))
        listening.listen()
    except (OSError, OverflowError, TypeError) as error:  # the last two: no port, no host name at all
        listening.close()
        raise ConfigError(
            "cannot serve the review page on this address",
            got=f"{address.host}:{address.port}: {error}",
            do="give an address of this machine and a free port (0 takes any)",
        ) from error
    return listening


def _invitation(listening: socket.socket, token: str | None) -> str:
    """The token stands in the URL's fragment, which browsers do not send."""
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    lines = [f"review page: {url}"] if token is None else [f"review page: {url}#token={token}", f"token: {token}"]
    if host not in _LOOPBACK:
        lines.append("it is plain HTTP: where others share the network, tunnel it (ssh -L) or put TLS before it")
    return "\n".join(lines)


def _standing(progress: Progress, settings: PageSettings) -> str:
    waiting = ", ".join(f"{count} {_NAMES[kind]}" for kind, count in progress.waiting.items() if count)
    judged = sum(progress.judged.values())
    return f"{waiting or 'nothing'} waiting, {judged} judgements so far. {'' if waiting else settings.note}".strip()


def _why_empty(config: RunConfig | None) -> str:
    """What to say where nothing waits."""
    if config is None:
        return "All pairs of the file are judged."
    refresh = config.rm.refresh
    if config.review.enabled or (refresh is not None and refresh.judge == "review"):
        return "The run sends items as it goes on; they appear here by themselves."
    return "This run sends nothing to people: set review.enabled, or rm.refresh.judge: review."
