"""What waits for people, and what they said: pairs to compare, flagged answers, audits. The seam and the in-memory
version; the Redis version is in cluster/review_queue_redis.py.

Consumes: items from the run, judgements from people. Produces: one item at a time for each annotator, and a log of
judgements that only grows. Waits for: the server's answer, where there is one; never for people. Who unblocks it: the
client's deadline. Always holds:
- an item is shown to no more people at a time than still have to judge it, and to nobody who judged it; what an
  annotator has before them stays theirs until it is judged or the lease runs out;
- a judgement that arrives twice counts once. One that arrives late, for an item that others closed, counts too: no
  work of people is lost;
- the log is never rewritten: taking a judgement back adds an entry that says so. `standing` gives what holds.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal, Protocol, get_args

import msgspec

from cluster.data_records import Prompt
from cluster.errors import DataError
from cluster.stores import Clock

Kind = Literal["pair", "flagged", "audit"]
Verdict = Literal["first", "second", "tie", "bad", "fine", "skip", "undone"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""In the order in which they are shown: a refresh of the reward model waits for pairs."""
PAIR_VERDICTS: Final[tuple[Verdict, ...]] = ("first", "second", "tie", "skip")
ANSWER_VERDICTS: Final[tuple[Verdict, ...]] = ("bad", "fine", "skip")


def now_iso() -> str:
    """This moment, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class ReviewItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something to judge. `item_id` names its content: pushed twice, it is one item. `answers`: two for a pair, else
    one. `policy_versions`: who wrote each answer, None where not known; empty where nothing is known. `reason`: why it
    is here, for flagged answers the rule that hit."""

    item_id: str
    kind: Kind
    prompt: Prompt
    answers: tuple[str, ...]
    policy_versions: tuple[int | None, ...] = ()
    reason: str = ""
    created_at: str = ""

    def __post_init__(self) -> None:
        wanted = 2 if self.kind == "pair" else 1
        if len(self.answers) != wanted:
            raise ValueError(f"a review item of kind {self.kind} has {wanted} answers, got {len(self.answers)}")
        if self.policy_versions and len(self.policy_versions) != wanted:
            raise ValueError(f"{len(self.policy_versions)} policy versions for {wanted} answers")


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What one annotator said of one item. "first" and "second" are the item's own order, whatever was shown. "skip":
    cannot tell. "undone": the annotator's judgement of this item is taken back."""

    item_id: str
    annotator: str
    verdict: Verdict
    note: str = ""
    judged_at: str = msgspec.field(default_factory=now_iso)
    judgement_id: str = msgspec.field(default_factory=lambda: secrets.token_hex(12))
    """The same in every copy that is sent again."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the log. Positions count from 1."""

    position: int
    judgement: Judgement
    item: ReviewItem


@dataclass(frozen=True)
class Progress:
    """Counts by kind, and of each annotator. Skips count as judged."""

    waiting: Mapping[Kind, int]
    judged: Mapping[Kind, int]
    by_annotator: Mapping[str, int]
    agreeing: int = 0
    """Of `compared`: two people's judgements of one item, skips left out, that say the same."""
    compared: int = 0

    @property
    def agreement(self) -> float | None:
        """Share of agreeing judgements; None before two people have judged the same item."""
        return self.agreeing / self.compared if self.compared else None


