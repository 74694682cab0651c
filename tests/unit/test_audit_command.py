"""`keel data audit`: files of any form and run directories in; a table, audit.json and plots out."""

from __future__ import annotations

import gzip
import io
import json
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from cluster.data_records import PreferencePair, PromptRecord, SftExample, write_rows
from cluster.errors import DataError
from keel.preferences.audit import AuditInput, audit_file, load_audit
from keel.preferences.plots import write_plots
from keel.preferences.table import plain, render
from reward_service.audit.cues import Cue
from reward_service.audit.records import AUDIT_FILE, AnnotatorFacts, Audit, Leaning, Share, Stratum, decode_audit

HARMLESS = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless" / "pairs.jsonl.gz"
PNG = b"\x89PNG"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def comparisons(count: int = 120, *, seed: int = 0) -> list[dict[str, Any]]:
    """Two answers to each question, compared by three annotators."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        both = {"answer_a": f"yes {rng.random()} and more", "answer_b": f"no {rng.random()}"}
        rows += [
            {"prompt": f"question {number}", **both, "preferred": rng.choice("ab"), "annotator": annotator}
            for annotator in ("ann", "bob", "eve")
        ]
    return rows


def test_a_file_becomes_a_table_a_json_file_and_plots(tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", comparisons())
    said: list[str] = []
    audit = audit_file(AuditInput(path), say=said.append)
    out = tmp_path / "votes.jsonl.audit"
    assert decode_audit((out / AUDIT_FILE).read_bytes()) == audit
    assert {file.name for file in out.iterdir()} >= {AUDIT_FILE, "lengths.png", "balance.png", "annotators.png"}
    assert all(file.read_bytes().startswith(PNG) for file in out.glob("*.png"))
    assert str(out) in said[-1]
    assert audit.pairs == 120
    assert [one.annotator for one in audit.annotators] == ["ann", "bob", "eve"]
    assert audit.finding("order_only") is not None, "comparisons have an order of their own"


def test_out_and_nothing_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "votes.jsonl", comparisons())
    audit_file(AuditInput(path), out=tmp_path / "deep" / "er", say=None)
    assert (tmp_path / "deep" / "er" / AUDIT_FILE).is_file()
    assert capsys.readouterr().out == ""


def test_columns_prompts_and_rebalancing(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        {"q": f"what about {n}", "good": f"well {rng.random()} it is so", "bad": f"no {rng.random()}"}
        for n in range(90)
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    sft = write(tmp_path / "sft.jsonl", [{"prompt": f"what about {n}", "answer": "x"} for n in range(40)])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"what about {n}"} for n in range(80)])
    what = AuditInput(
        path,
        columns={"prompt": "q", "chosen": "good", "rejected": "bad"},
        sft=sft,
        prompts=prompts,
        rebalance="weights",
    )
    audit = load_audit(what)
    assert audit.number("prompt_overlap", "exact") == 40
    assert audit.finding("rebalanced") is not None
    assert audit.number("length_bias", "longer_preferred") == 1.0


def test_malformed_lines_are_counted_and_named(tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", [*comparisons(40), "{broken", {"prompt": "p"}])
    records = load_audit(AuditInput(path)).finding("records")
    assert records is not None
    assert records.level == "warn"
    assert "line 121" in records.value
    assert "line 122" in records.value


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        load_audit(AuditInput(tmp_path / "absent.jsonl"))
    path = write(tmp_path / "bad.jsonl", ["{broken", {"prompt": "p", "chosen": "a", "rejected": "a"}])
    with pytest.raises(DataError, match="no pair with a clear label") as caught:
        audit_file(AuditInput(path), say=None)
    assert "line 1" in str(caught.value)
    assert not (tmp_path / "bad.jsonl.audit").exists()


def test_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no preferences to audit"):
        load_audit(AuditInput(tmp_path))
    data = tmp_path / "data"
    pairs = [
        PreferencePair(pair_id=str(n), prompt=f"ask {n}", chosen=f"a {n}", rejected=f"b {n} c",
                       votes=(True, True, False), annotators=("x", "y", "z"), confidence=2 / 3)
        for n in range(60)
    ]  # fmt: skip
    write_rows(data / "preferences.jsonl", pairs)
    write_rows(data / "sft.jsonl", [SftExample(prompt=f"ask {n}", answer="a") for n in range(60)])
    write_rows(data / "prompts.jsonl", [PromptRecord(prompt_id=str(n), prompt=f"ask {n}") for n in range(60)])
    audit = audit_file(AuditInput(tmp_path), say=None)
    assert audit.number("prompt_overlap", "share") == 1.0
    assert (tmp_path / "audit" / AUDIT_FILE).is_file()
    assert audit.number("confidence", "unclear") == 0.0
    write_rows(data / "preferences_unclear.jsonl", [
        PreferencePair(pair_id=f"unclear {n}", prompt=f"ask {n}", chosen="a", rejected="b", votes=(True, False),
                       annotators=("x", "z"))
        for n in range(20)
    ])  # fmt: skip
    audit = load_audit(AuditInput(tmp_path))
    assert (audit.pairs, audit.unclear, audit.number("confidence", "unclear")) == (60, 20, 0.25)
    assert audit.number("agreement", "couples") == 3 * 60 + 20


def test_a_directory_with_one_table(tmp_path: Path) -> None:
    write(tmp_path / "votes.jsonl", comparisons(30))
    (tmp_path / "README.md").write_text("about the votes")
    assert load_audit(AuditInput(tmp_path)).pairs == 30
    write(tmp_path / "more.jsonl", comparisons(30))
    with pytest.raises(DataError, match="2 tables"):
        load_audit(AuditInput(tmp_path))


def test_a_place_that_can_only_be_read_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    path = write(tmp_path / "shared" / "votes.jsonl", comparisons(30))
    path.parent.chmod(0o555)
    monkeypatch.chdir(tmp_path)
    audit_file(AuditInput(path), say=None)
    path.parent.chmod(0o755)
    assert (tmp_path / "votes.jsonl.audit" / AUDIT_FILE).is_file()
    assert [file.name for file in path.parent.iterdir()] == ["votes.jsonl"]


def test_the_disk_may_refuse(tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", comparisons(30))
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="cannot write the audit"):
        audit_file(AuditInput(path), out=tmp_path / "taken", say=None)


def hostile() -> Audit:
    """Names that a terminal or a plot's formula parser would take for something else."""
    name = "\x1b[2J$\\frac{1}$\n\u202e" + "x" * 200
    return Audit(
        source=name,
        pairs=3,
        findings=(),
        cues=(
            Cue(term="é", log_odds=1.0, z=5.0, q=0.001, chosen_share=0.5, rejected_share=0.1, pairs=9, accuracy=0.6,
                favours="chosen"),
        ),
        annotators=(
            AnnotatorFacts(
                annotator=name,
                votes=9,
                agreement=Share(share=0.3, low=0.1, high=0.4, count=9),
                against=True,
                leanings=(Leaning(feature="length", coefficient=-1.0, z=-4.0, q=0.001),),
            ),
        ),
        topics=(Stratum(name=name, pairs=3, longer_chosen=None),),
    )  # fmt: skip


