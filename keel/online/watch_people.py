"""People's part in the evaluation: pairs of the current policy's answer and the reference's go into the review queue,
and what people say of such pairs, whenever they do, is a win rate of its own.

Consumes: reviews.jsonl, which `keel review` writes. Produces: items of the review queue. Waits: for the queue server,
with the client's deadline; so it is called off the driver's loop; never for people. Always holds: which of the two
answers comes first is drawn; any pair of version 0 and a later one counts, whoever put it there; what is said of
held-out prompts trains nothing (cluster.data_records.read_training_pairs).
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cluster.review_queue import Recorded, ReviewItem, now_iso, standing
from cluster.run_redis import RunRedis
from configs.run import RunConfig
from keel.comparison import Reference
from keel.winrate import WinRate, win_rate
from reward_service.review.files import REVIEWS_FILE, read_reviews

REFERENCE_VERSION: Final = 0
"""The policy before training: what a learner publishes first."""


class People:
    """The review queue of a run."""

    def __init__(self, config: RunConfig, *, redis_url: str) -> None:
        self._config = config
        self._redis_url = redis_url

    def ask(self, references: Sequence[Reference], *, answers: Sequence[str], version: int) -> int:
        """Put the pairs into the queue, as far as it has room (review.queue_limit). Returns how many it took."""
        rng = random.Random(f"order for people {self._config.seed} {version}")
        items = [
            _item(reference, answer, item_id=f"watch-{version:06d}-{number:04d}", version=version, rng=rng)
            for number, (reference, answer) in enumerate(zip(references, answers, strict=True))
            if answer.strip() and answer != reference.text
        ]
        return asyncio.run(self._push(items))

    async def _push(self, items: Sequence[ReviewItem]) -> int:
        async with RunRedis(self._redis_url, run=self._config.name) as redis:
            return await redis.review.push(items, limit=self._config.review.queue_limit)


def _item(reference: Reference, answer: str, *, item_id: str, version: int, rng: random.Random) -> ReviewItem:
    answers, versions = (answer, reference.text), (version, REFERENCE_VERSION)
    if rng.random() < 0.5:
        answers, versions = answers[::-1], versions[::-1]
    return ReviewItem(
        item_id=item_id,
        kind="pair",
        prompt=reference.question.record.prompt,
        answers=answers,
        policy_versions=versions,
        reason="is the policy better than before training?",
        created_at=now_iso(),
    )


def people_win_rate(run_dir: Path, *, after_version: int) -> WinRate | None:
    """Of policies later than `after_version` against the reference, by all that people have said of such pairs up to
    now. None where they have said nothing."""
    return win_rate(people_outcomes(read_reviews(run_dir / REVIEWS_FILE), after_version=after_version))


def people_outcomes(log: Iterable[Recorded], *, after_version: int) -> list[float | None]:
    """One for each pair that somebody judged: 1 where more people prefer the later policy's answer, 0 the reference's,
    0.5 as many. "tie" is a vote for neither; "skip" is none."""
    votes: dict[str, list[float]] = defaultdict(list)
    for entry in standing(log):
        place = _later_policy(entry.item, after_version=after_version)
        if place is None or entry.judgement.verdict not in ("first", "second", "tie"):
            continue
        chosen = {"first": 0, "second": 1}.get(entry.judgement.verdict)
        votes[entry.item.item_id].append(0.0 if chosen is None else 1.0 if chosen == place else -1.0)
    return [0.5 + 0.5 * ((total > 0) - (total < 0)) for total in map(sum, votes.values())]


def _later_policy(item: ReviewItem, *, after_version: int) -> int | None:
    """Which of a pair's answers is the later policy's, where the other is the reference's; else None."""
    if item.kind != "pair" or len(item.policy_versions) != 2:
        return None
    first, second = item.policy_versions
    for place, (one, other) in enumerate(((first, second), (second, first))):
        if other == REFERENCE_VERSION and one is not None and one > max(after_version, REFERENCE_VERSION):
            return place
    return None
