"""The process that trains refreshed reward models: how it ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from configs.run import RefreshSection
from keel.online.trainer import RayTrainer
from keel.runtime import Runtime
from reward_service.rm.refresh import RefreshRequest


class FakeRay:
    """One actor, whose refresh never ends. `gone`: Ray itself does not answer any more."""

    def __init__(self, draft: Path, *, gone: bool = False) -> None:
        self.draft = draft
        self.gone = gone
        self.events: list[str] = []
        self.refresh = SimpleNamespace(remote=lambda _request: "reference")

    def remote(self, **_resources: Any) -> Any:
        return lambda _class: SimpleNamespace(remote=lambda *_: self)

    def kill(self, _actor: Any) -> None:
        self.events.append("kill")
        if self.gone:
            raise ConnectionError

    def wait(self, references: list[Any], *, timeout: float) -> tuple[list[Any], list[Any]]:
        assert timeout > 0
        self.events.append("wait")
        assert self.draft.exists(), "the process may still write there"
        return references, []


@pytest.mark.parametrize("gone", [False, True])
def test_closing_in_the_middle_of_a_refresh_leaves_no_draft(tmp_path: Path, gone: bool) -> None:
    draft = tmp_path / "rm" / "draft.abc"
    draft.mkdir(parents=True)
    version = tmp_path / "rm" / "versions" / "rm-1"
    version.mkdir(parents=True)
    ray = FakeRay(draft, gone=gone)
    runtime = SimpleNamespace(ray=ray, config=None, run=SimpleNamespace(path=tmp_path))
    trainer = RayTrainer(cast(Runtime, runtime), section=RefreshSection())
    trainer.start()
    trainer.refresh(RefreshRequest(1, "due", 3, ()))
    trainer.close()
    trainer.close()
    assert ray.events == (["kill"] if gone else ["kill", "wait"])
    assert not draft.exists()
    assert version.exists()
