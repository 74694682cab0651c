"""Answers to many prompts from the rollout actors, outside the online loop: for preference pairs and evaluation.

Waits: for the actors. Who unblocks it: their answers or deaths; generate() has a deadline of its own. Always holds: an
actor that dies is replaced, and what it was asked is asked again of another, a few times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.data_records import PromptRecord, data_dir, read_rows
from cluster.errors import DataError, EngineDeadError, KeelError
from cluster.group import as_keel_error, unwrapped
from cluster.supervise import RolePool
from cluster.text import EncodedPrompt, decode_answer, encode_prompt, load_tokenizer, prompt_text
from configs.run import RunConfig
from keel.runtime import Runtime

_CHUNK_PROMPTS = 256
_MAX_TRIES = 3
"""Of one chunk: what kills one actor after another is in the chunk."""


@dataclass(frozen=True)
class Question:
    """A prompt as read, as a person reads it, and as the policy reads it."""

    record: PromptRecord
    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Answer:
    """token_ids: with the end-of-sequence token unless truncated."""

    text: str
    token_ids: list[int]
    truncated: bool


def load_questions(config: RunConfig, run_dir: Path, *, table: str, limit: int | None = None) -> list[Question]:
    """The usable prompts of data/<table>.jsonl, the first `limit` of them, and token ids by the policy's tokenizer."""
    tokenizer = load_tokenizer(run_dir / "sft" / "model")
    questions: list[Question] = []
    for record in read_rows(data_dir(run_dir) / f"{table}.jsonl", PromptRecord):
        encoded = encode_prompt(
            tokenizer, record.prompt, max_tokens=config.data.max_prompt_tokens, long_prompt=config.data.long_prompt
        )
        if isinstance(encoded, EncodedPrompt):
            questions.append(Question(record, prompt_text(record.prompt), list(encoded.ids)))
        if limit is not None and len(questions) >= limit:
            break
    if not questions:
        raise DataError(f"no usable prompt in {table}.jsonl", got="0", do="see data/report.json for why")
    return questions


def answer_all(
    runtime: Runtime, pool: RolePool, questions: Sequence[Question], *, stage: str, temperature: float
) -> list[Answer]:
    """One answer a question, in order, spread over the pool's actors. Reports progress as `stage`."""
    tokenizer = load_tokenizer(runtime.run.path / "sft" / "model")
    asking = Asking(runtime, pool, temperature=temperature)
    for start in range(0, len(questions), _CHUNK_PROMPTS):
        asking.ask(start, [question.token_ids for question in questions[start : start + _CHUNK_PROMPTS]])
    answers: dict[int, Answer] = {}
    while asking.pending:
        for start, results in asking.answered():
            for offset, (ids, finish_reason) in enumerate(results):
                answers[start + offset] = Answer(decode_answer(tokenizer, ids), list(ids), finish_reason == "length")
            runtime.run.emit(stage=stage, event="progress", step=len(answers), steps=len(questions))
        runtime.tick()
    return [answers[position] for position in range(len(questions))]


@dataclass(frozen=True)
class _Chunk:
    start: int
    prompts: list[list[int]]
    handle: Any
    tries: int = 1


@dataclass
class Asking:
    """Chunks of prompts that are out at the actors."""

    runtime: Runtime
    pool: RolePool
    temperature: float
    pending: dict[Any, _Chunk] = field(default_factory=dict)
    _asked: int = 0
    _known: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._known = set(self.pool.handles)

    def ask(self, start: int, prompts: list[list[int]], *, tries: int = 1) -> None:
        """Send a chunk to the next actor in turn, waiting for one if none is up."""
        while not self.pool.handles:
            self.pool.wait_ready(self.runtime.tick)
        handle = self.pool.handles[self._asked % len(self.pool.handles)]
        self._asked += 1
        if handle not in self._known:
            # A replacement booted from the model directory; the others may hold newer weights.
            self.runtime.wait(handle.sync_to_newest.remote())
            self._known.add(handle)
        reference = handle.generate.remote(
            prompts, max_new_tokens=self.runtime.config.data.max_response_tokens, temperature=self.temperature
        )
        self.pending[reference] = _Chunk(start, prompts, handle, tries)

    def answered(self) -> list[tuple[int, Any]]:
        """Chunks that came back, by their start. Those of dead actors are asked again; any other error is raised."""
        ray = self.runtime.ray
        done, _ = ray.wait(list(self.pending), timeout=0.3)
        found = []
        for reference in done:
            chunk = self.pending.pop(reference)
            try:
                found.append((chunk.start, ray.get(reference)))
            except (ray.exceptions.RayError, KeelError) as error:
                self._again(chunk, unwrapped(error))
        self.pool.poll(timeout_s=0.0)
        return found

    def _again(self, chunk: _Chunk, error: BaseException) -> None:
        dead = isinstance(error, EngineDeadError | self.runtime.ray.exceptions.RayActorError)
        if not dead or chunk.tries >= _MAX_TRIES:
            raise as_keel_error(error, what="a process of the run died", do="look at logs/ (out of memory?)")
        self.pool.lost(chunk.handle, error)
        self.ask(chunk.start, chunk.prompts, tries=chunk.tries + 1)
