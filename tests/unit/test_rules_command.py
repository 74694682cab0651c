"""`keel rules`: every form of answers is tried, counts are right, and hostile text does not reach the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, DataError
from keel.rules_command import Tally, try_rules

pytestmark = pytest.mark.timeout(60)

RULES = """
rules:
  - {name: curse, when: {phrases: [damn]}, then: {penalise: {std: 1}}}
  - {name: shout, when: {regex: "!!"}, then: flag}
  - {name: secret, when: {phrases: [password]}, then: {override: {std: -2.5}}}
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    (tmp_path / "rules.yaml").write_text(RULES)
    return tmp_path / "rules.yaml"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_typed_answers_say_what_hits_and_what_it_does(rules: Path) -> None:
    said: list[str] = []
    tallies = try_rules(rules, answers=["damn!!", "fine", "", "damn, the password"], say=said.append)

    assert tallies == {"given": Tally(answers=4, hit=2, by_rule=tallies["given"].by_rule)}
    assert tallies["given"].by_rule == {"curse": 2, "shout": 1, "secret": 1}
    text = "\n".join(said)
    assert "penalise  curse: 'damn'\n  flag      shout: '!!'\n  → reward − 1 std" in text
    assert "fine\n  no rule is hit" in text
    assert "(empty)\n  no rule is hit" in text
    assert "→ reward becomes the mean − 2.5 std" in text


def test_columns_that_are_null_are_not_there_and_no_answer_is_no_table(rules: Path, tmp_path: Path) -> None:
    """Parquet has every column in every row."""
    empty = {"prompt": None, "answer": None, "chosen": None, "rejected": None}
    path = write(
        tmp_path / "a.jsonl", empty | {"answer": "damn"}, empty | {"prompt": "p", "chosen": "x", "rejected": "y"}
    )
    assert {kind: one.answers for kind, one in try_rules(rules, file=path, say=lambda text: None).items()} == {
        "answer": 1, "chosen": 1, "rejected": 1,
    }  # fmt: skip
    said: list[str] = []
    with pytest.raises(ConfigError, match="nothing to try"):
        try_rules(rules, file=write(tmp_path / "empty.jsonl"), say=said.append)
    assert len(said) == 1, said


def test_a_files_pairs_dialogues_and_answers_are_counted_by_kind(rules: Path, tmp_path: Path) -> None:
    head = "\n\nHuman: damn\n\nAssistant:"
    path = write(
        tmp_path / "answers.jsonl",
        {"prompt": "damn", "chosen": "fine", "rejected": "damn"},
        {"chosen": f"{head} fine", "rejected": f"{head} oh!!"},
        {"chosen": f"{head} fine", "rejected": "\n\nHuman: other\n\nAssistant: fine"},
        {"prompt": [{"role": "user", "content": "damn"}], "answer": ""},
        {"prompt": "p", "before": "damn", "after": "fine", "gold_before": 1.0},
    )
    said: list[str] = []
    tallies = try_rules(rules, file=path, show=1, say=said.append)

    counted = {kind: (tally.answers, dict(tally.by_rule)) for kind, tally in tallies.items()}
    assert counted == {
        "chosen": (2, {}),
        "rejected": (2, {"curse": 1, "shout": 1}),
        "answer": (1, {}),
        "before": (1, {"curse": 1}),
        "after": (1, {}),
    }
    text = "\n".join(said)
    assert "1 rows left out" in text
    assert text.count("→") == 1, "only the first is shown"


def test_a_terminal_is_not_commanded_by_an_answer(rules: Path) -> None:
    said: list[str] = []
    try_rules(rules, answers=["damn \x1b[2J\x07 \u202e gone"], say=said.append)
    assert not {"\x1b", "\x07", "\u202e"} & set("".join(said))


@pytest.mark.parametrize("row", [{"prompt": "p"}, {"answer": 3}, {"prompt": 3, "answer": "a"}])
def test_a_row_without_an_answer_names_its_line(rules: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "answers.jsonl", {"answer": "fine"}, row)
    with pytest.raises(DataError, match=r"answers.jsonl:2: no answer"):
        try_rules(rules, file=path, say=lambda line: None)


def test_nothing_to_try_is_said(rules: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to try"):
        try_rules(rules, say=lambda line: None)
