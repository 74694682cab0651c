"""Preference pairs as a reward model learns from them: encoded, split by prompt, weighed, shared out to the members.

Everything here is decided by content and seed, never by order of arrival: what is held out once stays held out when
fresh pairs join, and so does what a member leaves out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.data_records import PREFERENCES_FILE, PreferencePair, Prompt, data_dir, read_rows, stable_prompt_id
from cluster.errors import DataError
from cluster.labels import held_out_annotators, without_annotators
from cluster.text import Rejection, encode_answer, encode_prompt
from configs.run import DataSection, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_PAIRS: Final = 500
"""Their thousand answers give the mean within a thirtieth of a deviation; a refresh scores them once more."""


@dataclass(frozen=True)
class EncodedPair:
    """Ids of prompt + answer for both answers, and the answers' lengths in tokens. `pair` has the label that the model
    is taught; `judged` is the same pair with the votes of every annotator."""

    pair: PreferencePair
    judged: PreferencePair
    prompt_id: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    answer_lengths: tuple[int, int]
    weight: float = 1.0

    def margin(self, largest: float) -> float:
        """m·(2c − 1): c is the share of annotators who agree, 1 where unknown."""
        return largest * (2 * (1.0 if self.pair.confidence is None else self.pair.confidence) - 1)


@dataclass(frozen=True)
class PairSets:
    """A run's original preferences. No prompt is in both `train` and `held_out`. `calibration`: whose answers a
    version's scores are calibrated on, the same for every version. `held_out_annotators`: whose votes made no label."""

    train: list[EncodedPair]
    held_out: list[EncodedPair]
    calibration: list[EncodedPair]
    held_out_annotators: tuple[str, ...]
    digest: str


def load_pairs(config: RunConfig, run_dir: Path, *, tokenizer: PreTrainedTokenizerBase) -> PairSets:
    """`<run_dir>/data/preferences.jsonl`, labelled by the annotators who are not held out, encoded and split. Raises
    DataError under two usable pairs, and when they cannot be split."""
    path = data_dir(run_dir) / PREFERENCES_FILE
    judged = read_rows(path, PreferencePair)
    kept_out = held_out_annotators(judged, config.rm.held_out_annotators, seed=config.seed)
    labelled = training_labels(judged, held_out=kept_out)
    pairs = encode_pairs(labelled, data=config.data, tokenizer=tokenizer, judged=judged)
    if len(pairs) < 2:
        raise DataError(
            "too few preference pairs for a reward model",
            got=f"{len(pairs)} usable",
            do="check data.preferences, or run the collect stage with more pairs",
        )
    train, held_out = split_by_prompt(pairs, held_out_fraction=config.rm.held_out_fraction, seed=config.seed)
    return PairSets(
        train=train,
        held_out=held_out,
        calibration=pairs[:CALIBRATION_PAIRS],
        held_out_annotators=kept_out,
        digest=files_digest([path]),
    )


