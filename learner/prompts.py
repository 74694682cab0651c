"""The deck of training prompts, from data/prompts.jsonl."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cluster.data_records import PROMPTS_FILE, PromptRecord, data_dir, read_rows
from cluster.text import EncodedPrompt, encode_prompt, load_tokenizer
from configs.run import RunConfig
from learner.deck import Cut, DeckPrompt, PromptDeck

log = logging.getLogger(__name__)


def load_deck(config: RunConfig, run_dir: Path, *, position: int, cuts: Sequence[Cut] = ()) -> PromptDeck:
    """Every prompt that encodes, with what was left out counted in the log. Raises DataError when none is left."""
    tokenizer = load_tokenizer(run_dir / "sft" / "model")
    prompts: list[DeckPrompt] = []
    outcomes: Counter[str] = Counter()
    for record in read_rows(data_dir(run_dir) / PROMPTS_FILE, PromptRecord):
        encoded = encode_prompt(
            tokenizer, record.prompt, max_tokens=config.data.max_prompt_tokens, long_prompt=config.data.long_prompt
        )
        if isinstance(encoded, EncodedPrompt):
            prompts.append(DeckPrompt(record.prompt_id, tuple(encoded.ids), record.prompt))
            outcomes["truncated" if encoded.truncated else "whole"] += 1
        else:
            outcomes[f"rejected: {encoded.reason}"] += 1
    log.info("prompts: %s", dict(outcomes))
    return PromptDeck(prompts, seed=config.seed, position=position, cuts=cuts)
