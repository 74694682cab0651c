"""The driver's side of updating the reward model while the policy trains: when a refresh is due, fresh pairs are
sampled and judged, a process of its own fine-tunes on them, and a version that is accepted is announced to the workers.

Consumes: the learner's step records; answers of the rollout actors; labels of the judge. Produces: fresh preferences
(data/fresh_preferences.jsonl), reward-model versions, `announce` (for the overseer's thread), refreshes.jsonl.
Waits: never; `step` is called from the driver's watch loop and goes on with what is under way. Who unblocks it: the
actors, the judge (rm.refresh.label_timeout_s), the training process.
Always holds: one refresh at a time; a refresh that fails or is refused leaves the old version in place and the run
going; the judge is never asked for more than rm.refresh.budget_pairs pairs, restarts included (what a judge that failed
was asked does not count); a number, and with it the pairs' names, is used once a run; a judge that never answers keeps
neither the run nor the driver from ending.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from cluster.data_records import FRESH_PREFERENCES_FILE, PreferencePair, append_rows, data_dir
from cluster.errors import DeadlineError
from cluster.files import Json, JsonlWriter, atomic_write_text, read_jsonl
from cluster.reward_models import RewardModels
from cluster.supervise import RolePool
from configs.run import RefreshSection
from keel.background import in_background
from keel.online.fresh_pairs import FreshPair, PairSampler, fresh_files
from keel.online.judges import PairJudge, make_judge
from keel.online.trainer import RayTrainer, Trainer
from keel.roles import Roles
from keel.rundir import append_progress
from keel.runtime import Runtime
from reward_service.preferences import Collected, accuracy
from reward_service.rm.triggers import RefreshProgress, may_refresh, probe_due, refresh_reason

log = logging.getLogger(__name__)

REFRESHES_FILE: Final = "refreshes.jsonl"
ASKED_FILE: Final = "refresh_asked.json"
"""What the judge was asked last, written before it is: the driver may be killed before refreshes.jsonl says so."""
CAUGHT_FILES: Final = ("caught.jsonl", "caught_by_rules.jsonl")
"""Answers found bad by people and by rules: <run>/…, which may not be there."""
_MIN_LABELLED: Final = 10
"""Fewer clear labels than this teach nothing; the refresh is given up."""
_LABEL_GRACE_S: Final = 30.0
"""People end by themselves when their time is up; a function is given up this much later."""

Work = Generator[None, None, None]


class Refresher:
    """One a run. `announced`: called with (version, reason) when another version is to score. `hold`: called with the
    policy version from which on training is to wait for the refresh at hand, and with None when it is over."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        section: RefreshSection,
        judge: PairJudge,
        rollout: RolePool,
        reward: RolePool,
        trainer: Trainer,
        announced: Callable[[str, str], None],
        hold: Callable[[int | None], None],
    ) -> None:
        self.counts: Counter[str] = Counter()
        """accepted, refused, failed, pairs_judged: since the start of the driver."""
        self._runtime = runtime
        self._section = section
        self._judge = judge
        self._reward = reward
        self._announced = announced
        self._hold = hold
        self._models = RewardModels(runtime.run.path / "rm")
        self._sampler = PairSampler(runtime, rollout, section=section)
        self._trainer = trainer
        self._record = JsonlWriter(runtime.run.path / REFRESHES_FILE)
        fresh = data_dir(runtime.run.path) / FRESH_PREFERENCES_FILE
        if fresh.exists():  # A last line that a kill or a full disk tore is cut off: no refresh could read the file.
            JsonlWriter(fresh).close()
        self.progress, self._number = _earlier(runtime.run.path)
        self._work: Work | None = None
        self._frozen_until = 0
        self._asked: str | None = None
        self._turned = self._live = False
        """Had a turn; and after it a step ended, so that the actors hold the run's weights, not those of their boot."""
        trainer.start()

    def step(self, records: Sequence[Json]) -> None:
        """One turn. `records`: steps of the learner that ended since the last."""
        if records:
            self.progress = self.progress.not_ahead_of(records[-1]["version"])
        for record in records:
            self.progress = self.progress.observe(
                version=record["version"],
                kl=record["kl_nats_per_sequence"],
                z=record["proxy_z"],
                gain=self._section.plateau_gain,
            )
        self._turned, self._live = True, self._live or (self._turned and bool(records))
        if self._work is None and self._live:
            self._work = self._next_work()
        if self._work is not None and next(self._work, _ENDED) is _ENDED:
            self._work = None

    def freeze_until(self, version: int) -> None:
        """No refresh and no probe is begun before this policy version."""
        self._frozen_until = max(self._frozen_until, version)

    def ask(self, reason: str) -> None:
        """A refresh is due now, or after the one under way. Where the section allows none, or the budget is spent, it
        is noted and forgotten."""
        self._asked = reason

    def close(self) -> None:
        """What is under way is given up; pairs that a judge has handed over, or people have judged, are kept."""
        if self._work is not None:
            self._work.close()
            self._work = None
            self._note("ended", f"refresh {self._number} is given up: the run ends")
        self._judge.cancel()
        self._trainer.close()
        self._record.close()

    def _next_work(self) -> Work | None:
        if self.progress.version < self._frozen_until:
            return None
        reason = self._take_asked() or refresh_reason(self.progress, self._section)
        if reason is not None:
            return self._guarded("refresh", self._waited_for(self._refresh(reason)))
        if probe_due(self.progress, self._section):
            return self._guarded("probe", self._probe())
        return None

    def _take_asked(self) -> str | None:
        asked, self._asked = self._asked, None
        if asked is None or may_refresh(self.progress, self._section):
            return asked
        self._note("refused", f"no refresh is allowed at version {self.progress.version}: {asked}")
        return None

    def _guarded(self, what: str, work: Work) -> Work:
        """A failure is noted, and the run goes on with the reward model it has."""
        try:
            yield from work
        except Exception as error:  # The judge is the user's function: it may raise anything.
            log.exception("%s %d failed", what, self._number)
            self.counts["failed"] += 1
            self._note("failed", f"{what} {self._number} failed, the reward model stays: {error}")
            self._write(what, outcome="failed", why=str(error))

    def _waited_for(self, work: Work) -> Work:
        """Training goes on meanwhile for as many versions as the section grants, if it grants so many only."""
        granted = self._section.wait_after_versions
        if granted is None:
            yield from work
            return
        self._hold(self.progress.version + granted)
        try:
            yield from work
        finally:
            self._hold(None)

    # ------------------------------------------------------------ the two kinds of work

    def _refresh(self, reason: str) -> Work:
        started_s, begun = time.monotonic(), self.progress
        self.progress = begun.begun()
        self._number += 1
        granted = self._section.wait_after_versions
        waits = "" if granted is None else f"; training waits for it from version {begun.version + granted} on"
        self._note("began", f"refresh {self._number}: {reason}{waits}")
        collected = yield from self._judged(self._section.pairs, what="refresh")
        if len(collected.pairs) < _MIN_LABELLED:
            note = f"only {len(collected.pairs)} pairs with a clear label: {collected.report.rejected}"
            self._note("refused", f"refresh {self._number} given up: {note}")
            self._write("refresh", outcome="refused", reason=reason, why=note, pairs=collected.report.read)
            self.counts["refused"] += 1
            return
        outcome = yield from self._train(reason, version=begun.version)
        if outcome.accepted:
            if self._models.current().version != outcome.version:  # A rollback came just after it was published.
                self._models.make_current(outcome.version)
            self._announced(outcome.version, reason)
        word = "accepted" if outcome.accepted else "refused"
        self.counts[word] += 1
        self._note(word, f"refresh {self._number} {word}: {outcome.why}")
        self._write(
            "refresh",
            reason=reason,
            outcome=word,
            pairs=collected.report.read,
            total_seconds=round(time.monotonic() - started_s, 2),
            **{key: value for key, value in asdict(outcome).items() if key != "accepted"},
        )

    def _probe(self) -> Work:
        """Compare reward model and judge on a few fresh pairs; the pairs train the next refresh."""
        self.progress = self.progress.probing()
        self._number += 1
        pairs = yield from self._sampler.sample(
            self._left(self._section.probe_pairs), number=self._number, version=self.progress.version
        )
        collected = yield from self._label(pairs, what="probe")
        sampled = [(pairs[place], pair) for place, pair in zip(collected.places, collected.pairs, strict=True)]
        margins = yield from self._margins(sampled)
        disagreement = 1.0 - accuracy(margins) if margins else None
        self.progress = replace(self.progress, disagreement=disagreement)
        shown = "no pairs to compare" if disagreement is None else f"{disagreement:.0%} of {len(margins)} pairs"
        self._note("probed", f"reward model and judge order differently: {shown}")
        self._write("probe", outcome="probed", disagreement=disagreement, pairs=collected.report.read)

    # ------------------------------------------------------------ their parts

    def _judged(self, count: int, *, what: str) -> Generator[None, None, Collected]:
        pairs = yield from self._sampler.sample(self._left(count), number=self._number, version=self.progress.version)
        return (yield from self._label(pairs, what=what))

    def _label(self, pairs: Sequence[FreshPair], *, what: str) -> Generator[None, None, Collected]:
        """Have them judged off this thread, and keep what came of it."""
        judge, number, seed = self._judge, self._number, self._runtime.config.seed
        candidates = [pair.candidate for pair in pairs]
        asked = {"number": number, "pairs_judged": self.progress.pairs_judged + len(candidates)}
        atomic_write_text(self._runtime.run.path / ASKED_FILE, json.dumps(asked))
        name, seed = f"{what}-{number:04d}", seed + 7919 * number
        job = in_background(lambda: judge.label(candidates, name=name, seed=seed), name="judge")
        timeout_s = self._section.label_timeout_s + _LABEL_GRACE_S
        until_s = time.monotonic() + timeout_s
        while not job.done():
            if time.monotonic() > until_s:
                raise DeadlineError("the judge did not answer", got=f"nothing for {timeout_s:.0f} s")
            yield
        collected = job.result()
        self.progress = self.progress.judged(collected.report.read)
        self.counts["pairs_judged"] += collected.report.read
        if not self._judge.keeps_records:
            append_rows(data_dir(self._runtime.run.path) / FRESH_PREFERENCES_FILE, collected.pairs)
        return collected

    def _train(self, reason: str, *, version: int) -> Generator[None, None, Any]:
        from reward_service.rm.refresh import RefreshRequest

        run_dir = self._runtime.run.path
        request = RefreshRequest(
            number=self._number,
            reason=reason,
            policy_version=version,
            fresh=fresh_files(run_dir),
            caught=tuple(path for name in CAUGHT_FILES if (path := run_dir / name).is_file()),
        )
        reference = self._trainer.refresh(request)
        while not self._runtime.ray.wait([reference], timeout=0.0)[0]:
            yield
        return self._runtime.result(reference)

    def _margins(self, judged: Sequence[tuple[FreshPair, PreferencePair]]) -> Generator[None, None, list[float]]:
        """The serving reward model's score of the chosen answer less that of the rejected one, for pairs of which both
        answers were just sampled."""
        sequences, signs = [], []
        for fresh, pair in judged:
            first, second = fresh.answers
            if second is not None:
                sequences += [(fresh.question.token_ids, answer.token_ids) for answer in (first, second)]
                signs.append(1.0 if pair.chosen == fresh.candidate.answer_a else -1.0)
        if not signs:
            return []
        while not self._reward.handles:
            yield
        reference = self._reward.handles[0].score.remote(sequences)
        while not self._runtime.ray.wait([reference], timeout=0.0)[0]:
            yield
        scores: list[float] = self._runtime.result(reference)
        return [sign * (a - b) for sign, a, b in zip(signs, scores[::2], scores[1::2], strict=True)]

    def _left(self, count: int) -> int:
        return max(1, min(count, self._section.budget_pairs - self.progress.pairs_judged))

    def _note(self, event: str, text: str) -> None:
        append_progress(self._runtime.run.path, {"role": "refresh", "event": event, "note": text})

    def _write(self, kind: str, **fields: Any) -> None:
        """A line of refreshes.jsonl: what a resumed run goes on from, and the report draws."""
        self._record.write(
            {
                "kind": kind,
                "number": self._number,
                "at_version": self.progress.version,
                "last_version": self.progress.last_version,
                "last_kl": self.progress.last_kl,
                "pairs_judged": self.progress.pairs_judged,
                "scores": self._models.current().version,
                **fields,
            }
        )


