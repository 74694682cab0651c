"""Supervised fine-tuning on demonstrations, with TRL: the policy that PPO starts from and is held close to. With
sft.epochs 0 a pretrained model is that policy, and is copied as it is.

The loss covers the answer and its end-of-sequence token, not the prompt. Reads `<run_dir>/data/sft.jsonl`; writes
`<run_dir>/sft/model` (an ordinary Hugging Face directory) and `<run_dir>/sft/report.json`.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

from cluster.data_records import SFT_FILE, SftExample, data_dir, read_rows, write_atomically
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
from cluster.stored_models import load_stored, stored_dtype
from cluster.text import Rejection, encode_answer, encode_prompt, load_tokenizer
from configs.run import DataSection, RunConfig
from learner.model_init import InitialModel, make_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_FRACTION: Final = 0.05
IGNORED_LABEL: Final = -100
"""Label of positions outside the loss, by torch's and transformers' convention."""


class EncodedExample(TypedDict):
    """[L] prompt ids then answer ids, and [L] labels, the prompt's ignored."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class SftReport:
    """What SFT did. `eval_loss`: nats a token on held-out demonstrations; `perplexity`: its exponential. Neither is
    known of a model that was taken as it is."""

    examples_train: int
    examples_held_out: int
    steps: int
    eval_loss: float | None
    perplexity: float | None
    seconds: float
    taken_as_it_is: bool = False


def run_sft(config: RunConfig, run_dir: Path, emit: Emit) -> SftReport:
    """Train and save the SFT policy, or take the model as it is; the same configuration, threads and data give the same
    weights.

    `emit` gets {"stage": "sft", "step", "steps", "loss"} every ten steps and at the end a report with "done": True.
    Raises DataError (no demonstrations), ModelError (no model, or disk full), NonFiniteError.
    """
    started_s = time.monotonic()
    silence_progress_bars()
    initial = make_model(config, run_dir)
    fitted = _train(initial, config, run_dir, emit) if config.sft.epochs else _take(initial, run_dir)
    report = replace(fitted, seconds=time.monotonic() - started_s)
    write_atomically(run_dir / "sft" / "report.json", json.dumps(asdict(report), indent=2).encode())
    emit({"stage": "sft", "done": True, **asdict(report)})
    return report


def _take(initial: InitialModel, run_dir: Path) -> SftReport:
    """Copy the model, its weights bit for bit. Through Transformers, so that what is copied is whole and loads."""
    model = load_stored(initial.model_dir, kind="language model", dtype=stored_dtype(initial.model_dir))
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise NonFiniteError(
                f"{initial.model_dir} has weights that are not finite", got=name, do="use another model"
            )
    model.config.use_cache = True
    with whole_directory(run_dir / "sft" / "model", error=ModelError) as directory:
        model.save_pretrained(directory)
        load_tokenizer(initial.tokenizer_dir).save_pretrained(directory)
    return SftReport(0, 0, steps=0, eval_loss=None, perplexity=None, seconds=0.0, taken_as_it_is=True)


def _train(initial: InitialModel, config: RunConfig, run_dir: Path, emit: Emit) -> SftReport:
    tokenizer = load_tokenizer(initial.tokenizer_dir)
    train, held_out = split_examples(encode_examples(run_dir, data=config.data, tokenizer=tokenizer), seed=config.seed)
    settings = FitSettings(
        examples=len(train),
        epochs=config.sft.epochs,
        batch_size=config.sft.batch_size,
        learning_rate=config.sft.learning_rate,
        warmup_fraction=config.sft.warmup_fraction,
        weight_decay=config.sft.weight_decay,
        seed=config.seed,
    )
    with torch_threads(config.sft.threads), tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(initial.model_dir, tokenizer, train=train, held_out=held_out, settings=settings,
                           scratch=Path(scratch))  # fmt: skip
        trainer.add_callback(progress_callback(emit, stage="sft", steps=settings.steps))
        run_trainer(trainer, stage="sft")
        eval_loss = float(trainer.evaluate()["eval_loss"])
        with whole_directory(run_dir / "sft" / "model", error=ModelError) as directory:
            trainer.model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    return SftReport(
        examples_train=len(train),
        examples_held_out=len(held_out),
        steps=settings.steps,
        eval_loss=eval_loss,
        perplexity=math.exp(min(eval_loss, 700.0)),
        seconds=0.0,
    )


def encode_examples(run_dir: Path, *, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[EncodedExample]:
    """Demonstrations as token ids. Raises DataError under two usable ones."""
    examples: list[EncodedExample] = []
    for row in read_rows(data_dir(run_dir) / SFT_FILE, SftExample):
        prompt = encode_prompt(tokenizer, row.prompt, max_tokens=data.max_prompt_tokens, long_prompt=data.long_prompt)
        if isinstance(prompt, Rejection):  # the data stage counted it
            continue
        answer = encode_answer(tokenizer, row.answer, max_tokens=data.max_response_tokens)
        examples.append(
            {
                "input_ids": [*prompt.ids, *answer.ids],
                "labels": [IGNORED_LABEL] * len(prompt.ids) + list(answer.ids),
            }
        )
    if len(examples) < 2:
        raise DataError(
            "too few demonstrations for SFT", got=f"{len(examples)} usable", do="check data.sft and its column map"
        )
    return examples


def split_examples(examples: list[EncodedExample], *, seed: int) -> tuple[list[EncodedExample], list[EncodedExample]]:
    """(to train on, held out): the same ones for the same examples and seed."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    held_out = max(1, round(HELD_OUT_FRACTION * len(examples)))
    return [examples[i] for i in order[held_out:]], [examples[i] for i in order[:held_out]]


def _trainer(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: list[EncodedExample],
    held_out: list[EncodedExample],
    settings: FitSettings,
    scratch: Path,
) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    # Batches are drawn at random, not by length: the loss is a mean over a batch's tokens, so a batch of short answers
    # alone would weigh each of its tokens more, and the policy would learn to stop early.
    arguments = SFTConfig(
        **trainer_arguments(settings, scratch=scratch),
        max_length=None,  # lengths were cut by cluster.text
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
    )
