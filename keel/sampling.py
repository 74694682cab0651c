"""Answers to many prompts from the rollout actors, outside the online loop: for preference pairs and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.data_records import PromptRecord, data_dir, read_rows
from cluster.errors import DataError
from cluster.supervise import RolePool
from cluster.text import EncodedPrompt, decode_answer, encode_prompt, load_tokenizer, prompt_text
from configs.run import RunConfig
from keel.runtime import Runtime

_CHUNK_PROMPTS = 256


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
    ray = runtime.ray
    config = runtime.config
    tokenizer = load_tokenizer(runtime.run.path / "sft" / "model")
    handles = pool.handles
    pending: dict[object, int] = {}
    for number, start in enumerate(range(0, len(questions), _CHUNK_PROMPTS)):
        chunk = [question.token_ids for question in questions[start : start + _CHUNK_PROMPTS]]
        reference = handles[number % len(handles)].generate.remote(
            chunk, max_new_tokens=config.data.max_response_tokens, temperature=temperature
        )
        pending[reference] = start
    answers: dict[int, Answer] = {}
    while pending:
        done, _ = ray.wait(list(pending), timeout=0.3)
        for reference in done:
            start = pending.pop(reference)
            results = runtime.wait(reference)
            for offset, (ids, finish_reason) in enumerate(results):
                answers[start + offset] = Answer(decode_answer(tokenizer, ids), list(ids), finish_reason == "length")
            runtime.run.emit(stage=stage, event="progress", step=len(answers), steps=len(questions))
        runtime.tick()
    return [answers[position] for position in range(len(questions))]
