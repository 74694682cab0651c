"""What the reward service's benchmark is made of: rollouts of a given size, a scorer that does nothing, models of the
demo's shape, and a worker process.

Consumes and produces, in `work`: the run's streams. Waits for: `start`, then for what a reward worker waits for, then
`stop`. Who unblocks it: the benchmark. Always holds: everything but the scorer is the code of a run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path
from typing import Final

import numpy as np

from cluster.records import PromptTask, Rollout, VersionRun, encode, pack_floats, pack_ids
from cluster.reward_models import RewardModels, RmManifest, StoredRm
from cluster.run_redis import RunRedis
from reward_service.batch_scoring import BatchScoring
from reward_service.forward_thread import ForwardThread
from reward_service.scorer import Scores, ScriptedScorer
from reward_service.worker import RewardWorker, WorkerSettings
from reward_service.worker_metrics import NoMetrics

BATCH: Final = 64
LEASE_S: Final = 60.0
PROMPT_TOKENS: Final = 16
FIRST_WORD_ID: Final = 4
"""Ids below are the special tokens."""


def rollout(name: str, *, response_ids: Sequence[int], prompt_ids: Sequence[int] = range(PROMPT_TOKENS)) -> Rollout:
    """An answer as an actor publishes it."""
    return Rollout(
        task=PromptTask(
            task_id=name,
            prompt_id=f"prompt-{name[-2:]}",
            group_id=name,
            prompt_ids_i32=pack_ids(prompt_ids),
            max_new_tokens=len(response_ids),
            temperature=1.0,
        ),
        response_ids_i32=pack_ids(response_ids),
        behaviour_logprobs_f32=pack_floats(np.full(len(response_ids), -1.0)),
        version_runs=(VersionRun(0, 0),),
        finish_reason="length",
        actor="rollout-0",
        generate_s=0.5,
    )


def payloads(count: int, *, size_bytes: int) -> list[bytes]:
    """Encoded rollouts of about `size_bytes` each: a token costs 8, its id and its log-prob."""
    empty = len(encode(rollout("00000000", response_ids=[0]))) - 8
    tokens = max(1, round((size_bytes - empty) / 8))
    return [encode(rollout(f"{number:08d}", response_ids=range(tokens))) for number in range(count)]


def answers(count: int, *, words: int, seed: int) -> list[Rollout]:
    """Random answers of 32 to 64 tokens; no two have the same text."""
    random = np.random.default_rng(seed % 2**32)
    made = []
    for number in range(count):
        prompt, response = (
            random.integers(FIRST_WORD_ID, words, size) for size in (PROMPT_TOKENS, int(random.integers(32, 65)))
        )
        made.append(rollout(f"{seed}-{number:06d}", response_ids=response.tolist(), prompt_ids=prompt.tolist()))
    return made


@dataclass(frozen=True)
class Models:
    """Untrained, of the demo's shape. `words`: size of the vocabulary."""

    reward_model: StoredRm
    reference_dir: Path
    words: int


def make_models(directory: Path, *, members: int) -> Models:
    """Saved in `directory`, as a run has them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from configs.load import load_config
    from configs.run import NewModel
    from learner.model_init import make_tokenizer, transformer_config

    shape = load_config("demo").model
    assert isinstance(shape, NewModel)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(shape, texts=[" ".join(f"word{number}" for number in range(shape.vocab_size - 8))])
    reference_dir = directory / "reference"
    config = transformer_config(shape, tokenizer=tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(reference_dir)
    tokenizer.save_pretrained(reference_dir)
    registry = RewardModels(directory / "rm")
    config.num_labels = 1
    with registry.draft() as draft:
        for member in range(members):
            AutoModelForSequenceClassification.from_config(config).save_pretrained(draft / f"member_{member}")
        stored = registry.publish(draft, RmManifest(version="rm-bench", members=members))
    return Models(stored, reference_dir, len(tokenizer))


class NullScorer(ScriptedScorer):
    """As cheap as a scorer can be."""

    def score(self, batch: Sequence[Rollout]) -> list[Scores]:
        return [Scores((0.5,), self._minus_ones(rollout)) for rollout in batch]


class CommitTimes(NoMetrics):
    """When each sample's score was published; `done` at the `expected`-th."""

    def __init__(self, expected: int | None = None) -> None:
        self.at_s: list[float] = []
        self.done = asyncio.Event()
        self._expected = expected

    def count(self, what: str) -> None:
        if what != "scored":
            raise AssertionError(f"a sample was {what}: nothing may fail here")
        self.at_s.append(time.monotonic())
        if len(self.at_s) == self._expected:
            self.done.set()


def worker_settings(consumer: str) -> WorkerSettings:
    """As in a run. The token limit is out of the way: batches have 64 samples."""
    return WorkerSettings(consumer=consumer, batch_size=BATCH, token_budget=1 << 24, lease_s=LEASE_S)


@dataclass(frozen=True)
class WorkerReport:
    """commits_at_s: on the machine's monotonic clock. cpu_s: of the whole process, while it worked."""

    commits_at_s: list[float]
    cpu_s: float


@dataclass(frozen=True)
class Signals:
    """Between the benchmark and its worker processes. `ready` counts them."""

    ready: Semaphore
    start: Event
    stop: Event


def work(redis_url: str, run: str, name: str, signals: Signals, report: Connection) -> None:
    """One reward worker with a scorer that does nothing, as a process."""
    report.send(asyncio.run(_work(redis_url, run, name, signals)))


async def _work(redis_url: str, run: str, name: str, signals: Signals) -> WorkerReport:
    thread, times = ForwardThread(), CommitTimes()
    scoring = BatchScoring(NullScorer(), thread=thread, cache=None, metrics=NoMetrics(), timeout_s=60.0)
    async with RunRedis(redis_url, run=run, lease_s=LEASE_S) as redis:
        worker = RewardWorker(redis.streams, scoring=scoring, metrics=times, settings=worker_settings(name))
        signals.ready.release()
        await asyncio.to_thread(signals.start.wait)
        cpu_s = time.process_time()
        run_task = asyncio.create_task(worker.run())
        stop_asked = asyncio.create_task(asyncio.to_thread(signals.stop.wait))
        await asyncio.wait({run_task, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
        cpu_s = time.process_time() - cpu_s
        if not run_task.done():
            await worker.stop()
        await run_task
    thread.close()
    return WorkerReport(times.at_s, cpu_s)
