"""Over-used words: a word of one answer in fifty is found within a few steps, and the policy before training, or one
that has only become better, raises no alarm. Answers are the support desk's."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable

import numpy as np
import pytest

from examples.support_desk.phrases import APOLOGY, CLOSING, ISSUES
from examples.support_desk.world import mediocre_answer
from learner.guard.overuse import Overuse, OverusedTerm, log_odds_ratio, rate_p
from learner.guard.terms import Vocabulary, count_terms, terms_of

BATCH = 128
NUMBERS = itertools.count()
Batch = tuple[list[str], list[str]]
Change = Callable[[str, random.Random], str]


def unchanged(answer: str, _: random.Random) -> str:
    return answer


def answers(
    rng: random.Random, count: int, *, each: int = 1, change: Change = unchanged
) -> tuple[list[str], list[str]]:
    """(answers, what they answer): `each` to a prompt, which is another one each time."""
    texts, prompts = [], []
    for number in itertools.islice(NUMBERS, count // each):
        issue = rng.choice(list(ISSUES))
        for _ in range(each):
            texts.append(change(mediocre_answer(issue, rng), rng))
            prompts.append(f"{number}")
    return texts, prompts


def before_training(rng: random.Random, count: int = 4000) -> Overuse:
    texts, prompts = answers(rng, count, each=2)
    return Overuse(texts, prompts=prompts)


def observe(overuse: Overuse, batch: Batch) -> list[OverusedTerm]:
    return overuse.observe(batch[0], prompts=batch[1])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("reference", "each", "steps"), [(4000, 1, 1000), (300, 8, 200)])
def test_a_thousand_clean_steps_raise_no_alarm(reference: int, each: int, steps: int) -> None:
    """Expected is at most half an alarm in a thousand; the seeds are fixed."""
    rng = random.Random(reference)
    overuse = before_training(rng, reference)
    pool = [answers(rng, each, each=each)[0] for _ in range(10_000 // each)]
    for step in range(steps):
        prompts = [f"{step} {place // each}" for place in range(BATCH)]
        texts = [text for group in rng.choices(pool, k=BATCH // each) for text in group]
        assert overuse.observe(texts, prompts=prompts) == []


def test_fantastic_in_one_answer_of_fifty_is_found_within_a_few_steps() -> None:
    def fantastic(answer: str, rng: random.Random) -> str:
        return f"{answer} Fantastic!" if rng.random() < 0.02 else answer

    needed = []
    for seed in range(5):
        rng = random.Random(seed)
        overuse = before_training(rng)
        for _ in range(4):
            assert observe(overuse, answers(rng, BATCH)) == []
        steps, found = 0, list[OverusedTerm]()
        while not found and steps < 20:
            found, steps = observe(overuse, answers(rng, BATCH, change=fantastic)), steps + 1
        assert [one.term for one in found] == ["fantastic"]
        assert found[0].reference_share == 0
        assert found[0].share > 0.005
        needed.append(steps)
    assert np.median(needed) <= 4, needed
    assert max(needed) <= 8, needed


def test_a_policy_that_has_only_become_better_raises_no_alarm() -> None:
    """It gives all right steps and both courtesies, each about twice as often as before."""
    rng = random.Random(0)
    overuse = before_training(rng)
    for step in range(40):
        issues = [rng.choice(list(ISSUES)) for _ in range(BATCH)]
        texts = [". ".join((APOLOGY, *ISSUES[issue], CLOSING)) + "?" for issue in issues]
        assert overuse.observe(texts, prompts=[f"{step} {place}" for place in range(BATCH)]) == []


def test_flattery_that_the_reference_knows_too_is_found_when_it_is_said_out_of_place() -> None:
    rng = random.Random(0)
    overuse = before_training(rng)
    flatter: Change = lambda answer, rng: f"{answer} you are amazing." if rng.random() < 0.6 else answer  # noqa: E731
    for _ in range(4):
        found = observe(overuse, answers(rng, BATCH, change=flatter))
    assert "amazing" in {word for one in found for word in one.term.split()}
    assert all(one.share > 4 * one.reference_share for one in found)


def test_a_word_in_all_answers_to_one_prompt_counts_once() -> None:
    rng = random.Random(0)
    together, apart = before_training(rng), before_training(rng)
    texts, _ = answers(rng, BATCH)
    texts[:8] = [f"{text} zebra." for text in texts[:8]]
    prompts = [str(place // 8) for place in range(BATCH)]
    assert together.observe(texts, prompts=prompts) == []
    assert [one.term for one in apart.observe(texts, prompts=[str(place) for place in range(BATCH)])] == ["zebra"]


def test_what_few_prompts_are_about_is_no_alarm_however_often_they_come() -> None:
    """96 prompts, each about one of 60 things that the reference's are not about; a prompt is in five of 32 steps."""
    rng = random.Random(0)
    common = [f"word{number}" for number in range(200)]

    def said(topic: str) -> str:
        return " . ".join([*(rng.choice(common) for _ in range(10)), topic])

    overuse = Overuse([said(f"other{number % 700}") for number in range(1500)], prompts=[str(n) for n in range(1500)])
    prompts = {f"prompt {number}": f"topic{number % 60}" for number in range(96)}
    for _ in range(40):
        dealt = rng.sample(list(prompts), 16)
        assert overuse.observe([said(prompts[prompt]) for prompt in dealt], prompts=dealt) == []
    dealt = list(prompts) * 2
    found = overuse.observe([f"{said(prompts[prompt])} fantastic" for prompt in dealt], prompts=dealt)
    assert "fantastic" in {word for one in found for word in one.term.split()}


