"""Preference data in every form becomes labelled pairs; every record is used, merged, or refused with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data import prepare_data
from cluster.data_records import PreferencePair, SftExample, read_rows, write_rows
from cluster.data_tables import Located
from cluster.errors import DataError
from cluster.judgements import FIELDS, Judged, parse
from configs.run import DataSection, FileSource, RunConfig
from reward_service.audit.annotations import (
    LoadedPreferences,
    Vote,
    held_out_annotators,
    load_preferences,
    without_annotators,
)


def _load(tmp_path: Path, rows: list[Any], **options: Any) -> LoadedPreferences:
    path = tmp_path / "p.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    loaded = load_preferences(path, **options)
    report = loaded.report
    assert report.used == len(loaded.pairs)
    assert report.read == report.used + report.held_out + sum(report.rejected.values())
    return loaded


def _line(annotator: str | None, preferred: str, *, a: str = "yes", b: str = "no", **more: Any) -> dict[str, Any]:
    who = {} if annotator is None else {"annotator": annotator}
    return {"prompt": "q", "answer_a": a, "answer_b": b, "preferred": preferred} | who | more


# ---------------------------------------------------------------- forms


def test_canonical_pairs_keep_all_they_carry(tmp_path: Path) -> None:
    pairs = [
        PreferencePair(pair_id="mine", prompt="q", chosen="good", rejected="bad", votes=(True, True, False),
                       annotators=("ann", "bo", "cy"), confidence=2 / 3, policy_version=7, rejected_version=3,
                       weight=1.5, judged_at="2026-11-21T08:00:00+00:00", source="review"),
        PreferencePair(pair_id="plain", prompt=[{"role": "user", "content": "hi"}], chosen="x", rejected="y"),
    ]  # fmt: skip
    write_rows(tmp_path / "pairs.jsonl", pairs)
    loaded = load_preferences(tmp_path / "pairs.jsonl")
    assert loaded.pairs == pairs
    assert loaded.votes == [Vote("mine", "ann", True), Vote("mine", "bo", True), Vote("mine", "cy", False)]


def test_votes_decide_the_order_of_a_pair(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "votes": [True, False, False], "annotators": ["x", "y", "z"],
           "policy_version": 2, "rejected_version": 5}  # fmt: skip
    loaded = _load(tmp_path, [row])
    (pair,) = loaded.pairs
    assert (pair.chosen, pair.votes, pair.policy_version, pair.rejected_version) == ("b", (False, True, True), 5, 2)
    assert loaded.counts["turned"] == 1
    assert Vote(pair.pair_id, "x", False) in loaded.votes


def test_dialogues_still_read(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant:"
    loaded = _load(tmp_path, [{"chosen": f"{start} yes", "rejected": f"{start} no"}])
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in loaded.pairs] == [(start, "yes", "no")]


def test_comparisons_of_one_pair_are_merged_into_votes_in_either_order(tmp_path: Path) -> None:
    rows = [
        _line("ann", "b", policy_version_a=1, policy_version_b=4),
        _line("bo", "a", a="no", b="yes"),
        _line("cy", "a", judged_at="2026-11-21T08:00:00Z"),
    ]
    loaded = _load(tmp_path, rows)
    (pair,) = loaded.pairs
    assert (pair.chosen, pair.rejected, pair.confidence) == ("no", "yes", 2 / 3)
    assert dict(zip(pair.annotators or (), pair.votes or (), strict=True)) == {"ann": True, "bo": True, "cy": False}
    assert (pair.policy_version, pair.rejected_version, pair.judged_at) == (4, 1, "2026-11-21T08:00:00Z")
    assert loaded.counts["merged"] == 2
    assert loaded.report.read == 3
    assert loaded.votes == [Vote(pair.pair_id, "ann", True), Vote(pair.pair_id, "bo", True),
                            Vote(pair.pair_id, "cy", False)]  # fmt: skip


def test_a_later_judgement_by_the_same_annotator_replaces_the_earlier(tmp_path: Path) -> None:
    loaded = _load(tmp_path, [_line("ann", "a"), _line("ann", "b")])
    assert [(pair.chosen, pair.votes) for pair in loaded.pairs] == [("no", (True,))]


def test_unnamed_judgements_are_all_votes(tmp_path: Path) -> None:
    loaded = _load(tmp_path, [_line(None, "a"), _line(None, "a"), _line(None, "b")])
    assert [(pair.chosen, pair.votes, pair.annotators) for pair in loaded.pairs] == [("yes", (True, True, False), None)]
    assert loaded.votes == []


def test_ties_weaken_a_majority_and_even_votes_are_unclear(tmp_path: Path) -> None:
    clear = [_line("ann", "a"), _line("bo", "a"), _line("cy", "tie")]
    weak = [_line("ann", "a", a="1"), _line("bo", "TIE", a="1"), _line("cy", "tie", a="1")]
    even = [_line("ann", "a", a="2"), _line("bo", "b", a="2")]
    loaded = _load(tmp_path, [*clear, *weak, *even])
    assert [(pair.chosen, pair.confidence) for pair in loaded.pairs] == [("yes", 2 / 3)]
    assert [(pair.chosen, pair.votes) for pair in loaded.unclear] == [("1", (True,)), ("2", (True, False))]
    assert loaded.report.rejected["low confidence"] == 2
    assert loaded.counts["ties"] == 3


def test_a_stated_confidence_holds_for_all_votes_and_not_for_some(tmp_path: Path) -> None:
    five = {"votes": [True] * 3 + [False] * 2, "annotators": list(FIVE), "confidence": 0.6}
    row = {"prompt": "q", "chosen": "a", "rejected": "b"} | five
    (held,) = held_out_annotators([PreferencePair(pair_id="", prompt="", chosen="", rejected="", annotators=FIVE)], 0.2)
    against = [name != held for name in FIVE]
    (pair,) = _load(tmp_path, [row | {"votes": against, "confidence": 0.8}], held_out_annotators=0.2).pairs
    assert pair.confidence == 1.0
    known_ties = {"prompt": "q", "chosen": "c", "rejected": "b", "votes": [True, True], "confidence": 0.7}
    assert [pair.confidence for pair in _load(tmp_path, [known_ties]).pairs] == [0.7]
    doubtful = {"prompt": "q", "chosen": "d", "rejected": "b", "confidence": 0.55}
    loaded = _load(tmp_path, [row, doubtful])
    assert [pair.chosen for pair in loaded.pairs] == ["a"]
    assert loaded.report.rejected == {"low confidence": 1}


def test_three_of_five_are_clear_and_a_least_number_of_votes_may_be_asked(tmp_path: Path) -> None:
    five = [_line(f"a{number}", "a" if number < 3 else "b") for number in range(5)]
    loaded = _load(tmp_path, [*five, _line("a0", "a", a="alone")], min_votes=3)
    assert [(pair.chosen, pair.confidence) for pair in loaded.pairs] == [("yes", 0.6)]
    assert loaded.report.rejected["too few votes"] == 1
    assert _load(tmp_path, [*five, _line("b", "a", a="alone")], min_confidence=0.7).pairs[0].chosen == "alone"


def test_a_ranking_gives_every_pair_once_in_its_order(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "answers": ["fair", "best", "good"], "ranking": [1, 2, 0], "annotator": "ann"},
            {"prompt": "r", "answers": ["1", "2", "3", "4"]}]  # fmt: skip
    loaded = _load(tmp_path, rows)
    assert [(pair.chosen, pair.rejected) for pair in loaded.pairs] == [
        ("best", "good"), ("best", "fair"), ("good", "fair"),
        ("1", "2"), ("1", "3"), ("1", "4"), ("2", "3"), ("2", "4"), ("3", "4"),
    ]  # fmt: skip
    assert len({pair.pair_id for pair in loaded.pairs}) == len(loaded.pairs)


def test_a_ranking_that_names_a_text_twice_says_nothing_of_it(tmp_path: Path) -> None:
    loaded = _load(tmp_path, [{"prompt": "q", "answers": ["best", "good", "best", "bad"]}])
    assert [(pair.chosen, pair.rejected) for pair in loaded.pairs] == [("best", "bad"), ("good", "bad")]
    assert loaded.report.rejected["tie"] == 1
    assert loaded.report.rejected["low confidence"] == 1  # better and worse than itself


def test_rankings_by_several_annotators_become_votes(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "answers": ["x", "y"], "ranking": [0, 1], "annotator": "ann"},
        {"prompt": "q", "answers": ["x", "y"], "ranking": [1, 0], "annotator": "bo"},
        {"prompt": "q", "answers": ["y", "x"], "annotator": 3},
    ]
    (pair,) = _load(tmp_path, rows).pairs
    assert (pair.chosen, pair.confidence, pair.annotators) == ("y", 2 / 3, ("ann", "bo", "3"))


def _rate(annotator: str, answer: str, rating: float, *, prompt: str = "q") -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, "rating": rating, "annotator": annotator}


def test_ratings_are_compared_on_each_annotators_own_scale(tmp_path: Path) -> None:
    # "x" has 8 and "y" 3, but 8 is the generous one's low end, and 3 the severe one's high end.
    rows = [
        _rate("generous", "x", 8), _rate("generous", "other", 10, prompt="r"),  # z −1, +1
        _rate("severe", "y", 3), _rate("severe", "another", 1, prompt="r"),  # z +1, −1
    ]  # fmt: skip
    loaded = _load(tmp_path, rows)
    assert [(pair.chosen, pair.rejected) for pair in loaded.pairs] == [("y", "x"), ("other", "another")]
    assert [(rating.annotator, rating.rating, rating.z) for rating in loaded.ratings] == [
        ("generous", 8, -1.0), ("generous", 10, 1.0), ("severe", 3, 1.0), ("severe", 1, -1.0),
    ]  # fmt: skip


def test_ratings_without_information_are_counted(tmp_path: Path) -> None:
    rows = [
        _rate("flat", "x", 5), _rate("flat", "y", 5),
        _rate("ann", "x", 4), _rate("ann", "y", 2), _rate("ann", "z", 4), _rate("ann", "alone", 3, prompt="r"),
    ]  # fmt: skip
    loaded = _load(tmp_path, rows)
    assert sorted((pair.chosen, pair.rejected) for pair in loaded.pairs) == [("x", "y"), ("z", "y")]
    assert loaded.report.rejected == {
        "rating by an annotator whose ratings are all equal": 2,
        "answers rated equal": 1,
        "only rated answer to its prompt": 1,
    }
    assert {vote.annotator for vote in loaded.votes} == {"ann"}


def test_forms_may_be_mixed_and_packed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, _line("ann", "a"), _rate("u", "c", 1), _rate("u", "d", 2)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert [pair.chosen for pair in load_preferences(path).pairs] == ["a", "yes", "d"]


def test_parquet_with_columns_of_several_forms(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_line("ann", "b", policy_version=3), {"prompt": "q", "answer": "c", "rating": 1.0},
            {"prompt": "q", "answer": "d", "rating": 2.0}]  # fmt: skip
    names = {name for row in rows for name in row}
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), tmp_path / "p.parquet")
    loaded = load_preferences(tmp_path / "p.parquet")
    assert [(pair.chosen, pair.policy_version) for pair in loaded.pairs] == [("no", 3), ("d", None)]


def test_columns_are_mapped(tmp_path: Path) -> None:
    row = {"question": "q", "left": "l", "right": "r", "winner": "b", "who": "ann"}
    columns = {"prompt": "question", "answer_a": "left", "answer_b": "right", "preferred": "winner", "annotator": "who"}
    (pair,) = _load(tmp_path, [row], columns=columns).pairs
    assert (pair.prompt, pair.chosen, pair.annotators) == ("q", "r", ("ann",))
    with pytest.raises(DataError, match="unknown field"):
        _load(tmp_path, [row], columns={"promt": "question"})


# ---------------------------------------------------------------- problems


def test_every_malformed_record_is_named_with_its_line_and_the_rest_is_used(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [
        good,
        '{"prompt": ',
        "[1]",
        {"query": "q", "better": "a"},
        good | {"votes": "3 of 5"},
        good | {"votes": [True], "annotators": ["x", "y"]},
        good | {"votes": [True, True], "annotators": ["x", "x"]},
        good | {"weight": -1},
        good | {"judged_at": "yesterday"},
        good | {"policy_version": 1.5},
        _line("ann", "left"),
        {"prompt": "q", "answers": ["a", "b"], "ranking": [1, 2]},
        {"prompt": "q", "answers": ["only"]},
        {"prompt": "q", "answer": "a", "rating": "five"},
        good | {"rejected": " "},
        good | {"rejected": "c"},
    ]
    loaded = _load(tmp_path, rows)
    assert [pair.rejected for pair in loaded.pairs] == ["b", "c"]
    assert [problem.line for problem in loaded.problems if problem.malformed] == list(range(2, 15))
    assert [(problem.line, problem.reason) for problem in loaded.problems if not problem.malformed] == [
        (15, "empty answer")
    ]
    reasons = {problem.line: problem.reason for problem in loaded.problems}
    assert "better, query" in reasons[4]
    assert "'left'" in reasons[11]


def test_nothing_usable_is_an_error_with_the_first_problems(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: tie; line 2: is not JSON"):
        _load(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "a"}, "{"])
    with pytest.raises(DataError, match="not found"):
        load_preferences(tmp_path / "none.jsonl")


def test_same_ids_are_told_apart(tmp_path: Path) -> None:
    row = {"pair_id": "one", "prompt": "q", "chosen": "a", "rejected": "b"}
    assert [pair.pair_id for pair in _load(tmp_path, [row, row | {"rejected": "c"}]).pairs] == ["one", "one@2"]


def test_canonical_pairs_merge_only_over_other_annotators(tmp_path: Path) -> None:
    def row(*who: str) -> dict[str, Any]:
        return {"prompt": "q", "chosen": "a", "rejected": "b", "votes": [True] * len(who), "annotators": list(who)}

    loaded = _load(tmp_path, [row("ann"), row("bo"), row("ann", "bo")])
    assert [pair.annotators for pair in loaded.pairs] == [("ann", "bo"), ("ann", "bo")]


# ---------------------------------------------------------------- annotators held out

FIVE = ("a", "b", "c", "d", "e")


def test_a_fifth_of_annotators_is_held_out_by_id_rounded_down() -> None:
    def pairs(names: tuple[str, ...]) -> list[PreferencePair]:
        return [PreferencePair(pair_id=name, prompt="q", chosen="x", rejected="y", votes=(True,), annotators=(name,))
                for name in names]  # fmt: skip

    assert held_out_annotators(pairs(FIVE[:4]), 0.2) == ()
    (one,) = held_out_annotators(pairs(FIVE), 0.2)
    assert held_out_annotators(pairs(FIVE[::-1]), 0.2) == (one,)
    assert len({held_out_annotators(pairs(FIVE), 0.2, seed=seed) for seed in range(30)}) == 5
    assert len(held_out_annotators(pairs(tuple(map(str, range(100)))), 0.29)) == 29


def test_held_out_votes_make_no_label(tmp_path: Path) -> None:
    (held,) = held_out_annotators([PreferencePair(pair_id="", prompt="", chosen="", rejected="", annotators=FIVE)], 0.2)
    rest = [name for name in FIVE if name != held]
    rows = [
        *[_line(name, "a") for name in rest], _line(held, "b"),
        *[_line(name, "a", a="even") for name in rest[:2]], *[_line(name, "b", a="even") for name in rest[2:]],
        _line(held, "a", a="even"),
        _line(held, "a", a="alone"),
    ]  # fmt: skip
    loaded = _load(tmp_path, rows, held_out_annotators=0.2)
    assert loaded.held_out == (held,)
    (pair,) = loaded.pairs
    assert (pair.chosen, pair.confidence, set(pair.annotators or ())) == ("yes", 1.0, set(rest))
    assert held not in {vote.annotator for vote in loaded.votes}
    assert [(vote.annotator, vote.prefers_chosen) for vote in loaded.held_out_votes] == [
        (held, False), (held, True), (held, True),
    ]  # fmt: skip
    assert [pair.chosen for pair in loaded.unclear] == ["even"]
    assert [(pair.chosen, pair.annotators) for pair in loaded.held_out_pairs] == [
        ("no", (held,)), ("even", (held,)), ("alone", (held,)),
    ]  # fmt: skip
    assert loaded.report.held_out == 1


def test_held_out_ratings_make_no_label(tmp_path: Path) -> None:
    rows = [_rate(name, answer, rating) for name in FIVE for answer, rating in (("x", 2), ("y", 1))]
    (held,) = _load(tmp_path, rows, held_out_annotators=0.2).held_out
    turned = [row if row["annotator"] == held else row | {"rating": 3 - row["rating"]} for row in rows]
    loaded = _load(tmp_path, turned, held_out_annotators=0.2)
    assert [pair.chosen for pair in loaded.pairs] == ["y"]
    assert [(vote.annotator, vote.prefers_chosen) for vote in loaded.held_out_votes] == [(held, False)]


def test_labels_without_some_annotators_are_worked_out_anew() -> None:
    def pair(name: str, votes: tuple[bool, ...], **more: Any) -> PreferencePair:
        return PreferencePair(pair_id=name, prompt="q", chosen="x", rejected="y", votes=votes, annotators=FIVE,
                              confidence=sum(votes) / 5, policy_version=3, **more)  # fmt: skip

    unknown = PreferencePair(pair_id="unknown", prompt="q", chosen="x", rejected="y")
    split = without_annotators(
        [
            pair("same", (True, True, True, True, False)),
            pair("turns", (True, True, True, False, False), rejected_version=1),
            pair("even", (True, True, False, True, False)),
            unknown,
        ],
        ["a", "b"],
    )
    assert [(one.pair_id, one.chosen, one.votes, one.confidence) for one in split.pairs] == [
        ("same", "x", (True, True, False), 2 / 3),
        ("turns", "y", (False, True, True), 2 / 3),
        ("even", "y", (True, False, True), 2 / 3),
        ("unknown", "x", None, None),
    ]
    assert (split.pairs[1].policy_version, split.pairs[1].rejected_version) == (1, 3)
    assert [(one.pair_id, one.chosen, one.annotators, one.votes) for one in split.held_out] == [
        (name, "x", ("a", "b"), (True, True)) for name in ("same", "turns", "even")
    ]
    alone = without_annotators([pair("even", (True, True, False, True, False))], ["e"])
    assert [one.confidence for one in alone.pairs] == [0.75]
    even = without_annotators([pair("even", (True, True, False, True, False))], ["a"])
    assert (even.pairs, [one.votes for one in even.unclear]) == ([], [(True, False, True, False)])
    everyone = without_annotators([pair("same", (True,) * 5)], FIVE)
    assert (everyone.pairs, everyone.unclear, len(everyone.held_out)) == ([], [], 1)


# ---------------------------------------------------------------- the data stage


def _prepare(tmp_path: Path, rows: list[Any]) -> list[PreferencePair]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    data = DataSection(preferences=FileSource(path=path), eval_fraction=0.0)
    prepare_data(RunConfig(name="t", data=data), tmp_path / "run")
    return read_rows(tmp_path / "run" / "data" / "preferences.jsonl", PreferencePair)


def test_the_data_stage_takes_every_form_and_keeps_votes(tmp_path: Path) -> None:
    rows = [
        _line("ann", "a"), _line("bo", "a"), {"prompt": "r", "answers": ["1", "2", "3"]},
        {"prompt": "s", "chosen": "a", "rejected": "b", "weight": 0.5, "policy_version": 2, "source": "review"},
    ]  # fmt: skip
    pairs = _prepare(tmp_path, rows)
    assert (pairs[0].votes, pairs[0].annotators) == ((True, True), ("ann", "bo"))
    assert (pairs[-1].weight, pairs[-1].policy_version, pairs[-1].source) == (0.5, 2, "review")
    assert [(pair.chosen, pair.rejected) for pair in pairs[1:4]] == [("1", "2"), ("1", "3"), ("2", "3")]
    examples = read_rows(tmp_path / "run" / "data" / "sft.jsonl", SftExample)
    assert [example.answer for example in examples] == ["yes", "1", "a"], "of a ranking, the best alone is shown"


def test_the_data_stage_refuses_malformed_records_by_line(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"(?s)2 malformed records.*jsonl:2: .*jsonl:4: is not JSON"):
        _prepare(tmp_path, [good, good | {"votes": 3}, good | {"rejected": "a"}, "{"])


# ---------------------------------------------------------------- anything at all

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["a", "b", "tie", "", "\n\nHuman: x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=8))
def test_no_record_makes_the_reader_crash(values: dict[str, Any]) -> None:
    items = parse(Located("f:1", 1, values), columns={})
    assert items
    for item in items:
        if isinstance(item, Judged):
            assert item.pair.chosen != item.pair.rejected
            assert item.pair.chosen.strip()
            assert item.pair.rejected.strip()
