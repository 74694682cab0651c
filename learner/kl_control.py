"""From the configuration's KL section to the controller that runs it."""

from __future__ import annotations

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


def kl_budget(section: config.KlBudget) -> kl.KlBudget:
    """The budget that `learner.kl_budget` describes."""
    return kl.KlBudget(
        start=section.start,
        widen_steps=section.widen_steps,
        cumulative_nats_per_sequence=section.cumulative_nats_per_sequence,
    )