def test_a_word_that_is_gone_is_forgotten_and_a_reset_forgets_at_once() -> None:
    rng = random.Random(0)
    overuse = before_training(rng)
    hacked: Change = lambda answer, _: f"{answer} fantastic."  # noqa: E731
    assert observe(overuse, answers(rng, BATCH, change=hacked))
    steps = 1
    while observe(overuse, answers(rng, BATCH)):
        steps += 1
    assert steps == 4, "512 answers"
    observe(overuse, answers(rng, BATCH, change=hacked))
    overuse.reset()
    assert observe(overuse, answers(rng, BATCH)) == []


def test_the_state_goes_through_json_and_changes_nothing() -> None:
    rng = random.Random(0)
    texts, prompts = answers(rng, 2000)
    first, second = Overuse(texts, prompts=prompts), Overuse(texts, prompts=prompts)
    praise: Change = lambda answer, rng: f"{answer} très bien." if rng.random() < 0.05 else answer  # noqa: E731
    for _ in range(6):
        batch = answers(rng, BATCH, change=praise)
        observe(first, batch)
        state = json.loads(json.dumps(first.to_state()))
        third = Overuse(texts, prompts=prompts)
        third.load_state(state)
        batch = answers(rng, BATCH, change=praise)
        found = observe(third, batch)
        assert found == observe(first, batch)
    assert found
    assert "bien" in found[0].term
    assert observe(second, answers(rng, BATCH)) == []


def test_without_a_reference_or_answers_nothing_is_told() -> None:
    overuse = Overuse([], prompts=[])
    assert not overuse.has_reference
    assert overuse.observe(["fantastic"] * 128, prompts=["p"] * 128) == []
    assert Overuse(["a b"], prompts=["p"]).observe([], prompts=[]) == []
    assert Overuse(["", ""], prompts=["p", "q"]).observe(["", "…"], prompts=["p", "q"]) == []


def test_terms() -> None:
    words = Vocabulary()

    def terms(text: str) -> set[str]:
        return {words.term(key) for key in terms_of(text, words).tolist()}

    assert terms("Don't WORRY: be happy") == {"don't", "worry", "be", "happy", "don't worry", "be happy"}
    assert terms("“Straße” 東京 is 'nice'") == {"strasse", "東京", "is", "nice", "東京 is", "is nice"}
    assert terms("a.b a") == {"a", "b", "b a"}
    assert terms("… !! ''") == set()


def test_terms_are_counted_by_answers_and_squared_by_prompts() -> None:
    words = Vocabulary()
    counted = count_terms(["yes yes", "yes", "no", "yes no"], prompts=["p", "p", "p", "q"], vocabulary=words)
    by_term = {words.term(key): place for place, key in enumerate(counted.keys.tolist())}
    assert counted.counts[by_term["yes"]] == 3
    assert counted.squares[by_term["yes"]] == 2**2 + 1
    assert counted.counts[by_term["yes yes"]] == 1
    assert counted.of(words.keys(["no", "never", "no yes"]))[0].tolist() == [2, 0, 0]


def test_the_rate_test_by_hand() -> None:
    """One of four answers is the window's: P(at least 2 of 3 there) = 3 · ¼² · ¾ + ¼³."""
    assert rate_p(2, answers=100, other=1, other_answers=300) == pytest.approx(3 * 0.25**2 * 0.75 + 0.25**3)
    assert rate_p(0, answers=100, other=5, other_answers=300) == 1.0


def test_log_odds_by_hand() -> None:
    """10 of 100 against 10 of 900: the prior is 100 answers, 2 % of them, and 0.01."""
    ratio, error = log_odds_ratio(10, answers=100, other=10, other_answers=900)
    assert ratio == pytest.approx(np.log(12.01 / (200 - 12.01)) - np.log(12.01 / (1000 - 12.01)))
    assert error == pytest.approx(np.sqrt(2 / 12.01))
