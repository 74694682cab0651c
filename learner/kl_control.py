"""From the configuration's KL section to the controller that runs it."""

from __future__ import annotations

from dataclasses import replace

from configs import run as config
from learner.algo import kl


def kl_controller(section: config.KlSection) -> kl.KlController:
    """The controller that `learner.kl` describes."""
    match section:
        case config.FixedKl():
            return kl.FixedKl(beta=section.beta)
        case config.AdaptiveKl():
            return kl.AdaptiveKl(
                beta_init=section.beta_init,
                target_nats_per_sequence=section.target_nats_per_sequence,
                horizon_samples=section.horizon_samples,
                beta_min=section.beta_min,
                beta_max=section.beta_max,
            )
        case config.ConstrainedKl():
            return kl.ConstrainedKl(
                beta_init=section.beta_init,
                limit_nats_per_sequence=section.limit_nats_per_sequence,
                dual_learning_rate=section.dual_learning_rate,
                beta_min=section.beta_min,
                beta_max=section.beta_max,
            )


def raised(state: kl.KlState, *, section: config.KlSection, factor: float, floor: float) -> kl.KlState:
    """β becomes max(β · factor, floor), and at most what the section allows. The controller goes on from there: a fixed
    one stays there.

    Example: β 0.1, factor 2, floor 0.05: 0.2; β 0, fixed: 0.05.
    """
    beta = max(state.beta * factor, floor)
    highest = float("inf") if isinstance(section, config.FixedKl) else max(section.beta_max, state.beta)
    return replace(state, beta=min(beta, highest))


def kl_budget(section: config.KlBudget) -> kl.KlBudget:
    """The budget that `learner.kl_budget` describes."""
    return kl.KlBudget(
        start=section.start,
        widen_steps=section.widen_steps,
        cumulative_nats_per_sequence=section.cumulative_nats_per_sequence,
    )
