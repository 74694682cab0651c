"""Loading a run's reward models for serving, beside whatever scores meanwhile.

Consumes: the registry `<run>/rm` and the reference model `<run>/sft/model`. Produces: `Serving`s. Waits for: the
loading, at most `_TIMEOUT_S`, in a thread of its own. Who unblocks it: its end, or the time limit.
Always holds: the reference model is loaded once and shared by all versions; no version is kept here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.errors import ModelError
from cluster.reward_models import RewardModels
from configs.reward import RewardSection
from reward_service.forward_thread import ForwardThread
from reward_service.serving import Serving

if TYPE_CHECKING:
    from cluster.rm_announcement import RmAnnouncement
    from reward_service.scorer_transformers import TransformersScorer

log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 600.0


class ModelLoader:
    """`start` first; then `version`, as often as wanted. `close` at the end."""

    def __init__(self, settings: RewardSection, *, rm_dir: Path, reference_dir: Path) -> None:
        self._settings = settings
        self._models = RewardModels(rm_dir)
        self._reference_dir = reference_dir
        self._thread = ForwardThread(name="load")
        self._reference: TransformersScorer | None = None

    async def start(self, announced: RmAnnouncement | None) -> Serving:
        """The announced version, else the registry's current one; only the reference model where no reward model is
        asked. Raises ModelError."""
        return await self._made(lambda: self._start(announced))

    async def version(self, version: str) -> Serving:
        """Another version. Raises ModelError, ScoringError when it takes too long, and what torch raises, e.g. when
        there is no memory for it."""
        return await self._made(lambda: self._version(version))

    def close(self) -> None:
        """Let the thread end after the call under way."""
        self._thread.close()

    async def _made(self, make: Callable[[], Serving]) -> Serving:
        # Through a list: the thread holds on to its last call with what that returned, and would keep a model alive.
        made: list[Serving] = []
        await self._thread.call(lambda: made.append(make()), timeout_s=_TIMEOUT_S)
        return made.pop()

    def _start(self, announced: RmAnnouncement | None) -> Serving:
        from reward_service.scorer_transformers import ScorerSettings, TransformersScorer

        reward = self._settings
        if reward.needs_model and announced is None:
            self._models.current()  # where there is none: said before a large reference model is loaded
        settings = ScorerSettings(
            batch_size=reward.batch_size,
            token_budget=reward.token_budget,
            threads=reward.threads,
            device="cuda" if reward.gpus_per_worker > 0 else "cpu",
            dtype=reward.dtype,
        )
        self._reference = TransformersScorer(None, reference_dir=self._reference_dir, settings=settings)
        if not reward.needs_model:
            return Serving(self._reference)
        if announced is not None:
            try:
                return self._version(announced.version)
            except Exception as error:
                # Maybe of an earlier run of this name. If it is this run's, the watch tries it again.
                log.error("reward model %s is announced and does not load: %r", announced.version, error)
        return self._version(self._models.current().version)

    def _version(self, version: str) -> Serving:
        if self._reference is None or not self._settings.needs_model:
            raise ModelError("no reward model is asked in this run", got=f"version {version}", do="set reward.sources")
        stored = self._models.get(version)
        return Serving.of(self._reference.with_reward_model(stored), stored)
