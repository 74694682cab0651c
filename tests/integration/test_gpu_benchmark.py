"""The GPU benchmark's program, run in small on a CPU, so that it works on the day there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_figures import Device, copy_bytes_per_s, peak_of, step_figures

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_the_whole_program_in_small(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=450, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "gpu-cpu.json").read_text())
    loop = result["loop"]
    assert loop["weight_bytes"] == 4 * loop["parameters"] > 0
    for key in ("learner_flop_per_s", "publish_bytes_per_s", "device_copy_bytes_per_s", "rollout_tokens_per_s"):
        assert loop[key] > 0.0
    assert loop["learner_share_of_peak"] is None
    assert result["bare_vllm_tokens_per_s"] > 0.0


def test_without_a_gpu_it_says_so_and_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped")


def test_the_card_table_takes_the_card_that_is_meant() -> None:
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA L40S") == 362e12
    assert peak_of("NVIDIA L4") == 121e12
    assert peak_of("a card of tomorrow") is None


def test_flops_are_six_a_parameter_token_and_epoch() -> None:
    record = {"tokens": 1000, "update_seconds": 2.0}
    assert step_figures(record, parameters=10, epochs=2) == 6 * 10 * 1000 * 2 / 2.0


def test_copying_is_measured() -> None:
    assert copy_bytes_per_s(Device("cpu", is_gpu=False, peak_flop_per_s=None), 1 << 20, tries=2) > 1e6
