"""The review page over HTTP, without a browser: who is let in, what is refused, what is given out. And sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import ConfigError, StreamError
from cluster.review_queue import MemoryReviewQueue, Progress, ReviewItem
from reward_service.review.files import ReviewFiles
from reward_service.review.page import PageSettings, ReviewPage, make_app
from reward_service.review.session import SESSION_S, Access, Guesses, annotator_name, is_swapped

TOKEN = "a-token-for-tests"
OWN = {"x-keel-review": "1"}
PAIR = ReviewItem(
    item_id="p", kind="pair", prompt="why?", answers=("one", "two"), policy_versions=(3, 4), reason="hidden"
)


@dataclass
class ManualClock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Queue(MemoryReviewQueue):
    """`down`: the server does not answer."""

    down = False

    async def progress(self) -> Progress:
        if self.down:
            raise StreamError("Redis cannot be reached")
        return await super().progress()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ReviewFiles]:
    with ReviewFiles(tmp_path) as made:
        yield made


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
async def http(files: ReviewFiles, queue: Queue) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(ReviewPage(queue, files=files, access=Access(TOKEN), settings=PageSettings("run")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://keel.test:8642") as client:
        yield client


async def login(http: httpx.AsyncClient, *, token: str = TOKEN, who: str = "ann") -> httpx.Response:
    return await http.post("/api/login", json={"token": token, "annotator": who}, headers=OWN)


async def judge(http: httpx.AsyncClient, **said: Any) -> httpx.Response:
    return await http.post("/api/judge", json={"item_id": "p", "judgement_id": "1", **said}, headers=OWN)


@pytest.mark.parametrize("path", ["/", "/review.js", "/text.js", "/review.css", "/api/session", "/nothing", "/healthz"])
async def test_every_answer_has_the_security_headers(http: httpx.AsyncClient, path: str) -> None:
    headers = (await http.get(path)).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["next", "judge", "undo"])
async def test_without_a_session_nothing_is_given_out(http: httpx.AsyncClient, queue: Queue, path: str) -> None:
    await queue.push([PAIR], limit=1)
    http.cookies.set("keel_review_8642", "YW5u.9999999999.0000")
    answer = await http.post(f"/api/{path}", json={"kinds": ["pair"]}, headers=OWN)
    assert (answer.status_code, "why" in answer.text) == (401, False)
    assert (await http.get("/api/progress")).status_code == 401
    assert (await http.get("/docs")).status_code == 404
    assert (await http.get("/openapi.json")).status_code == 404


async def test_blind_pairs_say_nothing_of_their_origin(http: httpx.AsyncClient, queue: Queue) -> None:
    await queue.push([PAIR], limit=1)
    assert (await login(http)).json() == {"annotator": "ann", "name": "run", "note": ""}
    item = (await http.post("/api/next", json={"kinds": ["pair"]}, headers=OWN)).json()["item"]
    assert set(item) == {"item_id", "kind", "prompt", "answers", "reason"}
    assert item["reason"] == ""
    assert item["answers"] == (["two", "one"] if is_swapped("p", "ann") else ["one", "two"])


async def test_requests_of_other_pages_are_refused(http: httpx.AsyncClient, queue: Queue) -> None:
    await queue.push([PAIR], limit=1)
    await login(http)
    said = {"item_id": "p", "judgement_id": "1", "verdict": "left"}
    assert (await http.post("/api/judge", json=said)).status_code == 403
    foreign = {**OWN, "origin": "http://evil.test"}
    assert (await http.post("/api/judge", json=said, headers=foreign)).status_code == 403
    assert (await http.post("/api/judge", json=said, headers={**OWN, "origin": "null"})).status_code == 403
    assert await queue.judgements() == []
    own = {**OWN, "origin": "http://keel.test:8642"}
    assert (await http.post("/api/judge", json=said, headers=own)).json()["stored"]


@pytest.mark.parametrize("header", ["host", "origin"])
@pytest.mark.parametrize("value", ["http://[", "[", "keel.test:port", "keel.test:99999999", "\u00b2", ":", ""])
async def test_headers_that_are_none_are_refused(
    http: httpx.AsyncClient, queue: Queue, header: str, value: str
) -> None:
    await queue.push([PAIR], limit=1)
    headers = [
        *((name.encode(), own.encode()) for name, own in OWN.items()),
        (header.encode(), value.encode("latin-1")),
    ]
    said = {"item_id": "p", "judgement_id": "1", "verdict": "left"}
    for path, body in (("login", {"token": TOKEN, "annotator": "ann"}), ("judge", said)):
        assert (await http.post(f"/api/{path}", json=body, headers=headers)).status_code < 500
    assert header == "host" or await queue.judgements() == []


async def test_guessing_the_token_is_slow(http: httpx.AsyncClient) -> None:
    assert [(await login(http, token=f"guess {n}")).status_code for n in range(11)] == [403] * 10 + [429]
    assert (await login(http)).status_code == 429


@pytest.mark.parametrize("who", ["", "  ", "x" * 41, "a\u202eb", "a\x00b"])
async def test_names_must_be_seen(http: httpx.AsyncClient, who: str) -> None:
    assert (await login(http, who=who)).status_code == 422


async def test_what_cannot_be_read_is_refused(http: httpx.AsyncClient, queue: Queue) -> None:
    await queue.push([PAIR], limit=1)
    await login(http)
    assert (await http.post("/api/judge", content=b"{", headers=OWN)).status_code == 400
    assert (await http.post("/api/judge", content=b"x" * 70_000, headers=OWN)).status_code == 413
    for opening in (b"[", b'{"item_id":'):
        assert (await http.post("/api/judge", content=opening * 5_000, headers=OWN)).status_code == 400
    assert (await http.post("/api/next", json={"kinds": ["secret"]}, headers=OWN)).status_code == 400
    assert (await judge(http, verdict="first")).status_code == 400, "only what was shown has a verdict"
    assert (await judge(http, verdict="bad")).status_code == 409
    assert (await judge(http, verdict="left", item_id="gone")).status_code == 409
    assert await queue.judgements() == []


async def test_a_queue_that_is_down_says_so_and_nothing_is_lost(
    http: httpx.AsyncClient, queue: Queue, files: ReviewFiles
) -> None:
    await queue.push([PAIR], limit=1)
    await login(http)
    queue.down = True
    health = await http.get("/healthz")
    assert (health.status_code, health.json()) == (503, {"error": "The review queue does not answer."}), "for anybody"
    assert (await judge(http, verdict="left")).status_code == 503
    queue.down = False
    assert (await http.get("/healthz")).status_code == 200
    assert (await judge(http, verdict="left")).json()["stored"], "sent again under its id"
    assert len(await queue.judgements()) == 1
    assert len((files.directory / "preferences.jsonl").read_text().splitlines()) == 1


async def test_a_disk_that_refuses_makes_the_page_try_again(
    http: httpx.AsyncClient, queue: Queue, files: ReviewFiles
) -> None:
    await queue.push([PAIR], limit=1)
    await login(http)
    (files.directory / "preferences.jsonl").mkdir()
    assert (await judge(http, verdict="left")).status_code == 503
    (files.directory / "preferences.jsonl").rmdir()
    assert (await judge(http, verdict="left")).json()["stored"]
    assert len((files.directory / "preferences.jsonl").read_text().splitlines()) == 1


def test_sessions_end_and_cannot_be_made_up() -> None:
    clock = ManualClock()
    access = Access(TOKEN, clock=clock)
    cookie = access.cookie_for("Ånn ☂.x")
    assert access.annotator_of(cookie) == "Ånn ☂.x"
    name, until_s, signature = cookie.split(".")
    forged = [
        f"{access.cookie_for('bob').split('.')[0]}.{until_s}.{signature}",
        f"{name}.{int(until_s) + 1}.{signature}",
    ]
    for other in [
        *forged,
        "",
        ".",
        "..",
        "ü.ü.ü",
        cookie[:-1],
        Access("another token!", clock=clock).cookie_for("ann"),
    ]:
        assert access.annotator_of(other) is None
    clock.now_s += SESSION_S + 1
    assert access.annotator_of(cookie) is None
    assert TOKEN not in cookie + repr(access)


def test_tokens_must_be_long() -> None:
    with pytest.raises(ConfigError, match="too short"):
        Access("short")


def test_guesses_are_forgotten() -> None:
    clock = ManualClock()
    guesses = Guesses(clock=clock)
    for _ in range(10):
        assert not guesses.too_many
        guesses.wrong()
    assert guesses.too_many
    clock.now_s += 61
    assert not guesses.too_many


def test_names_have_one_form() -> None:
    assert annotator_name("  Zoe\u0308   K ") == "Zoë K"


def test_sides_are_fair_and_fixed() -> None:
    swapped = [is_swapped(f"item {n}", "ann") for n in range(2000)]
    assert 900 < sum(swapped) < 1100
    assert swapped == [is_swapped(f"item {n}", "ann") for n in range(2000)]
    assert swapped != [is_swapped(f"item {n}", "bob") for n in range(2000)]
