"""Rows out of tables: JSON Lines (also gzipped), Parquet, and Hugging Face datasets by name, with a column map.

`fields` name what Keel needs; the source's `columns` say where each is. A row comes out as a dict keyed by field, and a
field whose column is absent is an error that names the columns found: a misspelt map must not look like empty data.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from configs.run import FileSource, HubSource

_COMPRESSION_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class Located:
    """A raw row and where it stands, for messages. `line`: of the file, or the row's number."""

    where: str
    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """A line that is no record."""

    where: str
    line: int
    reason: str
    got: str
    do: str

    def error(self) -> DataError:
        """For readers that cannot go on without the line."""
        return DataError(f"{self.where} {self.reason}", got=self.got, do=self.do)


def read_table(
    source: FileSource | HubSource, *, fields: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield rows as {field: value}.

    A field listed in `optional` may be absent unless the column map names it; its key is then missing from every row
    that has no such column. Raises DataError: file missing or damaged, malformed line (file:line), unknown field in
    the column map, missing column (with those found).
    """
    check_columns(source, fields=[*fields, *optional])
    for row in scan_table(source):
        if isinstance(row, Unreadable):
            raise row.error()
        yield _pick(row, columns=source.columns, fields=fields, optional=optional)


def check_columns(source: FileSource | HubSource, *, fields: Sequence[str]) -> None:
    """Raise DataError for a column map with another field than `fields`."""
    for field in source.columns:
        if field not in fields:
            raise DataError(
                f"the column map of {_name(source)} names an unknown field",
                got=repr(field),
                do=f"use only {', '.join(fields)} (field: column)",
            )


def scan_table(source: FileSource | HubSource) -> Iterator[Located | Unreadable]:
    """Every record as it stands, under its own column names; a line that is none comes out as such and does not end
    the scan. Raises DataError for a file or dataset that is missing, unreadable or damaged."""
    rows = _file_rows(source.path) if isinstance(source, FileSource) else _hub_rows(source)
    return itertools.islice(rows, source.limit)


def _name(source: FileSource | HubSource) -> str:
    return str(source.path) if isinstance(source, FileSource) else f"dataset {source.name!r}"


def _pick(row: Located, *, columns: dict[str, str], fields: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    picked: dict[str, Any] = {}
    for field in [*fields, *optional]:
        column = columns.get(field, field)
        if column in row.values:
            picked[field] = row.values[column]
        elif field in fields or field in columns:
            raise DataError(
                f"{row.where}: no column {column!r} for the field {field!r}",
                got="columns " + (", ".join(sorted(map(str, row.values))) or "(none)"),
                do=f"map it in the configuration: columns: {{{field}: <column>}}",
            )
    return picked


def _file_rows(path: Path) -> Iterator[Located | Unreadable]:
    if not path.is_file():
        raise DataError("data file not found", got=str(path), do="check the path; it is relative to where keel runs")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return _parquet_rows(path)
    plain = suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes
    if plain[-1:] in ([".jsonl"], [".json"], [".ndjson"]):
        return _json_rows(path, compressed=suffixes[-1:] == [".gz"])
    raise DataError(
        "unknown kind of data file", got=str(path), do="use .jsonl, .jsonl.gz or .parquet (one record a line or row)"
    )


def _json_rows(path: Path, *, compressed: bool) -> Iterator[Located | Unreadable]:
    number = 0
    try:
        with gzip.open(path, "rb") if compressed else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _json_row(line, where=f"{path}:{number}", number=number)
    except _COMPRESSION_ERRORS as error:
        raise DataError(
            f"{path} is damaged after line {number}", got=f"{type(error).__name__}: {error}", do="copy the file again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}", got=str(error), do="check the path and its permissions") from error


def _json_row(line: bytes, *, where: str, number: int) -> Located | Unreadable:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        return Unreadable(where, number, "is not JSON", got=f"{error}: {line[:80]!r}", do="repair or delete the line")
    if b"\\u" in line and not _is_unicode(values):
        return Unreadable(
            where,
            number,
            "has half a character",
            got=repr(line[:80]),
            do="repair or delete the lone \\ud800–\\udfff",
        )
    if not isinstance(values, dict):
        return Unreadable(
            where, number, "is not a JSON object", got=repr(values)[:80], do="write one {...} object a line"
        )
    return Located(where, number, values)


def _is_unicode(values: Any) -> bool:
    """JSON can spell a lone surrogate, as of an emoji cut in two; no file in UTF-8 can hold one."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        row = 0
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                row += 1
                yield Located(f"{path}:row {row}", row, values)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}", got=str(error), do="check that it is a whole Parquet file") from error


def _hub_rows(source: HubSource) -> Iterator[Located]:
    import datasets

    try:
        table = datasets.load_dataset(source.name, source.subset, split=source.split)
    except Exception as error:  # the library raises a dozen unrelated types, from ValueError to httpx's
        raise DataError(
            f"cannot load dataset {source.name!r} (subset {source.subset!r}, split {source.split!r})",
            got=f"{type(error).__name__}: {error}",
            do="check the name, subset and split, and the network (or HF_HOME, offline)",
        ) from error
    for row, values in enumerate(table, start=1):
        yield Located(f"{source.name}[{source.split}]:row {row}", row, dict(values))
