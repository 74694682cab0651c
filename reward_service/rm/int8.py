"""int8 on the CPU by dynamic quantisation: a quarter of the memory for weights; twice float32's speed in layers of a
thousand and more, none gained in small ones.

Weights get one scale a row, activations one a token. The latter is why torch's own dynamic quantisation is not used:
its scale spans the whole batch, so an answer's score would depend on the company it is in, and one token with large
activations would blur all others. Everything between the scales is integer arithmetic, the same on every machine.
Dettmers et al. 2022 (LLM.int8(), §3.1: vector-wise quantisation).

Legend: N tokens of a pass, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cluster.errors import ModelError

_WEIGHT_LEVELS = 127
_ACTIVATION_LEVELS = 63
"""7 bits: products of two int8 pairs then fit 16 bits, which CPUs without VNNI add them in."""
_ZERO = 64
_TINY = 1e-30
"""In place of the largest of a row of zeros."""


class Int8Linear(nn.Module):
    """In place of a linear layer: the same, from float32 to float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        self._scales_O = weight_OI.abs().amax(1).clamp_min(_TINY) / _WEIGHT_LEVELS
        whole_OI = (weight_OI / self._scales_O[:, None]).round().to(torch.int8)
        self._zeros_O = torch.zeros(len(whole_OI), dtype=torch.long)
        # Packed for this CPU's instructions; torch.compile's quantised linear layers use the same kernel.
        self._packed = torch.ops.onednn.qlinear_prepack(whole_OI, None)
        self._bias_O = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """[.., I] → [.., O]"""
        states_NI = states.reshape(-1, states.shape[-1])
        largest_N1 = states_NI.abs().amax(1, keepdim=True).clamp_min(_TINY)
        whole_NI = (states_NI / largest_N1 * _ACTIVATION_LEVELS).round_().add_(_ZERO).to(torch.uint8)
        product_NO = torch.ops.onednn.qlinear_pointwise(
            whole_NI, 1 / _ACTIVATION_LEVELS, _ZERO, self._packed, self._scales_O, self._zeros_O,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        result_NO: Tensor = product_NO.mul_(largest_N1)  # a token that is not finite stays so
        if self._bias_O is not None:
            result_NO += self._bias_O
        return result_NO.reshape(*states.shape[:-1], -1)


def quantise(model: nn.Module) -> None:
    """Replace every linear layer inside `model`, float32 on the CPU. Raises ModelError where torch has no such
    kernels."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise ModelError("int8 needs torch with oneDNN", got="a build without it", do="set reward.dtype=bfloat16")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
