"""Where `keel review` gets its items: the queue of a run that goes on, or pairs from a file.

Consumes and produces: see cluster/review_queue.py. Waits for: the run's server, bounded by the client's deadline. Who
unblocks it: that deadline. Always holds: a server that went away, as when a run stops and is resumed, is looked up anew
at the next call, so the page lives on.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from cluster.data_tables import Located, Unreadable, scan_table
from cluster.dialogues import Rejection, check_prompt
from cluster.errors import DataError, StreamError
from cluster.review_queue import (
    KINDS,
    Judgement,
    Kind,
    MemoryReviewQueue,
    Progress,
    Recorded,
    ReviewItem,
    ReviewQueue,
    now_iso,
    standing,
)
from cluster.run_redis import RunRedis
from configs.run import FileSource, RunConfig
from keel.living import connect

_ANSWER_COLUMNS = (("answer_a", "answer_b"), ("chosen", "rejected"))
_T = TypeVar("_T")


class RunQueue:
    """ReviewQueue of a run. `on_connect`: called each time a server was found, whose log may be another one."""

    def __init__(
        self, run_dir: Path, config: RunConfig, *, redis_url: str | None = None, on_connect: Callable[[], None]
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._redis_url = redis_url
        self._on_connect = on_connect
        self._redis: RunRedis | None = None
        self._connecting = asyncio.Lock()

    async def open(self) -> None:
        """Raises ConfigError where the run has no server that can be known, StreamError where it cannot be used."""
        await self._use(lambda queue: queue.progress())

    async def close(self) -> None:
        redis, self._redis = self._redis, None
        if redis is not None:
            await redis.close()

    async def push(self, items: Sequence[ReviewItem], *, limit: int) -> int:
        return await self._use(lambda queue: queue.push(items, limit=limit))

    async def next(
        self, annotator: str, *, lease_s: float, votes: int = 1, kinds: Sequence[Kind] = KINDS
    ) -> ReviewItem | None:
        return await self._use(lambda queue: queue.next(annotator, lease_s=lease_s, votes=votes, kinds=kinds))

    async def judge(self, judgement: Judgement, *, votes: int = 1) -> bool:
        return await self._use(lambda queue: queue.judge(judgement, votes=votes))

    async def undo(self, annotator: str, *, lease_s: float, votes: int = 1) -> Judgement | None:
        return await self._use(lambda queue: queue.undo(annotator, lease_s=lease_s, votes=votes))

    async def progress(self) -> Progress:
        return await self._use(lambda queue: queue.progress())

    async def judgements(self, *, after: int = 0) -> list[Recorded]:
        return await self._use(lambda queue: queue.judgements(after=after))

    async def _use(self, call: Callable[[ReviewQueue], Awaitable[_T]]) -> _T:
        redis = await self._connected()
        try:
            return await call(redis.review)
        except StreamError:
            if self._redis is redis:
                await self.close()
            raise

    async def _connected(self) -> RunRedis:
        async with self._connecting:
            if self._redis is None:
                redis = connect(self._run_dir, self._config, given=self._redis_url)
                try:
                    await redis.check()
                except BaseException:
                    await redis.close()
                    raise
                self._redis = redis
                self._on_connect()
            return self._redis


async def queue_from(log: Sequence[Recorded], *, votes: int) -> MemoryReviewQueue:
    """A queue in memory that goes on where `log` ended."""
    queue = MemoryReviewQueue()
    await queue.push([entry.item for entry in log], limit=len(log))
    for entry in standing(log):
        await queue.judge(entry.judgement, votes=votes)
    return queue


def read_pairs(path: Path) -> list[ReviewItem]:
    """Pairs to compare, from JSON Lines (also .gz) or Parquet with `prompt` and either `answer_a` and `answer_b` or
    `chosen` and `rejected`; the rest is not looked at. Raises DataError with file and line."""
    items: dict[str, ReviewItem] = {}
    for row in scan_table(FileSource(path=path)):
        if isinstance(row, Unreadable):
            raise row.error()
        item = _item(row)
        items.setdefault(item.item_id, item)
    return list(items.values())


def _item(row: Located) -> ReviewItem:
    columns = next((names for names in _ANSWER_COLUMNS if all(name in row.values for name in names)), None)
    if columns is None or "prompt" not in row.values:
        raise DataError(
            f"{row.where} is no pair to compare",
            got=f"columns {', '.join(sorted(row.values)) or 'none'}",
            do="give prompt, and answer_a and answer_b (or chosen and rejected)",
        )
    prompt = check_prompt(row.values["prompt"])
    do = "a prompt is text or chat messages with role and content, an answer is text"
    if isinstance(prompt, Rejection):
        raise DataError(f"{row.where} is no pair to compare", got=prompt.reason, do=do)
    try:
        answers = msgspec.convert([row.values[name] for name in columns], tuple[str, str])
    except msgspec.ValidationError as error:
        raise DataError(f"{row.where} is no pair to compare", got=str(error), do=do) from error
    # The same pair in the other order is the same item.
    content = msgspec.json.encode([prompt, sorted(answers)])
    return ReviewItem(
        item_id=f"file-{hashlib.sha256(content).hexdigest()[:16]}",
        kind="pair",
        prompt=prompt,
        answers=answers,
        reason=row.where,
        created_at=now_iso(),
    )
