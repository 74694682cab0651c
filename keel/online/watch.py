"""Measurements beside training: every guard.watch.every_versions policy versions the policy answers held-out prompts,
a judge compares its answers with those of the policy before training, and a canary and an anchor are looked at.

Consumes: the learner's step records; answers of the rollout actors, scores of a reward worker, outcomes of the judge.
Produces: evaluations.jsonl; the guard's signals, told to the learner; pairs for people. Waits: never, once training
goes on; `step` is called from the driver's watch loop and goes on with what is under way. Before training it waits for
its baselines (watch_start.py). Who unblocks it: the actors, the reward worker, the judge; guard.watch.timeout_s.
Always holds: one measurement at a time; a part of it that fails is noted and left out, and the rest and the run go on;
rewards that are compared come from one version of the reward model; a judge that hangs is not asked again before it is
done. A measurement bears the version that stood when it began; the policy goes on meanwhile, by a step or so.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

from cluster.data_records import Prompt
from cluster.errors import DeadlineError
from cluster.files import Json, JsonlWriter, read_jsonl
from cluster.plugin import resolve
from configs.guard import WatchSection
from keel.background import in_background
from keel.comparison import function_judge, judge_name, outcomes
from keel.online.judges import PEOPLE
from keel.online.watch_asking import Asker, T, Work
from keel.online.watch_people import People, people_win_rate
from keel.online.watch_start import Baseline, take_baseline
from keel.roles import Roles
from keel.rundir import append_progress
from keel.runtime import Runtime
from keel.sampling import Answer
from keel.winrate import perplexity_ratio, shift, versus_fields
from reward_service.preferences import Judge

log = logging.getLogger(__name__)

EVALUATIONS_FILE: Final = "evaluations.jsonl"
_PEOPLE_MEASUREMENTS: Final = 4
"""People's win rate is of the policies of so many measurements: people are slow."""
_TICK_S: Final = 0.05
Gold = Callable[[Prompt, str], float]
Tell = Callable[[dict[str, float], int], None]


