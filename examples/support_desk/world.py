"""Makes the support desk's data: mediocre demonstrations, training prompts, and evaluation prompts kept apart.

The demonstrations are mediocre on purpose, so that there is something to learn from preferences: of the three steps
each is wrong 15 % of the time and otherwise present 65 % of it, between fillers and some flattery (gold about 1).
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Final

from cluster.data_records import (
    EVAL_PROMPTS_FILE,
    PROMPTS_FILE,
    SFT_FILE,
    PromptRecord,
    SftExample,
    write_rows,
)
from cluster.errors import DataError
from examples.support_desk.phrases import (
    APOLOGY,
    CITIES,
    CLOSING,
    DAYS,
    FILLERS,
    FLATTERY,
    ISSUES,
    OPENINGS,
    prompt_of,
)

APOLOGY_RATE: Final = 0.5
FILLER_RATE: Final = 0.35
"""Chance of a filler before each step, and of one more after each filler."""
WRONG_STEP_RATE: Final = 0.15
RIGHT_STEP_RATE: Final = 0.65
"""Of the steps that are not wrong."""
FLATTERY_RATE: Final = 0.2
CLOSING_RATE: Final = 0.4
MAX_WORDS: Final = 63
"""Tokens of an answer before its end-of-sequence token: words and stops."""


def make(directory: Path, *, seed: int, sft_examples: int, prompts: int, eval_prompts: int) -> None:
    """Write sft.jsonl, prompts.jsonl and eval_prompts.jsonl into `directory`.

    The same seed gives the same bytes. Evaluation prompts are distinct and occur in neither of the other files; the
    others repeat where more are asked for than exist. Raises DataError for too many evaluation prompts.
    """
    rng = random.Random(f"support_desk {seed}")
    lines = [
        (issue, prompt_of(issue, opening=opening, city=city, day=day))
        for issue, opening, city, day in itertools.product(ISSUES, OPENINGS, CITIES, DAYS)
    ]
    if eval_prompts > len(lines) // 2:
        raise DataError(
            "too many evaluation prompts for the support desk",
            got=f"{eval_prompts} of {len(lines)} different prompts",
            do=f"ask for at most {len(lines) // 2}",
        )
    rng.shuffle(lines)
    held_out, rest = lines[:eval_prompts], lines[eval_prompts:]
    examples = []
    for _ in range(sft_examples):
        issue, line = rng.choice(rest)
        examples.append(SftExample(prompt=line, answer=mediocre_answer(issue, rng)))
    write_rows(directory / SFT_FILE, examples)
    write_rows(directory / PROMPTS_FILE, [_record("train", i, rest[i % len(rest)][1]) for i in range(prompts)])
    write_rows(directory / EVAL_PROMPTS_FILE, [_record("eval", i, line) for i, (_, line) in enumerate(held_out)])


def mediocre_answer(issue: str, rng: random.Random) -> str:
    """One demonstration for `issue`, of at most MAX_WORDS words and stops."""
    said = [APOLOGY] if rng.random() < APOLOGY_RATE else []
    for place in range(3):
        while rng.random() < FILLER_RATE:
            said.append(rng.choice(FILLERS))
        if rng.random() < WRONG_STEP_RATE:
            said.append(rng.choice(list(ISSUES.values()))[place])
        elif rng.random() < RIGHT_STEP_RATE:
            said.append(ISSUES[issue][place])
    if rng.random() < FLATTERY_RATE:
        said.append(rng.choice(FLATTERY))
    stops = ["." for _ in said]
    if rng.random() < CLOSING_RATE or not said:
        said.append(CLOSING)
        stops.append("?")
    while sum(len(sentence.split()) + 1 for sentence in said) > MAX_WORDS:
        said.pop()
        stops.pop()
    return " ".join(sentence + stop for sentence, stop in zip(said, stops, strict=True))


def _record(split: str, index: int, line: str) -> PromptRecord:
    return PromptRecord(prompt_id=f"{split}-{index:06d}", prompt=line)
