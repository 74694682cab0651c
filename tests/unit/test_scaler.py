"""Scaling requests and decisions, applied to a pool that only counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.control import RedisControl, ScaleReport, ScaleRequest
from cluster.errors import CodecError, ConfigError, DeadlineError, SupervisionError
from cluster.redis_server import EmbeddedServer
from cluster.run_redis import RunRedis
from configs.load import dump_config
from configs.run import AutoscaleSection, DataSection, RolloutSection, RunConfig
from keel.living import redis_url_of
from keel.online.scale import ask, scale_run
from keel.online.scaler import Scaler


@dataclass
class FakePool:
    """`boots`: how many more processes will find room."""

    up: int = 1
    wanted: int = 1
    draining: int = 0
    waiting_for_room: int = 0
    boots: int = 100
    withdrawn: list[str] = field(default_factory=list)

    def grow_to(self, count: int, *, tentative: bool = False) -> None:
        assert tentative
        self.wanted = max(self.wanted, count)

    def shrink_to(self, count: int) -> None:
        leaving = max(0, self.up - count)
        self.up, self.draining = self.up - leaving, self.draining + leaving
        self.wanted = min(self.wanted, count)

    def turn(self) -> None:
        """What is on its way comes up or finds no room; what drains is gone."""
        coming = min(self.wanted - self.up, self.boots)
        self.up, self.boots, self.draining = self.up + coming, self.boots - coming, 0
        if self.wanted > self.up:
            self.withdrawn.append("there is no room")
            self.wanted = self.up


@dataclass
class Scene:
    pool: FakePool = field(default_factory=FakePool)
    notes: list[str] = field(default_factory=list)
    now_s: float = 0.0
    idle: Mapping[str, float] | None = None

    def scaler(self, autoscale: AutoscaleSection | None = None, *, colocate: bool = False) -> Scaler:
        config = RunConfig(name="t", data=DataSection(), rollout=RolloutSection(autoscale=autoscale))
        placement = config.placement.model_copy(update={"colocate": colocate})  # unchecked: there is no GPU here
        return Scaler(
            self.pool,
            config=config.model_copy(update={"placement": placement}),
            idle_of_actors=lambda: self.idle,
            note=lambda event, text: self.notes.append(f"{event}: {text}"),
            clock=lambda: self.now_s,
        )


def test_a_request_is_carried_out_and_answered_once() -> None:
    scene = Scene()
    scaler = scene.scaler()
    scaler.request = ScaleRequest(3, "r1")
    scaler.step([])
    assert scaler.report == ScaleReport("r1", "working", 3, 1, "1 of 3 running")
    scene.pool.turn()
    scaler.step([])
    assert scaler.report == ScaleReport("r1", "done", 3, 3, "3 actors running")
    scene.pool.shrink_to(2)
    scaler.step([])
    assert scene.pool.wanted == 2, "a request that was carried out is not carried out again"
    assert scene.notes == ["scale: 3 actors asked for (now 1)", "scale: 3 actors running"]


def test_fewer_are_there_when_the_others_have_drained() -> None:
    scene = Scene(FakePool(up=3, wanted=3))
    scaler = scene.scaler()
    scaler.request = ScaleRequest(1, "r1")
    scaler.step([])
    assert (scaler.report.state, scaler.report.note) == ("working", "1 of 1 running, 2 draining")
    scene.pool.turn()
    scaler.step([])
    assert scaler.report.state == "done"


def test_a_shared_gpu_has_room_for_one_actor() -> None:
    scene = Scene()
    scaler = scene.scaler(colocate=True)
    scaler.request = ScaleRequest(2, "r1")
    scaler.step([])
    assert scaler.report.state == "refused"
    assert "placement.colocate" in scaler.report.note
    assert scene.pool.wanted == 1
    scaler.request = ScaleRequest(1, "r2")
    scaler.step([])
    assert scaler.report == ScaleReport("r2", "done", 1, 1, "1 actor running")


def test_what_finds_no_room_is_refused_and_the_old_number_comes_back() -> None:
    scene = Scene(FakePool(up=2, wanted=2, boots=1))
    scaler = scene.scaler()
    scaler.request = ScaleRequest(8, "r1")
    scaler.step([])
    scene.pool.turn()
    scaler.step([])
    assert scaler.report == ScaleReport("r1", "refused", 2, 2, "there is no room; back to 2 actors")


def test_a_newer_request_replaces_an_unfinished_one() -> None:
    scene = Scene(FakePool(up=1, wanted=1, boots=0))
    scaler = scene.scaler()
    scaler.request = ScaleRequest(8, "r1")
    scaler.step([])
    scaler.request = ScaleRequest(4, "r2")
    scaler.step([])
    assert scaler.report.number == "r2"
    assert scene.pool.wanted == 4
    scene.pool.turn()
    scaler.step([])
    assert scaler.report == ScaleReport("r2", "refused", 1, 1, "there is no room; back to 1 actor")


SECTION = AutoscaleSection(min_actors=1, max_actors=3, window_s=4, cool_down_s=10)


def wait_for_samples(scene: Scene, scaler: Scaler, *, seconds: int) -> None:
    """The learner waits nearly all the time, the actors never."""
    for _ in range(seconds):
        scene.now_s += 1.0
        scene.idle = {"a": 0.0}
        scaler.step([{"idle_seconds": 0.9, "step_seconds": 1.0}])
        scene.pool.turn()


def test_a_learner_that_waits_gets_actors_up_to_the_bound() -> None:
    scene = Scene()
    scaler = scene.scaler(SECTION)
    wait_for_samples(scene, scaler, seconds=8)
    assert scene.pool.up == 2
    assert scene.notes[0] == "autoscale: 1 → 2 actors: learner idle 90%, actors idle 0%"
    wait_for_samples(scene, scaler, seconds=60)
    assert scene.pool.up == 3
    assert scaler.decisions == {"add": 2, "remove": 0}


def test_a_number_given_by_hand_holds_until_it_is_handed_back() -> None:
    scene = Scene()
    scaler = scene.scaler(SECTION)
    scaler.request = ScaleRequest(1, "r1")
    wait_for_samples(scene, scaler, seconds=40)
    assert scene.pool.up == 1
    assert "autoscaling pauses" in scene.notes[0]
    scaler.request = ScaleRequest(None, "r2")
    wait_for_samples(scene, scaler, seconds=20)
    assert scene.pool.up == 2


def test_a_number_handed_back_during_a_change_is_answered_and_the_change_goes_on() -> None:
    scene = Scene(FakePool(up=3, wanted=3))
    scaler = scene.scaler(SECTION)
    scaler.request = ScaleRequest(1, "r1")
    scaler.step([])
    scaler.request = ScaleRequest(None, "r2")
    scaler.step([])
    scaler.step([])
    assert (scaler.report.number, scaler.report.state) == ("r2", "done")
    scene.pool.turn()
    scaler.step([])
    assert (scene.pool.up, scaler.report.number) == (1, "r2")
    assert scene.notes[-1] == "scale: 1 actor running"


def test_a_run_without_autoscaling_cannot_be_handed_the_number() -> None:
    scene = Scene()
    scaler = scene.scaler()
    scaler.request = ScaleRequest(None, "r1")
    scaler.step([])
    assert scaler.report.state == "refused"


# ---------------------------------------------------------------- the person's side


class ScriptedControl:
    """Answers with one report after another, the last for ever."""

    def __init__(self, *reports: ScaleReport) -> None:
        self.requests: list[ScaleRequest] = []
        self._reports = list(reports)

    async def ask(self, request: ScaleRequest) -> None:
        self.requests.append(request)

    async def asked(self) -> ScaleRequest | None:
        return self.requests[-1]

    async def tell(self, report: ScaleReport) -> None:
        self._reports.append(report)

    async def told(self) -> ScaleReport | None:
        return self._reports.pop(0) if len(self._reports) > 1 else self._reports[0]

    async def clear(self) -> None:
        self._reports.clear()


async def test_progress_is_said_once_and_another_requests_report_is_not_ours() -> None:
    said: list[str] = []
    control = ScriptedControl(
        ScaleReport("old", "refused", 1, 1, "not ours"),
        ScaleReport("r1", "working", 3, 1, "1 of 3 running"),
        ScaleReport("r1", "working", 3, 1, "1 of 3 running"),
        ScaleReport("r1", "done", 3, 3, "3 actors running"),
    )
    report = await ask(control, ScaleRequest(3, "r1"), timeout_s=10.0, say=said.append)
    assert report.running == 3
    assert said == ["1 of 3 running", "3 actors running"]


async def test_a_refusal_and_a_silence_are_errors() -> None:
    refused = ScriptedControl(ScaleReport("r1", "refused", 1, 1, "there is no room"))
    with pytest.raises(SupervisionError, match="no room"):
        await ask(refused, ScaleRequest(3, "r1"), timeout_s=10.0, say=lambda text: None)
    silent = ScriptedControl(ScaleReport("old", "done", 1, 1))
    with pytest.raises(DeadlineError, match="no answer"):
        await ask(silent, ScaleRequest(3, "r1"), timeout_s=0.3, say=lambda text: None)


async def test_a_request_that_nobody_will_answer_is_not_waited_for() -> None:
    class Replaced(ScriptedControl):
        async def asked(self) -> ScaleRequest | None:
            return ScaleRequest(9, "r2")

    class Forgotten(ScriptedControl):
        async def asked(self) -> ScaleRequest | None:
            return None

    async def over() -> None:
        raise SupervisionError("the run is not online")

    report = ScaleReport("old", "done", 1, 1)
    for control, reason in ((Replaced(report), "another request"), (Forgotten(report), "started again")):
        with pytest.raises(SupervisionError, match=reason):
            await ask(control, ScaleRequest(3, "r1"), timeout_s=10.0, say=lambda text: None)
    ended = ScriptedControl(ScaleReport("r1", "working", 3, 1, "1 of 3 running"))
    with pytest.raises(SupervisionError, match="not online"):
        await ask(ended, ScaleRequest(3, "r1"), timeout_s=10.0, say=lambda text: None, check_online=over)


def run_directory(path: Path, **redis: Any) -> RunConfig:
    sections = {"data": {"world": {"factory": "a:b"}}, "collect": {"judge": "a:b"}, "redis": redis}
    config = RunConfig.model_validate({"name": "here", **sections})
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(dump_config(config))
    return config


async def test_on_a_real_server_and_through_the_runs_own_address(tmp_path: Path) -> None:
    config = run_directory(tmp_path)
    with EmbeddedServer(tmp_path / "redis") as server:
        assert redis_url_of(tmp_path, config) == server.url
        async with RunRedis(server.url, run=config.name) as redis:
            control: RedisControl = redis.control
            assert await control.asked() is None
            assert await control.told() is None
            assert await redis.lock.holder() is None
            request, report = ScaleRequest(4), ScaleReport("n", "refused", 1, 2, "Grüße")
            await control.ask(request)
            await control.tell(report)
            assert await control.asked() == request
            assert await control.told() == report
            await redis.lock.acquire()
            assert "pid" in (await redis.lock.holder() or "")
            await redis.streams._client.command("HSET", control._key, "request", json.dumps({"actors": "x"}))
            with pytest.raises(CodecError, match="ScaleRequest"):
                await control.asked()
            await control.clear()
            assert await control.told() is None
    with pytest.raises(ConfigError, match="does not run on this machine"):
        redis_url_of(tmp_path, config)


def test_errors_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        scale_run(tmp_path, actors=2)
    with pytest.raises(ConfigError, match="at least one"):
        scale_run(tmp_path, actors=0)
    run_directory(tmp_path)
    with EmbeddedServer(tmp_path / "redis"), pytest.raises(SupervisionError, match="not online"):
        scale_run(tmp_path, actors=2)


def test_a_password_that_is_not_on_disk_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEEL_REDIS_URL", raising=False)
    config = run_directory(tmp_path, url="redis://***@queue:6379/0")
    with pytest.raises(ConfigError, match="password"):
        redis_url_of(tmp_path, config)
    assert redis_url_of(tmp_path, config, given="redis://:p@queue:6379/0") == "redis://:p@queue:6379/0"
    monkeypatch.setenv("KEEL_REDIS_URL", "redis://:q@queue:6379/0")
    assert redis_url_of(tmp_path, config) == "redis://:q@queue:6379/0"
