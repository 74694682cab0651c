"""Reward-model training with TRL: k members, Bradley–Terry loss −log σ(r_w − r_l) plus a centring penalty. Or reward
models that are taken as they are (rm.models), and measured like trained ones.

Reads `<run_dir>/data/preferences.jsonl`, starts each member from `<run_dir>/sft/model` (or the run's initial model),
and writes `<run_dir>/rm/`, complete or not at all: `member_0/…` as Hugging Face sequence-classification directories
with one label, and manifest.json (RmManifest).

A score is read at the last real token of prompt ids + answer ids, right-padded. Held-out pairs are the same for all
members and share no prompt with training ones; with several members, each also leaves out a random tenth of its own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.data_records import (
    PREFERENCES_FILE,
    PreferencePair,
    data_dir,
    read_rows,
    stable_prompt_id,
    write_atomically,
)
from cluster.errors import DataError, ModelError, NonFiniteError
from cluster.hf_training import (
    Emit,
    FitSettings,
    progress_callback,
    run_trainer,
    silence_progress_bars,
    torch_threads,
    trainer_arguments,
    whole_directory,
)
from cluster.text import Rejection, encode_answer, encode_prompt, load_tokenizer, resolve_model_dir
from configs.run import DataSection, PretrainedModel, RunConfig
from reward_service.preferences import accuracy, length_only_accuracy, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_PAIRS: Final = 2000
MEMBER_LEAVES_OUT: Final = 0.1
SCORING_BATCH: Final = 64
"""Answers in a pass; cluster.footprint.MEASURED_ROWS."""


@dataclass(frozen=True)
class EncodedPair:
    """Ids of prompt + answer for both answers, and the answers' lengths in tokens."""

    prompt_id: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    answer_lengths: tuple[int, int]


