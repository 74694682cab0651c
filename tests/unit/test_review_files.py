"""What people said, as files: pairs and caught answers follow the log of judgements, whatever happens between."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.data_records import PreferencePair, read_rows
from cluster.errors import ConfigError, DataError
from cluster.review_queue import Judgement, Recorded, ReviewItem, Verdict
from reward_service.review.files import ReviewFiles, read_reviews
from reward_service.rm.caught import read_caught

PAIR = ReviewItem(item_id="p", kind="pair", prompt="why?", answers=("one", "two"), policy_versions=(3, 5))
OTHER = ReviewItem(item_id="o", kind="pair", prompt="how?", answers=("yes", "no"))
FLAGGED = ReviewItem(
    item_id="f", kind="flagged", prompt="q", answers=("fantastic",), policy_versions=(7,), reason="rule"
)


class Log:
    """A queue's log, entry by entry."""

    def __init__(self) -> None:
        self.entries: list[Recorded] = []

    def say(self, item: ReviewItem, who: str, verdict: Verdict, note: str = "") -> list[Recorded]:
        at = f"2026-01-01T00:00:{len(self.entries):02d}+00:00"
        judgement = Judgement(item_id=item.item_id, annotator=who, verdict=verdict, note=note, judged_at=at)
        self.entries.append(Recorded(position=len(self.entries) + 1, judgement=judgement, item=item))
        return self.entries[-1:]


def pairs(directory: Path) -> list[PreferencePair]:
    path = directory / "preferences.jsonl"
    return read_rows(path, PreferencePair) if path.exists() else []


def caught(directory: Path) -> list[dict[str, Any]]:
    path = directory / "caught.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_pair_has_what_all_its_annotators_said(tmp_path: Path) -> None:
    log = Log()
    with ReviewFiles(tmp_path) as files:
        files.take(log.say(PAIR, "ann", "second"))
        assert pairs(tmp_path) == [
            PreferencePair(
                pair_id="p", prompt="why?", chosen="two", rejected="one", votes=(True,), annotators=("ann",),
                confidence=1.0, policy_version=5, rejected_version=3, judged_at="2026-01-01T00:00:00+00:00",
                source="review",
            )
        ]  # fmt: skip
        files.take(log.say(OTHER, "ann", "first"))
        files.take(log.say(PAIR, "bob", "first"))
        assert [pair.pair_id for pair in pairs(tmp_path)] == ["o"], "one against one is no preference"
        files.take(log.say(PAIR, "cy", "first"))
        (pair,) = [pair for pair in pairs(tmp_path) if pair.pair_id == "p"]
        assert (pair.chosen, pair.votes, pair.annotators) == ("one", (False, True, True), ("ann", "bob", "cy"))
        assert pair.confidence == pytest.approx(2 / 3)
        assert (pair.policy_version, pair.rejected_version) == (3, 5)
        files.take(log.say(PAIR, "ann", "undone"))
        (pair,) = [pair for pair in pairs(tmp_path) if pair.pair_id == "p"]
        assert (pair.votes, pair.annotators, pair.confidence) == ((True, True), ("bob", "cy"), 1.0)
    assert len(read_reviews(tmp_path / "reviews.jsonl")) == 5


@pytest.mark.parametrize("verdict", ["tie", "skip"])
def test_who_cannot_tell_gives_no_pair(tmp_path: Path, verdict: Verdict) -> None:
    with ReviewFiles(tmp_path) as files:
        log = Log()
        files.take(log.say(PAIR, "ann", verdict))
        assert pairs(tmp_path) == []
        files.take(log.say(PAIR, "bob", "first"))
        assert len(pairs(tmp_path)) == (0 if verdict == "tie" else 1)


def test_bad_answers_are_caught(tmp_path: Path) -> None:
    log = Log()
    with ReviewFiles(tmp_path) as files:
        files.take(log.say(FLAGGED, "ann", "fine"))
        assert caught(tmp_path) == []
        files.take(log.say(FLAGGED, "bob", "bad", "flattery"))
        assert caught(tmp_path) == [], "one against one"
        files.take(log.say(FLAGGED, "ann", "undone"))
        (line,) = caught(tmp_path)
        assert (line["prompt"], line["answer"], line["policy_version"]) == ("q", "fantastic", 7)
        assert line["reason"] == "rule; flattery"
        (read,) = read_caught([tmp_path / "caught.jsonl"])
        assert (read.answer, read.policy_version) == ("fantastic", 7), "as a refresh of the reward model reads it"
        files.take(log.say(FLAGGED, "bob", "undone"))
        assert caught(tmp_path) == []


