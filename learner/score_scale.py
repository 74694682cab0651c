"""The scales that scores come on, one for each version of the reward model: running statistics for the update, and the
fixed calibration that says how far the policy has come.

A version's statistics start from its own calibration set, so the reward does not jump when a refreshed reward model
takes over. Beside other sources the model counts in deviations of that set already: the scale stays, and a version goes
on from the statistics of the one before it. Statistics are the checkpoint's; the calibrations lie with the versions
(cluster/reward_models.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from cluster.errors import CheckpointError, ModelError
from cluster.records import ScoredRollout
from cluster.reward_models import Calibration, RewardModels, model_of
from learner.algo.normalise import MIN_STD, ScoreNormaliser
from learner.batch import TrainBatch
from learner.experience import normalised_scores


class ScoreScale:
    """`version`: of the reward model whose scores came last; None before the first batch and where there is none."""

    def __init__(self, models: RewardModels) -> None:
        self._models = models
        self._calibrations: dict[str, Calibration | None] = {}
        self.normaliser = ScoreNormaliser()
        self.version: str | None = models.current().version if models.exists() else None

    def normalised(self, batch: TrainBatch, *, score_clip: float) -> Tensor:
        """[B] normalised and clipped scores, each by its own version's statistics, which see this batch first."""
        for version in sorted(set(batch.rm_versions)):
            self.normaliser = self._warmed(version)
        scores_B, self.normaliser = normalised_scores(batch, self.normaliser, score_clip=score_clip)
        self.version = batch.rm_versions[-1]
        return scores_B

    def proxy_z(self, rollouts: Sequence[ScoredRollout]) -> float | None:
        """Mean of (reward − mean) / std by each version's calibration: 0 for the answers that it was calibrated on.
        None where no version has one."""
        found = [(scored, self._calibration(scored.rm_version)) for scored in rollouts]
        z = [(scored.reward - one.mean) / max(one.std, MIN_STD) for scored, one in found if one is not None]
        return fmean(z) if z else None

    def to_state(self) -> dict[str, Any]:
        return {"normaliser": self.normaliser.to_dict(), "rm_version": self.version}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the reward model it was trained against is not there any more."""
        self.version = state["rm_version"]
        model = model_of(self.version)
        if model is not None:
            try:
                self._models.get(model)
            except ModelError as error:
                raise CheckpointError(
                    "the checkpoint was trained against another reward model",
                    got=f"{model}: {error}",
                    do="restore rm/, or start over with --fresh",
                ) from error
        self.normaliser = ScoreNormaliser.from_dict(state["normaliser"])

    def _warmed(self, version: str) -> ScoreNormaliser:
        """The normaliser, with a start for `version` where there is one."""
        calibration = self._calibration(version)
        if calibration is not None:
            return self.normaliser.calibrated(
                version, mean=calibration.mean, std=calibration.std, count=calibration.count
            )
        before = self.normaliser.moments.get(self.version or "")
        if before is None or not _mixed_alike(version, self.version or ""):
            return self.normaliser
        return self.normaliser.calibrated(version, mean=before.mean, std=before.std, count=before.count)

    def _calibration(self, version: str) -> Calibration | None:
        """None for a scale that is not a reward model's own (reward.sources), and for a version that is not on disk."""
        if version not in self._calibrations:
            try:
                self._calibrations[version] = self._models.get(version).manifest.calibration
            except ModelError:
                self._calibrations[version] = None
        return self._calibrations[version]


def _mixed_alike(version: str, other: str) -> bool:
    """Two reward models beside the same other sources, at the same weights."""
    tag = version.partition("~")[2]
    return bool(tag) and tag == other.partition("~")[2]
