"""The data stage: every source becomes the canonical files, and every record is used or counted with a reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.data import fit_data, prepare_data
from cluster.data_records import PreferencePair, PromptRecord, SftExample, TableReport, read_report, read_rows
from cluster.data_tables import read_table
from cluster.dialogues import Comparison, Rejection, compare_dialogues
from cluster.errors import ConfigError, DataError
from configs.run import DataSection, FileSource, HubSource, NewModel, RunConfig, WorldSource
from learner.model_init import make_tokenizer


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(data: DataSection, *, seed: int = 0) -> RunConfig:
    return RunConfig(name="t", seed=seed, data=data)


def _balanced(table: TableReport) -> bool:
    return table.read == table.used + table.held_out + sum(table.rejected.values())


def _plain_pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


# ---------------------------------------------------------------- dialogues

OPEN = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: joke?\n\nAssistant:"


def test_dialogues_split_before_the_last_answer() -> None:
    assert compare_dialogues(f"{OPEN} yes\n", f"{OPEN} no") == Comparison(OPEN, "yes", "no")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{OPEN} a", f"{OPEN} a", "tie"),
        (f"{OPEN} a", f"{OPEN}   a ", "tie"),
        (f"{OPEN} a", f"{OPEN} ", "empty answer"),
        (f"{OPEN} a", "\n\nHuman: hey\n\nAssistant: b", "dialogues differ before the last answer"),
        (f"{OPEN} a", "just text", "not a dialogue"),
        (f"{OPEN} a", f"{OPEN} b\n\nHuman: more", "dialogue ends with a human turn"),
        (f"{OPEN} a", 7, "dialogue is neither text nor messages"),
    ],
)
def test_unusable_dialogues_are_rejected_with_a_reason(chosen: Any, rejected: Any, reason: str) -> None:
    assert compare_dialogues(chosen, rejected) == Rejection(reason)


def test_message_dialogues() -> None:
    user = {"role": "user", "content": "hi"}
    chosen, rejected = [user, {"role": "assistant", "content": "a"}], [user, {"role": "assistant", "content": "b"}]
    assert compare_dialogues(chosen, rejected) == Comparison([user], "a", "b")
    assert compare_dialogues([user], rejected) == Rejection("empty prompt") or isinstance(
        compare_dialogues([user], rejected), Rejection
    )


# ---------------------------------------------------------------- tables


def test_missing_column_names_those_found(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "p.jsonl", [{"query": "x", "better": "y", "worse": "z"}])
    with pytest.raises(DataError) as caught:
        list(read_table(FileSource(path=path), fields=("chosen",)))
    assert "better, query, worse" in str(caught.value)
    assert "p.jsonl:1" in str(caught.value)


def test_column_map_renames_and_refuses_unknown_fields(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "p.jsonl", [{"q": "x"}])
    assert list(read_table(FileSource(path=path, columns={"prompt": "q"}), fields=("prompt",))) == [{"prompt": "x"}]
    with pytest.raises(DataError, match="unknown field"):
        list(read_table(FileSource(path=path, columns={"promt": "q"}), fields=("prompt",)))


def test_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(DataError, match=r"p\.jsonl:3 is not JSON"):
        list(read_table(FileSource(path=path), fields=("prompt",)))


def test_bytes_that_are_no_text_and_lines_that_are_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:1"):
        list(read_table(FileSource(path=path), fields=("prompt",)))
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="not a JSON object"):
        list(read_table(FileSource(path=path), fields=("prompt",)))
    path.write_text('{"prompt": ' + "1" * 5000 + "}\n")
    with pytest.raises(DataError, match="is not JSON"):
        list(read_table(FileSource(path=path), fields=("prompt",)))


def test_half_a_character_is_named_and_a_whole_one_read(tmp_path: Path) -> None:
    """JSON spells an emoji as two surrogates; one alone could be read, but written nowhere."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00"}\n{"prompt": "cut \\ud83d"}\n')
    rows = read_table(FileSource(path=path), fields=("prompt",))
    assert next(rows) == {"prompt": "\U0001f600"}
    with pytest.raises(DataError, match=r"p\.jsonl:2 has half a character"):
        next(rows)


