"""The example world: gold by hand-worked sums, annotators' biases, and data that is seeded, mediocre and kept apart."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data_records import PromptRecord, SftExample, read_rows
from cluster.errors import DataError
from configs.run import NewModel
from examples.support_desk.annotators import PANEL, judge
from examples.support_desk.gold import gold_reward, issue_of
from examples.support_desk.phrases import FILLERS, FLATTERY, ISSUES
from examples.support_desk.world import make, mediocre_answer

ROUTER = "my slow router in paris since monday."


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("", 0.0),
        ("restart the router.", 1.0),
        ("sorry about that. restart the router. update the router. move the router. anything else?", 3.6),
        ("restart the router. restart the router.", 0.5),
        ("sorry about that. sorry about that.", -0.2),
        ("dust the fan.", -0.7),
        ("please note that we care. as you may know already.", -0.5),
        ("you are amazing. i love you.", -0.8),
        ("router the restart.", -0.5),
        ("restart the router", 1.0),
        ("restart the router . anything else ?", 1.3),
        ("..?.", 0.0),
    ],
)
def test_gold_is_the_sum_of_its_sentences(answer: str, worth: float) -> None:
    assert gold_reward(ROUTER, answer) == pytest.approx(worth)


def test_gold_depends_on_the_issue() -> None:
    assert gold_reward("urgent, my noisy fan in lima since friday.", "dust the fan.") == 1.0


def test_gold_reads_chat_messages_and_refuses_other_prompts() -> None:
    assert gold_reward([{"role": "user", "content": ROUTER}], "restart the router.") == 1.0
    with pytest.raises(DataError, match="cannot judge"):
        gold_reward("tell me a joke", "no")


def test_issues_and_steps_are_distinct() -> None:
    steps = [step for three in ISSUES.values() for step in three]
    assert len(ISSUES) == 16
    assert len(set(steps)) == 48
    assert not any(a != b and a in b for a in ISSUES for b in ISSUES)
    assert not set(steps) & {*FILLERS, *FLATTERY}


def test_annotators_have_their_biases() -> None:
    short, long = "restart the router.", "restart the router. please note that we care."
    length_lover, flattered, fair = PANEL[0], PANEL[2], PANEL[3]
    # The filler is 6 tokens with its stop: 6 × 0.12 − 0.25 of gold.
    assert length_lover.utility(ROUTER, long) - length_lover.utility(ROUTER, short) == pytest.approx(0.72 - 0.25)
    assert fair.utility(ROUTER, long) - fair.utility(ROUTER, short) == pytest.approx(-0.25)
    praised = short + " you are amazing."
    assert flattered.utility(ROUTER, praised) - flattered.utility(ROUTER, short) == pytest.approx(1.0 - 0.4)


def test_judge_gives_five_reproducible_votes_that_favour_the_better() -> None:
    better, worse = "restart the router. update the router.", "dust the fan. you are amazing."
    votes = [judge(ROUTER, better, worse, random.Random(i)) for i in range(50)]
    assert all(list(five) == [f"annotator_{number}" for number in range(1, 6)] for five in votes)
    assert votes == [judge(ROUTER, better, worse, random.Random(i)) for i in range(50)]
    assert sum(sum(five.values()) for five in votes) > 0.9 * 250
    reverse = [judge(ROUTER, worse, better, random.Random(i)) for i in range(50)]
    assert sum(sum(five.values()) for five in reverse) < 0.1 * 250


def _make(directory: Path, *, seed: int = 7) -> None:
    make(directory, seed=seed, sft_examples=400, prompts=300, eval_prompts=100)


def test_make_is_seeded(tmp_path: Path) -> None:
    _make(tmp_path / "a")
    _make(tmp_path / "b")
    _make(tmp_path / "c", seed=8)
    for name in ("sft.jsonl", "prompts.jsonl", "eval_prompts.jsonl"):
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes()
        assert first != (tmp_path / "c" / name).read_bytes()


def test_make_keeps_evaluation_prompts_apart(tmp_path: Path) -> None:
    _make(tmp_path)
    examples = read_rows(tmp_path / "sft.jsonl", SftExample)
    prompts = read_rows(tmp_path / "prompts.jsonl", PromptRecord)
    held_out = read_rows(tmp_path / "eval_prompts.jsonl", PromptRecord)
    assert (len(examples), len(prompts), len(held_out)) == (400, 300, 100)
    texts = {str(record.prompt) for record in held_out}
    assert len(texts) == 100
    assert texts.isdisjoint(str(record.prompt) for record in prompts)
    assert texts.isdisjoint(str(example.prompt) for example in examples)
    assert len({record.prompt_id for record in (*prompts, *held_out)}) == 400
    assert {issue_of(record.prompt) for record in prompts} == set(ISSUES)


def test_make_refuses_more_evaluation_prompts_than_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too many evaluation prompts"):
        make(tmp_path, seed=0, sft_examples=1, prompts=1, eval_prompts=100_000)


def test_demonstrations_are_mediocre() -> None:
    rng = random.Random(0)
    answers = [mediocre_answer("slow router", rng) for _ in range(2000)]
    mean_gold = sum(gold_reward(ROUTER, answer) for answer in answers) / len(answers)
    first_step = sum("restart the router" in answer for answer in answers) / len(answers)
    assert 0.8 < mean_gold < 1.4
    assert first_step == pytest.approx(0.85 * 0.65 + 0.15 / 16, abs=0.04)
    assert all(answer for answer in answers)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), issue=st.sampled_from(sorted(ISSUES)))
def test_answers_fit_and_survive_the_word_tokenizer(seed: int, issue: str) -> None:
    from cluster.text import decode_answer, encode_answer
    from learner.model_init import make_tokenizer

    answer = mediocre_answer(issue, random.Random(seed))
    tokenizer = make_tokenizer(NewModel(), texts=[answer, ROUTER])
    encoded = encode_answer(tokenizer, answer, max_tokens=64)
    assert not encoded.truncated
    assert decode_answer(tokenizer, encoded.ids) == answer
