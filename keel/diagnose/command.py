"""`keel diagnose RUN`: read the run's record, write diagnosis.json and diagnosis.md into it, and show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.files import atomic_write_text
from keel.diagnose.record import read_record
from keel.diagnose.render import as_json, markdown, show
from keel.diagnose.story import Diagnosis, diagnose_record

if TYPE_CHECKING:
    from rich.console import Console

DIAGNOSIS_JSON = "diagnosis.json"
DIAGNOSIS_MD = "diagnosis.md"


def diagnose(
    run_dir: Path, *, as_json_text: bool = False, write: bool = True, console: Console | None = None
) -> Diagnosis:
    """Diagnose a run, finished or not, and print it: Markdown, or the whole of diagnosis.json. A directory that cannot
    be written to is told, not fatal.

    Raises DataError when there is no such directory.
    """
    from rich.console import Console as RichConsole

    console = console or RichConsole()
    diagnosis = diagnose_record(read_record(run_dir))
    text = _text(diagnosis)
    told = write_diagnosis(run_dir, diagnosis, text) if write else ""
    if as_json_text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        show(diagnosis, console=console)
        if told:
            console.print(f"\n{told}", markup=False, highlight=False, soft_wrap=True)
    return diagnosis


def write_diagnosis_of(run_dir: Path) -> None:
    """As `diagnose`, without a word."""
    diagnosis = diagnose_record(read_record(run_dir))
    write_diagnosis(run_dir, diagnosis, _text(diagnosis))


def _text(diagnosis: Diagnosis) -> str:
    return json.dumps(as_json(diagnosis), ensure_ascii=False, indent=1, allow_nan=False)


def write_diagnosis(run_dir: Path, diagnosis: Diagnosis, text: str) -> str:
    """Returns a line on where it lies, or why it does not."""
    try:
        atomic_write_text(run_dir / DIAGNOSIS_JSON, text + "\n")
        atomic_write_text(run_dir / DIAGNOSIS_MD, markdown(diagnosis))
    except OSError as error:
        return f"not written to the run directory: {error}"
    return f"Written: {run_dir / DIAGNOSIS_MD} and {DIAGNOSIS_JSON}"
