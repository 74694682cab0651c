"""How the ppo stage begins: what it hands out, and who gets room first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from configs.load import load_config
from keel.interrupt import InterruptedRun
from keel.online import stage as online
from keel.roles import Roles
from keel.rundir import open_run
from keel.runtime import Runtime


def test_a_tracker_is_not_shown_the_queue_servers_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("demo_ci", overrides=[f"runs_dir={tmp_path}", 'redis.url="redis://me:s3cret@queue:6379/0"'])
    shown: list[Mapping[str, Any]] = []

    def opened(names: object, *, run_dir: Path, config: Mapping[str, Any]) -> None:
        shown.append(config)
        raise InterruptedRun("far enough")

    monkeypatch.setattr(online, "open_trackers", opened)
    with open_run(config, resume=False, fresh=False) as run:
        runtime = cast(Runtime, SimpleNamespace(config=config, run=run))
        with pytest.raises(InterruptedRun):
            online.run_online(runtime, cast(Roles, None))
    assert "s3cret" not in str(shown)
    assert shown[0]["learner"] == config.model_dump(mode="json")["learner"]


class Asked:
    """Roles that only say who was asked for, and who had room by then."""

    channel = object()

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattr__(self, role: str) -> Any:
        def pool(*_arguments: object) -> Any:
            self.events.append(f"{role} asked")
            return SimpleNamespace(wait_placed=lambda tick: self._placed(role))

        return pool

    def _placed(self, role: str) -> None:
        self.events.append(f"{role} placed")
        if role != "learner":
            raise InterruptedRun("far enough")


def test_the_learner_has_its_room_before_others_ask(tmp_path: Path) -> None:
    """Single processes go to the emptiest node: the one that the ranks would fit on together."""
    config = load_config("demo_ci", overrides=[f"runs_dir={tmp_path}"])
    roles = Asked()
    with open_run(config, resume=False, fresh=False) as run:
        runtime = SimpleNamespace(config=config, run=run, tick=lambda: None, on_exit=lambda action: None)
        with pytest.raises(InterruptedRun):
            online.run_online(cast(Runtime, runtime), cast(Roles, roles))
    assert roles.events[:2] == ["learner asked", "learner placed"]
