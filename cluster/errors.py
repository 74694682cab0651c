"""Every error that Keel raises on purpose: one tree, each message in three parts.

A message says *what* failed, what was *got*, and what to *do*. Errors cross process boundaries (Ray, multiprocessing),
so all of them pickle: the three parts are the constructor's arguments.
"""

from __future__ import annotations

from configs.errors import ConfigError as ConfigError
from configs.errors import KeelError as KeelError


class DataError(KeelError):
    """A dataset, file or column is missing or malformed."""


class ModelError(KeelError):
    """A model or tokenizer is missing, unreadable, or does not fit the rest."""


class CodecError(KeelError):
    """Bytes that are no record of this schema version."""


class StreamError(KeelError):
    """The queue server is unreachable, refuses us, or refuses writes."""


class WeightSyncError(KeelError):
    """A weight update failed, was partial, or left the engine with other weights than the learner's."""


class EngineDeadError(KeelError):
    """The generation engine ended; its process must be replaced."""


class ScoringError(KeelError):
    """A reward could not be computed. Never turned into a number."""


class NonFiniteError(KeelError):
    """A loss, reward or gradient is NaN or infinite."""


class CheckpointError(KeelError):
    """A checkpoint could not be written or read."""


class RunExistsError(KeelError):
    """Another run, living or finished, owns this run directory."""


class DeadlineError(KeelError):
    """Something did not happen in the time it was given."""


class StallError(DeadlineError):
    """The whole run makes no progress: no rollout comes back. Replacing the process that says so would not help."""


class SupervisionError(KeelError):
    """A task or process of the run ended that should have lived on."""
