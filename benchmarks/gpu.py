"""Keel on one GPU, measured: `benchmarks/gpu.sh`.

Steps, each in a process of its own: the demo; a randomly initialised model of 0.57 B parameters through the whole loop;
bare vLLM on that model's weights with the same lengths. Figures: weight sync seconds and bytes/s against the device's
own copy bandwidth; the learner's share of the card's peak FLOP/s; rollout tokens/s against bare vLLM.
`--tiny --device cpu` runs the same code in small on a CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_figures import Device, copy_bytes_per_s, find_device, parameters_in, step_figures

ROOT = Path(__file__).parents[1]
STAGE_TIMEOUT_S = 3600
WARM_UP_STEPS = 2
"""Of the loop: compilation, first allocations."""


@dataclass(frozen=True)
class Size:
    """What of the demo's configuration is changed, and how long the bare engine is driven."""

    changes: tuple[str, ...]
    steps: int
    batch_size: int
    response_tokens: int


LARGE = Size(
    changes=(
        "model.hidden_size=1536", "model.intermediate_size=4096", "model.layers=20", "model.heads=12",
        "model.max_position_embeddings=512", "data.max_response_tokens=256", "sft.epochs=1", "collect.pairs=512",
        "data.world.sft_examples=2048", "sft.learning_rate=1e-4", "rm.learning_rate=5e-5", "rm.min_accuracy=0",
        "rm.epochs=1", "learner.token_budget=65536", "reward.token_budget=65536", "reward.batch_size=256",
        "rollout.max_concurrent_requests=256", "learner.policy.learning_rate=1e-6",
        "learner.critic.learning_rate=5e-6", "learner.gradient_checkpointing=true", "evaluation.prompts=64",
        "rollout.boot_timeout_s=600", "rollout.generate_timeout_s=300", "learner.task_deadline_s=600",
        "learner.stall_timeout_s=1200", "ray.object_store_mib=8192",
    ),
    steps=12, batch_size=512, response_tokens=256,
)  # fmt: skip
TINY = Size(
    changes=(
        "model.hidden_size=64", "model.intermediate_size=128", "model.layers=2", "model.heads=2", "sft.epochs=1",
        "data.world.sft_examples=200", "data.world.prompts=128", "data.world.eval_prompts=32", "collect.pairs=64",
        "rm.min_accuracy=0", "rm.epochs=1", "evaluation.prompts=16", "data.max_response_tokens=32",
    ),
    steps=WARM_UP_STEPS + 2, batch_size=16, response_tokens=32,
)  # fmt: skip
ON_GPU = (
    "rollout.gpus_per_actor=0.4", "learner.gpus_per_rank=0.4", "reward.gpus_per_worker=0.1",
    "rollout.gpu_memory_utilization=0.35", "rollout.dtype=bfloat16", "learner.dtype=bfloat16",
    "rollout.engine_core=process", "rollout.probe_tolerance=0.1", "rollout.boot_timeout_s=600",
)  # fmt: skip


def train(name: str, *, runs_dir: Path, changes: tuple[str, ...]) -> Path:
    """`keel train demo` with these changes. Returns the run's directory; raises CalledProcessError."""
    settings = [f"name={name}", f"runs_dir={runs_dir}", *changes]
    command = [sys.executable, "-m", "keel.cli", "train", "demo", "--fresh"]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=STAGE_TIMEOUT_S)
    return runs_dir / name


def loop_changes(size: Size, device: Device) -> tuple[str, ...]:
    """The measured run's settings over the demo's."""
    common = (f"learner.steps={size.steps}", f"learner.batch_size={size.batch_size}", "learner.kl.horizon_samples=8192")
    return size.changes + common + (ON_GPU if device.is_gpu else ())


def loop_figures(run: Path, *, device: Device) -> dict[str, Any]:
    """Of the finished run, without its first steps."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP_STEPS:]
    parameters, parameter_bytes = parameters_in(run / "policy" / "final")
    epochs = 2  # of the demo's configuration
    flops = statistics.median(step_figures(record, parameters=parameters, epochs=epochs) for record in records)
    sync_s = statistics.median(record["publish_seconds"] for record in records)
    copy = copy_bytes_per_s(device, min(parameter_bytes, 1 << 30))
    return {
        "parameters": parameters,
        "steps": len(records),
        "learner_flop_per_s": flops,
        "learner_share_of_peak": None if device.peak_flop_per_s is None else flops / device.peak_flop_per_s,
        "weight_bytes": parameter_bytes,
        "publish_seconds": sync_s,
        "publish_bytes_per_s": parameter_bytes / sync_s,
        "device_copy_bytes_per_s": copy,
        "rollout_tokens_per_s": statistics.median(record["tokens_per_second_rollout"] for record in records),
        "step_seconds": statistics.median(record["step_seconds"] for record in records),
    }


def bare_vllm(model: Path, *, size: Size, device: Device) -> float:
    """Tokens/s of vLLM alone on the same weights, with as many requests of the same length as a batch has."""
    command = [
        sys.executable, "-m", "benchmarks.gpu_bare_vllm", str(model), "--requests", str(size.batch_size),
        "--tokens", str(size.response_tokens), "--dtype", "bfloat16" if device.is_gpu else "float32",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=STAGE_TIMEOUT_S, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["tokens_per_s"])


def measure(size: Size, *, device: Device, with_demo: bool) -> dict[str, Any]:
    """Everything, as one JSON-able record."""
    result: dict[str, Any] = {"device": device.name, "peak_flop_per_s": device.peak_flop_per_s}
    with tempfile.TemporaryDirectory(prefix="keel-gpu-") as folder:
        if with_demo:
            demo = train("demo", runs_dir=Path(folder), changes=ON_GPU if device.is_gpu else ())
            summary = json.loads((demo / "summary.json").read_text())
            result["demo"] = {key: summary[key] for key in ("gold_sft", "gold_final", "stage_seconds")}
        run = train("loop", runs_dir=Path(folder), changes=loop_changes(size, device))
        result["loop"] = loop_figures(run, device=device)
        bare = bare_vllm(run / "policy" / "final", size=size, device=device)
    result["bare_vllm_tokens_per_s"] = bare
    result["rollout_share_of_bare_vllm"] = result["loop"]["rollout_tokens_per_s"] / bare
    return result


def table(result: dict[str, Any]) -> str:
    """The figures, a line each."""
    flat = {key: value for key, value in result.items() if not isinstance(value, dict)} | result["loop"]
    return "\n".join(f"{key:32} {value:.4g}" if isinstance(value, float) else f"{key:32} {value}"
                     for key, value in flat.items())  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of some thousand parameters, and no demo run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    if device is None:
        print("skipped: no CUDA device that torch sees on this machine")
        return
    result = measure(TINY if arguments.tiny else LARGE, device=device, with_demo=not arguments.tiny)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.name.lower()).strip('-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(path)


if __name__ == "__main__":
    main()
