"""Files that are replaced whole, directories that are there or not, and lines of JSON."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from cluster.errors import DataError
from cluster.files import (
    JsonlTail,
    JsonlWriter,
    atomic_directory,
    atomic_write_text,
    read_jsonl,
    remove_stale,
)
from tests.unit.helpers import names, refuse


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.txt"
    atomic_write_text(path, "one ü")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            atomic_write_text(path, "two")
    assert path.read_text(encoding="utf-8") == "one ü"
    assert names(path.parent) == ["a.txt"]


def test_an_atomic_directory_is_absent_after_an_error(tmp_path: Path) -> None:
    def fill_and_fail() -> None:
        with atomic_directory(tmp_path / "d") as directory:
            (directory / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_and_fail()
    assert names(tmp_path) == []


def test_an_atomic_directory_does_not_replace(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "d"):
        raise AssertionError("the block must not run")


def test_only_leftovers_of_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a.tmp-12").mkdir()
    (tmp_path / "b.tmp-9").write_text("x")
    (tmp_path / "c.tmp-mine").write_text("x")
    remove_stale(tmp_path)
    assert names(tmp_path) == ["c.tmp-mine"]


def test_json_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"a": 1, "text": "line\nbreak ü"})
        assert read_jsonl(path) == [{"a": 1, "text": "line\nbreak ü"}]
        writer.write({"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}})
    assert read_jsonl(path)[1] == {"a": None, "b": [1.0, None], "c": {"d": None}}


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    with JsonlWriter(path) as writer:
        writer.write({"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}')
    with JsonlWriter(path) as writer:
        writer.write({"a": 2})
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read_jsonl(path)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_jsonl(tmp_path / "none.jsonl")


def test_a_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    tail = JsonlTail(path)
    assert tail.read() == []
    path.write_text('{"a": 1}\n{"a"')
    assert tail.read() == [{"a": 1}]
    assert tail.read() == []
    with path.open("a") as file:
        file.write(': 2}\nnot json\n{"a": 3}\n')
    assert tail.read() == [{"a": 2}, {"a": 3}]
    path.write_text('{"a": 4}\n')
    assert tail.read() == [{"a": 4}]


def test_a_tail_of_a_file_cut_back_gives_only_what_is_new(tmp_path: Path) -> None:
    """A learner that comes back cuts the steps after its checkpoint off, and goes on."""
    path = tmp_path / "a.jsonl"
    tail = JsonlTail(path)
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    assert len(tail.read()) == 3
    atomic_write_text(path, '{"a": 1}\n{"a": 2}\n')
    assert tail.read() == []
    atomic_write_text(path, '{"a": 1}\n{"a": 2}\n{"a": 30}\n{"a": 4}\n')
    assert tail.read() == [{"a": 30}, {"a": 4}]
    assert tail.read() == []
