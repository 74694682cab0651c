"""The constitution: what each condition finds, what a broken file says, and that no rule can stall the service."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ConfigError, ScoringError
from configs.reward import RewardSection
from configs.yaml_text import parse_yaml
from reward_service.rewards.constitution import PATTERN_LIMIT_S, Constitution, load_constitution
from reward_service.rewards.sources import TextSample

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]


Load = Callable[[str], Constitution]
"""The rules that a text holds."""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(text: str) -> Constitution:
        (tmp_path / "rules.yaml").write_text(text)
        return load_constitution(tmp_path / "rules.yaml")

    return loaded


def sample(answer: str, *, prompt: str = "a prompt", tokens: int = 5) -> TextSample:
    return TextSample("t", prompt, answer, "stop", tokens)


def rule(when: str, *, on: str = "answer") -> str:
    return f"rules:\n  - name: r\n    when: {when}\n    on: {on}\n    then: flag\n"


async def detail(rules: Constitution, one: TextSample) -> str | None:
    """What the only rule found; None where it was not hit."""
    (hits,) = await rules.judge([one])
    assert not isinstance(hits, ScoringError), hits
    return hits[0].verdict.detail if hits else None


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("when", "hit", "missed"),
    [
        (
            "{phrases: [you are amazing]}",
            ["You are  AMAZING!", "so, you\nare amazing"],
            ["you are amazingly"],
        ),
        ("{phrases: [c++, a.b]}", ["in C++ now", "a.b"], ["c+", "axb", "c++x"]),
        ("{phrases: [no, yes, off, 2024-01-01]}", ["oh no", "2024-01-01"], ["nowhere"]),
        ("{phrases: [Paris], ignore_case: false}", ["Paris"], ["paris"]),
        (r"{regex: '\b\d{3}-\d{4}\b'}", ["call 555-1234"], ["5555-1234", "call"]),
        ("{regex: '^damn', ignore_case: true}", ["DAMN it"], ["well, damn"]),
        ("{regex: '^(?!.*sorry)'}", ["go away"], ["sorry, no"]),
        ("{max_words: 3}", ["one two three four"], ["one two three", ""]),
        ("{min_words: 2}", ["", "  ", "one"], ["one two"]),
        ("{min_words: 2, regex: z}", ["one", "a z"], ["a b"]),
    ],
)
async def test_a_condition_hits_and_misses(load: Load, when: str, hit: list[str], missed: list[str]) -> None:
    rules = load(rule(when))
    for answer in hit:
        assert await detail(rules, sample(answer)) is not None, answer
    for answer in missed:
        assert await detail(rules, sample(answer)) is None, answer
    rules.close()


async def test_tokens_words_and_matches_are_named(load: Load) -> None:
    rules = load(rule("{max_tokens: 5, max_words: 2, phrases: [fine]}"))
    assert await detail(rules, sample("ok", tokens=6)) == "6 tokens, at most 5"
    assert await detail(rules, sample("one two three")) == "3 words, at most 2"
    assert await detail(rules, sample("Fine")) == "'Fine'"
    assert await detail(rules, sample("ok", tokens=5)) is None
    rules.close()


async def test_a_rule_on_the_prompt_does_not_read_the_answer(load: Load) -> None:
    rules = load(rule("{phrases: [medicine]}", on="prompt"))
    assert await detail(rules, sample("fine", prompt="which medicine?")) == "'medicine'"
    assert await detail(rules, sample("medicine", prompt="which?")) is None
    rules.close()


def repeats_the_prompt(prompt: str, answer: str) -> str | bool:
    if answer == "broken":
        raise ValueError("broken")
    return f"all {len(prompt)} characters" if prompt in answer else False


async def returns_a_number(prompt: str, answer: str) -> float:
    return 0.5


async def test_a_function_says_what_it_found_and_its_failure_is_that_samples(load: Load) -> None:
    rules = load(rule("{function: 'tests.unit.test_constitution:repeats_the_prompt'}"))
    found = await rules.judge([sample("you asked: a prompt"), sample("broken"), sample("fine")])
    rules.close()

    assert not isinstance(found[0], ScoringError)
    assert [hit.verdict.detail for hit in found[0]] == ["all 8 characters"]
    assert isinstance(found[1], ScoringError)
    assert "rule r" in str(found[1])
    assert found[2] == []


async def test_a_function_that_gives_neither_bool_nor_text_is_an_error(load: Load) -> None:
    rules = load(rule("{function: 'tests.unit.test_constitution:returns_a_number'}"))
    (found,) = await rules.judge([sample("fine")])
    rules.close()
    assert isinstance(found, ScoringError)


async def test_a_catastrophic_regex_is_stopped_while_the_process_goes_on(load: Load) -> None:
    """(x+x+)+y on 5,000 x would take longer than the universe has. Another thread counts meanwhile."""
    rules = load(rule("{regex: '(x+x+)+y'}"))
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.01):
            ticks[0] += 1

    threading.Thread(target=tick, daemon=True).start()
    started_s = time.process_time()
    found = await rules.judge([sample("fine"), sample("x" * 5000), sample("xxy")])
    stop.set()
    rules.close()

    assert found[0] == []
    assert isinstance(found[1], ScoringError)
    assert "rule r takes too long" in str(found[1])
    assert not isinstance(found[2], ScoringError)
    assert len(found[2]) == 1
    assert time.process_time() - started_s < PATTERN_LIMIT_S * 3
    assert ticks[0] > 10


async def test_nothing_to_judge(load: Load) -> None:
    rules = load(rule("{max_words: 3}"))
    assert await rules.judge([]) == []
    rules.close()


# ---------------------------------------------------------------- what is wrong with a file


BROKEN = """\
rules:
  - name: flattery
    when: {phrases: [you are amazing], phrasess: [x]}
    then: {penalise: {std: 1.0}}
  - name: digits
    when:
      regexp: '\\d'
    then: flag
  - name: amount
    when: {max_words: many}
    then: {penalise: {std: -1}}
  - when: {max_words: 3}
    then: flagg
  - name: nothing
    when: {}
    then: {override: {std: .inf}}
  - name: both
    when: {max_words: 3}
    then: {flag: true, penalise: {std: 1}}
  - name: tokens
    when: {max_tokens: 3}
    on: prompt
    then: flag
