"""Direct preference optimisation with TRL (Rafailov et al. 2023): a policy from preferences alone, for when the reward
model is poor, or on top of PPO.

loss = −log σ(β·(Δ_chosen − Δ_rejected)), Δ = log π(answer|prompt) − log π_start(answer|prompt), in nats a sequence.

Reads `<run_dir>/data/preferences.jsonl`, and the fresh and reviewed preferences of the run where there are any. Starts
from policy/final where PPO is among the stages, else from sft/model; the start is also the reference. Writes
`<run_dir>/dpo/model` (a Hugging Face directory) and dpo/report.json, complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

from cluster.data_records import (
    FRESH_PREFERENCES_FILE,
    PREFERENCES_FILE,
    REVIEWED_PREFERENCES_FILE,
    data_dir,
    read_training_pairs,
    stable_prompt_id,
    write_atomically,
)
from cluster.errors import DataError, ModelError
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
from cluster.text import Rejection, encode_answer, encode_prompt, load_tokenizer
from configs.run import DataSection, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_FRACTION: Final = 0.1
"""Of the prompts, kept out to measure the implicit reward on."""


class EncodedPreference(TypedDict):
    """Token ids; both answers with their end-of-sequence token where they end by themselves."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class DpoReport:
    """What DPO did. `accuracy`: share of held-out pairs whose chosen answer gained more log-probability than the
    rejected one; about 0.5 by chance. `chosen_gain`, `rejected_gain`: Δ, in nats a sequence, on held-out pairs."""

    started_from: str
    pairs_train: int
    pairs_held_out: int
    steps: int
    accuracy: float
    chosen_gain: float
    rejected_gain: float
    eval_loss: float
    seconds: float


def run_dpo(config: RunConfig, run_dir: Path, emit: Emit) -> DpoReport:
    """Train and save; the same configuration, threads and data give the same weights.

    `emit` gets {"stage": "dpo", "step", "steps", "loss"} every ten steps and at the end a report with "done": True.
    Raises DataError (no or too few preferences), ModelError (nothing to start from, or disk full), NonFiniteError.
    """
    started_s = time.monotonic()
    silence_progress_bars()
    start_dir = start_of(config, run_dir)
    tokenizer = load_tokenizer(start_dir)
    train, held_out = split(encode_preferences(run_dir, data=config.data, tokenizer=tokenizer), seed=config.seed)
    settings = FitSettings(
        examples=len(train),
        epochs=config.dpo.epochs,
        batch_size=config.dpo.batch_size,
        learning_rate=config.dpo.learning_rate,
        warmup_fraction=config.dpo.warmup_fraction,
        seed=config.seed,
    )
    with torch_threads(config.dpo.threads), tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(config, start_dir, tokenizer, data=(train, held_out), settings=settings,
                           scratch=Path(scratch))  # fmt: skip
        trainer.add_callback(progress_callback(emit, stage="dpo", steps=settings.steps))
        run_trainer(trainer, stage="dpo")
        measured = trainer.evaluate()
        with whole_directory(run_dir / "dpo" / "model", error=ModelError) as directory:
            trainer.model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    beta = config.dpo.beta
    report = DpoReport(
        started_from=str(start_dir.relative_to(run_dir)),
        pairs_train=len(train),
        pairs_held_out=len(held_out),
        steps=settings.steps,
        accuracy=float(measured["eval_rewards/accuracies"]),
        chosen_gain=float(measured["eval_rewards/chosen"]) / beta,  # TRL's "rewards" are β·Δ
        rejected_gain=float(measured["eval_rewards/rejected"]) / beta,
        eval_loss=float(measured["eval_loss"]),
        seconds=time.monotonic() - started_s,
    )
    write_atomically(run_dir / "dpo" / "report.json", json.dumps(asdict(report), indent=2).encode())
    emit({"stage": "dpo", "done": True, **asdict(report)})
    return report


def start_of(config: RunConfig, run_dir: Path) -> Path:
    """The policy that DPO starts from. Raises ModelError when it is not there."""
    after_ppo = "ppo" in config.stages
    directory = run_dir / "policy" / "final" if after_ppo else run_dir / "sft" / "model"
    if not (directory / "config.json").is_file():
        raise ModelError(
            "no policy to start DPO from",
            got=f"{directory} is not there",
            do=f"run the {'ppo' if after_ppo else 'sft'} stage first",
        )
    return directory


def encode_preferences(
    run_dir: Path, *, data: DataSection, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, EncodedPreference]]:
    """(prompt's id, token ids) of every pair whose answers still differ when cut to data.max_response_tokens, without
    those about prompts that are kept for evaluation. Raises DataError under two."""
    files = (
        data_dir(run_dir) / PREFERENCES_FILE,
        data_dir(run_dir) / FRESH_PREFERENCES_FILE,
        run_dir / REVIEWED_PREFERENCES_FILE,
    )
    found: list[tuple[str, EncodedPreference]] = []
    for pair in [pair for path in files if path.is_file() for pair in read_training_pairs(path, run_dir=run_dir)]:
        prompt = encode_prompt(tokenizer, pair.prompt, max_tokens=data.max_prompt_tokens, long_prompt=data.long_prompt)
        if isinstance(prompt, Rejection):  # the data stage counted it
            continue
        chosen = encode_answer(tokenizer, pair.chosen, max_tokens=data.max_response_tokens).ids
        rejected = encode_answer(tokenizer, pair.rejected, max_tokens=data.max_response_tokens).ids
        if chosen != rejected:
            encoded = EncodedPreference(
                prompt_ids=list(prompt.ids), chosen_ids=list(chosen), rejected_ids=list(rejected)
            )
            found.append((stable_prompt_id(pair.prompt), encoded))
    if len(found) < 2:
        raise DataError(
            "too few preference pairs for DPO",
            got=f"{len(found)} usable",
            do="give data.preferences, or let the collect stage sample pairs for a judge",
        )
    return found


def split(
    pairs: Sequence[tuple[str, EncodedPreference]], *, seed: int
) -> tuple[list[EncodedPreference], list[EncodedPreference]]:
    """(training, held-out), no prompt in both. Raises DataError when all pairs share one prompt."""

    def position(prompt_id: str) -> bytes:
        return hashlib.sha256(f"dpo {seed} {prompt_id}".encode()).digest()

    prompts = sorted({prompt_id for prompt_id, _ in pairs}, key=position)
    kept_out = set(prompts[: max(1, round(HELD_OUT_FRACTION * len(prompts)))])
    train = [pair for prompt_id, pair in pairs if prompt_id not in kept_out]
    if not train:
        raise DataError("all preference pairs are on one prompt", got=f"{len(pairs)} pairs", do="give pairs on more")
    return train, [pair for prompt_id, pair in pairs if prompt_id in kept_out]


def _trainer(
    config: RunConfig,
    start_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: tuple[list[EncodedPreference], list[EncodedPreference]],
    settings: FitSettings,
    scratch: Path,
) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class EncodedDpoTrainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset  # token ids already, by cluster.text

    section = config.dpo
    model = AutoModelForCausalLM.from_pretrained(start_dir, dtype=torch.float32, local_files_only=True)
    arguments = DPOConfig(
        **trainer_arguments(settings, scratch=scratch),
        beta=section.beta,
        loss_type=[section.loss],
        label_smoothing=section.label_smoothing,
        max_length=None,  # lengths were cut by cluster.text
        precompute_ref_log_probs=True,  # the reference does not change, so it need not stay in memory
    )
    return EncodedDpoTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(data[0]),
        eval_dataset=Dataset.from_list(data[1]),
        processing_class=tokenizer,
    )