@dataclass(frozen=True)
class Calibration:
    """Mean and population standard deviation of the ensemble's raw score over `count` answers; where a run's score
    normaliser starts."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class RmManifest:
    """What `<run_dir>/rm/` holds. `accuracy`: of the ensemble's mean score on held-out pairs, with its 95 % Wilson
    interval. `version` follows from the weights' bytes. `taken_from`: where the members came from, when they were not
    trained here; pairs_train is 0 then."""

    version: str
    members: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    length_only_accuracy: float
    member_accuracies: tuple[float, ...]
    pairs_train: int
    pairs_held_out: int
    calibration: Calibration
    taken_from: tuple[str, ...] = ()


def run_rm(config: RunConfig, run_dir: Path, emit: Emit) -> RmManifest:
    """Train or take all members, measure them, write the directory.

    `emit` gets {"stage": "rm", "member", "step", "steps", "loss"} every ten steps, at the end the manifest with
    "done": True. Raises DataError (no or too few pairs), ModelError (no initial model, one of rm.models that does not
    fit the policy, disk full, accuracy under rm.min_accuracy; the refused model is then in `<run_dir>/rm.rejected`),
    NonFiniteError.
    """
    silence_progress_bars()
    model_dir, tokenizer_dir = _initial(config, run_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    pairs = encode_pairs(run_dir, data=config.data, tokenizer=tokenizer)
    train, held_out = split_by_prompt(pairs, held_out_fraction=config.rm.held_out_fraction, seed=config.seed)
    refused = run_dir / "rm.rejected"
    calibrated = pairs[:CALIBRATION_PAIRS]
    with torch_threads(config.rm.threads), whole_directory(run_dir / "rm", error=ModelError) as directory:
        held_out_scores, calibration_scores = [], []
        for member in range(config.rm.ensemble):
            target = directory / f"member_{member}"
            if config.rm.models:
                model = _take_member(config, model_dir, tokenizer=tokenizer, member=member, target=target)
            else:
                model = _train_member(config, model_dir, tokenizer=tokenizer, pairs=train, member=member, emit=emit)
                model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            held_out_scores.append(_pair_scores(model, held_out, pad_id=int(tokenizer.pad_token_id)))
            calibration_scores.append(_pair_scores(model, calibrated, pad_id=int(tokenizer.pad_token_id)))
            del model  # before the next one comes
        manifest = _manifest(directory, train=train, held_out=held_out, held_out_scores=held_out_scores,
                             calibration_scores=calibration_scores)  # fmt: skip
        if config.rm.models:
            manifest = replace(manifest, pairs_train=0, taken_from=tuple(map(str, config.rm.models)))
        write_atomically(directory / "manifest.json", json.dumps(asdict(manifest), indent=2).encode())
        emit({"stage": "rm", "done": True, **asdict(manifest)})
        if manifest.accuracy < config.rm.min_accuracy:
            directory.rename(_emptied(refused))
            raise ModelError(
                "the reward model is too weak to train against",
                got=f"held-out accuracy {manifest.accuracy:.3f} ({manifest.accuracy_low:.3f}–"
                f"{manifest.accuracy_high:.3f}), length alone {manifest.length_only_accuracy:.3f}",
                do=f"give more or clearer pairs, or lower rm.min_accuracy ({config.rm.min_accuracy}); see {refused}",
            )
    return manifest


def _emptied(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def _initial(config: RunConfig, run_dir: Path) -> tuple[Path, Path]:
    """Directories of the weights and the tokenizer that members start from."""
    sft = run_dir / "sft" / "model"
    if sft.is_dir():
        return sft, sft
    if isinstance(config.model, PretrainedModel):
        return resolve_model_dir(config.model.path), resolve_model_dir(config.model.tokenizer or config.model.path)
    init = run_dir / "init"
    if not init.is_dir():
        raise ModelError("no model to start the reward model from", got=f"neither {sft} nor {init}", do="run sft first")
    return init, init


def encode_pairs(run_dir: Path, *, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPair]:
    """Preference pairs as token ids. Those that no longer differ once truncated carry no preference: left out (the
    data stage counts them). Raises DataError under two pairs."""
    encoded: list[EncodedPair] = []
    for pair in read_rows(data_dir(run_dir) / PREFERENCES_FILE, PreferencePair):
        prompt = encode_prompt(tokenizer, pair.prompt, max_tokens=data.max_prompt_tokens, long_prompt=data.long_prompt)
        if isinstance(prompt, Rejection):
            continue
        chosen = encode_answer(tokenizer, pair.chosen, max_tokens=data.max_response_tokens).ids
        rejected = encode_answer(tokenizer, pair.rejected, max_tokens=data.max_response_tokens).ids
        if chosen == rejected:
            continue
        encoded.append(
            EncodedPair(
                prompt_id=stable_prompt_id(pair.prompt),
                chosen_ids=[*prompt.ids, *chosen],
                rejected_ids=[*prompt.ids, *rejected],
                answer_lengths=(len(chosen), len(rejected)),
            )
        )
    if len(encoded) < 2:
        raise DataError(
            "too few preference pairs for a reward model",
            got=f"{len(encoded)} usable",
            do="check data.preferences, or run the collect stage with more pairs",
        )
    return encoded


def split_by_prompt(
    pairs: Sequence[EncodedPair], *, held_out_fraction: float, seed: int
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """(training, held-out), no prompt in both: prompts are held out in the order of a seeded hash until their pairs
    make up the fraction. Raises DataError when either side would be empty."""

    def position(prompt_id: str) -> bytes:
        return hashlib.sha256(f"rm {seed} {prompt_id}".encode()).digest()

    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.prompt_id] = counts.get(pair.prompt_id, 0) + 1
    wanted = max(1, round(held_out_fraction * len(pairs)))
    chosen: set[str] = set()
    held_out_pairs = 0
    for prompt_id in sorted(counts, key=position):
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


def _take_member(config: RunConfig, policy_dir: Path, *, tokenizer: Any, member: int, target: Path) -> Any:
    """One of rm.models, copied to `target`; where it scores fastest and in the type that it will serve in."""
    import torch

    from reward_service.rm_take import take_member

    model = take_member(
        config.rm.models[member], target=target, policy_dir=policy_dir, tokenizer=tokenizer,
        max_sequence_tokens=config.max_sequence_tokens,
    )  # fmt: skip
    device = "cuda" if config.learner.on_gpu and torch.cuda.is_available() else "cpu"
    return model.to(device, getattr(torch, config.reward.dtype))


def _train_member(
    config: RunConfig, model_dir: Path, *, tokenizer: Any, pairs: Sequence[EncodedPair], member: int, emit: Emit
) -> Any:
    """One member, trained, in evaluation mode."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    seed = config.seed + 1000 * (member + 1)
    own = _own_share(pairs, seed=seed) if config.rm.members > 1 else list(pairs)
    settings = FitSettings(
        examples=len(own),
        epochs=config.rm.epochs,
        batch_size=config.rm.batch_size,
        learning_rate=config.rm.learning_rate,
        seed=seed,
    )
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(
            model_dir, num_labels=1, dtype=torch.float32, local_files_only=True, pad_token_id=tokenizer.pad_token_id
        )
    # A zero head starts every pair at a margin of 0; a random one starts members at arbitrary preferences.
    torch.nn.init.zeros_(model.score.weight)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                **trainer_arguments(settings, scratch=Path(scratch)),
                max_length=None,  # lengths were cut by cluster.text
                # A third less padding. The loss is a mean over pairs, so batches of like length bias nothing.
                train_sampling_strategy="group_by_length",
                length_column_name="length",
                center_rewards_coefficient=config.rm.centering,
            ),
            train_dataset=Dataset.from_list(
                [
                    {
                        "chosen_ids": pair.chosen_ids,
                        "rejected_ids": pair.rejected_ids,
                        "length": max(len(pair.chosen_ids), len(pair.rejected_ids)),
                    }
                    for pair in own
                ]
            ),
            processing_class=tokenizer,
        )
        trainer.add_callback(progress_callback(emit, stage="rm", steps=settings.steps, fields={"member": member}))
        run_trainer(trainer, stage="rm")
    return model.eval()


