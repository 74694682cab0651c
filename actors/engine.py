"""What generates: the seam between the rollout worker and vLLM, and a scripted stand-in for tests of the plumbing.

Legend: P prompt tokens, T response tokens, L tokens of a probe sequence. Log-probs are in nats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from cluster.errors import EngineDeadError, KeelError, WeightSyncError
from cluster.gloo_group import GlooFollower
from cluster.records import Float32s, Int32s, VersionRun
from cluster.weight_group import GroupBrokenError, GroupPlan, GroupUpdate
from cluster.weights import UNSYNCED, WeightBlob

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One prompt to answer once. prompt_ids: int32 [P]. temperature 0 is greedy. `request_id` is unique in flight."""

    request_id: str
    prompt_ids: Int32s
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True, eq=False)
class Generation:
    """An answer.

    response_ids: int32 [T], T >= 1, ending in the end-of-sequence token if finish_reason is "stop".
    logprobs: float32 [T], of each sampled token, at the request's temperature, under the policy that sampled it.
    version_runs: which policy version sampled which tokens; the first run starts at 0, starts increase.
    """

    response_ids: Int32s
    logprobs: Float32s
    version_runs: tuple[VersionRun, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class SyncTimings:
    """pause_s: how long generation stood still. load_s: the part of it spent on loading the weights."""

    pause_s: float
    load_s: float


class Engine(Protocol):
    """A generation engine. All methods belong to one event loop; `generate` may run many times at once.

    After EngineDeadError, or a WeightSyncError from `load_weights`, every call but `shutdown` raises EngineDeadError
    for ever, calls in flight included: the engine is replaced, never resumed. (One exception, that leaves the engine
    as it was: weights that are not newer than its own.) Any other KeelError concerns that one request.
    """

    @property
    def version(self) -> int:
        """The policy version of the loaded weights; UNSYNCED (-1) while they are the model directory's."""
        ...

    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample an answer. Cancelling the caller aborts the request."""
        ...

    async def load_weights(self, blob: WeightBlob) -> SyncTimings:
        """Pause, replace all weights, take over the version, resume. Requests in flight go on under the new weights.
        Raises WeightSyncError when the blob is not newer, or does not hold exactly this model's parameters."""
        ...

    @property
    def group_ranks(self) -> int:
        """How many of the engine's processes take weights from a group: its tensor-parallel size."""
        ...

    async def join_group(self, plan: GroupPlan, *, first_rank: int) -> None:
        """Take ranks first_rank, … in a group, in place of any earlier one. Generation goes on. Raises
        GroupBrokenError, and is then in no group."""
        ...

    async def leave_group(self) -> None:
        """Close the group's connections, if there are any."""
        ...

    async def receive_weights(self, update: GroupUpdate) -> SyncTimings:
        """`load_weights`, with the bytes coming through the group. GroupBrokenError leaves the engine as it was, to
        have the version from elsewhere; any other WeightSyncError is the engine's end."""
        ...

    async def sleep(self) -> None:
        """Give the device's memory back; generate nothing, and load nothing, until `wake`. Raises ConfigError where
        there is no device to share."""
        ...

    async def wake(self) -> None:
        """Take the memory again, with the weights and the version from before, and go on."""
        ...

    async def probe(self, token_ids: Int32s) -> Float32s:
        """int32 [L] → float32 [L-1]: log p(token l+1 | tokens 0..l) at temperature 1 under the loaded weights."""
        ...

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine cannot generate any more."""
        ...

    async def shutdown(self) -> None:
        """End the engine and whatever it started. May be called again."""
        ...


def check_newer_than_engine(version: int, *, engine_version: int) -> None:
    """Raise WeightSyncError unless the version is above the engine's."""
    if version <= engine_version:
        raise WeightSyncError(
            "these weights are not newer than the engine's",
            got=f"version {version}, the engine holds {engine_version}",
            do="publish under a higher version; versions never go backwards",
        )


def merge_runs(starts: Sequence[tuple[int, int]]) -> tuple[VersionRun, ...]:
    """(start, version) pairs in order of start → runs, with neighbours of one version merged.

    >>> merge_runs([(0, 3), (4, 3), (9, 5)])
    (VersionRun(start=0, version=3), VersionRun(start=9, version=5))
    """
    runs: list[VersionRun] = []
    for start, version in starts:
        if not runs or runs[-1].version != version:
            runs.append(VersionRun(start=start, version=version))
    return tuple(runs)


Answers = Callable[[GenerationRequest], Sequence[int]]
"""A script: the response ids for a request. They end at an end-of-sequence token or at the request's limit."""


@dataclass
class _Pending:
    """A request in a scripted engine: the answer it will give, token by token."""

    request: GenerationRequest
    answer: Sequence[int]
    finished: asyncio.Future[Generation]
    starts: list[tuple[int, int]] = field(default_factory=list)


class ScriptedEngine:
    """Answers from a script, or at random over the vocabulary, with the log-prob of a uniform policy.

    `manual=True`: tokens come only from `tick()`, one per call for each request in flight, so that a test decides
    what happens between two tokens. Otherwise the engine ticks itself, `token_s` apart.
    `fail_next`, `die` and `probe_error_nats` play the ways in which a real engine goes wrong.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 32,
        eos_id: int = 0,
        seed: int = 0,
        answers: Answers | None = None,
        manual: bool = False,
        token_s: float = 0.0,
    ) -> None:
        self.probe_error_nats = 0.0
        self.expected_names: Collection[str] | None = None
        """When set, weights with other names are refused, as a real model refuses them."""
        self.before_load: asyncio.Event | None = None
        """When set, `load_weights` waits for it in the middle, generation paused."""
        self._vocab_size, self._eos_id, self._token_s, self._manual = vocab_size, eos_id, token_s, manual
        self.asleep = False
        """Between `sleep` and `wake`, when nothing is generated."""
        self.received: WeightBlob | None = None
        """The last version that came through a group."""
        self._follower: GlooFollower | None = None
        self._answers: Answers = answers or self._random_answer
        self._random = np.random.default_rng(seed)
        self._version = UNSYNCED
        self._probe_logprobs: Float32s | None = None
        self._pending: dict[str, _Pending] = {}
        self._failures: list[KeelError] = []
        self._dead: EngineDeadError | None = None
        self._paused = False
        self._arrived = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        return self._version

    @property
    def in_flight(self) -> tuple[str, ...]:
        """Ids of the requests that wait for tokens, oldest first."""
        return tuple(self._pending)

    async def generate(self, request: GenerationRequest) -> Generation:
        self._ensure_alive()
        if self._failures:
            raise self._failures.pop(0)
        if request.request_id in self._pending:
            raise KeelError("a request of this id is in flight", got=request.request_id, do="use unique ids")
        pending = _Pending(request, self._answers(request), asyncio.get_running_loop().create_future())
        self._pending[request.request_id] = pending
        self._arrived.set()
        if not self._manual and self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick_forever())
        try:
            return await pending.finished
        finally:
            self._pending.pop(request.request_id, None)

    async def load_weights(self, blob: WeightBlob) -> SyncTimings:
        self._ensure_alive()
        check_newer_than_engine(blob.version, engine_version=self._version)
        self._paused = True
        if self.before_load is not None:
            await self.before_load.wait()
        self._ensure_alive()
        if self.expected_names is not None and set(blob.shapes) != set(self.expected_names):
            odd = sorted(set(blob.shapes) ^ set(self.expected_names))
            self.die("a weight update failed")
            raise WeightSyncError("missing or unexpected parameters", got=", ".join(odd), do="publish the whole model")
        self._version = blob.version
        self._probe_logprobs = None if blob.probe is None else blob.probe.logprobs
        self._paused = False
        self._arrived.set()
        return SyncTimings(pause_s=0.0, load_s=0.0)

    @property
    def group_ranks(self) -> int:
        return 1

    async def join_group(self, plan: GroupPlan, *, first_rank: int) -> None:
        await self.leave_group()
        self._follower = await asyncio.to_thread(GlooFollower.join, plan, rank=first_rank)

    async def leave_group(self) -> None:
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    async def receive_weights(self, update: GroupUpdate) -> SyncTimings:
        self._ensure_alive()
        check_newer_than_engine(update.version, engine_version=self._version)
        if self._follower is None:
            raise GroupBrokenError(f"the engine is not in weight group {update.epoch}")
        buffer = await asyncio.to_thread(self._follower.receive, update.size_bytes)
        self.received = WeightBlob(update.version, update.manifest, buffer, update.probe)
        return await self.load_weights(self.received)

    async def sleep(self) -> None:
        self._ensure_alive()
        self.asleep = True

    async def wake(self) -> None:
        self._ensure_alive()
        self.asleep = False
        self._arrived.set()

    async def probe(self, token_ids: Int32s) -> Float32s:
        self._ensure_alive()
        exact = self._probe_logprobs
        if exact is None or len(exact) != len(token_ids) - 1:
            exact = np.full(len(token_ids) - 1, self._uniform_logprob, dtype=np.float32)
        return exact - np.float32(self.probe_error_nats)

    async def check_health(self) -> None:
        self._ensure_alive()

    async def shutdown(self) -> None:
        self.die("shut down")
        await self.leave_group()
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None

    def tick(self) -> None:
        """One token for every request in flight, in order of arrival. Nothing while paused, asleep or dead."""
        if self._paused or self.asleep or self._dead is not None:
            return
        for pending in tuple(self._pending.values()):
            if not pending.finished.done():
                self._advance(pending)

    def fail_next(self, error: KeelError) -> None:
        """The next `generate` raises `error` and nothing else happens. Queued when called repeatedly."""
        self._failures.append(error)

    def die(self, reason: str = "killed by its script") -> None:
        """End now: calls in flight and all later ones raise EngineDeadError."""
        self._dead = self._dead or EngineDeadError("the engine is dead", got=reason, do="replace its process")
        for pending in tuple(self._pending.values()):
            if not pending.finished.done():
                pending.finished.set_exception(self._dead)

    async def _tick_forever(self) -> None:
        while self._dead is None:
            self._arrived.clear()
            self.tick()
            if self._pending and not self._paused and not self.asleep:
                await asyncio.sleep(self._token_s)
            else:
                await self._arrived.wait()

    def _advance(self, pending: _Pending) -> None:
        pending.starts.append((len(pending.starts), self._version))
        length = len(pending.starts)
        stopped = pending.answer[length - 1] == self._eos_id
        if stopped or length >= min(pending.request.max_new_tokens, len(pending.answer)):
            generation = Generation(
                response_ids=np.asarray(pending.answer[:length], dtype=np.int32),
                logprobs=np.full(length, self._uniform_logprob, dtype=np.float32),
                version_runs=merge_runs(pending.starts),
                finish_reason="stop" if stopped else "length",
            )
            pending.finished.set_result(generation)

    def _random_answer(self, request: GenerationRequest) -> Sequence[int]:
        ids: list[int] = self._random.integers(0, self._vocab_size, request.max_new_tokens).tolist()
        return ids

    @property
    def _uniform_logprob(self) -> float:
        return -float(np.log(self._vocab_size))

    def _ensure_alive(self) -> None:
        if self._dead is not None:
            raise self._dead