class Watch:
    """One a run. `tell`: called with a measurement's signals and the policy version that they are of."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        section: WatchSection,
        asker: Asker,
        baseline: Baseline,
        judge: Judge | None = None,
        people: People | None = None,
        tell: Tell,
    ) -> None:
        self.counts: Counter[str] = Counter()
        """measured, failed (parts): since the start of the driver."""
        self._runtime = runtime
        self._section = section
        self._asker = asker
        self._baseline = baseline
        self._judge = judge
        self._people = people
        self._tell = tell
        gold = runtime.config.evaluation.gold
        self._gold: Gold | None = None if gold is None else resolve(gold, key="evaluation.gold")
        self._record = JsonlWriter(runtime.run.path / EVALUATIONS_FILE)
        self._measured = last_measured(runtime)
        self._now = (0, 0)
        """Step and version."""
        self._turned = self._live = False
        """Had a turn; and after it a step ended, so that the actors hold the run's weights. Before, where a run is
        resumed, they hold those that they booted with."""
        self._work: Work[None] | None = None
        self._until_s = 0.0
        self._hanging: dict[str, Future[Any]] = {}

    def step(self, records: Sequence[Json]) -> None:
        """One turn. `records`: steps of the learner that ended since the last."""
        if records:
            self._now = records[-1]["step"], records[-1]["version"]
            # A resumed learner may stand at an earlier version than the last measurement.
            self._measured = min(self._measured, self._now[1])
        self._turned, self._live = True, self._live or (self._turned and bool(records))
        if self._work is None and self._live and self._now[1] - self._measured >= self._section.every_versions:
            self._measured = self._now[1]
            self._until_s = time.monotonic() + self._section.timeout_s
            self._work = self._measure(*self._now)
        if self._work is not None:
            self._work = self._advanced(self._work)

    def close(self) -> None:
        """What is under way is given up."""
        if self._work is not None:
            self._work.close()
            self._work = None
            self._note("ended", f"the measurement at version {self._measured} is given up: the run ends")
        self._record.close()

    def _advanced(self, work: Work[None]) -> Work[None] | None:
        """One turn further. Late, the part that is under way fails, and each that follows."""
        try:
            if time.monotonic() > self._until_s:
                limit_s = self._section.timeout_s
                work.throw(DeadlineError("the measurement took too long", got=f"over {limit_s:g} s"))
            else:
                next(work)
        except StopIteration:
            return None
        except Exception as error:
            log.exception("a measurement failed")
            self.counts["failed"] += 1
            self._note("failed", f"the measurement at version {self._measured} failed: {error}")
            return None
        return work

    # ------------------------------------------------------------ one measurement

    def _measure(self, step: int, version: int) -> Work[None]:
        started_s = time.monotonic()
        fields: dict[str, Any] = {}
        fields |= (yield from self._tried("the answers", self._answered(version))) or {}
        fields |= (yield from self._tried("the anchor", self._anchor())) or {}
        if not fields:
            return
        seconds = time.monotonic() - started_s
        head = {"time_s": round(time.time(), 3), "step": step, "version": version}
        self._record.write({**head, **fields, "seconds": round(seconds, 3)})
        self.counts["measured"] += 1
        self._tell(signals_of(fields), version)
        self._note("measured", f"version {version}: {in_words(fields)} ({seconds:.1f} s)")

    def _answered(self, version: int) -> Work[dict[str, Any]]:
        """All that the policy's own answers tell."""
        references, canary = self._baseline.references, self._baseline.canary
        prompts = [reference.question.token_ids for reference in references]
        both = yield from self._asker.answers([*prompts, *(canary.prompts if canary is not None else [])])
        answers, canary_answers = both[: len(prompts)], both[len(prompts) :]
        fields: dict[str, Any] = {"prompts": len(answers)}
        margins: list[float] | None = None
        if self._asker.has_rewards:
            scored = yield from self._tried("the rewards", self._rewarded(answers, canary_answers))
            if scored is not None:
                margins, shifted = scored
                fields |= shifted
        fields |= (yield from self._tried("gold", self._golden(answers))) or {}
        fields |= (yield from self._tried("the judge", self._judged(answers, margins, version=version))) or {}
        fields |= (yield from self._tried("people", self._by_people(answers, version=version))) or {}
        return fields

    def _rewarded(
        self, answers: Sequence[Answer], canary_answers: Sequence[Answer]
    ) -> Work[tuple[list[float], dict[str, Any]]]:
        """The policy's rewards less the reference's, and the canary's shift. All in one call, and so by one version."""
        references, canary = self._baseline.references, self._baseline.canary
        prompts = [reference.question.token_ids for reference in references]
        sequences = [
            *zip(prompts, (answer.token_ids for answer in answers), strict=True),
            *zip(prompts, (reference.token_ids for reference in references), strict=True),
        ]
        if canary is not None:
            sequences += zip(canary.prompts, (answer.token_ids for answer in canary_answers), strict=True)
            sequences += zip(canary.prompts, canary.answers, strict=True)
        rewards = yield from self._asker.rewards(sequences)
        count, rest = len(prompts), rewards[2 * len(prompts) :]
        margins = [mine - other for mine, other in zip(rewards[:count], rewards[count : 2 * count], strict=True)]
        moved = shift(rest[: len(rest) // 2], baseline=rest[len(rest) // 2 :])
        return margins, {} if moved is None else {"canary_ks": moved.ks, "canary_z": moved.z}

    def _golden(self, answers: Sequence[Answer]) -> Work[dict[str, Any]]:
        gold, references = self._gold, self._baseline.references
        if gold is None or not references:
            return {}
        prompts = [reference.question.record.prompt for reference in references]

        def mean() -> float:
            return statistics.fmean(
                float(gold(prompt, answer.text)) for prompt, answer in zip(prompts, answers, strict=True)
            )

        before = [reference.gold for reference in references if reference.gold is not None]
        now = yield from self._off_thread("gold", mean)
        return {"gold": now, "gold_reference": statistics.fmean(before) if before else None}

    def _judged(
        self, answers: Sequence[Answer], margins: Sequence[float] | None, *, version: int
    ) -> Work[dict[str, Any]]:
        judge, references = self._judge, self._baseline.references
        if judge is None or not references:
            return {}
        prompts = [reference.question.record.prompt for reference in references]
        seed = self._runtime.config.seed + 6007 * version
        found = yield from self._off_thread(
            "the judge",
            lambda: outcomes(
                prompts,
                answers=[answer.text for answer in answers],
                references=[reference.text for reference in references],
                judge=judge,
                seed=seed,
            ),
        )
        lengths = [
            float(len(answer.token_ids) - len(reference.token_ids))
            for answer, reference in zip(answers, references, strict=True)
        ]
        return versus_fields(found, token_differences=lengths, reward_margins=margins)

    def _by_people(self, answers: Sequence[Answer], *, version: int) -> Work[dict[str, Any]]:
        """What people have said by now; and these answers for them to compare, where they are the judge."""
        people, references = self._people, self._baseline.references
        after = version - _PEOPLE_MEASUREMENTS * self._section.every_versions
        if people is not None and references:
            texts = [answer.text for answer in answers]
            yield from self._off_thread("people", lambda: people.ask(references, answers=texts, version=version))
        path = self._runtime.run.path
        rate = yield from self._off_thread("people", lambda: people_win_rate(path, after_version=after))
        if rate is None:
            return {}
        return {
            "win_rate_people": rate.share,
            "win_rate_people_low": rate.low,
            "win_rate_people_high": rate.high,
            "pairs_judged_by_people": rate.n,
        }

    def _anchor(self) -> Work[dict[str, Any]]:
        texts, anchor = self._baseline.texts, self._baseline.anchor
        if texts is None or anchor is None:
            return {}
        nats = yield from self._asker.nats_per_token(texts.sequences)
        ratio = perplexity_ratio(nats, before=anchor.nats_per_token)
        return {"anchor_nats_per_token": nats, "anchor_perplexity_ratio": ratio}

    # ------------------------------------------------------------ how it goes on

    def _tried(self, what: str, work: Work[T]) -> Work[T | None]:
        """A part that fails is noted; what it would have said is absent."""
        try:
            return (yield from work)
        except Exception as error:  # The judge and gold are the user's functions: they may raise anything.
            log.warning("%s failed", what, exc_info=error)
            self.counts["failed"] += 1
            self._note("failed", f"version {self._measured}: {what}: {error}")
            return None

    def _off_thread(self, what: str, call: Callable[[], T]) -> Work[T]:
        hanging = self._hanging.get(what)
        if hanging is not None and not hanging.done():
            raise DeadlineError(f"{what} of the measurement before is still at it", do="see why it does not come back")
        job: Future[T] = in_background(call, name=f"watch: {what}")
        self._hanging[what] = job
        while not job.done():
            yield
        return job.result()

    def _note(self, event: str, text: str) -> None:
        append_progress(self._runtime.run.path, {"role": "watch", "event": event, "note": text})


_SIGNALS: Final = (
    "win_rate",
    "win_rate_high",
    "win_rate_length_controlled",
    "rm_judge_agreement",
    "anchor_perplexity_ratio",
    "canary_ks",
    "canary_z",
)


def signals_of(fields: Json) -> dict[str, float]:
    """What the guard is told, by the names of configs.guard.Thresholds; and the win rate's upper end, which it judges.
    canary_z is without its sign: a shift either way is one."""
    found = {name: float(fields[name]) for name in _SIGNALS if fields.get(name) is not None}
    if "canary_z" in found:
        found["canary_z"] = abs(found["canary_z"])
    return found


def in_words(fields: Json) -> str:
    """One line for people."""
    parts = []
    if fields.get("win_rate") is not None:
        parts.append(f"win rate {fields['win_rate']:.2f} ({fields['win_rate_low']:.2f}–{fields['win_rate_high']:.2f})")
    for key, name in (
        ("gold", "gold"), ("rm_judge_agreement", "reward model agrees with the judge"), ("win_rate_people", "people"),
        ("anchor_perplexity_ratio", "perplexity ×"), ("canary_z", "canary z"),
    ):  # fmt: skip
        if fields.get(key) is not None:
            parts.append(f"{name} {fields[key]:.2f}")
    return ", ".join(parts) or "nothing to tell"


def last_measured(runtime: Runtime) -> int:
    """Version of the last measurement of an earlier driver; 0 before the first."""
    path = runtime.run.path / EVALUATIONS_FILE
    lines = read_jsonl(path) if path.exists() else []
    return int(lines[-1]["version"]) if lines else 0


def make_watch(runtime: Runtime, roles: Roles) -> Watch | None:
    """What guard.watch asks for; None where it asks for nothing. To be called when the roles stand ready and do not run
    yet: the baselines are taken here. Raises ConfigError for a judge that cannot be had."""
    config = runtime.config
    section = config.guard.watch
    if section is None:
        return None
    judge, named = function_judge(config), judge_name(config)
    people = People(config, redis_url=runtime.redis_url) if named is not None and named[1] == PEOPLE else None
    rollout, learner = roles.rollout(runtime.run.path), roles.learner()
    asker = Asker(runtime, rollout=rollout, reward=roles.reward() if config.reward.needs_model else None)

    def tick() -> None:
        rollout.poll(timeout_s=_TICK_S)
        runtime.tick()

    def tell(values: dict[str, float], version: int) -> None:
        for handle in learner.handles:
            handle.measured.remote(values, version)

    def note(text: str) -> None:
        append_progress(runtime.run.path, {"role": "watch", "event": "failed", "note": text})

    note_start = {"stage": "ppo", "event": "progress", "note": "measuring the policy before training"}
    append_progress(runtime.run.path, note_start)
    baseline = take_baseline(runtime, asker, section=section, tick=tick, note=note)
    return Watch(runtime, section=section, asker=asker, baseline=baseline, judge=judge, people=people, tell=tell)
