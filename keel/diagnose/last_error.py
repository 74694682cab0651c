"""The last error that a run's logs tell of: which process, what, and which kind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TAIL_BYTES: Final = 64 * 1024
_ERROR: Final = re.compile(
    r"^[|\s]*(?:[\w.]+\.)?(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt)|InterruptedRun)\b:? ?(?P<what>.*)$"
)
_GOT: Final = re.compile(r"^[|\s]*got: (?P<got>.*)$")
_NO_MEMORY: Final = re.compile(
    r"out of memory|OutOfMemory|Cannot allocate memory|MemoryError|oom-kill|SIGKILL.*memory", re.IGNORECASE
)


@dataclass(frozen=True)
class LastError:
    file: str
    kind: str
    what: str
    out_of_memory: bool = False


def last_error(logs: Path) -> LastError | None:
    """From the log that was written last among those that tell of an error. None without any. The drivers' and the
    learner's come before the others': a worker's error that was dealt with says little."""
    try:
        paths = [path for path in logs.glob("*.log") if path.is_file()]
    except OSError:
        return None
    found = [(path, error) for path in paths if (error := _of(path)) is not None]
    if not found:
        return None
    return max(found, key=lambda one: (one[1].out_of_memory, _rank(one[0]), one[0].stat().st_mtime))[1]


def _rank(path: Path) -> int:
    return next((rank for rank, role in ((2, "learner"), (1, "driver")) if path.name.startswith(role)), 0)


def _of(path: Path) -> LastError | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    error, got = None, ""
    for index, line in enumerate(lines):
        if (match := _ERROR.match(line)) is not None:
            error = match
            told = _GOT.match(lines[index + 1]) if index + 1 < len(lines) else None
            got = f" ({told['got']})" if told is not None else ""
    memory = next((line for line in reversed(lines) if _NO_MEMORY.search(line)), None)
    if memory is not None:
        return LastError(path.name, error["kind"] if error else "OutOfMemory", memory.strip()[:300], True)
    if error is None:
        return None
    return LastError(path.name, error["kind"], f"{error['what']}{got}"[:300])
