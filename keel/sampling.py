"""Answers to many prompts from the rollout actors, outside the online loop: for preference pairs and evaluation.

Waits: for the actors. Who unblocks it: their answers or deaths; generate() has a deadline of its own. Always holds: an
actor that dies is replaced, and what it was asked is asked again of another, a few times. Online the watch loop is the
one that replaces it, and that ends the run when it cannot: here nothing is done that could hide that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.data_records import PromptRecord, data_dir, read_rows
from cluster.errors import DataError, EngineDeadError, KeelError
from cluster.group import as_keel_error, unwrapped
from cluster.supervise import RolePool
from cluster.text import EncodedPrompt, decode_answer, encode_prompt, load_tokenizer, prompt_text
from configs.run import RunConfig
from keel.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    runtime: Runtime,
    pool: RolePool,
    questions: Sequence[Question],
    *,
    stage: str,
    temperature: float,
    newest: bool = False,
) -> list[Answer]:
    """One answer a question, in order, spread over the pool's actors. Reports progress as `stage`. `newest`: actors
    hold the newest weights of the run, not those that they started with."""
    tokenizer = policy_tokenizer(runtime)
    asking = Asking(runtime, pool, temperature=temperature, newest=newest)
    for start in range(0, len(questions), _CHUNK_PROMPTS):
        asking.ask(start, [question.token_ids for question in questions[start : start + _CHUNK_PROMPTS]])
    answers: dict[int, Answer] = {}
    while asking.open:
        for start, results in asking.answered():
            answers |= {start + offset: answer for offset, answer in enumerate(decoded(tokenizer, results))}
            runtime.run.emit(stage=stage, event="progress", step=len(answers), steps=len(questions))
        runtime.tick()
    return [answers[position] for position in range(len(questions))]


def policy_tokenizer(runtime: Runtime) -> PreTrainedTokenizerBase:
    """Of the run's policy. Loading a large vocabulary takes a second: once, not for each answer."""
    return load_tokenizer(runtime.run.path / "sft" / "model")


def decoded(tokenizer: PreTrainedTokenizerBase, results: Sequence[tuple[list[int], str]]) -> list[Answer]:
    """What an actor's `generate` gave, as answers."""
    return [Answer(decode_answer(tokenizer, ids), list(ids), reason == "length") for ids, reason in results]


@dataclass(frozen=True)
class _Chunk:
    start: int
    prompts: list[list[int]]
    handle: Any
    tries: int = 1


@dataclass
class Asking:
    """Chunks of prompts that are out at the actors. `newest`: as in `answer_all`. `online`: beside a run's rollouts,
    when actors follow the policy by themselves, the watch loop sees to the pool, and nothing may wait for an actor to
    come up."""

    runtime: Runtime
    pool: RolePool
    temperature: float
    newest: bool = False
    online: bool = False
    pending: dict[Any, _Chunk] = field(default_factory=dict)
    _unsent: list[tuple[int, list[list[int]], int]] = field(default_factory=list)
    _asked: int = 0
    _known: set[Any] = field(default_factory=set)
    _gone: set[Any] = field(default_factory=set)
    """Online: actors that died here, whether or not the pool knows yet."""

    def __post_init__(self) -> None:
        self._known = set(self.pool.handles)

    def ask(self, start: int, prompts: list[list[int]], *, tries: int = 1) -> None:
        """Send a chunk to the next actor in turn, waiting for one if none is up; online, it is sent when one is."""
        if self.online and not self._living:
            self._unsent.append((start, prompts, tries))
            return
        while not self._living:
            self.pool.wait_ready(self.runtime.tick)
        living = self._living
        handle = living[self._asked % len(living)]
        self._asked += 1
        if self.newest and handle not in self._known:
            # A replacement booted from the model directory; the others may hold newer weights.
            self.runtime.wait(handle.sync_to_newest.remote())
            self._known.add(handle)
        reference = handle.generate.remote(
            prompts, max_new_tokens=self.runtime.config.data.max_response_tokens, temperature=self.temperature
        )
        self.pending[reference] = _Chunk(start, prompts, handle, tries)

    @property
    def _living(self) -> list[Any]:
        return [handle for handle in self.pool.handles if handle not in self._gone]

    @property
    def open(self) -> bool:
        """Some chunk has not come back."""
        return bool(self.pending or self._unsent)

    def answered(self, *, wait_s: float = 0.3) -> list[tuple[int, Any]]:
        """Chunks that came back, by their start. Those of dead actors are asked again; any other error is raised."""
        unsent, self._unsent = self._unsent, []
        for start, prompts, tries in unsent:
            self.ask(start, prompts, tries=tries)
        if not self.pending:
            return []
        ray = self.runtime.ray
        done, _ = ray.wait(list(self.pending), timeout=wait_s, num_returns=len(self.pending) if wait_s == 0.0 else 1)
        found = []
        for reference in done:
            chunk = self.pending.pop(reference)
            try:
                found.append((chunk.start, ray.get(reference)))
            except (ray.exceptions.RayError, KeelError) as error:
                self._again(chunk, unwrapped(error))
        if not self.online:
            self.pool.poll(timeout_s=0.0)
        return found

    def _again(self, chunk: _Chunk, error: BaseException) -> None:
        dead = isinstance(error, EngineDeadError | self.runtime.ray.exceptions.RayActorError)
        if not dead or chunk.tries >= _MAX_TRIES:
            raise as_keel_error(error, what="a process of the run died", do="look at logs/ (out of memory?)")
        if self.online:
            self._gone.add(chunk.handle)
        else:
            self.pool.lost(chunk.handle, error)
        self.ask(chunk.start, chunk.prompts, tries=chunk.tries + 1)
