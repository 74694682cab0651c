"""Where a reward comes from: the seam that every source stands behind, and those that need no network.

Consumes: samples as text. Produces: for each, in order, its reward by this source, or a ScoringError. Waits for: a
function, at most its time-out. Who unblocks it: the function ending, or the time limit. Always holds: a number that
leaves here is finite; what is no number, or did not come in time, is an error and never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat
from urllib.parse import urlsplit

from cluster.errors import ScoringError
from reward_service.rewards.text_function import TextFunction


@dataclass(frozen=True)
class TextSample:
    """An answer as the reward model would read it, special tokens left out. `response_tokens` counts all that were
    sampled."""

    task_id: str
    prompt: str
    answer: str
    finish_reason: str
    """As Rollout's: "stop" or "length"."""
    response_tokens: int


class SourceDownError(ScoringError):
    """A reward source is away. Nothing is wrong with the sample: it can be scored when the source is back."""


class RewardSource(Protocol):
    """One source, for callers on one event loop."""

    name: str
    """Its key in a record's `parts`; the same whenever the configuration is the same, and no secret."""

    async def rewards(self, samples: Sequence[TextSample]) -> list[float | ScoringError]:
        """One outcome a sample, in order. Raises StuckError when the process must be replaced."""
        ...

    async def aclose(self) -> None:
        """Let go of threads and connections. Repeatable."""
        ...


class FunctionSource:
    """A Python function of (prompt, answer), or a coroutine of it. A bool is 1 or 0."""

    def __init__(self, function: TextFunction) -> None:
        self.name = function.name
        self._function = function

    async def rewards(self, samples: Sequence[TextSample]) -> list[float | ScoringError]:
        outcomes = await self._function.outcomes([(sample.prompt, sample.answer) for sample in samples])
        return [
            outcome if isinstance(outcome, ScoringError) else number(outcome, source=f"reward function {self.name}")
            for outcome in outcomes
        ]

    async def aclose(self) -> None:
        self._function.close()


def number(value: Any, *, source: str) -> float | ScoringError:
    """`value` as a finite float; otherwise the error that says what it was.

    >>> number(True, source="f"), number(2, source="f")
    (1.0, 2.0)
    """
    reward = math.nan
    if isinstance(value, SupportsFloat):  # numpy's and torch's scalars too; text is not among them
        try:
            reward = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # e.g. an array of several
            reward = math.nan
    if math.isfinite(reward):
        return reward
    return ScoringError(
        f"{source} gave no finite number", got=shortened(value), do="return a float; raise where there is none"
    )


def shortened(value: object, *, at_most: int = 120) -> str:
    """`repr` on one line of a message."""
    text = repr(value)
    return text if len(text) <= at_most else f"{text[: at_most - 1]}…"


def public_url(url: str) -> str:
    """A URL without user, password, query and fragment: any of them may hold a secret.

    >>> public_url("https://me:secret@rm.example:8443/get_reward?key=abc")
    'https://rm.example:8443/get_reward'
    """
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
