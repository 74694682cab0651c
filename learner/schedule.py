"""The learning-rate schedule, and AdamW under it with gradient clipping.

State for the checkpoint is one flat dict of tensors by parameter name (safetensors holds it; nothing is pickled).
Parameters may be shards (DTensor): their state then is sharded as they are, and norms are those of the whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.run import OptimizerSection


def learning_rate_at(step: int, *, section: OptimizerSection, total_steps: int) -> float:
    """Learning rate of `step` (from 0): linear warm-up to the peak over `warmup_steps`, then constant, linear or cosine
    to `final_fraction` of the peak at step total_steps − 1, and flat from there.

    Example: peak 1, warmup 2, linear to 0.1, 5 steps: 0.5, 1.0, 1.0, 0.55, 0.1.
    """
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    if section.decay == "constant":
        return section.learning_rate
    progress = min(1.0, (step - section.warmup_steps) / max(1, total_steps - 1 - section.warmup_steps))
    remaining = 1.0 - progress if section.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.learning_rate * (section.final_fraction + (1.0 - section.final_fraction) * remaining)


class ScheduledAdamW:
    """AdamW (decoupled weight decay on matrices only) over a module's trainable parameters, by the schedule above."""

    def __init__(self, module: nn.Module, *, section: OptimizerSection, total_steps: int) -> None:
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        decayed = [parameter for _, parameter in named if parameter.ndim >= 2]
        plain = [parameter for _, parameter in named if parameter.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": section.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=section.learning_rate, betas=section.betas
        )
        self._named, self._section, self._total_steps = dict(named), section, total_steps
        self.set_step(0)

    @property
    def learning_rate(self) -> float:
        return float(self._adamw.param_groups[0]["lr"])

    def set_step(self, step: int, *, scale: float = 1.0) -> float:
        """Take the learning rate of training step `step` (from 0), times `scale`, for every update until the next
        call."""
        rate = scale * learning_rate_at(step, section=self._section, total_steps=self._total_steps)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        return rate

    def clip(self) -> Tensor:
        """Scale gradients to max_grad_norm at most. Returns the norm before, over all ranks, which is not finite if a
        gradient is."""
        norm = nn.utils.clip_grad_norm_(self._named.values(), self._section.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> None:
        self._adamw.step()

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors by "<parameter name>/<step, exp_avg or exp_avg_sq>": views of the live state, to be saved before the
        next step. {} before the first."""
        return {
            f"{name}/{key}": value
            for name, parameter in self._named.items()
            for key, value in self._adamw.state.get(parameter, {}).items()
        }

    def move_state(self, device: torch.device) -> None:
        """After the parameters have moved there. Gradients are dropped."""
        self.zero_grad()
        for state in self._adamw.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(device)

    def reset_state(self, *, zeros: bool) -> None:
        """The state before the first step, which is none; or, with `zeros`, what the first step would begin with, so
        that `state_tensors` has something to read into."""
        self._adamw.state.clear()
        for parameter in self._named.values() if zeros else ():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
