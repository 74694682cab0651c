"""The checkpoints that a run may go back to: of the start, and of steps that the guard found nothing wrong with.

They are pinned, so that pruning leaves them; of the good ones the newest few are kept, of the start for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.checkpoint import CheckpointStore


class GoodCheckpoints:
    """`steps`: oldest first, of this branch of the run alone."""

    def __init__(self, store: CheckpointStore, *, keep: int) -> None:
        self.steps: tuple[int, ...] = ()
        self._store = store
        self._keep = keep

    def to_come(self, step: int) -> tuple[int, ...]:
        """`steps` when `step`, which is about to be saved, is among them."""
        start, later = self._parted({*self.steps, step})
        return start + later[-self._keep :]

    def add(self, step: int) -> None:
        """A good one was saved. Raises CheckpointError."""
        self._set(self.to_come(step))

    def forget_after(self, step: int) -> None:
        """The run went back to this step: what came later belongs to the branch that was left. Raises
        CheckpointError."""
        self._set(at for at in self.steps if at <= step)

    def forget(self, step: int) -> None:
        """It turned out to be damaged. Raises CheckpointError."""
        self._set(at for at in self.steps if at != step)

    def restore(self, steps: Iterable[int]) -> None:
        """Those that a resumed run's checkpoint names and that are still there; no other stays pinned, such as one
        between whose pinning and whose unpinning a learner died. Raises CheckpointError."""
        there = set(self._store.list())
        self.steps = tuple(self._store.pinned())
        self._set(step for step in steps if step in there)

    def _set(self, steps: Iterable[int]) -> None:
        wanted = tuple(sorted(steps))
        for step in set(wanted) - self._store.pinned():
            self._store.pin(step)
        for step in set(self.steps) - set(wanted):
            self._store.unpin(step)
        self.steps = wanted

    @staticmethod
    def _parted(steps: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(the start's, the others), oldest first."""
        ordered = sorted(steps)
        return tuple(step for step in ordered if step == 0), tuple(step for step in ordered if step > 0)
