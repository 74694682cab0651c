"""The policy's answers beside the reference's to the same held-out prompts: what there is to compare with, and what a
judge says of it.

The reference is the policy before training; its answers are those of the evaluation at the start (eval/sft.rows.jsonl).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.data_records import Prompt
from cluster.errors import ConfigError
from cluster.files import read_jsonl
from cluster.plugin import resolve
from cluster.text import encode_answer, load_tokenizer
from configs.run import RunConfig
from keel.online.judges import PEOPLE
from keel.sampling import Question, load_questions
from reward_service.preferences import Candidate, Judge, collect_pairs

REFERENCE_ROWS = Path("eval") / "sft.rows.jsonl"


@dataclass(frozen=True)
class Reference:
    """A held-out prompt and the reference's answer. `gold`: its gold reward, where there is one."""

    question: Question
    text: str
    token_ids: list[int]
    gold: float | None


def reference_answers(config: RunConfig, run_dir: Path, *, limit: int | None = None) -> list[Reference]:
    """The first `limit` held-out prompts that the reference has answered; none before the run's first evaluation."""
    path = run_dir / REFERENCE_ROWS
    if not path.exists():
        return []
    rows = read_jsonl(path)
    questions = load_questions(config, run_dir, table="eval_prompts", limit=len(rows))
    tokenizer = load_tokenizer(run_dir / "sft" / "model")
    known: list[Reference] = []
    for question, row in list(zip(questions, rows, strict=False))[:limit]:
        if question.text == row["prompt"]:
            encoded = encode_answer(tokenizer, row["answer"], max_tokens=config.data.max_response_tokens)
            cut = row["truncated"] and not encoded.truncated
            ids = encoded.ids[:-1] if cut else encoded.ids  # an answer that was cut has no end of its own
            known.append(Reference(question, row["answer"], list(ids), row.get("gold")))
    return known


def judge_name(config: RunConfig) -> tuple[str, str] | None:
    """(key, value) of who compares answers: guard.watch.judge, or else collect.judge; None where nobody does."""
    watch = config.guard.watch
    if watch is not None and watch.judge is not None:
        return "guard.watch.judge", watch.judge
    return None if config.collect.judge is None else ("collect.judge", config.collect.judge)


def function_judge(config: RunConfig, *, named: str | None = None) -> Judge | None:
    """The function `named`, or else the configured one; None where there is none, or people judge. Raises
    ConfigError."""
    if named == PEOPLE:
        raise ConfigError(
            "people are not waited for here", got=f"judge {PEOPLE!r}", do="name a function, package.module:function"
        )
    found = ("--judge", named) if named is not None else judge_name(config)
    if found is None or found[1] == PEOPLE:
        return None
    judge: Judge = resolve(found[1], key=found[0])
    return judge


def outcomes(
    prompts: Sequence[Prompt], *, answers: Sequence[str], references: Sequence[str], judge: Judge, seed: int
) -> list[float | None]:
    """1 where the judge prefers the policy's answer, 0 the reference's, 0.5 neither: no clear majority, or the same
    text. The judge sees each pair in random order, by `seed`. An empty answer loses against one that is not, unasked.
    """
    rng = random.Random(f"order of answers {seed}")
    swapped = [rng.random() < 0.5 for _ in prompts]
    pairs = [
        Candidate(prompt, reference, answer) if swap else Candidate(prompt, answer, reference)
        for prompt, answer, reference, swap in zip(prompts, answers, references, swapped, strict=True)
    ]
    collected = collect_pairs(pairs, judge=judge, seed=seed)
    found: list[float | None] = [
        _without_judge(answer, reference) for answer, reference in zip(answers, references, strict=True)
    ]
    for place, pair in zip(collected.places, collected.pairs, strict=True):
        found[place] = float(pair.chosen == answers[place])
    return found


def _without_judge(answer: str, reference: str) -> float:
    return 0.5 + 0.5 * (bool(answer.strip()) - bool(reference.strip()))