def test_gzip_is_read_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps({"prompt": str(i) * 50}).encode() + b"\n" for i in range(200)))
    path.write_bytes(whole)
    rows = list(read_table(FileSource(path=path, limit=150), fields=("prompt",)))
    assert len(rows) == 150
    assert rows[3] == {"prompt": "3" * 50}
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        list(read_table(FileSource(path=path), fields=("prompt",)))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"q": ["a", None], "n": [1, 2]}), path)
    rows = list(read_table(FileSource(path=path, columns={"prompt": "q"}), fields=("prompt",)))
    assert rows == [{"prompt": "a"}, {"prompt": None}]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot read"):
        list(read_table(FileSource(path=path), fields=("q",)))


def test_missing_file_and_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        list(read_table(FileSource(path=tmp_path / "none.jsonl"), fields=("prompt",)))
    (tmp_path / "p.csv").write_text("a")
    with pytest.raises(DataError, match="unknown kind"):
        list(read_table(FileSource(path=tmp_path / "p.csv"), fields=("prompt",)))


def test_hub_dataset_goes_through_the_column_map(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, subset: str | None, *, split: str) -> list[dict[str, str]]:
        if name != "org/set":
            raise FileNotFoundError(name)
        return [{"instruction": f"{subset} {split}"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HubSource(name="org/set", subset="s", split="test", columns={"prompt": "instruction"})
    assert list(read_table(source, fields=("prompt",))) == [{"prompt": "s test"}]
    with pytest.raises(DataError, match="cannot load dataset 'org/other'"):
        list(read_table(HubSource(name="org/other"), fields=("prompt",)))


# ---------------------------------------------------------------- prepare


def test_preferences_alone_give_all_files(tmp_path: Path) -> None:
    rows = _plain_pairs(200)
    rows += [
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "", "rejected": "a"},
    ]
    source = FileSource(path=_jsonl(tmp_path / "p.jsonl", rows))
    report = prepare_data(_config(DataSection(preferences=source)), tmp_path / "run")

    data = tmp_path / "run" / "data"
    pairs = read_rows(data / "preferences.jsonl", PreferencePair)
    held_out = {record.prompt_id: record.prompt for record in read_rows(data / "eval_prompts.jsonl", PromptRecord)}
    prompts = read_rows(data / "prompts.jsonl", PromptRecord)
    examples = read_rows(data / "sft.jsonl", SftExample)
    assert report.tables["preferences"].rejected == {"empty prompt": 1, "tie": 1, "empty answer": 1}
    assert all(map(_balanced, report.tables.values()))
    assert 5 <= len(held_out) <= 40  # a tenth of 200, by hash
    assert len(prompts) + len(held_out) == 200
    trained = {pair.prompt for pair in pairs}
    assert trained == {record.prompt for record in prompts} == {example.prompt for example in examples}
    assert trained.isdisjoint(held_out.values())
    assert PreferencePair(pair_id=pairs[0].pair_id, prompt=pairs[0].prompt, chosen=pairs[0].chosen,
                          rejected=pairs[0].rejected) == pairs[0]  # fmt: skip
    assert read_report(tmp_path / "run") == report


def test_the_split_follows_content_not_order(tmp_path: Path) -> None:
    rows = _plain_pairs(100)
    sides = []
    for name, ordered, seed in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)):
        source = FileSource(path=_jsonl(tmp_path / f"{name}.jsonl", ordered))
        prepare_data(_config(DataSection(preferences=source), seed=seed), tmp_path / name)
        held_out = read_rows(tmp_path / name / "data" / "eval_prompts.jsonl", PromptRecord)
        sides.append({record.prompt for record in held_out})
    assert sides[0] == sides[1]
    assert sides[0] != sides[2]


def test_a_small_table_still_keeps_a_prompt_out(tmp_path: Path) -> None:
    source = FileSource(path=_jsonl(tmp_path / "p.jsonl", _plain_pairs(2)))
    report = prepare_data(_config(DataSection(preferences=source, eval_fraction=1e-9)), tmp_path / "run")
    assert (report.tables["prompts"].used, report.tables["eval_prompts"].used) == (1, 1)


