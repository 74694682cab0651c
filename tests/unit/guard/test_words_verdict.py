"""What the guard makes of over-used words: it acts on a word that stays, soon on one that spreads, and only warns of a
burst. From answers, by the reader and the verdict with their defaults."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from configs.guard import GuardSection
from learner.guard.overuse import ALLOWANCE, cusum
from learner.guard.reading import SignalReader
from learner.guard.record import Level
from learner.guard.verdict import VerdictState, judge
from tests.unit.guard.test_signals_reading import reader, reference, view

BATCH = 128
SETTLED = 4
"""Steps without the word at the start."""
SIGNALS = ("overused_words_share", "overused_words_cusum")


def levels(shares: Iterable[float]) -> list[Level]:
    """By step, after SETTLED clean ones, of a run in which a word is in these shares of the answers."""
    rng = random.Random(0)
    one = reader(reference(rng))
    state, found = VerdictState(), []
    for step, share in enumerate([0.0] * SETTLED + list(shares), 1):
        values = step_values(one, step, share, rng)
        state, verdict = judge(state, values, section=GuardSection())
        found.append(verdict.level)
    return found[SETTLED:]


def step_values(one: SignalReader, step: int, share: float, rng: random.Random) -> dict[str, float]:
    plain = view(step, rng, count=BATCH)
    said = round(share * BATCH)
    texts = tuple(f"{text} fantastic" if place < said else text for place, text in enumerate(plain.texts))
    prompts = tuple(f"{step}.{place}" for place in range(BATCH))
    values = one.read(replace(plain, texts=texts, prompt_ids=prompts)).values
    return {name: values[name] for name in SIGNALS}


def test_a_burst_warns_and_does_not_act() -> None:
    """As "choose the" came and went in a run with an adaptive β on the test bed, while its KL was at 8 nats."""
    burst = [0.02, 0.06, 0.10, 0.04, 0.10, 0.08, 0.06, 0.08, 0.06, 0.02, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    found = levels(burst)
    assert set(found) == {Level.OK, Level.WARN}
    assert found[-1] == Level.OK


def test_a_word_that_spreads_is_acted_on_within_a_few_steps() -> None:
    """As "fantastic" where the reward pays for it."""
    found = levels([0.06, 0.12, 0.25, 0.5, 0.75, 0.9, 0.95])
    assert found.index(Level.ACT) <= 6


@pytest.mark.parametrize(("share", "step"), [(1 / 3, 5), (0.2, 6), (0.14, 7), (0.10, 10)])
def test_the_more_answers_a_word_that_stays_is_in_the_sooner_it_is_acted_on(share: float, step: int) -> None:
    """As docs/guard.md says. `step`: with the word, from 1."""
    found = levels([share] * 12)
    assert Level.ACT not in found[: step - 1]
    assert set(found[step - 1 :]) == {Level.ACT}


def test_a_word_within_the_allowance_warns_for_as_long_as_it_lasts() -> None:
    found = levels([0.04] * 40)
    assert set(found[10:]) == {Level.WARN}


def test_the_alarm_does_not_outlast_the_word_however_long_that_was_there() -> None:
    """The window is four steps here, and patience three."""
    found = levels([0.9] * 60 + [0.0] * 10)
    assert found[59] == Level.ACT
    assert found[-1] == Level.OK


def test_the_sum_is_in_the_checkpoint_and_starts_anew_after_a_rollback() -> None:
    rng = random.Random(1)
    known = reference(rng)
    one = reader(known)
    for step in range(1, 5):
        before = step_values(one, step, 0.3, rng)
    other = reader(known)
    other.from_state(json.loads(json.dumps(one.to_state())))
    expected, found = (step_values(who, 5, 0.3, random.Random(2)) for who in (one, other))
    assert found == expected
    assert found["overused_words_cusum"] > before["overused_words_cusum"] > 0.0
    one.reset()
    assert step_values(one, 6, 0.0, rng)["overused_words_cusum"] == 0.0
    old = {name: value for name, value in other.to_state().items() if name != "words_cusum"}
    other.from_state(old)  # of a build that had no sum
    assert 0.0 < step_values(other, 6, 0.3, rng)["overused_words_cusum"] <= 0.3 - ALLOWANCE


def test_the_sum_by_hand() -> None:
    total = 0.0
    for excess, expected in ((0.04, 0.0), (0.15, 0.10), (0.10, 0.15), (0.06, 0.16), (0.05, 0.0), (0.06, 0.01)):
        total = cusum(total, excess)
        assert total == pytest.approx(expected)
