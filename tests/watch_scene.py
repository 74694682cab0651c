"""Roles that answer at once and as told, for measurements of a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from cluster.supervise import RolePool
from cluster.text import encode_answer, load_tokenizer
from configs.run import RunConfig
from keel.roles import Roles
from keel.runtime import Runtime


class Reference:
    def __init__(self, value: Any) -> None:
        self.value = value


class Handle:
    def __init__(self, **methods: Callable[..., Any]) -> None:
        for name, method in methods.items():
            setattr(self, name, SimpleNamespace(remote=method))


@dataclass
class Scene:
    """Roles whose answers are there at once. `answer`: what the policy says now; `nats`: what each text's token costs
    it; `score`: the reward of a response's ids."""

    config: RunConfig
    answer: list[int]
    nats: float = 1.0
    score: Callable[[Sequence[int]], float] = len
    ready: bool = True
    told: list[tuple[dict[str, float], int]] = field(default_factory=list)
    asked: int = 0
    ticks: int = 0
    cancelled: list[Reference] = field(default_factory=list)
    emitted: list[dict[str, Any]] = field(default_factory=list)

    def runtime(self) -> Runtime:
        ray = SimpleNamespace(
            wait=lambda references, timeout, num_returns=1: (references, []) if self.ready else ([], references),
            get=lambda reference: reference.value,
            cancel=self.cancelled.append,
            exceptions=SimpleNamespace(RayError=SystemError, RayActorError=SystemError),
        )
        run = SimpleNamespace(path=self.config.run_dir, emit=lambda **fields: self.emitted.append(fields))
        return cast(
            Runtime,
            SimpleNamespace(
                config=self.config, run=run, ray=ray, result=lambda reference: reference.value, tick=self.tick,
                redis_url="redis://nowhere", wait=lambda reference: reference.value,
                call=lambda function, *values: function(*values),
            ),
        )  # fmt: skip

    def tick(self) -> None:
        self.ticks += 1

    def roles(self) -> Roles:
        pool = cast(RolePool, SimpleNamespace(handles=[Handle(
            generate=self.generate,
            score=lambda sequences, version=None: Reference([float(self.score(ids)) for _, ids in sequences]),
            response_nats=lambda pairs: Reference([(self.nats * len(ids), len(ids)) for _, ids in pairs]),
            measured=lambda values, version: self.told.append((values, version)),
        )], poll=lambda timeout_s: None, wait_ready=lambda tick: None))  # fmt: skip
        return cast(Roles, SimpleNamespace(rollout=lambda path: pool, reward=lambda: pool, learner=lambda: pool))

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float) -> Reference:
        self.asked += len(prompts)
        return Reference([(self.answer, "stop") for _ in prompts])


def ids(config: RunConfig, text: str) -> list[int]:
    return list(encode_answer(load_tokenizer(config.run_dir / "sft" / "model"), text, max_tokens=48).ids)
