"""Optional experiment trackers: the step records of metrics.jsonl, sent on to TensorBoard or Weights & Biases.

Consumes: one flat record a PPO step. Produces: event files in the run directory, or an online run. Always holds: a
tracker that is missing is refused before training starts; one that fails later is logged, dropped, and ends nothing.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.errors import ConfigError
from cluster.files import Json
from keel.display import number

TrackerName = Literal["tensorboard", "wandb"]
_LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """A place that draws curves of numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record finite numbers by name for PPO step `step`; steps rise."""
        ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in `run_dir/tensorboard`."""

    def __init__(self, run_dir: Path) -> None:
        module = _import("torch.utils.tensorboard", tracker="tensorboard")
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"keel/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run named after the run directory. Login and offline mode: WANDB_API_KEY, WANDB_MODE."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        module = _import("wandb", tracker="wandb")
        self._run = module.init(project="keel", name=run_dir.name, dir=str(run_dir), config=dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """The trackers of one run, together. A failing one is dropped with a warning."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, record: Json) -> None:
        """Send the finite numbers of one step record; a record without `step` is ignored."""
        step = number(record, "step")
        if step is None:
            return
        values = {name: value for name in record if name != "step" and (value := number(record, name)) is not None}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(int(step), values)
            except Exception as error:  # whatever a third party's network client raises must not end a training run
                _LOG.warning("tracker %s failed at step %d and is dropped: %s", name, int(step), error)
                del self._trackers[name]

    def close(self) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:  # as in log
                _LOG.warning("tracker %s did not close: %s", name, error)
        self._trackers.clear()


def open_trackers(names: Sequence[TrackerName], *, run_dir: Path, config: Mapping[str, Any]) -> Trackers:
    """The trackers of `metrics.trackers`. `config` is shown beside the curves where the tracker can.

    Raises ConfigError naming the package to install when one is missing.
    """
    opened: dict[str, Tracker] = {}
    try:
        for name in names:
            opened[name] = TensorBoardTracker(run_dir) if name == "tensorboard" else WandbTracker(run_dir, config)
    except BaseException:
        Trackers(opened).close()
        raise
    return Trackers(opened)


def _import(module: str, *, tracker: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"metrics.trackers names {tracker}, which is not installed",
            got=str(error),
            do=f"pip install {tracker}, or take it out of metrics.trackers",
        ) from error
