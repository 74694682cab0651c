"""What a vLLM engine is started with: from Keel's settings and the model directory to vLLM's options. No vLLM here.

Options that settings name: tensor parallelism, chunked prefill, tokens of a step, prefix caching. One engine with
several GPUs runs on vLLM's own multiprocess executor, so all its GPUs are on the actor's node; on a CPU its workers are
processes that share the node's cores.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.errors import ConfigError, ModelError
from configs.run import LoraSection, RolloutSection

PLUGIN: Final = "actors.vllm_worker.WorkerPlugin"
BACKEND: Final = "keel"
_LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as its largest rank."""

_CPU_ENVIRONMENT: Final[Mapping[str, str]] = {
    "TORCH_COMPILE_DISABLE": "1",  # enforce_eager leaves one inductor compile of seconds in the log-prob helper
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise every engine of a node binds itself to core 0
}


@dataclass(frozen=True)
class VllmSpec:
    """What an engine needs to know. `seed` must differ between engines, and between restarts of one: `engine_seed`."""

    model_path: str
    rollout: RolloutSection
    max_sequence_tokens: int
    seed: int
    eos_ids: tuple[int, ...] = ()
    """End-of-sequence tokens. Empty: those that the model directory names."""
    update_timeout_s: float = 300.0
    lora: LoraSection | None = None
    """With broadcast "adapter": the engine takes adapters, and nothing else."""
    log_stats: bool = False
    """Keep vLLM's own series, vllm:*, in prometheus_client's default registry."""
    can_sleep: bool = False
    """The engine shares its GPU with the learner."""

    @property
    def on_gpu(self) -> bool:
        return self.rollout.gpus_per_actor > 0

    @property
    def takes_adapters(self) -> bool:
        return self.lora is not None and self.lora.broadcast == "adapter"


def engine_seed(*, run_seed: int, actor_index: int, incarnation: int) -> int:
    """A seed of 31 bits for one life of one engine: equal seeds would sample equal tokens."""
    digest = hashlib.blake2s(f"{run_seed}/{actor_index}/{incarnation}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def model_eos_ids(model_path: str) -> tuple[int, ...]:
    """End-of-sequence ids from generation_config.json, else config.json. Raises ModelError when neither names one."""
    for name in ("generation_config.json", "config.json"):
        file = Path(model_path) / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (int(eos),)
    raise ModelError(
        "the model names no end-of-sequence token", got=model_path, do="set eos_token_id in its generation_config.json"
    )


def checkpoint_shapes(model_path: str) -> dict[str, tuple[int, ...]] | None:
    """Parameter name → shape from the headers of the directory's safetensors; None where there are none. A tied LM
    head counts as absent, whether or not the files hold it."""
    files = sorted(Path(model_path).glob("*.safetensors"))
    if not files:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"})
    if json.loads((Path(model_path) / "config.json").read_text()).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def prepare_environment(spec: VllmSpec) -> None:
    """Settings that vLLM and torch read when they are imported. A value that the user has set stays."""
    # On a CPU each start lists ten warnings that ask for libraries of another platform.
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING" if spec.on_gpu else "ERROR"}
    if Path(spec.model_path).is_dir():
        settings["HF_HUB_OFFLINE"] = "1"
    if not spec.on_gpu:
        settings |= {**_CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(max(1, int(spec.rollout.cpus_per_actor)))}
        if spec.rollout.tensor_parallel_size == 1:
            settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the uni-process executor: one process less
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and it would override rollout.kv_cache_gib
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def engine_options(spec: VllmSpec) -> dict[str, Any]:
    """Arguments of vLLM's AsyncEngineArgs. Raises ConfigError for a rank that vLLM has no room for."""
    rollout = spec.rollout
    options: dict[str, Any] = {
        "model": spec.model_path,
        "dtype": rollout.dtype,
        "max_model_len": spec.max_sequence_tokens,
        "max_num_seqs": rollout.max_concurrent_requests,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "enable_chunked_prefill": rollout.chunked_prefill,
        "enable_prefix_caching": rollout.prefix_caching,
        "seed": spec.seed,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: after the temperature
        "generation_config": "vllm",  # no sampling defaults of the model's: the learner does not know of them
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "disable_log_stats": not spec.log_stats,
        "use_tqdm_on_load": False,
        "enable_log_requests": False,
        "worker_extension_cls": PLUGIN,
    }
    if rollout.tensor_parallel_size > 1:
        # Left to itself on a GPU, vLLM sees that its actor is in a placement group of Ray's and would start workers of
        # its own there, where the actor has taken all GPUs.
        options["distributed_executor_backend"] = "mp"
    if rollout.max_batched_tokens is not None:
        options["max_num_batched_tokens"] = rollout.max_batched_tokens
    if spec.on_gpu:
        options["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        options["enable_sleep_mode"] = spec.can_sleep
    else:
        options["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * (1 << 30))
        options["enforce_eager"] = True
    if spec.lora is not None and spec.takes_adapters:
        options |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": lora_room(spec.lora.rank)}
    return options


def lora_room(rank: int) -> int:
    """The smallest of vLLM's rank limits that holds `rank`."""
    for room in _LORA_RANKS:
        if rank <= room:
            return room
    raise ConfigError(
        "vLLM takes no adapter of this rank",
        got=f"learner.lora.rank {rank}",
        do=f"use at most {_LORA_RANKS[-1]}, or learner.lora.broadcast: merged",
    )
