"""The data stage: any source → canonical text files, with a count for every record.

Two steps, because a new model's tokenizer is trained on the run's own text:

1. `prepare_data` reads a world or tables and writes `<run_dir>/data/` (see cluster.data_records).
2. `fit_data`, once there is a tokenizer, measures lengths: drops what the configuration rejects, counts what later
   stages will truncate. The files keep whole texts; truncation happens in cluster.text, identically everywhere.

Nothing is dropped without a counted reason; a table with no usable record left is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.data_records import (
    EVAL_PROMPTS_FILE,
    PREFERENCES_FILE,
    PROMPTS_FILE,
    SFT_FILE,
    DataReport,
    PreferencePair,
    PromptRecord,
    Row,
    SftExample,
    TableReport,
    data_dir,
    read_report,
    read_rows,
    stable_prompt_id,
    write_report,
    write_rows,
)
from cluster.data_tables import read_table
from cluster.dialogues import Rejection, check_answer, check_prompt
from cluster.errors import ConfigError, DataError
from cluster.plugin import resolve
from cluster.preference_table import read_preferences, require_well_formed
from cluster.text import encode_answer, encode_prompt
from configs.run import DataSection, FileSource, HubSource, RunConfig, WorldSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIE_AFTER_TRUNCATION: Final = "tie after truncation"
DUPLICATE_PROMPT: Final = "duplicate prompt"
ALSO_REJECTED: Final = "chosen in one pair, rejected in another"
SAME_ANSWER: Final = "same answer as in an earlier pair"
LONG_ANSWER: Final = "answer longer than max_response_tokens"


def prepare_data(config: RunConfig, run_dir: Path) -> DataReport:
    """Write the canonical files and report.json of a run; returns the report.

    Raises DataError (source missing, malformed, without the columns, or without one usable record) and ConfigError
    (no source at all, or a world factory that cannot be imported).
    """
    if config.data.world is not None:
        tables = _from_world(config.data.world, directory=data_dir(run_dir), seed=config.seed)
    else:
        tables = _from_tables(config.data, directory=data_dir(run_dir), seed=config.seed)
    report = DataReport(tables=tables)
    write_report(run_dir, report)
    _require_usable(report)
    return report


def fit_data(config: RunConfig, run_dir: Path, *, tokenizer: PreTrainedTokenizerBase) -> DataReport:
    """Measure the canonical files with the run's tokenizer; rewrite them without what does not fit.

    Idempotent: a report already marked `fitted` is returned as it is. Raises DataError if nothing is left of a table.
    """
    report = read_report(run_dir)
    if report.fitted:
        return report
    fitter = _Fitter(config.data, tokenizer)
    for name, kind in _KINDS.items():
        path = data_dir(run_dir) / f"{name}.jsonl"
        if name in report.tables and path.is_file():
            rows = read_rows(path, kind)
            kept = [row for row in rows if fitter.keep(row, report.tables[name])]
            report.tables[name].used = len(kept)
            write_rows(path, kept)
    report.fitted = True
    write_report(run_dir, report)
    _require_usable(report)
    return report


_KINDS: Final[dict[str, type[SftExample] | type[PromptRecord] | type[PreferencePair]]] = {
    "sft": SftExample,
    "prompts": PromptRecord,
    "eval_prompts": PromptRecord,
    "preferences": PreferencePair,
}


def _require_usable(report: DataReport) -> None:
    for name, table in report.tables.items():
        if not table.used:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(table.rejected.items()))
            raise DataError(
                f"no usable record is left in {name}",
                got=f"{table.read} read, {table.held_out} held out, rejected: {reasons or 'none'}",
                do="check the column map, the length limits and eval_fraction",
            )


# ---------------------------------------------------------------- world


def _from_world(world: WorldSource, *, directory: Path, seed: int) -> dict[str, TableReport]:
    make = resolve(world.factory, key="data.world.factory")
    make(directory, seed=seed, sft_examples=world.sft_examples, prompts=world.prompts, eval_prompts=world.eval_prompts)
    tables: dict[str, TableReport] = {}
    for name in ("sft", "prompts", "eval_prompts"):
        count = len(read_rows(directory / f"{name}.jsonl", _KINDS[name]))
        tables[name] = TableReport(read=count, used=count)
    return tables


# ---------------------------------------------------------------- tables


class _EvalSplit:
    """Which prompts are kept out for evaluation: a seeded hash of the prompt's id, so the same prompt falls on the
    same side in every table, every run of that seed and every order of the rows."""

    def __init__(self, fraction: float, *, seed: int) -> None:
        self._fraction, self._seed = fraction, seed
        self._forced: str | None = None

    def position(self, prompt_id: str) -> float:
        """Uniform in [0, 1)."""
        digest = hashlib.sha256(f"{self._seed}:{prompt_id}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64

    def force_one_of(self, prompt_ids: list[str]) -> None:
        """Small tables: keep one prompt out even if the hash would keep none."""
        if self._fraction > 0 and len(prompt_ids) > 1 and not any(map(self.holds_out, prompt_ids)):
            self._forced = min(prompt_ids, key=self.position)

    def holds_out(self, prompt_id: str) -> bool:
        return prompt_id == self._forced or self.position(prompt_id) < self._fraction


def _from_tables(data: DataSection, *, directory: Path, seed: int) -> dict[str, TableReport]:
    if data.preferences is None and data.prompts is None:
        raise ConfigError(
            "the run has no prompts",
            got="data without world, prompts or preferences",
            do="set data.world, data.prompts or data.preferences",
        )
    tables: dict[str, TableReport] = {}
    pairs: list[PreferencePair] = []
    if data.preferences is not None:
        loaded = read_preferences(data.preferences, needed=False)
        require_well_formed(loaded, data.preferences)
        tables["preferences"], pairs = loaded.report, loaded.pairs
    tables["prompts"] = TableReport()
    records = list(_prompts(data.prompts, pairs, tables["prompts"]))
    split = _EvalSplit(data.eval_fraction, seed=seed)
    split.force_one_of([record.prompt_id for record in records])

    _write_prompts(directory, records, split=split, tables=tables)
    examples: list[SftExample] = []
    if data.sft is not None:
        tables["sft"] = TableReport()
        examples = list(_sft(data.sft, tables["sft"]))
    elif pairs:
        tables["sft"] = TableReport()
        examples = list(_demonstrations(pairs, tables["sft"]))
    if examples:
        write_rows(directory / SFT_FILE, _train_rows(examples, split=split, table=tables["sft"]))
    if pairs:
        write_rows(directory / PREFERENCES_FILE, _train_rows(pairs, split=split, table=tables["preferences"]))
    return tables


def _prompts(
    source: FileSource | HubSource | None, pairs: list[PreferencePair], table: TableReport
) -> Iterator[PromptRecord]:
    """Distinct prompts of the table, or of the pairs where there is none."""
    values: Iterator[Any] = (
        (row["prompt"] for row in read_table(source, fields=("prompt",))) if source else (pair.prompt for pair in pairs)
    )
    seen: set[str] = set()
    for value in values:
        table.read += 1
        prompt = check_prompt(value)
        if isinstance(prompt, Rejection):
            table.reject(prompt.reason)
            continue
        prompt_id = stable_prompt_id(prompt)
        if prompt_id in seen:
            table.reject(DUPLICATE_PROMPT)
            continue
        seen.add(prompt_id)
        yield PromptRecord(prompt_id=prompt_id, prompt=prompt)


def _sft(source: FileSource | HubSource, table: TableReport) -> Iterator[SftExample]:
    for row in read_table(source, fields=("prompt", "answer")):
        table.read += 1
        prompt = check_prompt(row["prompt"])
        if isinstance(prompt, Rejection):
            table.reject(prompt.reason)
            continue
        answer = check_answer(row["answer"])
        if isinstance(answer, Rejection):
            table.reject(answer.reason)
            continue
        yield SftExample(prompt=prompt, answer=answer)


def _demonstrations(pairs: list[PreferencePair], table: TableReport) -> Iterator[SftExample]:
    """The chosen answers, each once, without those that lost to another: of a ranking, the best alone."""
    rejected = {(stable_prompt_id(pair.prompt), pair.rejected) for pair in pairs}
    seen: set[tuple[str, str]] = set()
    for pair in pairs:
        table.read += 1
        key = (stable_prompt_id(pair.prompt), pair.chosen)
        if key in rejected:
            table.reject(ALSO_REJECTED)
        elif key in seen:
            table.reject(SAME_ANSWER)
        else:
            seen.add(key)
            yield SftExample(prompt=pair.prompt, answer=pair.chosen)


def _write_prompts(
    directory: Path, records: list[PromptRecord], *, split: _EvalSplit, tables: dict[str, TableReport]
) -> None:
    held_out = [record for record in records if split.holds_out(record.prompt_id)]
    rest = [record for record in records if not split.holds_out(record.prompt_id)]
    tables["prompts"].used, tables["prompts"].held_out = len(rest), len(held_out)
    write_rows(directory / PROMPTS_FILE, rest)
    write_rows(directory / EVAL_PROMPTS_FILE, held_out)
    if held_out:
        tables["eval_prompts"] = TableReport(read=len(held_out), used=len(held_out))


def _train_rows(rows: list[Any], *, split: _EvalSplit, table: TableReport) -> list[Any]:
    """Rows whose prompt is not kept for evaluation."""
    kept = [row for row in rows if not split.holds_out(stable_prompt_id(row.prompt))]
    table.held_out, table.used = len(rows) - len(kept), len(kept)
    return kept


# ---------------------------------------------------------------- lengths


class _Fitter:
    """Decides for one record whether its lengths fit, and counts what will be truncated."""

    def __init__(self, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data, self._tokenizer = data, tokenizer

    def keep(self, row: Row, table: TableReport) -> bool:
        """False: the record is left out, and its reason counted."""
        data = self._data
        prompt = encode_prompt(
            self._tokenizer, row.prompt, max_tokens=data.max_prompt_tokens, long_prompt=data.long_prompt
        )
        if isinstance(prompt, Rejection):
            table.reject(prompt.reason)
            return False
        answers = [
            encode_answer(self._tokenizer, answer, max_tokens=data.max_response_tokens) for answer in _answers(row)
        ]
        cut = any(answer.truncated for answer in answers)
        if cut and data.long_response == "reject":
            table.reject(LONG_ANSWER)
            return False
        if len(answers) == 2 and answers[0].ids == answers[1].ids:
            table.reject(TIE_AFTER_TRUNCATION)
            return False
        table.truncated_prompts += prompt.truncated
        table.truncated_answers += cut
        table.truncated += prompt.truncated or cut
        return True


def _answers(row: SftExample | PromptRecord | PreferencePair) -> tuple[str, ...]:
    if isinstance(row, PromptRecord):
        return ()
    if isinstance(row, SftExample):
        return (row.answer,)
    return (row.chosen, row.rejected)