class ReviewQueue(Protocol):
    """Any number of processes may hold one. Each method of a networked version may raise StreamError."""

    async def push(self, items: Sequence[ReviewItem], *, limit: int) -> int:
        """Queue items; those of a kind of which `limit` wait already, and those known, are left out. Returns how many
        were taken."""
        ...

    async def next(
        self, annotator: str, *, lease_s: float, votes: int = 1, kinds: Sequence[Kind] = KINDS
    ) -> ReviewItem | None:
        """What `annotator` should judge now: the item they have before them, else the oldest of the first of `kinds`
        that has one for them. It is theirs for `lease_s`. None: nothing for them."""
        ...

    async def judge(self, judgement: Judgement, *, votes: int = 1) -> bool:
        """Store a judgement; False where another one of the annotator stands for this item. The item is closed when
        `votes` people have judged it, skips included. Raises DataError for an item that is not known, or a verdict that
        its kind does not have."""
        ...

    async def undo(self, annotator: str, *, lease_s: float, votes: int = 1) -> Judgement | None:
        """Take back the newest standing judgement of `annotator`, who gets its item again next. None: there is none."""
        ...

    async def progress(self) -> Progress: ...

    async def judgements(self, *, after: int = 0) -> list[Recorded]:
        """Entries of the log after this position, oldest first. `standing` says which hold."""
        ...


def standing(log: Iterable[Recorded]) -> list[Recorded]:
    """The entries that hold, oldest first, of a log from its start: taken-back ones and what takes them back are left
    out."""
    kept: dict[tuple[str, str], Recorded] = {}
    for entry in log:
        key = (entry.judgement.item_id, entry.judgement.annotator)
        kept.pop(key, None)
        if entry.judgement.verdict != "undone":
            kept[key] = entry
    return list(kept.values())


def check_verdict(item: ReviewItem, judgement: Judgement) -> None:
    """Raises DataError where the item's kind does not have the verdict."""
    allowed = PAIR_VERDICTS if item.kind == "pair" else ANSWER_VERDICTS
    if judgement.verdict not in allowed:
        raise DataError(
            f"no verdict for an item of kind {item.kind}", got=judgement.verdict, do=f"give one of {', '.join(allowed)}"
        )


def unknown_item(item_id: str) -> DataError:
    return DataError("this item is not in the review queue", got=repr(item_id), do="reload the page")


class Tally:
    """Progress, kept up to date entry by entry."""

    def __init__(self) -> None:
        self.position = 0
        self._votes: dict[str, dict[str, Verdict]] = {}
        self._judged: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._by_annotator: dict[str, int] = {}
        self._agreeing = self._compared = 0

    def take(self, log: Iterable[Recorded]) -> None:
        """Entries after `position`, in order."""
        for entry in log:
            said, kind = entry.judgement, entry.item.kind
            votes = self._votes.setdefault(said.item_id, {})
            if (old := votes.pop(said.annotator, None)) is not None:
                self._count(kind, said.annotator, verdict=old, others=votes, by=-1)
            if said.verdict != "undone":
                self._count(kind, said.annotator, verdict=said.verdict, others=votes, by=1)
                votes[said.annotator] = said.verdict
            self.position = entry.position

    def _count(self, kind: Kind, annotator: str, *, verdict: Verdict, others: Mapping[str, Verdict], by: int) -> None:
        self._judged[kind] += by
        self._by_annotator[annotator] = self._by_annotator.get(annotator, 0) + by
        if verdict != "skip":
            said = [other for other in others.values() if other != "skip"]
            self._compared += by * len(said)
            self._agreeing += by * said.count(verdict)

    def progress(self, waiting: Mapping[Kind, int]) -> Progress:
        people = {name: count for name, count in sorted(self._by_annotator.items()) if count}
        return Progress(dict(waiting), dict(self._judged), people, self._agreeing, self._compared)


# ---------------------------------------------------------------- in memory


@dataclass
class _Entry:
    item: ReviewItem
    verdicts: dict[str, Judgement] = field(default_factory=dict)
    """Standing, by annotator."""
    leases: dict[str, float] = field(default_factory=dict)
    """Annotator → when it runs out."""


