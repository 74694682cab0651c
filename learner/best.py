"""The policies that a run hands over, as ordinary Hugging Face directories: the final one and the best one.

Best: highest normalised score, averaged over the last few steps, among policies whose KL is within a quarter of the
target. The score is the learned reward: the gold reward of a test world is never looked at. Another version of the
reward model scores otherwise, and corrects the one before it: with it the search begins anew.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cluster.errors import CheckpointError
from cluster.files import atomic_directory, remove_directory, remove_stale

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SaveModel = Callable[[Path], None]
"""Writes the policy, as it is now, into a directory."""
WINDOW_STEPS = 5
KL_MARGIN = 1.25


class BestPolicy:
    """Watches the steps; writes `policy/best` and `policy/final`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        """(normalised score, KL as a share of its target) of the latest steps."""
        self._best = float("-inf")
        self._rm_version: str | None = None

    def observe(
        self, score_normalised: float, *, kl: float, kl_target: float | None, rm_version: str | None = None
    ) -> None:
        """One step's batch means. `rm_version`: of the reward model that gave the scores."""
        if rm_version != self._rm_version:
            self._window.clear()
            self._best, self._rm_version = float("-inf"), rm_version
        self._window.append((score_normalised, kl / kl_target if kl_target else 0.0))

    def rolled_back(self, state: Mapping[str, Any], *, to_step: int) -> None:
        """The run is back at the checkpoint of `to_step`, which holds this `state`. A policy/best of the branch that it
        left is removed: a higher learned reward is what that branch went wrong by."""
        self._window.clear()
        self.from_state(state)
        target = self._directory / "best"
        note = target / "keel.json"
        if target.exists() and (not note.exists() or json.loads(note.read_text())["step"] > to_step):
            remove_directory(target)
            self._best = float("-inf")

    def save_if_better(self, save_model: SaveModel, *, tokenizer: PreTrainedTokenizerBase, step: int) -> None:
        """Write policy/best when the window's mean score is the highest yet and its KL within bounds."""
        if not self._window or fmean(share for _, share in self._window) > KL_MARGIN:
            return
        score = fmean(score for score, _ in self._window)
        # It is not there where a learner died after a rollback had removed it, or while it was replaced.
        if score <= self._best and (self._directory / "best").exists():
            return
        self._best = score
        self._write("best", save_model, tokenizer, {"step": step, "score_normalised": score})

    def save_final(self, save_model: SaveModel, *, tokenizer: PreTrainedTokenizerBase, step: int) -> None:
        """Write policy/final: the newest policy."""
        self._write("final", save_model, tokenizer, {"step": step})

    def to_state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "best": self._best if self._window and self._best > float("-inf") else None,
            "window": list(self._window),
            "rm_version": self._rm_version,
        }

    def from_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of to_state."""
        self._best = float("-inf") if state["best"] is None else float(state["best"])
        self._rm_version = state.get("rm_version")  # Checkpoints of before refreshes do not name it.
        self._window.extend((float(score), float(share)) for score, share in state["window"])

    def _write(
        self, name: str, save_model: SaveModel, tokenizer: PreTrainedTokenizerBase, note: Mapping[str, float]
    ) -> None:
        target, fresh = self._directory / name, self._directory / f"{name}.new"
        try:
            remove_stale(self._directory)  # A learner killed half-way leaves as much as a model there.
            if fresh.exists():
                remove_directory(fresh)
            with atomic_directory(fresh) as beside:
                save_model(beside)
                tokenizer.save_pretrained(beside)
                (beside / "keel.json").write_text(json.dumps(note))
            if target.exists():
                remove_directory(target)
            fresh.rename(target)
        except OSError as error:
            raise CheckpointError(
                f"cannot write policy/{name}",
                got=str(error),
                do="free disk space, then --resume; checkpoints are intact",
            ) from error
