"""What people said, as files of a run (or of any directory).

| file | a line |
|---|---|
| reviews.jsonl | cluster.review_queue.Recorded: each judgement with its item; "undone" takes one back. Only grows |
| preferences.jsonl | PreferencePair, source "review": a pair with what all its annotators said |
| caught.jsonl | CaughtAnswer: an answer that people called bad |

Consumes: the review queue's log. Produces: the files. Waits for: the disk. Who unblocks it: the disk, or its error.
Always holds: the last two files say what reviews.jsonl says, item by item. A new item is one O_APPEND write. Where a
line has to change or go (another vote, a judgement taken back) the file is replaced whole: a reader sees the old or the
new one. Lines about items that are not in reviews.jsonl are left alone. One process at a time, by a lock file; whatever
a killed one left undone is made up for at the next start.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from cluster.data_records import PREFERENCES_FILE, PreferencePair, Prompt
from cluster.errors import ConfigError, DataError
from cluster.files import atomic_write_bytes
from cluster.review_queue import Judgement, Recorded, ReviewItem, standing

REVIEWS_FILE: Final = "reviews.jsonl"
CAUGHT_FILE: Final = "caught.jsonl"
SOURCE: Final = "review"
_LOCK_FILE: Final = ".review.lock"


class CaughtAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that people called bad. `reason`: what brought it to them, and their notes."""

    prompt: Prompt
    answer: str
    reason: str
    policy_version: int | None
    item_id: str


def pair_from(item: ReviewItem, judgements: Sequence[Judgement]) -> PreferencePair | None:
    """A pair ordered by its standing judgements. None without a clear majority: more of them for one answer than for
    the other, and more than ties."""
    votes = [judgement for judgement in judgements if judgement.verdict in ("first", "second")]
    firsts = sum(judgement.verdict == "first" for judgement in votes)
    most, ties = max(firsts, len(votes) - firsts), sum(judgement.verdict == "tie" for judgement in judgements)
    if 2 * most <= len(votes) or most <= ties:
        return None
    first_wins = 2 * firsts > len(votes)
    answers, versions = item.answers, item.policy_versions or (None, None)
    if not first_wins:
        answers, versions = answers[::-1], versions[::-1]
    return PreferencePair(
        pair_id=item.item_id,
        prompt=item.prompt,
        chosen=answers[0],
        rejected=answers[1],
        votes=tuple((judgement.verdict == "first") == first_wins for judgement in votes),
        annotators=tuple(judgement.annotator for judgement in votes),
        confidence=most / len(votes),
        policy_version=versions[0],
        rejected_version=versions[1] if versions[1] != versions[0] else None,
        judged_at=max(judgement.judged_at for judgement in votes),
        source=SOURCE,
    )


def caught_from(item: ReviewItem, judgements: Sequence[Judgement]) -> CaughtAnswer | None:
    """An answer that more people called bad than fine, by its standing judgements; else None."""
    said = [judgement for judgement in judgements if judgement.verdict in ("bad", "fine")]
    bad = [judgement for judgement in said if judgement.verdict == "bad"]
    if 2 * len(bad) <= len(said):
        return None
    return CaughtAnswer(
        prompt=item.prompt,
        answer=item.answers[0],
        reason="; ".join(text for text in (item.reason, *(judgement.note for judgement in bad)) if text),
        policy_version=item.policy_versions[0] if item.policy_versions else None,
        item_id=item.item_id,
    )


