"""The driver's side of the guard: what it does for each line of guard.jsonl, and what it does not do again."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.files import read_jsonl
from cluster.reward_models import RewardModels, RmManifest
from configs.guard import GuardSection
from keel.online.guard_actions import GuardActions, sentence
from keel.online.webhook import Webhook
from keel.runtime import Runtime
from learner.guard.journal import GUARD_FILE, At, Journal
from learner.guard.record import Action, Alert, FreezeRm, Halt, Level, RaiseBeta, RefreshRm, RollBack, Verdict

pytestmark = pytest.mark.timeout(60)


class Hook:
    """A server of alerts. `statuses`: of the next answers, 200 after them. `gate`: shut, requests wait."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.statuses: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.arrived.release()
                hook.gate.wait(30.0)
                hook.bodies.append(json.loads(body))
                self.send_response(hook.statuses.pop(0) if hook.statuses else 200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Not to stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hooks/secret"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    opened = Hook()
    yield opened
    opened.close()


@dataclass
class Scene:
    """A run directory that a learner's journal is written to, and a driver that follows it."""

    run_dir: Path
    section: GuardSection = field(default_factory=GuardSection)
    announced: list[tuple[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    step: int = 40
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.journal = Journal(self.run_dir, step=0)
        self.stack.callback(self.journal.close)

    def freeze_until(self, version: int) -> None:
        """As a refresher."""
        self.frozen.append(version)

    def ask(self, reason: str) -> None:
        """As a refresher."""
        self.asked.append(reason)

    def driver(self, *, refreshes: bool = True, webhook: Webhook | None = None) -> GuardActions:
        config = SimpleNamespace(name="demo", guard=self.section)
        runtime = cast(Runtime, SimpleNamespace(config=config, run=SimpleNamespace(path=self.run_dir)))
        actions = GuardActions(
            runtime,
            announce=lambda version, reason: self.announced.append((version, reason)),
            refresher=self if refreshes else None,
            webhook=webhook,
        )
        self.stack.callback(actions.close)
        return actions

    def write(self, action: Action, **fields: Any) -> None:
        self.journal.action(action, at=At(step=self.step, version=41, branch=0), why="KL is over 10", **fields)

    def notes(self) -> list[dict[str, Any]]:
        path = self.run_dir / "progress.jsonl"
        return read_jsonl(path) if path.exists() else []

    def models(self, *versions: str) -> RewardModels:
        """The last of them scores."""
        models = RewardModels(self.run_dir / "rm")
        for version in versions:
            with models.draft() as draft:
                (draft / "member_0").mkdir()
                models.publish(draft, RmManifest(version=version, members=1))
        return models


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    with made.stack:
        yield made


def test_an_alert_is_logged_and_noted_once(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    driver = scene.driver()
    driver.step([])
    scene.write(Alert("act at step 40: KL is over 10. rolling back to step 30"))
    driver.step([])
    driver.step([])
    (note,) = scene.notes()
    assert (note["role"], note["event"]) == ("guard", "alert")
    assert note["note"] == "act at step 40: KL is over 10. rolling back to step 30"
    assert note["note"] in caplog.text
    assert driver.counts["alert"] == 1
    assert driver.posts == {}


def test_the_reward_models_actions_reach_the_refresher(scene: Scene) -> None:
    driver = scene.driver()
    scene.write(FreezeRm(until_version=61))
    scene.write(RefreshRm("the guard asked for it"))
    driver.step([])
    assert (scene.frozen, scene.asked) == ([61], ["the guard asked for it"])


def test_where_nothing_is_refreshed_they_are_noted_alone(scene: Scene) -> None:
    driver = scene.driver(refreshes=False)
    scene.write(FreezeRm(until_version=61))
    scene.write(RefreshRm("why"))
    driver.step([])
    assert [note["event"] for note in scene.notes()] == ["freeze_rm", "refresh_rm"]


def test_after_a_rollback_the_checkpoints_reward_model_scores(scene: Scene) -> None:
    models = scene.models("rm-a", "rm-b")
    driver = scene.driver()
    scene.write(RollBack(30), rm_version="rm-a~1a2b")
    driver.step([])
    assert models.current().version == "rm-a"
    assert scene.announced == [("rm-a", "rollback to step 30")]
    assert scene.notes()[-1]["note"] == "the reward model is rm-a again, that of step 30"


@pytest.mark.parametrize("rm_version", ["rm-b", "none", "none~1a2b", None])
def test_the_same_reward_model_or_none_is_not_announced(scene: Scene, rm_version: str | None) -> None:
    scene.models("rm-a", "rm-b")
    driver = scene.driver()
    scene.write(RollBack(30), rm_version=rm_version)
    driver.step([])
    assert scene.announced == []


def test_a_reward_model_that_is_gone_is_noted_and_the_run_goes_on(scene: Scene) -> None:
    models = scene.models("rm-b")
    driver = scene.driver()
    scene.write(RollBack(30), rm_version="rm-gone")
    driver.step([])
    assert models.current().version == "rm-b"
    assert scene.announced == []
    assert scene.notes()[-1]["event"] == "failed"


def test_a_disk_that_refuses_does_not_end_the_run(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.models("rm-a", "rm-b")
    driver = scene.driver()
    monkeypatch.setattr("cluster.reward_models.atomic_write_bytes", full_disk)
    scene.write(RollBack(30), rm_version="rm-a")
    driver.step([])
    assert scene.announced == []
    assert "the reward model stays" in scene.notes()[-1]["note"]


def full_disk(*_: Any) -> None:
    raise OSError("no space left")


def test_a_driver_that_comes_later_repeats_nothing_but_a_freeze(scene: Scene) -> None:
    scene.models("rm-a", "rm-b")
    scene.write(Alert("act"))
    scene.write(FreezeRm(until_version=61))
    scene.write(RefreshRm("why"))
    scene.write(RollBack(30), rm_version="rm-a")
    driver = scene.driver()
    driver.step([])
    assert (scene.frozen, scene.asked, scene.announced, scene.notes()) == ([61], [], [], [])
    scene.write(Alert("again"))
    driver.step([])
    assert [note["note"] for note in scene.notes()] == ["again"]


def test_what_a_resumed_learner_takes_back_and_writes_anew_is_followed(scene: Scene) -> None:
    driver = scene.driver()
    scene.write(Alert("first"))
    scene.step = 45
    scene.write(Alert("taken back"))
    driver.step([])
    scene.journal.close()
    scene.journal = Journal(scene.run_dir, step=40)
    scene.stack.callback(scene.journal.close)
    scene.step = 44
    scene.write(Alert("anew"))
    driver.step([])
    assert [note["note"] for note in scene.notes()] == ["first", "taken back", "anew"]


def test_levels_and_torn_lines_are_no_actions(scene: Scene) -> None:
    driver = scene.driver()
    at = At(step=3, version=4, branch=0)
    scene.journal.level(Verdict(Level.WARN, warn=("clip_fraction",), why="w"), {"clip_fraction": 0.5}, at=at)
    with (scene.run_dir / GUARD_FILE).open("a") as file:
        file.write('not json\n[1]\n{"event": "action", "act')
    driver.step([])
    assert scene.notes() == []


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"action": "alert", "step": 3, "why": "act at step 3: x"}, "act at step 3: x"),
        ({"action": "halt", "step": 3, "why": "KL", "reason": "too many"}, "halt at step 3: too many"),
        (
            {"action": "roll_back", "step": 3, "why": "KL", "to_step": 1, "rm_version": "rm-a"},
            "roll_back at step 3 (to_step 1, rm_version rm-a): KL",
        ),
    ],
)
def test_sentences(event: dict[str, Any], expected: str) -> None:
    assert sentence(event) == expected


# ---------------------------------------------------------------- webhook


def test_the_webhook_gets_each_action_as_documented(scene: Scene, hook: Hook) -> None:
    scene.section = GuardSection(webhook=hook.url)
    driver = scene.driver()
    scene.write(Alert("act at step 40: KL is over 10"))
    scene.write(RaiseBeta(factor=2.0, floor=0.05), beta=0.2)
    scene.write(Halt("enough"))
    driver.step([])
    driver.close()
    alert, raised, halt = hook.bodies
    assert alert["text"] == "keel demo: act at step 40: KL is over 10"
    own = {"text", "run", "time_s", "step", "version", "branch", "event", "action", "signals", "why"}
    assert alert.keys() == own
    assert raised.keys() == own | {"factor", "floor", "beta"}
    assert (raised["run"], raised["action"], raised["beta"]) == ("demo", "raise_beta", 0.2)
    assert halt["reason"] == "enough"
    assert driver.posts == {"sent": 3}


@pytest.fixture
def open_hook() -> Iterator[Callable[..., Webhook]]:
    with ExitStack() as stack:

        def open_one(url: str, *, timeout_s: float = 20.0) -> Webhook:
            webhook = Webhook(url, timeout_s=timeout_s, pause_s=0.001)
            stack.callback(webhook.close)
            return webhook

        yield open_one


def until(holds: Callable[[], bool]) -> None:
    """The thread of the webhook has come so far."""
    pause = threading.Event()
    while not holds():
        pause.wait(0.005)


def test_what_may_pass_is_tried_twice_more(hook: Hook, open_hook: Callable[..., Webhook]) -> None:
    hook.statuses = [503, 429]
    webhook = open_hook(hook.url)
    webhook.post({"n": 1})
    until(lambda: webhook.counts.total() == 1)
    assert [body["n"] for body in hook.bodies] == [1, 1, 1]
    assert dict(webhook.counts) == {"sent": 1}
    hook.statuses = [500, 500, 500]
    webhook.post({"n": 2})
    webhook.post({"n": 3})
    until(lambda: webhook.counts.total() == 3)
    assert [body["n"] for body in hook.bodies[3:]] == [2, 2, 2, 3]
    assert dict(webhook.counts) == {"sent": 2, "failed": 1}


def test_what_is_refused_is_not_tried_again_and_the_url_is_in_no_log(
    hook: Hook, open_hook: Callable[..., Webhook], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hook.statuses = [404]
    webhook = open_hook(hook.url)
    webhook.post({"n": 1})
    until(lambda: webhook.counts.total() == 1)
    assert len(hook.bodies) == 1
    assert dict(webhook.counts) == {"failed": 1}
    assert "127.0.0.1: status 404" in caplog.text
    assert "secret" not in caplog.text


def test_no_server_no_matter(hook: Hook, open_hook: Callable[..., Webhook]) -> None:
    hook.close()
    webhook = open_hook(hook.url)
    webhook.post({"n": 1})
    until(lambda: webhook.counts.total() == 1)
    assert dict(webhook.counts) == {"failed": 1}


def test_a_body_that_is_no_json_does_not_silence_the_rest(hook: Hook, open_hook: Callable[..., Webhook]) -> None:
    webhook = open_hook(hook.url)
    webhook.post({"n": object()})
    webhook.post({"n": 2})
    until(lambda: webhook.counts.total() == 2)
    assert hook.bodies == [{"n": 2}]


def test_a_server_that_hangs_keeps_nobody_waiting(hook: Hook, open_hook: Callable[..., Webhook]) -> None:
    hook.gate.clear()
    webhook = open_hook(hook.url, timeout_s=0.2)
    for n in range(300):
        webhook.post({"n": n})
    assert hook.arrived.acquire(timeout=20.0)
    assert webhook.counts["failed"] >= 300 - 256 - 1, "the oldest are given up"
    webhook.close()


def test_an_alert_at_the_very_end_still_goes_out(hook: Hook, open_hook: Callable[..., Webhook]) -> None:
    webhook = open_hook(hook.url)
    webhook.post({"n": 1})
    webhook.close()
    assert hook.bodies == [{"n": 1}]