def files_digest(paths: Iterable[Path]) -> str:
    """16 hex digits over the files' bytes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def training_labels(judged: Sequence[PreferencePair], *, held_out: tuple[str, ...]) -> list[PreferencePair]:
    """Pairs labelled by the annotators who are not held out; those without a clear majority among them are left out."""
    return without_annotators(judged, held_out).pairs


def encode_pairs(
    pairs: Iterable[PreferencePair],
    *,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    judged: Iterable[PreferencePair] = (),
) -> list[EncodedPair]:
    """Pairs as token ids. Those that no longer differ once truncated carry no preference: left out (the data stage
    counts them). `judged`: the same pairs with all votes, where those differ."""
    all_votes = {pair.pair_id: pair for pair in judged}
    encoded: list[EncodedPair] = []
    for pair in pairs:
        chosen = encode_text(pair.prompt, pair.chosen, data=data, tokenizer=tokenizer)
        rejected = encode_text(pair.prompt, pair.rejected, data=data, tokenizer=tokenizer)
        if chosen is None or rejected is None or chosen == rejected:
            continue
        encoded.append(
            EncodedPair(
                pair=pair,
                judged=all_votes.get(pair.pair_id, pair),
                prompt_id=stable_prompt_id(pair.prompt),
                chosen_ids=chosen[0],
                rejected_ids=rejected[0],
                answer_lengths=(chosen[1], rejected[1]),
                weight=1.0 if pair.weight is None else pair.weight,
            )
        )
    return encoded


def encode_text(
    prompt: Prompt, answer: str, *, data: DataSection, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], int] | None:
    """(ids of prompt + answer, tokens of the answer); None for a prompt that cannot be used."""
    head = encode_prompt(tokenizer, prompt, max_tokens=data.max_prompt_tokens, long_prompt=data.long_prompt)
    if isinstance(head, Rejection):
        return None
    tail = encode_answer(tokenizer, answer, max_tokens=data.max_response_tokens).ids
    return [*head.ids, *tail], len(tail)


# ---------------------------------------------------------------- splits


def split_by_prompt(
    pairs: Sequence[EncodedPair], *, held_out_fraction: float, seed: int
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """(training, held-out), no prompt in both: prompts are held out in the order of `held_out_position` until their
    pairs make up the fraction. Raises DataError when either side would be empty."""
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.prompt_id] = counts.get(pair.prompt_id, 0) + 1
    wanted = max(1, round(held_out_fraction * len(pairs)))
    chosen: set[str] = set()
    held_out_pairs = 0
    for prompt_id in sorted(counts, key=lambda prompt_id: held_out_position(prompt_id, seed=seed)):
        if held_out_pairs >= wanted:
            break
        chosen.add(prompt_id)
        held_out_pairs += counts[prompt_id]
    held_out = [pair for pair in pairs if pair.prompt_id in chosen]
    train = [pair for pair in pairs if pair.prompt_id not in chosen]
    if not train or not held_out:
        raise DataError(
            "the preference pairs cannot be split by prompt",
            got=f"{len(counts)} different prompts in {len(pairs)} pairs, held_out_fraction {held_out_fraction}",
            do="give pairs on more prompts, or change rm.held_out_fraction",
        )
    return train, held_out


def held_out_position(prompt_id: str, *, seed: int) -> float:
    """In [0, 1): prompts are held out from the low end. Original and fresh pairs share it, so that with equal fractions
    a prompt that fresh pairs are measured on was hardly ever among those that the first model learned from."""
    return _unit(f"rm {seed} {prompt_id}")


def member_share(pairs: Sequence[EncodedPair], *, member: int, fits: int, leaves_out: float, seed: int) -> list[int]:
    """Indices of the pairs that this one of `fits` models sees: all but a share of its own. The shares are apart as far
    as they can be: with three models that leave out a third each, each pair is left out by one. All, where there is one
    model, and where nothing would be left."""
    everything = list(range(len(pairs)))
    if fits == 1:
        return everything
    own = [
        index
        for index, pair in enumerate(pairs)
        if (_unit(f"member {seed} {pair.pair.pair_id}") + member / fits) % 1.0 >= leaves_out
    ]
    return own or everything


def own_pairs(
    pairs: Sequence[EncodedPair], *, config: RunConfig, member: int, members: int, discriminator: bool
) -> list[EncodedPair]:
    """What one model of a version learns from; number `members` is the discriminator. A member that is alone in the
    reward sees everything."""
    alone = members == 1 and member == 0
    share = member_share(
        pairs,
        member=member,
        fits=members + discriminator,
        leaves_out=0.0 if alone else config.rm.member_leaves_out,
        seed=config.seed,
    )
    return [pairs[index] for index in share]


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


# ---------------------------------------------------------------- balance


def rebalanced(pairs: Sequence[EncodedPair], *, config: RunConfig) -> list[EncodedPair]:
    """Training pairs as rm.rebalance wants them: drawn evenly from strata, or weighed; their own weights stay."""
    if config.rm.rebalance == "none":
        return list(pairs)
    from reward_service.audit.rebalance import inverse_frequency_weights, stratified_sample

    texts = [pair.pair for pair in pairs]
    if config.rm.rebalance == "inverse_frequency":
        weights = inverse_frequency_weights(texts, seed=config.seed)
        return [replace(pair, weight=pair.weight * weight) for pair, weight in zip(pairs, weights, strict=True)]
    by_id = {pair.pair.pair_id: pair for pair in pairs}
    return [by_id[pair.pair_id] for pair in stratified_sample(texts, seed=config.seed)]
