"""The driver's side of a refresh with actors, judge and training process that do as told."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from cluster.reward_models import RewardModels, RmManifest
from cluster.supervise import RolePool
from configs.run import RunConfig
from keel.online.judges import FunctionJudge
from keel.online.refresh import Refresher
from keel.runtime import Runtime
from reward_service.rm.refresh import Comparison, RefreshOutcome, RefreshRequest


class Reference:
    """To a value that is there."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Handle:
    def __init__(self, **methods: Callable[..., Any]) -> None:
        for name, method in methods.items():
            setattr(self, name, SimpleNamespace(remote=method))


@dataclass
class Scene:
    """A runtime whose references are their own values; `train` answers for the training process."""

    config: RunConfig
    train: Callable[[RefreshRequest], Any]
    asked: list[float] = field(default_factory=list)
    requests: list[RefreshRequest] = field(default_factory=list)
    announced: list[tuple[str, str]] = field(default_factory=list)
    held: list[int | None] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def runtime(self) -> Runtime:
        ray = SimpleNamespace(
            wait=lambda references, timeout, num_returns=1: (references, []),
            get=lambda reference: reference.value,
            exceptions=SimpleNamespace(RayError=SystemError, RayActorError=SystemError),
            cancel=lambda reference, force: None,
        )
        run = SimpleNamespace(path=self.config.run_dir)
        return cast(
            Runtime, SimpleNamespace(config=self.config, run=run, ray=ray, start=self.start, result=self.result)
        )

    def pool(self) -> RolePool:
        handle = Handle(
            generate=self.generate,
            score=lambda sequences: Reference([float(len(answer)) for _, answer in sequences]),
        )
        return cast(RolePool, SimpleNamespace(handles=[handle], poll=lambda timeout_s: None))

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float) -> Reference:
        self.asked += [temperature] * len(prompts)
        answers = [([self.rng.randrange(5, 60) for _ in range(self.rng.randrange(2, 9))], "stop") for _ in prompts]
        return Reference(answers)

    def start(self) -> None:
        """As a Trainer."""

    def refresh(self, request: RefreshRequest) -> RefreshRequest:
        """As a Trainer."""
        self.requests.append(request)
        return request

    def close(self) -> None:
        """As a Trainer."""

    def result(self, reference: Any) -> Any:
        return self.train(reference) if isinstance(reference, RefreshRequest) else reference.value

    def refresher(self, judge: Any = None, *, turned: bool = True) -> Refresher:
        """`turned`: it has had its first turn, as in a new run."""
        section = self.config.rm.refresh
        assert section is not None
        made = Refresher(
            self.runtime(),
            section=section,
            judge=FunctionJudge(judge or (lambda prompt, a, b, rng: [len(a) >= len(b)] * 3)),
            rollout=self.pool(),
            reward=self.pool(),
            trainer=self,
            announced=lambda version, reason: self.announced.append((version, reason)),
            hold=self.held.append,
        )
        if turned:
            made.step([])
        return made


def outcome(*, accepted: bool) -> Callable[[RefreshRequest], RefreshOutcome]:
    better = Comparison(pairs=10, before=0.6, after=0.7)

    def train(request: RefreshRequest) -> RefreshOutcome:
        version = f"rm-new-{request.number}"
        if accepted:
            models = RewardModels(request.fresh[0].parents[1] / "rm")
            with models.draft() as draft:
                (draft / "member_0").mkdir()
                models.publish(draft, RmManifest(version=version, members=1))
        return RefreshOutcome(
            accepted=accepted, version=version, parent="rm-1", why="as told", old=better, fresh=better,
            disagreement=0.2, counts={}, seconds=1.0,
        )  # fmt: skip

    return train


def records(*versions: int) -> list[dict[str, Any]]:
    return [{"version": one, "kl_nats_per_sequence": 0.1 * one, "proxy_z": 0.0} for one in versions]


def until_idle(refresher: Refresher, *, version: int) -> None:
    refresher.step(records(version))
    until_s = time.monotonic() + 30.0
    while time.monotonic() < until_s:
        if refresher._work is None:
            return
        refresher.step([])
        time.sleep(0.001)  # for the judge's thread
    raise AssertionError("the refresh did not end")
