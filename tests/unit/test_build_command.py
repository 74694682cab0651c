"""`keel data build`: what it writes, says and refuses; nothing half is ever there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.data_records import PreferencePair, read_rows
from cluster.errors import DataError
from keel.preferences.build import BuildOptions, Built, build
from reward_service.audit.annotations import load_preferences

NAMES = ("ann", "bo", "cy", "di", "ed")


def _rows() -> list[Any]:
    """60 pairs judged line by line by five; ed votes against the others."""
    return [
        {"question": f"q {number}", "answer_a": f"right {number}", "answer_b": "wrong", "preferred": preferred,
         "annotator": name}
        for number in range(60)
        for name, preferred in zip(NAMES, "aaaab", strict=True)
    ]  # fmt: skip


def _build(tmp_path: Path, rows: list[Any], **options: Any) -> tuple[Built, str]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    said: list[str] = []
    columns = {"prompt": "question"} if "question" in json.dumps(rows[0]) else {}
    built = build(path, out=tmp_path / "pairs.jsonl", options=BuildOptions(columns=columns, **options), say=said.append)
    return built, "\n".join(said)


def test_build_writes_pairs_that_read_back_the_same(tmp_path: Path) -> None:
    built, said = _build(tmp_path, _rows())
    pairs = read_rows(tmp_path / "pairs.jsonl", PreferencePair)
    assert built.pairs == len(pairs) == 60
    assert all(pair.chosen.startswith("right") and pair.confidence == 0.8 for pair in pairs)
    assert load_preferences(tmp_path / "pairs.jsonl").pairs == pairs
    assert "read 300 records: 300 comparisons" in said
    assert "240 not used: merged" in said
    assert "annotators agree in 60.0% of 600 couples" in said
    assert "ed: disagrees with the majority" in said


def test_problems_are_said_with_their_lines_malformed_ones_first(tmp_path: Path) -> None:
    rows = [*_rows()[:5], {"question": "q", "chosen": "a", "rejected": "a"}, "{", {"question": "q", "text": "a"}]
    _, said = _build(tmp_path, rows)
    lines = [line for line in said.splitlines() if "in.jsonl:" in line]
    assert [line.split("in.jsonl:")[1].split(":")[0] for line in lines] == ["7", "8", "6"]


def test_many_problems_are_counted_and_not_all_said(tmp_path: Path) -> None:
    _, said = _build(tmp_path, [*_rows()[:5], *["{"] * 50])
    assert "… and 30 more records" in said
    assert "50 not used: is not JSON" in said


def test_held_out_annotators_have_a_file_of_their_own(tmp_path: Path) -> None:
    built, said = _build(tmp_path, _rows(), held_out=0.2)
    (held,) = built.loaded.held_out
    assert built.held_out_path == tmp_path / "pairs.held_out.jsonl"
    alone = read_rows(tmp_path / "pairs.held_out.jsonl", PreferencePair)
    assert {pair.annotators for pair in alone} == {(held,)}
    assert len(alone) == 60
    for pair in read_rows(tmp_path / "pairs.jsonl", PreferencePair):
        assert held not in (pair.annotators or ())
    assert "rm.held_out_annotators" in said


def test_weights_and_samples_are_written(tmp_path: Path) -> None:
    _build(tmp_path, _rows(), rebalance="weights")
    weights = [pair.weight or 0.0 for pair in read_rows(tmp_path / "pairs.jsonl", PreferencePair)]
    assert sum(weights) / len(weights) == pytest.approx(1.0)
    _, said = _build(tmp_path, _rows(), rebalance="stratified")
    assert "drawn evenly from strata" in said


def test_after_an_error_no_file_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable preference"):
        _build(tmp_path, ["{"])
    assert not (tmp_path / "pairs.jsonl").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "in.jsonl"]


def test_the_output_is_no_other_kind_of_file_and_not_the_input(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    before = path.read_bytes()
    for out in (path, tmp_path / "pairs.csv"):
        with pytest.raises(DataError):
            build(path, out=out, options=BuildOptions(), say=lambda _: None)
    assert path.read_bytes() == before


def test_too_few_annotators_to_hold_one_out_is_said(tmp_path: Path) -> None:
    built, said = _build(tmp_path, _rows(), held_out=0.19)
    assert built.held_out_path is None
    assert "no pairs of held-out annotators: 19% of 5 named annotators is less than one" in said


def test_numbers_that_no_float_holds_are_refused_with_their_line(tmp_path: Path) -> None:
    huge = '{"prompt": "q", "answer": "a", "rating": 1' + "0" * 400 + "}"
    _, said = _build(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}, huge])
    assert "in.jsonl:2: rating is not a number" in said