class MemoryReviewQueue:
    """ReviewQueue in this process."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._waiting: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
        self._held: dict[str, str] = {}
        self._stacks: dict[str, list[str]] = {}
        """Items that each annotator judged, newest last."""
        self._log: list[Recorded] = []
        self._seen: set[str] = set()
        self._tally = Tally()

    async def push(self, items: Sequence[ReviewItem], *, limit: int) -> int:
        taken = 0
        for item in items:
            queue = self._waiting[item.kind]
            if item.item_id not in self._entries and len(queue) < limit:
                self._entries[item.item_id] = _Entry(item)
                queue.append(item.item_id)
                taken += 1
        return taken

    async def next(
        self, annotator: str, *, lease_s: float, votes: int = 1, kinds: Sequence[Kind] = KINDS
    ) -> ReviewItem | None:
        until_s = self._clock() + lease_s
        held = self._entries.get(self._held.get(annotator, ""))
        if held is not None and held.item.kind in kinds and self._is_kept(held, annotator, votes=votes):
            held.leases[annotator] = until_s
            return held.item
        self._release(annotator)
        for kind in kinds:
            for item_id in self._waiting[kind]:
                entry = self._entries[item_id]
                if self._is_free(entry, annotator, votes=votes):
                    entry.leases[annotator] = until_s
                    self._held[annotator] = item_id
                    return entry.item
        return None

    async def judge(self, judgement: Judgement, *, votes: int = 1) -> bool:
        entry = self._entries.get(judgement.item_id)
        if entry is None:
            raise unknown_item(judgement.item_id)
        check_verdict(entry.item, judgement)
        if judgement.judgement_id in self._seen:
            return True
        if judgement.annotator in entry.verdicts:
            return False
        self._seen.add(judgement.judgement_id)
        self._record(entry, judgement)
        entry.verdicts[judgement.annotator] = judgement
        self._stacks.setdefault(judgement.annotator, []).append(judgement.item_id)
        entry.leases.pop(judgement.annotator, None)
        queue = self._waiting[entry.item.kind]
        if len(entry.verdicts) >= votes and judgement.item_id in queue:
            queue.remove(judgement.item_id)
        return True

    async def undo(self, annotator: str, *, lease_s: float, votes: int = 1) -> Judgement | None:
        stack = self._stacks.get(annotator)
        if not stack:
            return None
        entry = self._entries[stack.pop()]
        judgement = entry.verdicts.pop(annotator)
        self._record(entry, Judgement(item_id=judgement.item_id, annotator=annotator, verdict="undone"))
        queue = self._waiting[entry.item.kind]
        if len(entry.verdicts) < votes and judgement.item_id not in queue:
            queue.insert(0, judgement.item_id)
        self._release(annotator)
        entry.leases[annotator] = self._clock() + lease_s
        self._held[annotator] = judgement.item_id
        return judgement

    async def progress(self) -> Progress:
        return self._tally.progress({kind: len(queue) for kind, queue in self._waiting.items()})

    async def judgements(self, *, after: int = 0) -> list[Recorded]:
        return self._log[after:]

    def _is_free(self, entry: _Entry, annotator: str, *, votes: int) -> bool:
        """Of an item that waits: `annotator` has not judged it, and nobody else has taken the last place."""
        now_s = self._clock()
        others = sum(name != annotator and until_s > now_s for name, until_s in entry.leases.items())
        return annotator not in entry.verdicts and len(entry.verdicts) + others < votes

    def _is_kept(self, entry: _Entry, annotator: str, *, votes: int) -> bool:
        """What `annotator` had before them is still theirs: under a lease, or nobody took it since."""
        if annotator in entry.verdicts:
            return False
        if entry.leases.get(annotator, 0.0) > self._clock():
            return True
        return entry.item.item_id in self._waiting[entry.item.kind] and self._is_free(entry, annotator, votes=votes)

    def _release(self, annotator: str) -> None:
        held = self._held.pop(annotator, None)
        if held is not None:
            self._entries[held].leases.pop(annotator, None)

    def _record(self, entry: _Entry, judgement: Judgement) -> None:
        recorded = Recorded(position=len(self._log) + 1, judgement=judgement, item=entry.item)
        self._log.append(recorded)
        self._tally.take([recorded])
