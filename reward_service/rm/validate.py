"""The validation card of a version that was just trained, taken or refreshed: its ensemble and its data, as the card
wants them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.data_records import Prompt
from cluster.errors import DataError
from cluster.reward_models import RmManifest
from cluster.text import encode_answer
from configs.run import DataSection, RunConfig
from reward_service.card.card import CardData, PolicyAnswer, Scorers, card_settings, make_card, write_card
from reward_service.rm.measure import Ensemble
from reward_service.rm.pairs import PairSets, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_card(
    config: RunConfig,
    draft: Path,
    *,
    manifest: RmManifest,
    ensemble: Ensemble,
    sets: PairSets,
    tokenizer: PreTrainedTokenizerBase,
    policy: Sequence[PolicyAnswer] = (),
    answers: int = 1000,
) -> tuple[RmManifest, tuple[str, ...]]:
    """Write the card into the draft. Returns the manifest with the card's verdict, and the card's reasons. `answers`:
    at most so many of the training pairs' and of the policy's are scored for it."""
    settings = replace(
        card_settings(
            config, version=manifest.version, parent=manifest.parent, number=manifest.number, reason=manifest.reason
        ),
        train_answers=answers,
        policy_answers=answers,
    )
    data = CardData(
        train=[pair.judged for pair in sets.train],
        held_out=[pair.judged for pair in sets.held_out],
        held_out_annotators=sets.held_out_annotators,
        policy=policy,
    )
    card = make_card(scorers_of(ensemble, data=config.data, tokenizer=tokenizer), data=data, settings=settings)
    write_card(card, draft)
    return msgspec.structs.replace(manifest, verdict=card.verdict), card.reasons


def scorers_of(ensemble: Ensemble, *, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> Scorers:
    """An ensemble that takes texts."""

    def sequences(texts: Sequence[tuple[Prompt, str]]) -> list[list[int]]:
        found = []
        for prompt, answer in texts:
            encoded = encode_text(prompt, answer, data=data, tokenizer=tokenizer)
            if encoded is None:
                raise DataError("a prompt cannot be scored", got=f"{prompt!r:.200}", do="see data.max_prompt_tokens")
            found.append(encoded[0])
        return found

    return Scorers(
        members=lambda texts: ensemble.member_scores(sequences(texts)),
        aggregate=ensemble.aggregate,
        tokens=lambda answer: len(encode_answer(tokenizer, answer, max_tokens=sys.maxsize).ids),
        discriminator=(
            (lambda texts: ensemble.discriminator_scores(sequences(texts))) if ensemble.discriminates else None
        ),
    )
