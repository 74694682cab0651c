"""Demonstrations that the policy has not been fine-tuned on: text whose perplexity shows what training forgets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.data_records import SFT_FILE, data_dir
from cluster.text import load_tokenizer
from configs.run import RunConfig
from learner.sft import IGNORED_LABEL, encode_examples, split_examples


@dataclass(frozen=True)
class HeldOutTexts:
    """`sequences`: (prompt ids, answer ids). `source`: where they come from, for people."""

    source: str
    sequences: list[tuple[list[int], list[int]]]


def held_out_texts(config: RunConfig, run_dir: Path, *, limit: int) -> HeldOutTexts | None:
    """At most `limit` of them: those that SFT kept back, or any where a model was taken as it is. None for a run
    without demonstrations."""
    if not (data_dir(run_dir) / SFT_FILE).exists() or limit == 0:
        return None
    examples = encode_examples(run_dir, data=config.data, tokenizer=load_tokenizer(run_dir / "sft" / "model"))
    _, held_out = split_examples(examples, seed=config.seed)
    source = "demonstrations that SFT kept back"
    if config.sft.epochs == 0:
        held_out, source = examples, "demonstrations, none of which was trained on"
    sequences = []
    for example in held_out[:limit]:
        ids, answer = example["input_ids"], [label for label in example["labels"] if label != IGNORED_LABEL]
        sequences.append((ids[: len(ids) - len(answer)], answer))
    return HeldOutTexts(source, sequences)
