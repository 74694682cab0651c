"""The advisor: what decides, what is said besides, and how answers are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ConfigError, DataError
from keel.preferences.advise import advise_command
from reward_service.audit.advise import Advice, Answers, advise
from reward_service.audit.records import AUDIT_FILE, Audit, Finding, Number, encode_audit


def audited(
    *, pairs: int = 12_000, agreement: float | None = 0.75, length_only: float = 0.52, cue: float = 0.51
) -> Audit:
    def finding(name: str, **numbers: Number) -> Finding:
        return Finding(name=name, level="ok", value="", numbers=numbers, meaning="")

    return Audit(
        pairs=pairs,
        findings=(
            finding("agreement", pairwise=agreement),
            finding("length_only", accuracy=length_only),
            finding("cues", strongest_accuracy=cue),
            finding("confidence", unclear=0.05),
        ),
    )


@pytest.mark.parametrize(
    ("audit", "answers", "method", "because"),
    [
        (audited(), Answers(), "rlhf", "12,000 pairs"),
        (audited(), Answers(baseline=0.97), "nothing", "97%"),
        (audited(), Answers(verifiable=True), "rules", "program"),
        (audited(), Answers(factual=True), "sft", "factual"),
        (audited(), Answers(factual=True, verifiable=True), "rules", "program"),
        (audited(agreement=0.55), Answers(), "sft", "55%"),
        (audited(pairs=300), Answers(), "sft", "too few"),
        (audited(pairs=2_000), Answers(), "dpo", "by heart"),
        (audited(length_only=0.7), Answers(), "dpo", "length alone"),
        (audited(cue=0.8), Answers(), "dpo", "one word alone"),
        (audited(agreement=None), Answers(), "rlhf", "12,000 pairs"),
        (None, Answers(), "sft", "no preferences"),
        (None, Answers(verifiable=True), "rules", "program"),
        # The gravest reason decides.
        (audited(agreement=0.5, pairs=2_000), Answers(), "sft", "agree"),
        (audited(agreement=0.5), Answers(baseline=0.96), "nothing", "96%"),
    ],
)
def test_what_decides(audit: Audit | None, answers: Answers, method: str, because: str) -> None:
    advice = advise(audit, answers)
    assert advice.method == method
    assert because in advice.reasons[0]
    assert advice.next_steps
    assert advice.would_change


@pytest.mark.parametrize(("baseline", "method"), [(0.95, "rlhf"), (0.951, "nothing")])
def test_the_limit_of_the_baseline(baseline: float, method: str) -> None:
    assert advise(audited(), Answers(baseline=baseline)).method == method


@pytest.mark.parametrize(("agreement", "method"), [(0.60, "rlhf"), (0.599, "sft")])
def test_the_limit_of_agreement(agreement: float, method: str) -> None:
    assert advise(audited(agreement=agreement), Answers()).method == method


def test_what_else_speaks_against_it_is_said_too() -> None:
    advice = advise(audited(agreement=0.5, pairs=2_000), Answers(latency_ms=50))
    assert any("by heart" in entry for entry in advice.also)
    assert any("50 ms" in entry for entry in advice.also)
    assert "Annotators are not named" in " ".join(advise(audited(agreement=None), Answers()).also)


# ---------------------------------------------------------------- command


def asked(replies: Iterator[str], given: Answers) -> tuple[Advice, list[str]]:
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        try:
            return next(replies)
        except StopIteration:
            raise EOFError from None

    return advise_command(None, answers=given, ask=ask, say=lambda _: None), questions


def test_only_what_is_not_given_is_asked_and_wrong_replies_again() -> None:
    advice, questions = asked(iter(["maybe", "y", "150", "97 %", "-3", "250ms"]), Answers(factual=False))
    assert [question.split()[0] for question in questions] == ["Can", "Can", "How", "How", "Most", "Most"]
    assert advice.method == "nothing"
    assert advice.reasons[0].startswith("97%")


def test_the_end_of_input_leaves_the_rest_unknown() -> None:
    advice, questions = asked(iter(["n", "yes"]), Answers())
    assert len(questions) == 3
    assert advice.method == "rules"


def test_nothing_is_asked_without_a_terminal_and_json_is_json() -> None:
    said: list[str] = []
    advise_command(None, answers=Answers(), as_json=True, say=said.append)
    assert json.loads("\n".join(said))["method"] == "sft"


def test_an_earlier_audit_is_used(tmp_path: Path) -> None:
    (tmp_path / AUDIT_FILE).write_bytes(encode_audit(audited(agreement=0.5)))
    said: list[str] = []
    for path in (tmp_path, tmp_path / AUDIT_FILE):
        assert advise_command(path, answers=Answers(), say=said.append).method == "sft"
    assert said[0].startswith("SFT: ")
    assert "Why:" in said[0]
    assert "keel sft CONFIG" in said[0]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="baseline"):
        advise_command(None, answers=Answers(baseline=80.0))
    with pytest.raises(ConfigError, match="latency"):
        advise_command(None, answers=Answers(latency_ms=0.0))
    (tmp_path / AUDIT_FILE).write_text("{}")
    with pytest.raises(DataError, match="cannot read the audit"):
        advise_command(tmp_path, answers=Answers())
    with pytest.raises(DataError, match="not found"):
        advise_command(tmp_path / "absent.jsonl", answers=Answers())
