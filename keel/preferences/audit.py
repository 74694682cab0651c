"""`keel data audit`: reads preferences, prints what is wrong with them, writes audit.json and plots. Starts nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from cluster.data_records import (
    PREFERENCES_FILE,
    PROMPTS_FILE,
    SFT_FILE,
    UNCLEAR_FILE,
    PreferencePair,
    Prompt,
    data_dir,
    read_rows,
)
from cluster.data_tables import Located, read_table, scan_table
from cluster.dialogues import Rejection, check_prompt
from cluster.errors import DataError
from cluster.files import atomic_write_bytes
from cluster.judgements import Judged, parse
from cluster.preference_table import LoadedPreferences, read_preferences
from configs.run import FileSource
from reward_service.audit.rebalance import How
from reward_service.audit.records import AUDIT_FILE, Audit, encode_audit

Say = Callable[[str], None]
Rebalance = Literal["none", "stratified", "weights"]
HOW: Final[dict[Rebalance, How]] = {"none": "none", "stratified": "stratified", "weights": "inverse_frequency"}
"""What --rebalance says → rm.rebalance."""

_PROBLEMS_SHOWN: Final = 5
_TABLES: Final = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class AuditInput:
    """What to audit. `path`: preferences in any form that Keel reads, a directory that holds one file of them, or a
    run's directory, whose SFT and RL prompts and judged pairs without a clear majority are then looked at too.
    `columns`: field → column of the preferences. `rebalance`: say what it would change."""

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    sft: Path | None = None
    prompts: Path | None = None
    unclear: Path | None = None
    rebalance: Rebalance = "none"


def audit_file(what: AuditInput, *, out: Path | None = None, seed: int = 0, say: Say | None = print) -> Audit:
    """Audit, print, and write audit.json and plots to `out` (left out: `<file>.audit/` beside the file, `audit/` in a
    run). `say`: None prints nothing. Raises DataError: nothing to read, nothing usable, or `out` cannot be written."""
    what = _resolved(what)
    audit = _audit(what, seed=seed)
    if say is not None:
        from keel.preferences.table import print_audit

        print_audit(audit)
    directory = out or _default_out(what.path)
    written = _write(audit, directory)
    if say is not None:
        say(f"written to {directory}: {', '.join(path.name for path in written)}")
    return audit


def load_audit(what: AuditInput, *, seed: int = 0) -> Audit:
    """The audit alone: nothing printed, nothing written. Raises DataError."""
    return _audit(_resolved(what), seed=seed)


def _audit(what: AuditInput, *, seed: int) -> Audit:
    from reward_service.audit.agreement import votes_of
    from reward_service.audit.audit import Around, Records, audit

    source = FileSource(path=what.path, columns=dict(what.columns))
    loaded = read_preferences(source, needed=False)
    _require_pairs(what.path, loaded)
    unclear = [] if what.unclear is None else read_rows(what.unclear, PreferencePair)
    around = Around(
        unclear=[*loaded.unclear, *unclear],
        votes=[*loaded.votes, *votes_of(unclear)],
        ratings=loaded.ratings,
        shown=_shown(source),
        records=Records(
            read=loaded.counts["records"],
            refused=loaded.report.rejected,
            problems=[f"line {one.line}: {one.reason}" for one in loaded.problems if one.malformed],
        ),
        sft_prompts=_prompts(what.sft),
        rl_prompts=_prompts(what.prompts),
        rebalance=HOW[what.rebalance],
    )
    return audit(loaded.pairs, around=around, source=str(what.path), seed=seed)


def _resolved(what: AuditInput) -> AuditInput:
    """A run's directory → its files; another directory → the one table in it."""
    if not what.path.is_dir():
        return what
    data = data_dir(what.path)
    preferences = data / PREFERENCES_FILE
    if not preferences.is_file():
        tables = sorted(path for path in what.path.iterdir() if path.is_file() and path.name.endswith(_TABLES))
        if len(tables) == 1:
            return replace(what, path=tables[0])
        raise DataError(
            "no preferences to audit",
            got=f"{preferences} does not exist, and {what.path} holds {len(tables)} tables",
            do="give a file of preferences, or a run whose data or collect stage is done",
        )

    def own(name: str) -> Path | None:
        return data / name if (data / name).is_file() else None

    sft, prompts = what.sft or own(SFT_FILE), what.prompts or own(PROMPTS_FILE)
    return replace(what, path=preferences, sft=sft, prompts=prompts, unclear=own(UNCLEAR_FILE))


def _default_out(path: Path) -> Path:
    """Beside the data; here, where that place can only be read."""
    run = path.parent.parent
    if path == data_dir(run) / PREFERENCES_FILE:
        return run / "audit"
    name = f"{path.name}.audit"
    marked = path.parent.stat().st_mode & stat.S_IWUSR  # which root may write to all the same, and should not
    return path.with_name(name) if marked and os.access(path.parent, os.W_OK) else Path(name)


def _require_pairs(path: Path, loaded: LoadedPreferences) -> None:
    if loaded.pairs:
        return
    problems = "; ".join(f"line {one.line}: {one.reason}" for one in loaded.problems[:_PROBLEMS_SHOWN])
    counts = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(loaded.report.rejected.items()))
    raise DataError(
        f"no pair with a clear label in {path}",
        got=f"{loaded.counts['records']:,} records; {counts or 'nothing refused'}. {problems}".rstrip(),
        do="check the column map (--column prompt=question) and the lines named",
    )


def _shown(source: FileSource) -> list[tuple[Prompt, bool]]:
    """Prompt and "the first answer is preferred" of the records that name answers by place: answer_a and answer_b."""
    column = source.columns.get("preferred", "preferred")
    return [
        (item.pair.prompt, opinion)
        for row in scan_table(source)
        if isinstance(row, Located) and row.values.get(column) is not None
        for item in parse(row, columns=source.columns)
        if isinstance(item, Judged)
        for _, opinion in item.opinions
        if opinion is not None
    ]


def _prompts(path: Path | None) -> list[Prompt]:
    """Usable prompts of a table; the rest is the data stage's to count."""
    if path is None:
        return []
    rows = read_table(FileSource(path=path), fields=("prompt",))
    checked = [check_prompt(row["prompt"]) for row in rows]
    return [prompt for prompt in checked if not isinstance(prompt, Rejection)]


def _write(audit: Audit, directory: Path) -> list[Path]:
    """audit.json, which is there whole or not at all, and the plots."""
    from keel.preferences.plots import write_plots

    path = directory / AUDIT_FILE
    try:
        atomic_write_bytes(path, encode_audit(audit))
        return [path, *write_plots(audit, directory)]
    except OSError as error:
        raise DataError(
            f"cannot write the audit to {directory}", got=str(error), do="choose another place with --out"
        ) from error
