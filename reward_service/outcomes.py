"""What a reward worker holds, and what it puts in the place of each entry: the last step before the server.

Pure: no queue, no server, no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from cluster.records import DeadLetter, Rollout, ScoredRollout, encode
from cluster.streams import Hop, StreamName
from reward_service.batch_scoring import CacheUpdate

_HOPS_AT_A_TIME: Final = 128
_BYTES_AT_A_TIME: Final = 4 * 2**20
"""Bounds of one round trip: the server serves nobody else while it moves entries."""


@dataclass(frozen=True)
class Held:
    """A leased rollout."""

    entry_id: str
    rollout: Rollout
    deliveries: int

    @property
    def tokens(self) -> int:
        return (len(self.rollout.task.prompt_ids_i32) + len(self.rollout.response_ids_i32)) // 4  # int32


Records = Sequence[tuple[Held, ScoredRollout | DeadLetter]]


@dataclass(frozen=True)
class Outcomes:
    """Records to put in the place of held entries, and what to remember afterwards."""

    records: Records
    learned: CacheUpdate = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A held entry, its hop, and what the hop counts as."""

    held: Held
    hop: Hop
    counts_as: str


def round_trips(records: Records) -> Iterator[list[Step]]:
    """The steps that publish `records`, in order, cut into round trips of bounded size; a record over the bound goes
    alone."""
    steps: list[Step] = []
    size_bytes = 0
    for held, record in records:
        step = _step(held, record)
        size_bytes += len(step.hop.payload)
        if steps and (len(steps) == _HOPS_AT_A_TIME or size_bytes > _BYTES_AT_A_TIME):
            yield steps
            steps, size_bytes = [], len(step.hop.payload)
        steps.append(step)
    if steps:
        yield steps


def _step(held: Held, record: ScoredRollout | DeadLetter) -> Step:
    if isinstance(record, ScoredRollout):
        return Step(held, Hop(held.entry_id, StreamName.SCORED, encode(record)), "scored")
    letter = msgspec.structs.replace(record, deliveries=held.deliveries)
    return Step(held, Hop(held.entry_id, StreamName.DEAD, encode(letter)), "rejected" if letter.rejected else "dead")
