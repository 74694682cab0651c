"""A low-rank adapter as a directory in peft's format, which is what vLLM loads adapters from."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cluster.errors import WeightSyncError
from cluster.weights import WeightBlob, unpack

_MEMORY: Final = Path("/dev/shm")


@contextlib.contextmanager
def landed_adapter(blob: WeightBlob) -> Iterator[str]:
    """Write the blob's adapter, in memory where the system has a file system for that. The directory goes afterwards.

    Raises WeightSyncError when the blob holds no adapter.
    """
    from safetensors.torch import save_file

    adapter = blob.adapter
    if adapter is None:
        raise WeightSyncError(f"version {blob.version} holds no adapter", do="set learner.lora.broadcast on both sides")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter.target_modules),
        "bias": "none",
    }
    with tempfile.TemporaryDirectory(prefix="keel-adapter-", dir=_MEMORY if _MEMORY.is_dir() else None) as directory:
        save_file(dict(unpack(blob)), Path(directory) / "adapter_model.safetensors")
        (Path(directory) / "adapter_config.json").write_text(json.dumps(config))
        yield directory
