"""The web page on which people judge: blind pairs, flagged answers, audits. `make_app` gives an ASGI application.

Consumes: the review queue; judgements from browsers. Produces: judgements, in the queue first and then in the files.
Waits for: the queue and the disk, for one request at a time where files are written. Who unblocks it: their deadlines.
Always holds: nothing but the login form is given out without the token; which policy wrote an answer and in what order
a pair was stored are not sent to the browser; requests that change anything come from our own script (SameSite cookie,
a header that forms cannot send, the origin); answers reach the browser as JSON and are shown as text.

FastAPI is imported here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response

from cluster.data_records import Prompt
from cluster.errors import DataError, KeelError
from cluster.review_queue import Judgement, Kind, ReviewItem, ReviewQueue, Verdict
from reward_service.review.files import ReviewFiles
from reward_service.review.session import MAX_NAME, SESSION_S, Access, Guesses, annotator_name, is_swapped

_LOG = logging.getLogger(__name__)
_STATIC: Final = Path(__file__).parent / "static"
_PAGES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/review.js": ("review.js", "text/javascript; charset=utf-8"),
    "/text.js": ("text.js", "text/javascript; charset=utf-8"),
    "/review.css": ("review.css", "text/css; charset=utf-8"),
}
OWN_HEADER: Final = "x-keel-review"
"""Only a script of the page's own origin can send it."""
_MAX_BODY_BYTES: Final = 64 * 1024
_MAX_NOTE: Final = 4000
_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_T = TypeVar("_T", bound=msgspec.Struct)


@dataclass(frozen=True)
class PageSettings:
    """`name`: of what is reviewed, shown on the page. `votes`: people who judge each item. `note`: shown where nothing
    waits."""

    name: str
    votes: int = 1
    lease_s: float = 600.0
    note: str = ""


class _Login(msgspec.Struct):
    token: str
    annotator: str


class _Wish(msgspec.Struct):
    """What to show next."""

    kinds: tuple[Kind, ...] = ()


class _Said(msgspec.Struct):
    """`verdict`: of a pair "left" or "right" as it was shown, or "tie"; else "bad" or "fine"; or "skip"."""

    item_id: str
    verdict: str
    judgement_id: str
    note: str = ""
    kinds: tuple[Kind, ...] = ()


class _Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, error: str) -> None:
        self.status, self.error = status, error


class ReviewPage:
    """The requests' handlers."""

    def __init__(self, queue: ReviewQueue, *, files: ReviewFiles, access: Access, settings: PageSettings) -> None:
        self._queue = queue
        self._files = files
        self._access = access
        self._settings = settings
        self._guesses = Guesses()
        self._writing = asyncio.Lock()

    async def login(self, request: Request) -> Response:
        asked = await _body(request, _Login)
        if self._guesses.too_many:
            raise _Refused(429, "Too many wrong tokens. Wait a minute.")
        if not self._access.matches(asked.token.strip()):
            self._guesses.wrong()
            raise _Refused(403, "That is not the token. It was printed where the page was started.")
        name = annotator_name(asked.annotator)
        if name is None:
            raise _Refused(422, f"Give a name of 1 to {MAX_NAME} visible characters.")
        reply = _json(self._who(name))
        reply.set_cookie(
            _cookie_name(request),
            self._access.cookie_for(name),
            max_age=int(SESSION_S),
            httponly=True,
            samesite="strict",
            secure=request.scope["scheme"] == "https",
        )
        return reply

    async def logout(self, request: Request) -> Response:
        await _body(request, _Wish)
        reply = _json({})
        reply.delete_cookie(_cookie_name(request), httponly=True, samesite="strict")
        return reply

    async def session(self, request: Request) -> Response:
        return _json(self._who(self._annotator(request)))

    async def next(self, request: Request) -> Response:
        annotator = self._annotator(request)
        return await self._state(annotator, (await _body(request, _Wish)).kinds)

    async def judge(self, request: Request) -> Response:
        annotator = self._annotator(request)
        said = await _body(request, _Said)
        judgement = Judgement(
            item_id=said.item_id,
            annotator=annotator,
            verdict=_verdict(said, annotator),
            note=said.note.strip()[:_MAX_NOTE],
            judgement_id=said.judgement_id[:64],
        )
        stored = await self._queue.judge(judgement, votes=self._settings.votes)
        await self.write_files()
        return await self._state(annotator, said.kinds, stored=stored)

    async def undo(self, request: Request) -> Response:
        annotator = self._annotator(request)
        wish = await _body(request, _Wish)
        undone = await self._queue.undo(annotator, lease_s=self._settings.lease_s, votes=self._settings.votes)
        await self.write_files()
        return await self._state(annotator, wish.kinds, undone=undone is not None)

    async def progress(self, request: Request) -> Response:
        self._annotator(request)
        return _json({"progress": await self._progress()})

    async def health(self, request: Request) -> Response:
        """Needs no token, and so says no more than whether it works."""
        del request
        try:
            await self._queue.progress()
        except KeelError as error:
            _LOG.warning("review page: %s", error)
            raise _Refused(503, "The review queue does not answer.") from error
        return Response(b"ok\n", media_type="text/plain")

    async def write_files(self) -> None:
        """Bring the files up to the queue's log. Raises DataError, StreamError."""
        async with self._writing:
            log = await self._queue.judgements(after=self._files.position)
            await asyncio.to_thread(self._files.take, log)

    def _annotator(self, request: Request) -> str:
        name = self._access.annotator_of(request.cookies.get(_cookie_name(request), ""))
        if name is None:
            raise _Refused(401, "Log in again.")
        return name

    def _who(self, annotator: str) -> dict[str, Any]:
        return {"annotator": annotator, "name": self._settings.name, "note": self._settings.note}

    async def _state(self, annotator: str, kinds: tuple[Kind, ...], **more: bool) -> Response:
        settings = self._settings
        item = await self._queue.next(annotator, lease_s=settings.lease_s, votes=settings.votes, kinds=kinds)
        shown = None if item is None else _shown(item, annotator)
        return _json({"item": shown, "progress": await self._progress(), **more})

    async def _progress(self) -> dict[str, Any]:
        progress = await self._queue.progress()
        return {
            "waiting": progress.waiting,
            "judged": progress.judged,
            "by_annotator": progress.by_annotator,
            "agreement": progress.agreement,
            "compared": progress.compared,
        }


