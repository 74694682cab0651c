"""What a measurement beside training asks of a run's roles: answers, rewards, log-probabilities of texts.

Consumes: actors and reward workers. Produces: their answers. Waits: never; each method is a generator that yields while
something is out. Who unblocks it: the roles' answers or deaths; the caller's deadline, which throws into the generator.
Always holds: nobody is waited for on the driver's thread; an actor that died is another one's turn (keel/sampling.py);
what is given up is taken back from the roles, so that they never work on more than one measurement.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Final, TypeVar, cast

from cluster.errors import DataError
from cluster.supervise import RolePool
from keel.runtime import Runtime
from keel.sampling import Answer, Asking, decoded, policy_tokenizer

T = TypeVar("T")
Work = Generator[None, None, T]
Sequences = Sequence[tuple[list[int], list[int]]]
"""(prompt ids, response ids)."""
_CHUNK: Final = 32
"""Prompts in one call: small, so that rollouts go on between them."""


class Asker:
    """One a run."""

    def __init__(self, runtime: Runtime, *, rollout: RolePool, reward: RolePool | None) -> None:
        self._runtime = runtime
        self._rollout = rollout
        self._reward = reward
        self._tokenizer = policy_tokenizer(runtime)

    @property
    def has_rewards(self) -> bool:
        """A reward model scores in this run."""
        return self._reward is not None

    def answers(self, prompts: Sequence[list[int]]) -> Work[list[Answer]]:
        """One answer to each, by the policy as it is now, at the temperature of the rollouts."""
        asking = Asking(self._runtime, self._rollout, temperature=self._runtime.config.rollout.temperature, online=True)
        for start in range(0, len(prompts), _CHUNK):
            asking.ask(start, list(prompts[start : start + _CHUNK]))
        found: dict[int, Answer] = {}
        try:
            while asking.open:
                for start, results in asking.answered(wait_s=0.0):
                    found |= {start + offset: answer for offset, answer in enumerate(decoded(self._tokenizer, results))}
                yield
        finally:
            self._take_back(asking.pending)
        return [found[position] for position in range(len(prompts))]

    def rewards(self, sequences: Sequences) -> Work[list[float]]:
        """The serving reward model's, one version's for all of them."""
        assert self._reward is not None
        while not self._reward.handles:
            yield
        (scores,) = yield from self._results([self._reward.handles[0].score.remote(list(sequences))])
        return cast("list[float]", scores)

    def nats_per_token(self, sequences: Sequences) -> Work[float]:
        """Mean −log p of the responses' tokens under the policy as it is now. Raises DataError for no token."""
        while not self._rollout.handles:
            yield
        handles = list(self._rollout.handles)
        asked = [
            handles[number % len(handles)].response_nats.remote(list(sequences[start : start + _CHUNK]))
            for number, start in enumerate(range(0, len(sequences), _CHUNK))
        ]
        parts = yield from self._results(asked)
        sums: list[tuple[float, int]] = [one for part in parts for one in part]
        tokens = sum(count for _, count in sums)
        if not tokens:
            raise DataError("the held-out texts have no token", do="look at data/sft.jsonl")
        return sum(nats for nats, _ in sums) / tokens

    def _results(self, asked: Sequence[Any]) -> Work[list[Any]]:
        found: list[Any] = []
        try:
            for reference in asked:
                while not self._runtime.ray.wait([reference], timeout=0.0)[0]:
                    yield
                found.append(self._runtime.result(reference))
        finally:
            self._take_back(asked[len(found) :])
        return found

    def _take_back(self, asked: Iterable[Any]) -> None:
        ray = self._runtime.ray
        for reference in asked:
            with contextlib.suppress(ray.exceptions.RayError):  # Of a process that is gone, or of Ray itself.
                ray.cancel(reference)