def test_users_text_is_only_text(tmp_path: Path) -> None:
    assert {path.name for path in write_plots(hostile(), tmp_path)} == {"cues.png", "balance.png", "annotators.png"}
    shown = io.StringIO()
    Console(file=shown, width=118, color_system=None).print(render(hostile()))
    assert "\x1b" not in shown.getvalue()
    assert "\u202e" not in shown.getvalue()
    assert plain("a\r\n\tb\x07") == "a b"


def test_plots_of_an_earlier_audit_are_taken_away(tmp_path: Path) -> None:
    write_plots(hostile(), tmp_path)
    assert write_plots(Audit(pairs=1, findings=()), tmp_path) == []
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.skipif(not HARMLESS.is_file(), reason=f"needs hh-rlhf harmless-base pairs at {HARMLESS}")
@pytest.mark.timeout(180)
def test_human_preferences_are_audited_within_a_minute(tmp_path: Path) -> None:
    before = time.process_time()
    audit = audit_file(AuditInput(HARMLESS), out=tmp_path, say=lambda _: None)
    assert time.process_time() - before < 60
    assert audit.number("length_bias", "longer_preferred") == pytest.approx(0.44, abs=0.005)
    bias = audit.finding("length_bias")
    assert bias is not None
    assert bias.value.startswith("the longer answer is chosen in 44")
    assert bias.level == "warn"
    assert {cue.term for cue in audit.cues} >= {"sorry", "i don’t"}


@pytest.mark.skipif(not HARMLESS.is_file(), reason=f"needs hh-rlhf harmless-base pairs at {HARMLESS}")
def test_human_preferences_with_their_sides_shuffled_have_no_cues(tmp_path: Path) -> None:
    rng = random.Random(0)
    with gzip.open(HARMLESS, "rt", encoding="utf-8") as stream:
        rows = [msgspec.json.decode(line) for line in stream]
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    audit = load_audit(AuditInput(write(tmp_path / "shuffled.jsonl", rows)))
    assert len(audit.cues) <= 1
    for name in ("length_bias", "length_only", "words_only", "prompt_only"):
        finding = audit.finding(name)
        assert finding is not None
        assert finding.level == "ok", finding
