"""Answers that people or rules caught, as pairs to learn from: the caught answer is the rejected side, and one that was
preferred for the same prompt is the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.data_records import PreferencePair, Prompt, stable_prompt_id
from cluster.errors import DataError
from configs.run import DataSection
from reward_service.rm.pairs import EncodedPair, encode_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CaughtAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A line of caught.jsonl."""

    prompt: Prompt
    answer: str
    reason: str = ""
    policy_version: int | None = None


def read_caught(files: Sequence[Path]) -> list[CaughtAnswer]:
    """All answers of these files, each prompt and answer once, in order. A file that does not exist is empty. Raises
    DataError, naming file and line, on anything else."""
    found: dict[tuple[str, str], CaughtAnswer] = {}
    for path in files:
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                answer = msgspec.json.decode(line, type=CaughtAnswer)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path}:{number} is no caught answer", got=f"{error}: {line[:80]!r}", do="repair or drop the line"
                ) from error
            found[stable_prompt_id(answer.prompt), answer.answer] = answer
    return list(found.values())


def caught_pairs(
    answers: Sequence[CaughtAnswer],
    *,
    examples: Sequence[EncodedPair],
    held_out: set[str],
    most: int,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
) -> list[EncodedPair]:
    """At most `most` pairs, of the answers caught last. The chosen side is the last preferred answer to the prompt in
    `examples`; an answer whose prompt has none, or is held out, is left out."""
    preferred = {(pair.prompt_id, pair.pair.chosen): pair.pair.chosen for pair in examples}
    by_prompt: dict[str, list[str]] = {}
    for prompt_id, chosen in preferred:
        by_prompt.setdefault(prompt_id, []).append(chosen)
    pairs = []
    for number, caught in enumerate(answers):
        prompt_id = stable_prompt_id(caught.prompt)
        better = [chosen for chosen in by_prompt.get(prompt_id, []) if chosen != caught.answer]
        if not better or prompt_id in held_out:
            continue
        pairs.append(
            PreferencePair(
                pair_id=f"caught-{number:07d}",
                prompt=caught.prompt,
                chosen=better[-1],
                rejected=caught.answer,
                rejected_version=caught.policy_version,
                source="caught",
            )
        )
    encoded = encode_pairs(pairs, data=data, tokenizer=tokenizer)
    return encoded[len(encoded) - most :] if len(encoded) > most else encoded
