"""The canonical text files of a run: what every source of data becomes, and what every later stage reads.

| file in `<run_dir>/data/` | record | read by |
|---|---|---|
| sft.jsonl | SftExample | SFT |
| prompts.jsonl, eval_prompts.jsonl | PromptRecord | collection and PPO; evaluation |
| preferences.jsonl | PreferencePair | RM training, DPO |
| preferences_unclear.jsonl | PreferencePair | `keel data audit` |
| fresh_preferences.jsonl | PreferencePair | refreshes of the RM, DPO |
| report.json | DataReport | people, the run's report |

A prompt is plain text or a list of chat messages ({"role", "content"}).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from cluster.errors import DataError
from cluster.files import atomic_write_bytes

Prompt = str | list[dict[str, str]]

SFT_FILE: Final = "sft.jsonl"
PROMPTS_FILE: Final = "prompts.jsonl"
EVAL_PROMPTS_FILE: Final = "eval_prompts.jsonl"
PREFERENCES_FILE: Final = "preferences.jsonl"
UNCLEAR_FILE: Final = "preferences_unclear.jsonl"
"""Judged, without a clear majority. No model trains on them; an audit counts how often annotators agree on them too."""
FRESH_PREFERENCES_FILE: Final = "fresh_preferences.jsonl"
"""Judged by a function while the policy trained."""
REVIEWED_PREFERENCES_FILE: Final = "preferences.jsonl"
"""In the run's directory itself: judged by people."""
REPORT_FILE: Final = "report.json"


class SftExample(msgspec.Struct, frozen=True, kw_only=True):
    """One demonstration."""

    prompt: Prompt
    answer: str


class PromptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt that the policy will answer."""

    prompt_id: str
    prompt: Prompt


class PreferencePair(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Two answers to one prompt, ordered by a judge.

    `votes`: each True is one for `chosen`, by the annotator of the same place in `annotators`. `confidence`: the
    majority's share of the votes, in (0.5, 1]. `policy_version`: which policy wrote `chosen`, and `rejected` too unless
    `rejected_version` names another; absent where not known. `weight`: in the reward model's loss. `judged_at`: ISO
    8601. `source`: where the pair comes from, e.g. "collected", "refresh", "review", "caught".
    """

    pair_id: str
    prompt: Prompt
    chosen: str
    rejected: str
    votes: tuple[bool, ...] | None = None
    annotators: tuple[str, ...] | None = None
    confidence: float | None = None
    policy_version: int | None = None
    rejected_version: int | None = None
    weight: float | None = None
    judged_at: str | None = None
    source: str | None = None


class TableReport(msgspec.Struct, kw_only=True):
    """What became of one table's records. Always: read = used + held_out + Σ rejected.

    `held_out`: left out of training because their prompt is kept for evaluation. `truncated`: used records with
    anything cut to fit max_prompt_tokens or max_response_tokens; a pair counts once, however many of its texts were.
    """

    read: int = 0
    used: int = 0
    held_out: int = 0
    truncated: int = 0
    truncated_prompts: int = 0
    truncated_answers: int = 0
    rejected: dict[str, int] = {}

    def reject(self, reason: str) -> None:
        """Count one record that is left out, for `reason`."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1


class DataReport(msgspec.Struct, kw_only=True):
    """Counts of every table. `fitted`: lengths were measured with the run's tokenizer (see cluster.data.fit_data)."""

    tables: dict[str, TableReport]
    fitted: bool = False


Row = TypeVar("Row", bound=SftExample | PromptRecord | PreferencePair)


def data_dir(run_dir: Path) -> Path:
    """Where the canonical files of a run are."""
    return run_dir / "data"


def stable_prompt_id(prompt: Prompt) -> str:
    """16 hex digits that depend on the prompt's content alone."""
    return hashlib.sha256(msgspec.json.encode(prompt)).hexdigest()[:16]


def write_atomically(path: Path, payload: bytes) -> None:
    """A reader sees the old file or the whole new one. Raises DataError when the disk refuses."""
    try:
        atomic_write_bytes(path, payload)
    except OSError as error:
        raise DataError(
            f"cannot write {path}", got=str(error), do="free some disk space or choose another runs_dir"
        ) from error


def read_training_pairs(path: Path, *, run_dir: Path) -> list[PreferencePair]:
    """All pairs of a canonical file but those about prompts that the run keeps for evaluation: people compare the
    policies' answers to these too. Raises DataError as read_rows."""
    pairs, held_out = read_rows(path, PreferencePair), data_dir(run_dir) / EVAL_PROMPTS_FILE
    records = read_rows(held_out, PromptRecord) if held_out.is_file() else []
    kept = {stable_prompt_id(record.prompt) for record in records}
    return [pair for pair in pairs if stable_prompt_id(pair.prompt) not in kept]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line, atomically."""
    write_atomically(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add one JSON object a line, in one write. Raises DataError when the disk refuses."""
    try:
        with path.open("ab") as stream:
            stream.write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    except OSError as error:
        raise DataError(f"cannot write {path}", got=str(error), do="free some disk space") from error


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """All records of a canonical file. Raises DataError, naming file and line, on anything else."""
    decoder = msgspec.json.Decoder(kind)
    rows: list[Row] = []
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    rows.append(decoder.decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise DataError(
                        f"{path}:{number} is not a {kind.__name__}",
                        got=f"{error}: {line[:80]!r}",
                        do="run the data stage again, or repair the line",
                    ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}", got=str(error), do="run the data stage first") from error
    return rows


def write_report(run_dir: Path, report: DataReport) -> None:
    """Write `<run_dir>/data/report.json`."""
    write_atomically(data_dir(run_dir) / REPORT_FILE, msgspec.json.format(msgspec.json.encode(report), indent=2))


def read_report(run_dir: Path) -> DataReport:
    """Read `<run_dir>/data/report.json`. Raises DataError."""
    path = data_dir(run_dir) / REPORT_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=DataReport)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"cannot read {path}", got=str(error), do="run the data stage again") from error


def record_table(run_dir: Path, name: str, table: TableReport) -> DataReport:
    """Add or replace one table's counts in report.json, for tables that a later stage makes (collected preferences)."""
    report = read_report(run_dir)
    report.tables[name] = table
    write_report(run_dir, report)
    return report