def make_app(page: ReviewPage) -> FastAPI:
    """Serves the page. Raises OSError where its files are not installed."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(_SecurityHeaders)
    for path, (name, content_type) in _PAGES.items():
        app.get(path)(_static((_STATIC / name).read_bytes(), content_type))
    for path, handler in (
        ("login", page.login), ("logout", page.logout), ("next", page.next), ("judge", page.judge), ("undo", page.undo)
    ):  # fmt: skip
        app.post(f"/api/{path}")(_answered(_from_our_page(handler)))
    app.get("/api/session")(_answered(page.session))
    app.get("/api/progress")(_answered(page.progress))
    app.get("/healthz")(_answered(page.health))
    return app


_Handler = Callable[[Request], Awaitable[Response]]


def _static(body: bytes, content_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(body, headers={"content-type": content_type})

    return answer


def _answered(handler: _Handler) -> _Handler:
    """Errors become answers that the page's script can tell apart: 409 drops a judgement, 503 sends it again."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except _Refused as refused:
            return _json({"error": refused.error}, status=refused.status)
        except KeelError as error:
            _LOG.warning("review page: %s", error)
            wrong = isinstance(error, DataError) and not isinstance(error.__cause__, OSError)
            return _json({"error": str(error)}, status=409 if wrong else 503)

    return answer


def _from_our_page(handler: _Handler) -> _Handler:
    async def answer(request: Request) -> Response:
        origin = request.headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != request.headers.get("host")
        if foreign or OWN_HEADER not in request.headers:
            raise _Refused(403, "Requests must come from the review page.")
        return await handler(request)

    return answer


async def _body(request: Request, kind: type[_T]) -> _T:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_BODY_BYTES:
            raise _Refused(413, "The request is too long.")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _Refused(400, f"The request cannot be read: {error}") from error


def _cookie_name(request: Request) -> str:
    """Cookies know no ports, and two runs may be reviewed on one machine."""
    port = request.headers.get("host", "").rpartition(":")[2]
    return f"keel_review_{port if port.isdecimal() else 0}"


def _json(value: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt


def _shown(item: ReviewItem, annotator: str) -> dict[str, Any]:
    """As much of an item as its annotator may know."""
    swapped = item.kind == "pair" and is_swapped(item.item_id, annotator)
    return {
        "item_id": item.item_id,
        "kind": item.kind,
        "prompt": _messages(item.prompt),
        "answers": item.answers[::-1] if swapped else item.answers,
        "reason": "" if item.kind == "pair" else item.reason,
    }


_SHOWN_VERDICTS: Final[dict[str, Verdict]] = {"tie": "tie", "skip": "skip", "bad": "bad", "fine": "fine"}


def _verdict(said: _Said, annotator: str) -> Verdict:
    """From the places of the answers as they were shown to those in the item."""
    if said.verdict in ("left", "right"):
        return "first" if (said.verdict == "left") != is_swapped(said.item_id, annotator) else "second"
    if said.verdict not in _SHOWN_VERDICTS:
        raise _Refused(400, "No such verdict.")
    return _SHOWN_VERDICTS[said.verdict]


class _SecurityHeaders:
    """ASGI middleware: every answer has the headers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers)
