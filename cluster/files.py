"""Files that are whole or absent, and logs of JSON lines that survive a kill.

Always holds: a reader sees the old content or the new, never a part; an `atomic_directory` appears complete or not at
all; of a JSON Lines file at most the last line is torn, and readers leave a torn line out.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.errors import DataError

Json = dict[str, Any]
"""One JSON object."""
_TEMPORARY = re.compile(r"\.tmp-\d+$")


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably. Parent directories are made. Raises OSError; `path` is then as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, durably. Raises OSError; `path` is then as it was."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to fill, which becomes `path` when the block ends without an error.

    Every file in it is on disk before the rename. `path` must not exist. An error, or a kill at any moment, leaves
    `path` absent. Raises FileExistsError, OSError.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Delete `path` so that a kill half-way leaves a temporary name, never a half-empty `path`. Raises OSError."""
    doomed = _temporary_name(path)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_stale(directory: Path) -> list[Path]:
    """Delete what killed writers left in `directory`. Only its one living writer may call this. Returns what went."""
    stale = [path for path in directory.glob("*.tmp-*") if _TEMPORARY.search(path.name)] if directory.is_dir() else []
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return stale


def fsync_tree(path: Path) -> None:
    """Make every file under `path`, and their names, durable. Raises OSError."""
    for folder, _, names in os.walk(path):
        for name in names:
            _fsync_file(Path(folder, name))
        fsync_directory(Path(folder))


def fsync_directory(path: Path) -> None:
    """Make the names in `path` durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


# ---------------------------------------------------------------- JSON lines


class JsonlWriter:
    """Appends one JSON object a line. Each record reaches the file before `write` returns.

    A torn last line, left by a kill, is cut off on opening. NaN and infinities are no JSON and are written as null,
    that is, as absent. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend_tail(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, object]) -> None:
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError:
            line = json.dumps(_without_non_finite(record), ensure_ascii=False, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonlTail:
    """Reads a growing JSON Lines file piece by piece: each `read` gives the whole lines that are new since the last.

    The file may not exist yet. It may be cut back or replaced, as a resumed learner does: lines that it shares with
    what was read stay read, those after them are new. Lines that are no JSON objects are left out: this reader is for
    displays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset_bytes = 0
        self._read_lines: list[int] = []
        """Hash of each line that was read, to find where a replaced file departs."""

    def read(self) -> list[Json]:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                replaced = status.st_ino != self._inode or status.st_size < self._offset_bytes
                start = 0 if replaced else self._offset_bytes
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return []
        whole, newline, _ = data.rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        if replaced:
            shared = self._shared_with(lines)
            self._read_lines, lines = self._read_lines[:shared], lines[shared:]
        self._inode, self._offset_bytes = status.st_ino, start + len(whole) + len(newline)
        self._read_lines.extend(map(hash, lines))
        records = (_parse_object(line) for line in lines)
        return [record for record in records if record is not None]

    def _shared_with(self, lines: list[bytes]) -> int:
        """How many lines at the start were read before."""
        pairs = zip(self._read_lines, map(hash, lines), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def read_jsonl(path: Path) -> list[Json]:
    """All objects of a JSON Lines file, blank lines left out and a torn last line too.

    Raises DataError naming file and line for any other line that is no JSON object, or when the file is unreadable.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}", got=str(error), do="check the path and its permissions") from error
    lines = data.split(b"\n")
    records: list[Json] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse_object(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise DataError(f"{path}:{number}: not a JSON object", got=repr(line[:80]), do="mend or delete this line")
    return records


def _parse_object(line: bytes) -> Json | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _mend_tail(path: Path) -> None:
    """Cut a torn last line off; end a whole one that lacks its newline."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        head, newline, tail = data.rpartition(b"\n")
        if not tail:
            return
        if _parse_object(tail) is None:
            file.truncate(len(head) + len(newline))
        else:
            file.write(b"\n")


def _without_non_finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return value
