"""Controllers of β, the price of KL(π‖π_ref), and the KL budget over training.

A controller is a frozen set of constants with a pure `update`: state and measurement in, next state out. All KL here is
in nats per *sequence* (the sum over an answer's tokens, averaged over answers). `KlState` is JSON in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

MAX_ERROR: Final = 0.2
MAX_CHANGE: Final = 0.5
"""β moves by at most this fraction a step. Without a bound Ziegler's multiplier turns negative past n = 5 horizons."""
MIN_SCALE: Final = 0.01
"""A budget that starts at 0 would divide by 0; a hundredth of the target is as good as none."""
MAX_RELATIVE_VIOLATION: Final = 5.0


@dataclass(frozen=True)
class KlState:
    """beta: the current price. cumulative_nats_per_sequence: sum over steps of each step's own policy movement."""

    beta: float
    cumulative_nats_per_sequence: float = 0.0

    def moved(self, step_kl_nats_per_sequence: float) -> KlState:
        """After a step that moved the policy by so much. A negative estimate is noise about 0 and adds nothing."""
        spent = self.cumulative_nats_per_sequence + max(0.0, _finite(step_kl_nats_per_sequence))
        return replace(self, cumulative_nats_per_sequence=spent)

    def to_dict(self) -> dict[str, float]:
        return {"beta": self.beta, "cumulative_nats_per_sequence": self.cumulative_nats_per_sequence}

    @classmethod
    def from_dict(cls, state: Mapping[str, float]) -> KlState:
        return cls(float(state["beta"]), float(state["cumulative_nats_per_sequence"]))


class KlController(Protocol):
    """`target_nats_per_sequence`: the KL it steers to at scale 1; None where it steers to none."""

    @property
    def target_nats_per_sequence(self) -> float | None: ...

    def initial(self) -> KlState: ...

    def update(self, state: KlState, *, kl_nats_per_sequence: float, samples: int, scale: float = 1.0) -> KlState:
        """The next state after `samples` answers with this mean KL. `scale`: the budget's share of the target."""
        ...


@dataclass(frozen=True)
class FixedKl:
    """β never changes."""

    beta: float

    @property
    def target_nats_per_sequence(self) -> float | None:
        return None

    def initial(self) -> KlState:
        return KlState(self.beta)

    def update(self, state: KlState, *, kl_nats_per_sequence: float, samples: int, scale: float = 1.0) -> KlState:
        _finite(kl_nats_per_sequence)
        return state


@dataclass(frozen=True)
class AdaptiveKl:
    """Ziegler et al. 2019, §2.2: e = clip(KL/target − 1, ±0.2), β ← β·(1 + e·n/horizon), with |e|·n/horizon at most ½
    and β kept in [beta_min, beta_max].

    Example: β 0.1, target 6, horizon 1000, n = 100: KL 9 gives e = 0.2 (clipped) and β = 0.1·1.02 = 0.102; KL 6 leaves
    β; KL 5.4 gives e = −0.1 and β = 0.1·0.99 = 0.099.
    """

    beta_init: float
    target_nats_per_sequence: float
    horizon_samples: int
    beta_min: float
    beta_max: float

    def initial(self) -> KlState:
        return KlState(_within(self.beta_init, self.beta_min, self.beta_max))

    def update(self, state: KlState, *, kl_nats_per_sequence: float, samples: int, scale: float = 1.0) -> KlState:
        target = self.target_nats_per_sequence * max(scale, MIN_SCALE)
        error = _within(_finite(kl_nats_per_sequence) / target - 1.0, -MAX_ERROR, MAX_ERROR)
        change = _within(error * samples / self.horizon_samples, -MAX_CHANGE, MAX_CHANGE)
        return replace(state, beta=_within(state.beta * (1.0 + change), self.beta_min, self.beta_max))


@dataclass(frozen=True)
class ConstrainedKl:
    """β as the Lagrange multiplier of KL ≤ limit: dual ascent on log β (so β stays positive), with the violation taken
    relative to the limit (so the rate has no unit): log β ← log β + rate·clip(KL/limit − 1, ±5).

    Example: β 0.1, limit 3, rate 0.05: KL 6 gives β = 0.1·e^0.05 = 0.1051; KL 0 gives 0.1·e^−0.05 = 0.0951.
    """

    beta_init: float
    limit_nats_per_sequence: float
    dual_learning_rate: float
    beta_min: float
    beta_max: float

    @property
    def target_nats_per_sequence(self) -> float | None:
        return self.limit_nats_per_sequence

    def initial(self) -> KlState:
        return KlState(_within(self.beta_init, self.beta_min, self.beta_max))

    def update(self, state: KlState, *, kl_nats_per_sequence: float, samples: int, scale: float = 1.0) -> KlState:
        limit = self.limit_nats_per_sequence * max(scale, MIN_SCALE)
        violation = _within(
            _finite(kl_nats_per_sequence) / limit - 1.0, -MAX_RELATIVE_VIOLATION, MAX_RELATIVE_VIOLATION
        )
        beta = state.beta * math.exp(self.dual_learning_rate * violation)
        return replace(state, beta=_within(beta, self.beta_min, self.beta_max))


@dataclass(frozen=True)
class KlBudget:
    """The KL target over training: from `start` × target, linearly, to the whole target after `widen_steps` steps; and
    an optional bound on the sum of each step's own movement."""

    start: float = 1.0
    widen_steps: int = 0
    cumulative_nats_per_sequence: float | None = None

    def scale_at(self, step: int) -> float:
        """Share of the target at `step` (from 0). Example: start 0.2, widen_steps 4: 0.2, 0.4, 0.6, 0.8, 1, 1, …"""
        if step >= self.widen_steps:
            return 1.0
        return max(MIN_SCALE, self.start + (1.0 - self.start) * step / self.widen_steps)

    def spent_share(self, state: KlState) -> float | None:
        """The policy's summed movement over the bound; None without one. Example: 2 nats of 8: 0.25."""
        limit = self.cumulative_nats_per_sequence
        return None if limit is None else state.cumulative_nats_per_sequence / limit

    def is_spent(self, state: KlState) -> bool:
        """Whether the policy's summed movement has passed the bound."""
        limit = self.cumulative_nats_per_sequence
        return limit is not None and state.cumulative_nats_per_sequence > limit


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _finite(kl: float) -> float:
    if not math.isfinite(kl):
        raise ValueError(f"KL must be finite: {kl}")
    return kl
