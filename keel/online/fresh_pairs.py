"""Pairs of answers to be judged while a run goes on: the current policy's against each other, and against what earlier
policies answered to the same prompts, those among them that a rollback left.

Waits: for the rollout actors, without blocking: `sample` is a generator that yields while their answers are out. Who
unblocks it: the actors' answers or deaths. Always holds: every pair names the policy versions of both its answers, as
they were when it was asked for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.data_records import (
    FRESH_PREFERENCES_FILE,
    PREFERENCES_FILE,
    REVIEWED_PREFERENCES_FILE,
    PreferencePair,
    Prompt,
    data_dir,
    read_rows,
    stable_prompt_id,
)
from cluster.files import read_jsonl
from cluster.supervise import RolePool
from configs.run import RefreshSection
from keel.runtime import Runtime
from keel.sampling import Answer, Asking, Question, decoded, load_questions, policy_tokenizer
from learner.guard.journal import LEFT_FILE
from reward_service.preferences import Candidate

_CHUNK_PROMPTS = 64
"""Small, so that the answers of all actors come about together and rollouts go on between them."""


@dataclass(frozen=True)
class FreshPair:
    """A pair not judged yet, as texts and, where the policy just sampled them, as token ids."""

    candidate: Candidate
    question: Question
    answers: tuple[Answer, Answer | None]
    """None: an earlier policy's, of which the text is kept."""


@dataclass(frozen=True)
class _Earlier:
    """What a policy once answered."""

    question: Question
    text: str
    version: int | None


class PairSampler:
    """One a run."""

    def __init__(self, runtime: Runtime, pool: RolePool, *, section: RefreshSection) -> None:
        self._runtime = runtime
        self._pool = pool
        self._section = section
        self._tokenizer = policy_tokenizer(runtime)
        self._questions = load_questions(runtime.config, runtime.run.path, table="prompts")

    def sample(self, count: int, *, number: int, version: int) -> Generator[None, None, list[FreshPair]]:
        """`count` pairs of policy `version`. `number` seeds the draw: another one, other prompts."""
        rng = random.Random(f"fresh pairs {self._runtime.config.seed} {number}")
        earlier = self._draw_earlier(round(self._section.earlier_fraction * count), rng)
        twice = [rng.choice(self._questions) for _ in range(count - len(earlier))]
        temperatures = itertools.cycle(self._section.temperatures)
        first_of, second_of = next(temperatures), next(temperatures)
        firsts = yield from self._answers([*twice, *(old.question for old in earlier)], temperature=first_of)
        seconds = yield from self._answers(twice, temperature=second_of)
        pairs = [
            FreshPair(_candidate(question, first.text, second.text, version, version), question, (first, second))
            for question, first, second in zip(twice, firsts, seconds, strict=False)
        ]
        pairs += [
            FreshPair(
                _candidate(old.question, answer.text, old.text, version, old.version), old.question, (answer, None)
            )
            for old, answer in zip(earlier, firsts[len(twice) :], strict=True)
        ]
        rng.shuffle(pairs)
        return pairs

    def _answers(self, questions: Sequence[Question], *, temperature: float) -> Generator[None, None, list[Answer]]:
        asking = Asking(self._runtime, self._pool, temperature=temperature, online=True)
        answers: dict[int, Answer] = {}
        for start in range(0, len(questions), _CHUNK_PROMPTS):
            asking.ask(start, [question.token_ids for question in questions[start : start + _CHUNK_PROMPTS]])
        while asking.open:
            for start, results in asking.answered(wait_s=0.0):
                answers |= {start + offset: answer for offset, answer in enumerate(decoded(self._tokenizer, results))}
            yield
        return [answers[position] for position in range(len(questions))]

    def _draw_earlier(self, count: int, rng: random.Random) -> list[_Earlier]:
        """Earlier answers, each policy version as likely as any other, however many answers are known of it."""
        by_version: dict[int | None, list[_Earlier]] = {}
        for one in self._known_answers():
            by_version.setdefault(one.version, []).append(one)
        versions = sorted(by_version, key=lambda version: -1 if version is None else version)
        return [rng.choice(by_version[rng.choice(versions)]) for _ in range(count)] if versions else []

    def _known_answers(self) -> list[_Earlier]:
        """All answers in the run's preferences, and the last ones of policies that a rollback left, to prompts that the
        policy is still asked."""
        run_dir = self._runtime.run.path
        questions = {stable_prompt_id(question.record.prompt): question for question in self._questions}
        found: list[_Earlier] = []
        for path in (data_dir(run_dir) / PREFERENCES_FILE, *fresh_files(run_dir)):
            for pair in read_rows(path, PreferencePair):
                question = questions.get(stable_prompt_id(pair.prompt))
                if question is not None:
                    other = pair.policy_version if pair.rejected_version is None else pair.rejected_version
                    found.append(_Earlier(question, pair.chosen, pair.policy_version))
                    found.append(_Earlier(question, pair.rejected, other))
        left = run_dir / LEFT_FILE
        for row in read_jsonl(left) if left.exists() else ():
            question = questions.get(stable_prompt_id(row["prompt"]))
            if question is not None:
                found.append(_Earlier(question, row["answer"], row["version"]))
        return found


def fresh_files(run_dir: Path) -> tuple[Path, ...]:
    """Where a run's later preferences are: judged by function, and by people. Those that exist."""
    paths = (data_dir(run_dir) / FRESH_PREFERENCES_FILE, run_dir / REVIEWED_PREFERENCES_FILE)
    return tuple(path for path in paths if path.is_file())


def _candidate(question: Question, a: str, b: str, version_a: int | None, version_b: int | None) -> Candidate:
    prompt: Prompt = question.record.prompt
    return Candidate(prompt, a, b, version_a=version_a, version_b=version_b)
