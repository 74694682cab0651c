"""The process that trains reward models while a run goes on. It is kept between refreshes: loading the libraries takes
as long as a small refresh.

Consumes: one request at a time. Produces: a reference to its outcome. Waits: to be closed, for the process's death.
Who unblocks it: Ray, which killed it, or the deadline.
Always holds: a process that died is replaced at the next request; the one at hand fails and changes nothing; `close`
leaves no process, and no draft of a reward model.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final, Protocol

from cluster.reward_models import RewardModels
from configs.run import RefreshSection, RunConfig
from keel.ray_environment import torch_environment
from keel.rundir import append_progress
from keel.runtime import Runtime
from reward_service.rm.refresh import RefreshOutcome, RefreshRequest

_DEATH_S: Final = 5.0
"""A process that was killed is gone by then."""


class Trainer(Protocol):
    """What a Refresher needs."""

    def start(self) -> None:
        """Be ready soon."""
        ...

    def refresh(self, request: RefreshRequest) -> Any:
        """A Ray reference to the RefreshOutcome."""
        ...

    def close(self) -> None:
        """End, also in the middle of a refresh."""
        ...


class RayTrainer:
    """In a Ray actor with the resources of rm.refresh."""

    def __init__(self, runtime: Runtime, *, section: RefreshSection) -> None:
        self._runtime = runtime
        self._section = section
        self._process: Any = None
        self._asked: Any = None

    def start(self) -> None:
        section, ray = self._section, self._runtime.ray
        process = ray.remote(
            num_cpus=section.cpus,
            num_gpus=section.gpus,
            runtime_env={"env_vars": torch_environment(section.threads)},
        )(TrainerProcess)
        self._process = process.remote(self._runtime.config, self._runtime.run.path)

    def refresh(self, request: RefreshRequest) -> Any:
        if self._asked is not None and self._died():
            self.start()
        self._asked = self._process.refresh.remote(request)
        return self._asked

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(Exception):  # Ray itself may be gone.
                self._runtime.ray.kill(self._process)
                if self._asked is not None:
                    self._runtime.ray.wait([self._asked], timeout=_DEATH_S)
            self._process = None
            RewardModels(self._runtime.run.path / "rm").clear_drafts()

    def _died(self) -> bool:
        """The last request ended with the process."""
        ray = self._runtime.ray
        if not ray.wait([self._asked], timeout=0.0)[0]:
            return False
        try:
            ray.get(self._asked)
        except ray.exceptions.RayActorError:
            return True
        except Exception:  # The refresh's own failure, told to the one who asked for it.
            return False
        return False


class TrainerProcess:
    """Made into a Ray actor."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        from reward_service.rm.fit import load_libraries

        load_libraries()  # now, while nobody waits
        self._config = config
        self._run_dir = run_dir

    def refresh(self, request: RefreshRequest) -> RefreshOutcome:
        import functools

        from reward_service.rm.refresh import refresh_rm

        return refresh_rm(self._config, self._run_dir, request, functools.partial(append_progress, self._run_dir))
