"""What a device could do, and what a step did of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PEAK_BF16_FLOP_PER_S: Final = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bf16 with float32 accumulation, from the makers' data sheets. The first name that the card's name has in it."""

_SAFETENSORS_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Device:
    """`peak_flop_per_s` is None where the table does not have the card."""

    name: str
    is_gpu: bool
    peak_flop_per_s: float | None


def peak_of(card: str) -> float | None:
    """
    >>> peak_of("NVIDIA H100 80GB HBM3")
    989000000000000.0
    """
    return next((peak for name, peak in PEAK_BF16_FLOP_PER_S.items() if name in card), None)


def find_device(kind: str) -> Device | None:
    """The CPU, or the first GPU; None where there is none."""
    import torch

    if kind == "cpu":
        return Device("cpu", is_gpu=False, peak_flop_per_s=None)
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_name(0)
    return Device(card, is_gpu=True, peak_flop_per_s=peak_of(card))


def copy_bytes_per_s(device: Device, size_bytes: int, *, tries: int = 5) -> float:
    """Best of some copies of so many bytes within the device's memory."""
    import torch

    where = "cuda" if device.is_gpu else "cpu"
    source = torch.ones(size_bytes, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    best_s = math.inf
    for _ in range(tries):
        if device.is_gpu:
            torch.cuda.synchronize()
        started_s = time.perf_counter()
        target.copy_(source)
        if device.is_gpu:
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - started_s)
    return size_bytes / best_s


def parameters_in(model_dir: Path) -> tuple[int, int]:
    """(parameters, bytes) of a model directory, from the headers of its safetensors files."""
    count = size_bytes = 0
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                numbers = math.prod(entry["shape"])
                count += numbers
                size_bytes += numbers * _SAFETENSORS_BYTES[entry["dtype"]]
    return count, size_bytes


def step_figures(record: Mapping[str, Any], *, parameters: int, epochs: int) -> float:
    """The policy's useful FLOP/s in one step of metrics.jsonl: 6·N a token and epoch (2 forward, 4 backward), over the
    whole update's time. The time also holds the proximal pass and the critic, so this is a lower bound of the card's
    use: with a critic of the policy's size, both passes counted, it does 2·(6·epochs + 2)·N a token."""
    return float(6 * parameters * record["tokens"] * epochs / record["update_seconds"])