def test_own_tables_for_prompts_and_sft(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    prompts = _jsonl(tmp_path / "q.jsonl", [{"prompt": "a"}, {"prompt": "a"}, {"prompt": chat}, {"prompt": None}])
    sft = _jsonl(tmp_path / "s.jsonl", [{"prompt": "x", "answer": "y"}, {"prompt": "x", "answer": 3}])
    data = DataSection(prompts=FileSource(path=prompts), sft=FileSource(path=sft), eval_fraction=0.0)
    report = prepare_data(_config(data), tmp_path / "run")
    assert report.tables["prompts"].rejected == {"duplicate prompt": 1, "prompt is neither text nor messages": 1}
    assert report.tables["sft"].rejected == {"answer is not text": 1}
    rows = read_rows(tmp_path / "run" / "data" / "prompts.jsonl", PromptRecord)
    assert [row.prompt for row in rows] == ["a", chat]


def test_nothing_usable_is_an_error_with_the_counts(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "x", "rejected": "x"}]
    source = FileSource(path=_jsonl(tmp_path / "p.jsonl", rows))
    with pytest.raises(DataError, match="tie: 1"):
        prepare_data(_config(DataSection(preferences=source)), tmp_path / "run")


def test_no_source_and_unknown_factory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        prepare_data(_config(DataSection()), tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere\.at\.all"):
        prepare_data(_config(DataSection(world=WorldSource(factory="nowhere.at.all:make"))), tmp_path)


def test_full_disk_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    source = FileSource(path=_jsonl(tmp_path / "p.jsonl", _plain_pairs(5)))
    with pytest.raises(DataError, match="cannot write"):
        prepare_data(_config(DataSection(preferences=source)), tmp_path / "run")


# ---------------------------------------------------------------- fit


def _fitted(tmp_path: Path, *, long_prompt: str, long_response: str) -> tuple[Path, dict[str, TableReport]]:
    rows = [
        {"prompt": "a b c", "chosen": "x y", "rejected": "z"},
        {"prompt": "a b c d e f", "chosen": "x", "rejected": "z"},
        {"prompt": "a b", "chosen": "x y z x y z x", "rejected": "z"},
        {"prompt": "a c", "chosen": "x y z x y", "rejected": "x y z x z"},
        {"prompt": "b c", "chosen": "x", "rejected": "y"},
    ]
    data = DataSection.model_validate(
        {
            "preferences": {"kind": "file", "path": _jsonl(tmp_path / "p.jsonl", rows)},
            "eval_fraction": 0.0,
            "max_prompt_tokens": 5,
            "max_response_tokens": 4,
            "long_prompt": long_prompt,
            "long_response": long_response,
        }
    )
    config = _config(data)
    prepare_data(config, tmp_path)
    tokenizer = make_tokenizer(NewModel(), texts=["a b c d e f x y z"])
    first = fit_data(config, tmp_path, tokenizer=tokenizer)
    assert fit_data(config, tmp_path, tokenizer=tokenizer) == first
    return tmp_path / "data", first.tables


def test_fit_counts_truncation(tmp_path: Path) -> None:
    directory, tables = _fitted(tmp_path, long_prompt="truncate_left", long_response="truncate_right")
    table = tables["preferences"]
    # Row 3's answers share their first four tokens, so truncation leaves no preference.
    assert table.rejected == {"tie after truncation": 1}
    assert (table.used, table.truncated, table.truncated_prompts, table.truncated_answers) == (4, 2, 1, 1)
    assert (tables["prompts"].used, tables["prompts"].truncated) == (5, 1)
    assert len(read_rows(directory / "preferences.jsonl", PreferencePair)) == 4


def test_fit_rejects_what_the_configuration_rejects(tmp_path: Path) -> None:
    directory, tables = _fitted(tmp_path, long_prompt="reject", long_response="reject")
    assert tables["preferences"].rejected == {
        "prompt longer than max_prompt_tokens": 1,
        "answer longer than max_response_tokens": 2,
    }
    assert all(map(_balanced, tables.values()))
    assert [pair.prompt for pair in read_rows(directory / "preferences.jsonl", PreferencePair)] == ["a b c", "b c"]
    assert "a b c d e f" not in {row.prompt for row in read_rows(directory / "prompts.jsonl", PromptRecord)}


def test_canonical_files_name_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_id": "a", "prompt": "b"}\n{"prompt_id": 3}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:2 is not a PromptRecord"):
        read_rows(path, PromptRecord)
