"""Who labels fresh pairs while a run goes on: a function, or people. Both behind one Protocol; `label` blocks, so it is
called off the driver's loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from cluster.data_records import TableReport
from cluster.errors import ConfigError, StreamError
from cluster.plugin import resolve
from cluster.review_queue import Recorded, ReviewItem, ReviewQueue, Verdict, now_iso, standing
from cluster.run_redis import RunRedis
from configs.run import RunConfig
from reward_service.preferences import Candidate, Collected, Judge, collect_pairs, is_usable

log = logging.getLogger(__name__)

PEOPLE: Final = "review"
"""rm.refresh.judge: pairs go to the review queue."""
NOT_JUDGED: Final = "not judged in time"
NO_PREFERENCE: Final = "judged equal, or skipped"
_POLL_S: Final = 1.0
_NO_LIMIT: Final = 1_000_000


class PairJudge(Protocol):
    """Labels pairs of answers."""

    keeps_records: bool
    """What it labels is on disk already, in the run's preferences.jsonl."""

    def label(self, candidates: Sequence[Candidate], *, name: str, seed: int) -> Collected:
        """Pairs with a clear preference, and counts of the others. `name`: what the pairs' ids begin with."""
        ...

    def cancel(self) -> None:
        """A `label` under way ends soon, with what there is."""
        ...


class FunctionJudge:
    """collect.judge, or another function like it: (prompt, answer_a, answer_b, rng) → votes."""

    keeps_records = False

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def label(self, candidates: Sequence[Candidate], *, name: str, seed: int) -> Collected:
        return collect_pairs(candidates, judge=self._judge, seed=seed, name=name, source="refresh")

    def cancel(self) -> None:
        """It has no one to wait for."""


class People:
    """Through the review queue, by `keel review`. Pairs wait for people up to `timeout_s`; then those that were judged
    have to do."""

    keeps_records = True

    def __init__(self, config: RunConfig, *, redis_url: str, timeout_s: float) -> None:
        self._review = config.review
        self._run = config.name
        self._redis_url = redis_url
        self._timeout_s = timeout_s
        self._cancelled = threading.Event()

    def label(self, candidates: Sequence[Candidate], *, name: str, seed: int) -> Collected:
        del seed
        return asyncio.run(self._label(candidates, name))

    def cancel(self) -> None:
        self._cancelled.set()

    async def _label(self, candidates: Sequence[Candidate], name: str) -> Collected:
        async with RunRedis(self._redis_url, run=self._run) as redis:
            return await ask_people(
                redis.review,
                candidates,
                name=name,
                votes=self._review.votes,
                timeout_s=self._timeout_s,
                cancelled=self._cancelled.is_set,
            )


async def ask_people(
    queue: ReviewQueue,
    candidates: Sequence[Candidate],
    *,
    name: str,
    votes: int,
    timeout_s: float,
    cancelled: Callable[[], bool] = lambda: False,
) -> Collected:
    """Put every usable pair into the queue and collect what people say until each has `votes` judgements, `cancelled`,
    or the time is up. All pairs are taken, however many wait already: the refresh has budgeted for them."""
    items = {f"{name}-{index:07d}": candidate for index, candidate in enumerate(candidates) if is_usable(candidate)}
    await queue.push([_item(candidate, item_id) for item_id, candidate in items.items()], limit=_NO_LIMIT)
    until_s = time.monotonic() + timeout_s
    judged: list[Recorded] = []
    while True:
        await _read_on(queue, judged)
        said = _said(judged, items)
        complete = all(len(said[item_id]) >= votes for item_id in items)
        if complete or cancelled() or time.monotonic() >= until_s:
            break
        await asyncio.sleep(_POLL_S)
    return _labelled(candidates, name=name, said=said)


async def _read_on(queue: ReviewQueue, judged: list[Recorded]) -> None:
    """Add what is new in the queue's log. A server that is away is asked again: people take longer."""
    try:
        judged += await queue.judgements(after=judged[-1].position if judged else 0)
    except StreamError as error:
        log.warning("review queue not read, trying again: %s", error)


def _said(judged: Sequence[Recorded], items: Container[str]) -> dict[str, dict[str, Verdict]]:
    """Item → annotator → what they say of it now."""
    said: dict[str, dict[str, Verdict]] = defaultdict(dict)
    for entry in standing(judged):
        if entry.judgement.item_id in items:
            said[entry.judgement.item_id][entry.judgement.annotator] = entry.judgement.verdict
    return said


def _labelled(candidates: Sequence[Candidate], *, name: str, said: Mapping[str, Mapping[str, Verdict]]) -> Collected:
    collected = Collected([], TableReport(read=len(candidates)))
    for index, candidate in enumerate(candidates):
        item_id = f"{name}-{index:07d}"
        verdicts = said.get(item_id, {})
        votes = {who: verdict == "first" for who, verdict in verdicts.items() if verdict in ("first", "second")}
        if is_usable(candidate) and not votes:
            collected.report.reject(NO_PREFERENCE if verdicts else NOT_JUDGED)
            continue
        one = collect_pairs([candidate], judge=lambda *_, votes=votes: votes, seed=0, source="review")
        for reason in one.report.rejected:
            collected.report.reject(reason)
        collected.pairs.extend([msgspec.structs.replace(pair, pair_id=item_id) for pair in one.pairs])
        collected.places.extend(index for _ in one.pairs)
    collected.report.used = len(collected.pairs)
    return collected


def _item(candidate: Candidate, item_id: str) -> ReviewItem:
    return ReviewItem(
        item_id=item_id,
        kind="pair",
        prompt=candidate.prompt,
        answers=(candidate.answer_a, candidate.answer_b),
        policy_versions=(candidate.version_a, candidate.version_b),
        reason="for the next reward model",
        created_at=now_iso(),
    )


def make_judge(config: RunConfig, *, redis_url: str) -> PairJudge:
    """Who labels fresh pairs of this run, by rm.refresh.judge or else collect.judge. Raises ConfigError."""
    section = config.rm.refresh
    named = None if section is None else section.judge
    reference = named or config.collect.judge
    if reference is None:
        raise ConfigError("nobody judges fresh pairs", do='set rm.refresh.judge: a function, or "review" for people')
    if named == PEOPLE and section is not None:
        return People(config, redis_url=redis_url, timeout_s=section.label_timeout_s)
    return FunctionJudge(resolve(reference, key="collect.judge" if named is None else "rm.refresh.judge"))