def test_lines_of_others_stay(tmp_path: Path) -> None:
    mine = PreferencePair(pair_id="p", prompt="x", chosen="a", rejected="b", source="collected")
    (tmp_path / "preferences.jsonl").write_bytes(msgspec.json.encode(mine))
    (tmp_path / "caught.jsonl").write_text('{"prompt": "x", "answer": "y", "reason": "rule", "policy_version": 1}\n')
    log = Log()
    with ReviewFiles(tmp_path) as files:
        files.take(log.say(PAIR, "ann", "first") + log.say(FLAGGED, "ann", "bad"))
        files.take(log.say(PAIR, "ann", "undone") + log.say(FLAGGED, "ann", "undone"))
    assert pairs(tmp_path) == [mine]
    assert [line["answer"] for line in caught(tmp_path)] == ["y"]


def test_a_new_pair_is_one_append(tmp_path: Path) -> None:
    log = Log()
    with ReviewFiles(tmp_path) as files:
        files.take(log.say(PAIR, "ann", "first"))
        before = os.stat(tmp_path / "preferences.jsonl").st_ino
        files.take(log.say(OTHER, "ann", "first"))
        assert os.stat(tmp_path / "preferences.jsonl").st_ino == before, "the file was not replaced"
        files.take(log.say(OTHER, "bob", "first"))
        assert os.stat(tmp_path / "preferences.jsonl").st_ino != before
        assert [pair.pair_id for pair in pairs(tmp_path)] == ["p", "o"]


@pytest.mark.parametrize("lost", ["preferences.jsonl", "caught.jsonl", "reviews.jsonl"])
def test_what_a_killed_process_left_undone_is_made_up_for(tmp_path: Path, lost: str) -> None:
    log = Log()
    with ReviewFiles(tmp_path) as files:
        files.take(log.say(PAIR, "ann", "first"))
        files.take(log.say(OTHER, "ann", "second"))
        files.take(log.say(FLAGGED, "ann", "bad"))
    whole = {name: (tmp_path / name).read_bytes() for name in ("preferences.jsonl", "caught.jsonl", "reviews.jsonl")}
    (tmp_path / lost).write_bytes(whole[lost][:-20])
    with ReviewFiles(tmp_path) as files:
        files.take(log.entries)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
    (tmp_path / lost).unlink()
    with ReviewFiles(tmp_path) as files:
        files.take(log.entries)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


def test_a_queue_that_lost_its_log_takes_nothing_away(tmp_path: Path) -> None:
    log = Log()
    with ReviewFiles(tmp_path) as files:
        files.take(log.say(PAIR, "ann", "first"))
        assert files.position == 1
    with ReviewFiles(tmp_path) as files:
        assert [entry.judgement for entry in files.log] == [entry.judgement for entry in log.entries]
        files.take(Log().say(OTHER, "ann", "first"))
    assert [pair.pair_id for pair in pairs(tmp_path)] == ["p", "o"]


def test_a_disk_that_refuses_is_made_up_for(tmp_path: Path) -> None:
    log = Log()
    with ReviewFiles(tmp_path) as files:
        files.take(log.say(PAIR, "ann", "first"))
        (tmp_path / "preferences.jsonl").unlink()
        (tmp_path / "preferences.jsonl").mkdir()
        with pytest.raises(DataError, match="cannot write"):
            files.take(log.say(OTHER, "ann", "first"))
        assert files.position == 1
        (tmp_path / "preferences.jsonl").rmdir()
        files.take(log.entries[files.position :])
        assert files.position == 2
    assert [pair.pair_id for pair in pairs(tmp_path)] == ["p", "o"]
    assert len(read_reviews(tmp_path / "reviews.jsonl")) == 2


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with ReviewFiles(tmp_path), pytest.raises(ConfigError, match="review here already"), ReviewFiles(tmp_path):
        pass
    with ReviewFiles(tmp_path):
        pass


def test_a_damaged_journal_names_its_line(tmp_path: Path) -> None:
    with ReviewFiles(tmp_path) as files:
        files.take(Log().say(PAIR, "ann", "first"))
    path = tmp_path / "reviews.jsonl"
    path.write_bytes(path.read_bytes() + b"{broken\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"reviews\.jsonl:2"), ReviewFiles(tmp_path):
        pass