def _own_share(pairs: Sequence[EncodedPair], *, seed: int) -> list[EncodedPair]:
    order = random.Random(seed).sample(range(len(pairs)), max(1, round((1 - MEMBER_LEAVES_OUT) * len(pairs))))
    return [pairs[i] for i in sorted(order)]


def _pair_scores(model: Any, pairs: Sequence[EncodedPair], *, pad_id: int) -> list[tuple[float, float]]:
    """(score of chosen, score of rejected) of each pair."""
    chosen = score_sequences(model, [pair.chosen_ids for pair in pairs], pad_id=pad_id)
    rejected = score_sequences(model, [pair.rejected_ids for pair in pairs], pad_id=pad_id)
    return list(zip(chosen, rejected, strict=True))


def score_sequences(model: Any, sequences: Sequence[Sequence[int]], *, pad_id: int) -> list[float]:
    """Raw score of each id sequence (prompt + answer), read at its last token by length, whatever that token is.

    Raises NonFiniteError.
    """
    import torch

    scores = [0.0] * len(sequences)
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    backbone = getattr(model, model.base_model_prefix)
    head = copy.deepcopy(model.score).float()  # in 16 bit, close scores would become equal ones
    for start in range(0, len(by_length), SCORING_BATCH):
        picked = by_length[start : start + SCORING_BATCH]
        lengths = torch.tensor([len(sequences[i]) for i in picked])
        ids_BL = torch.full((len(picked), int(lengths.max())), pad_id)
        for row, i in enumerate(picked):
            ids_BL[row, : len(sequences[i])] = torch.tensor(sequences[i])
        mask_BL = torch.arange(ids_BL.shape[1])[None, :] < lengths[:, None]
        with torch.inference_mode():
            hidden_BLD = backbone(
                input_ids=ids_BL.to(model.device), attention_mask=mask_BL.long().to(model.device), use_cache=False
            ).last_hidden_state
            last_BD = hidden_BLD[torch.arange(len(picked)), (lengths - 1).to(hidden_BLD.device)]
            values: list[float] = head(last_BD.float())[:, 0].tolist()
        for i, value in zip(picked, values, strict=True):
            scores[i] = value
    if not all(map(math.isfinite, scores)):
        raise NonFiniteError("the reward model's scores are not finite", do="lower rm.learning_rate")
    return scores


def _manifest(
    directory: Path,
    *,
    train: Sequence[EncodedPair],
    held_out: Sequence[EncodedPair],
    held_out_scores: list[list[tuple[float, float]]],
    calibration_scores: list[list[tuple[float, float]]],
) -> RmManifest:
    """[M][pairs] scores of each member → the ensemble's figures; its score is the mean over members."""
    share = accuracy([chosen - rejected for chosen, rejected in _means(held_out_scores)])
    low, high = wilson_interval(share, n=len(held_out))
    answers = [score for pair in _means(calibration_scores) for score in pair]
    return RmManifest(
        version=f"rm-{_weights_hash(directory)[:12]}",
        members=len(held_out_scores),
        accuracy=share,
        accuracy_low=low,
        accuracy_high=high,
        length_only_accuracy=length_only_accuracy(
            [pair.answer_lengths for pair in train], [pair.answer_lengths for pair in held_out]
        ),
        member_accuracies=tuple(
            accuracy([chosen - rejected for chosen, rejected in scores]) for scores in held_out_scores
        ),
        pairs_train=len(train),
        pairs_held_out=len(held_out),
        calibration=Calibration(statistics.fmean(answers), statistics.pstdev(answers), len(answers)),
    )


def _means(members: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean over members of each pair's two scores."""
    return [
        (statistics.fmean(pair[0] for pair in column), statistics.fmean(pair[1] for pair in column))
        for column in zip(*members, strict=True)
    ]


def _weights_hash(directory: Path) -> str:
    """SHA-256, in hex, over every member's safetensors files in order."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("member_*/*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