def make_refresher(runtime: Runtime, roles: Roles, *, announced: Callable[[str, str], None]) -> Refresher | None:
    """What rm.refresh asks for; None where it asks for nothing. Raises ConfigError for a judge that cannot be had."""
    config = runtime.config
    section = config.rm.refresh
    if section is None or not config.reward.needs_model:
        return None
    rollout, reward, learner = roles.rollout(runtime.run.path), roles.reward(), roles.learner()

    def hold(version: int | None) -> None:
        for handle in learner.handles:
            handle.hold_from.remote(version)

    return Refresher(
        runtime,
        section=section,
        judge=make_judge(config, redis_url=runtime.redis_url),
        rollout=rollout,
        reward=reward,
        trainer=RayTrainer(runtime, section=section),
        announced=announced,
        hold=hold,
    )


_ENDED: Final = object()


def _earlier(run_dir: Path) -> tuple[RefreshProgress, int]:
    """Where the refreshes of an earlier driver of this run left off, and the last number that it used."""
    progress, number = _on_record(run_dir / REFRESHES_FILE)
    path = run_dir / ASKED_FILE
    asked = json.loads(path.read_text()) if path.exists() else {"number": 0}
    if asked["number"] > number:  # It was killed or stopped before it came to an end.
        return replace(progress, pairs_judged=asked["pairs_judged"]), asked["number"]
    return progress, number


def _on_record(path: Path) -> tuple[RefreshProgress, int]:
    last = read_jsonl(path)[-1:] if path.exists() else []
    if not last:
        return RefreshProgress(), 0
    line = last[0]
    progress = RefreshProgress(
        version=line["last_version"],
        last_version=line["last_version"],
        last_kl=line["last_kl"],
        best_version=line["last_version"],
        probed_version=line["last_version"],
        pairs_judged=line["pairs_judged"],
    )
    return progress, line["number"]