def read_reviews(path: Path) -> list[Recorded]:
    """All of reviews.jsonl; a torn last line is left out, and no file is an empty one. Raises DataError."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {path}", got=str(error), do="check its permissions") from error
    log: list[Recorded] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            log.append(msgspec.json.decode(line, type=Recorded))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            if number < len(lines):
                got = f"{error}: {line[:80]!r}"
                raise DataError(f"{path}:{number} is no judgement", got=got, do="mend or delete the line") from error
    return log


class ReviewFiles:
    """The three files in `directory`. A context manager: inside, nobody else writes them. Blocking."""

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory
        self.position = 0
        """Of the queue's log, up to which everything is in the files."""
        self.log: list[Recorded] = []
        """All that was ever said, oldest first; positions are those of the queue at the time."""
        self._items: dict[str, list[Recorded]] = {}
        """The same by item."""
        self._known: set[str] = set()
        self._lock: int | None = None
        self._sound = False
        """The files say what `_items` says."""

    def __enter__(self) -> Self:
        """Raises ConfigError where another process has these files, DataError where they cannot be read."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.directory / _LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                "people review here already",
                got=f"another process writes {self.directory / REVIEWS_FILE}",
                do="use its page: any number of annotators can; or stop it first",
            ) from None
        self._lock = lock
        try:
            for entry in read_reviews(self.directory / REVIEWS_FILE):
                self._remember(entry)
            _cut_torn_line(self.directory / REVIEWS_FILE)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def take(self, log: Sequence[Recorded]) -> None:
        """Entries of the queue's log after `position`. Those known from before are not written again. Raises DataError
        where the disk refuses; then `position` stays, and the next call makes up for it."""
        fresh = [entry for entry in log if entry.judgement.judgement_id not in self._known]
        sound, self._sound = self._sound, False
        try:
            if fresh:
                _append(self.directory / REVIEWS_FILE, [msgspec.json.encode(entry) for entry in fresh])
            before = {entry.item.item_id: self._lines(entry.item.item_id) for entry in fresh}
            for entry in fresh:
                self._remember(entry)
            if sound:
                self._follow(before)
            else:
                self._rewrite(self._items)
        except OSError as error:
            raise DataError(
                f"cannot write what people said to {self.directory}",
                got=str(error),
                do="free some disk space; the judgements are kept in the queue",
            ) from error
        self._sound = True
        if log:
            self.position = log[-1].position

    def _remember(self, entry: Recorded) -> None:
        self.log.append(entry)
        self._known.add(entry.judgement.judgement_id)
        self._items.setdefault(entry.item.item_id, []).append(entry)

    def _lines(self, item_id: str) -> tuple[bytes | None, bytes | None]:
        """What preferences.jsonl and caught.jsonl should have for this item."""
        entries = self._items.get(item_id)
        if not entries:
            return None, None
        item, judgements = entries[0].item, [entry.judgement for entry in standing(entries)]
        if item.kind == "pair":
            return _line(pair_from(item, judgements)), None
        return None, _line(caught_from(item, judgements))

    def _follow(self, before: Mapping[str, tuple[bytes | None, bytes | None]]) -> None:
        """Bring the files, which said `before` of these items, up to date."""
        for column, name in enumerate((PREFERENCES_FILE, CAUGHT_FILE)):
            changes = {item_id: (old[column], self._lines(item_id)[column]) for item_id, old in before.items()}
            if any(old is not None and old != new for old, new in changes.values()):
                return self._rewrite(before)
            _append(self.directory / name, [new for old, new in changes.values() if old is None and new is not None])
        return None

    def _rewrite(self, item_ids: Iterable[str]) -> None:
        wanted = {item_id: self._lines(item_id) for item_id in item_ids}
        _replace_lines(
            self.directory / PREFERENCES_FILE, _pair_of_line, {key: pair for key, (pair, _) in wanted.items()}
        )
        _replace_lines(self.directory / CAUGHT_FILE, _item_of_line, {key: bad for key, (_, bad) in wanted.items()})


def _line(record: msgspec.Struct | None) -> bytes | None:
    return None if record is None else msgspec.json.encode(record)


class _Line(msgspec.Struct):
    """As much of a line as says which item it is about."""

    pair_id: str | None = None
    item_id: str | None = None
    source: str | None = None


def _pair_of_line(line: _Line) -> str | None:
    return line.pair_id if line.source == SOURCE else None


def _item_of_line(line: _Line) -> str | None:
    return line.item_id


def _append(path: Path, lines: Sequence[bytes]) -> None:
    """One write, whole or not at all."""
    if not lines:
        return
    data = b"".join(line + b"\n" for line in lines)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, data) != len(data):
            os.ftruncate(descriptor, size)
            raise OSError(f"{path}: the disk is full")
    finally:
        os.close(descriptor)


def _whole_lines(data: bytes) -> list[bytes]:
    """Without a torn last one, which a kill can leave; a whole one that lacks its newline counts."""
    *lines, tail = data.split(b"\n")
    try:
        return [*lines, tail] if isinstance(msgspec.json.decode(tail), dict) else lines
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return lines


def _cut_torn_line(path: Path) -> None:
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        atomic_write_bytes(path, b"".join(line + b"\n" for line in _whole_lines(data)))


def _replace_lines(path: Path, item_of: Callable[[_Line], str | None], wanted: Mapping[str, bytes | None]) -> None:
    """Make the file have exactly `wanted` for these items; lines about others stay."""
    data = path.read_bytes() if path.exists() else b""
    missing = {item_id: line for item_id, line in wanted.items() if line is not None}
    kept: list[bytes] = []
    for line in _whole_lines(data):
        item_id = _about(line, item_of)
        if item_id is None or item_id not in wanted:
            kept.append(line)
        elif item_id in missing:
            kept.append(missing.pop(item_id))
    text = b"".join(line + b"\n" for line in (*kept, *missing.values()))
    if text != data:
        atomic_write_bytes(path, text)


def _about(line: bytes, item_of: Callable[[_Line], str | None]) -> str | None:
    try:
        return item_of(msgspec.json.decode(line, type=_Line))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
