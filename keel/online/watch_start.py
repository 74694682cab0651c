"""What measurements beside training are compared with, taken before the first step: the canary's answers and rewards
(canary.json), and what held-out demonstrations cost the policy then (anchor.json).

Waits: for the roles, which stand ready and have nothing else to do yet, up to guard.watch.timeout_s. Always holds: a
run's baselines are taken once; a resumed run, or one whose reward model has changed, goes on with the same answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from cluster.errors import DataError, DeadlineError
from cluster.files import atomic_write_bytes
from cluster.reward_models import RewardModels
from configs.guard import WatchSection
from keel.comparison import Reference, reference_answers
from keel.interrupt import InterruptedRun
from keel.online.watch_asking import Asker, T, Work
from keel.runtime import Runtime
from keel.sampling import load_questions
from learner.held_out import HeldOutTexts, held_out_texts

CANARY_FILE: Final = "canary.json"
ANCHOR_FILE: Final = "anchor.json"


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """Fixed prompts, and what the policy before training answered. `rewards`: by `rm_version`; under another version
    the answers are scored again."""

    rm_version: str
    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    rewards: list[float]


class Anchor(msgspec.Struct, frozen=True, kw_only=True):
    """`nats_per_token`: of `texts` held-out demonstrations, before training."""

    source: str
    texts: int
    nats_per_token: float


@dataclass(frozen=True)
class Baseline:
    """Absent: not asked for, or not to be had (the run's progress says why)."""

    references: list[Reference]
    canary: Canary | None
    texts: HeldOutTexts | None
    anchor: Anchor | None


def take_baseline(
    runtime: Runtime, asker: Asker, *, section: WatchSection, tick: Callable[[], None], note: Callable[[str], None]
) -> Baseline:
    """That of an earlier driver of the run, or a new one. `tick`: called while the roles are at work."""
    run_dir = runtime.run.path
    references = reference_answers(runtime.config, run_dir, limit=section.prompts)
    texts = held_out_texts(runtime.config, run_dir, limit=section.anchor_texts)
    until_s = time.monotonic() + section.timeout_s

    def tried(what: str, work: Work[T]) -> T | None:
        try:
            return _finished(work, tick=tick, until_s=until_s)
        except InterruptedRun:
            raise
        except Exception as error:
            note(f"no {what} to compare with: {error}")
            return None

    canary = _stored(run_dir / CANARY_FILE, Canary)
    if canary is None and section.canary is not None and asker.has_rewards:
        prompts = _canary_prompts(runtime, used=len(references), count=section.canary.prompts)
        canary = tried("canary", _new_canary(asker, prompts, run_dir=run_dir))
    anchor = _stored(run_dir / ANCHOR_FILE, Anchor)
    if texts is not None and (anchor is None or anchor.texts != len(texts.sequences)):
        anchor = tried("anchor", _new_anchor(asker, texts, path=run_dir / ANCHOR_FILE))
    return Baseline(references, canary if section.canary is not None else None, texts, anchor)


def _canary_prompts(runtime: Runtime, *, used: int, count: int) -> list[list[int]]:
    """Held-out prompts, others than those of the evaluation while there are enough."""
    questions = load_questions(runtime.config, runtime.run.path, table="eval_prompts", limit=used + count)
    chosen = questions[used:] if len(questions) >= used + count else questions[-count:]
    return [question.token_ids for question in chosen]


def _new_canary(asker: Asker, prompts: Sequence[list[int]], *, run_dir: Path) -> Work[Canary]:
    answers = yield from asker.answers(prompts)
    rewards = yield from asker.rewards(
        [(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    )
    canary = Canary(
        rm_version=RewardModels(run_dir / "rm").current().version,
        prompts=list(prompts),
        answers=[answer.token_ids for answer in answers],
        texts=[answer.text for answer in answers],
        rewards=rewards,
    )
    _store(run_dir / CANARY_FILE, canary)
    return canary


def _new_anchor(asker: Asker, texts: HeldOutTexts, *, path: Path) -> Work[Anchor]:
    nats = yield from asker.nats_per_token(texts.sequences)
    anchor = Anchor(source=texts.source, texts=len(texts.sequences), nats_per_token=nats)
    _store(path, anchor)
    return anchor


def _finished(work: Work[T], *, tick: Callable[[], None], until_s: float) -> T:
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        if time.monotonic() > until_s:
            raise DeadlineError("the roles did not answer in time", do="raise guard.watch.timeout_s")
        tick()


def _store(path: Path, value: msgspec.Struct) -> None:
    atomic_write_bytes(path, msgspec.json.encode(value))


def _stored(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}", got=str(error), do="delete it: it is taken again") from error