"""


def problems(load: Load, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text)
    return str(caught.value)


def test_every_problem_is_named_with_its_rule_and_line(load: Load) -> None:
    message = problems(load, BROKEN)
    for expected in (
        "rule flattery (line 3): when.phrasess: unknown key; nearest valid: phrases",
        "rule digits (line 7): when.regexp: unknown key; nearest valid: regex",
        "rule amount (line 10): when.max_words: got 'many'",
        "rule amount (line 11): then.penalise.std: got -1",
        "rule number 4 (line 12): name: missing",
        "rule number 4 (line 13): then: got 'flagg'; say one of flag",
        "rule nothing (line 15): when: name at least one of",
        "rule nothing (line 16): then.override.std",
        "rule both (line 19): then: say one of",
        "rule tokens (line 20): max_tokens counts the answer's tokens",
    ):
        assert expected in message, message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rules:\n  - name: r\n    when: {regex: '(a'}\n    then: flag\n", "rule r (line 3): when.regex: got '(a'"),
        (
            "rules:\n  - name: r\n    then: flag\n    when:\n      function: tests.unit.test_constitution:nope\n",
            "rule r (line 5): when.function",
        ),
        (
            "rules:\n  - name: r\n    name: s\n    when: {max_words: 3}\n    then: flag\n",
            "line 3: key 'name' stands twice",
        ),
        (rule("{max_words: 3}") + rule("{max_words: 4}").removeprefix("rules:\n"), "the name is taken, on line 2"),
        ("rules: []\n", "no rules"),
        ("rules:\n  - 3\n", "rule number 1 (line 2)"),
        ("rule:\n  - name: r\n", "nearest valid: rules"),
        ("- name: r\n", "no key `rules`"),
        ("", "no key `rules`"),
        ("rules: [\n", "line 2"),
        ('rules:\n  - name: r\n    when: {regex: "\\d"}\n', "line 3"),
        (rule("{min_words: 9, max_words: 3}"), "every text would hit"),
        (rule("{phrases: [' ']}"), "phrases"),
        (rule("{phrases: one}"), "when.phrases: got 'one'; write a list"),
        (rule("{phrases: [911]}"), "when.phrases.0: got 911; write a text"),
    ],
)
def test_a_broken_file_says_where(load: Load, text: str, expected: str) -> None:
    assert expected in problems(load, text)


def test_no_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_constitution(tmp_path / "none.yaml")


# ---------------------------------------------------------------- the example and the documentation


def test_what_the_documentation_shows_is_valid(load: Load) -> None:
    """Its first block is a configuration, its constitution the example's."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/rewards.md").read_text(), flags=re.DOTALL)
    section = RewardSection.model_validate(parse_yaml(blocks[0], where="docs")["reward"])
    assert [source.kind for source in section.sources] == ["model", "function", "http"]

    documented, example = load(blocks[1]), load_constitution(ROOT / "examples/support_desk/constitution.yaml")
    assert documented.rules == example.rules


async def test_the_examples_rules_hit_what_they_are_for() -> None:
    rules = load_constitution(ROOT / "examples/support_desk/constitution.yaml")
    good = "sorry about that. restart the router. update the router. move the router. anything else?"
    answers = {
        good: [],
        "restart the router. i love you.": ["flattery"],
        "restart the router. move the router. restart the router.": ["says it twice"],
        "restart the router. dust the fan. slow the fan.": [],
        "": ["empty"],
        "let me explain in detail. " + "please note that we care. " * 9: ["rambling", "says it twice"],
    }
    found = await rules.judge([sample(answer) for answer in answers])
    rules.close()
    named = [[hit.verdict.rule for hit in hits] for hits in found if not isinstance(hits, ScoringError)]
    assert named == list(answers.values())
