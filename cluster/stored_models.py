"""Models as they lie in Hugging Face directories: whole or refused, in the type that they were saved in or another.

torch and transformers are imported inside the functions: this file is on the command line's path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from cluster.errors import ModelError

Kind = Literal["language model", "reward model"]
_WIDTHS: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""safetensors' names of float types and torch's, narrow to wide."""


def stored_dtype(directory: Path) -> str:
    """The widest float type among the stored weights: loading in it loses nothing. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    files = sorted(directory.glob("*.safetensors"))
    found: set[str] = set()
    try:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot read the weights in {directory}", got=f"{file.name}: {error}", do="fetch or copy the model again"
        ) from error
    floats = [torch_name for name, torch_name in _WIDTHS.items() if name in found]
    # Both 16-bit types have values that the other lacks.
    if {"bfloat16", "float16"} <= set(floats):
        floats.append("float32")
    if not floats or found - set(_WIDTHS):
        raise ModelError(
            f"{directory} has no plain weights",
            got=f"{len(files)} safetensors files with {', '.join(sorted(found)) or 'nothing'} in them",
            do="give a Hugging Face directory with safetensors weights that are not quantised",
        )
    return max(floats, key=list(_WIDTHS.values()).index)


def load_stored(directory: Path, *, kind: Kind, dtype: str) -> Any:
    """The model on the CPU, its weights in this type (a torch name). Nothing is random: raises ModelError where weights
    are missing, and for a reward model that has another head than a linear `score` with one label."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would write into the logs of a process that nobody watches
    if not (directory / "config.json").is_file():
        raise ModelError(
            "model not found",
            got=f"{directory} has no config.json",
            do="check the path, or run the stage that makes it",
        )
    factory = AutoModelForSequenceClassification if kind == "reward model" else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True, "trust_remote_code": False}
    try:
        model, report = factory.from_pretrained(directory, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"cannot load the model in {directory}",
            got=f"{type(error).__name__}: {first_line}",
            do="check that it is a complete Hugging Face directory with safetensors weights",
        ) from error
    if report["missing_keys"]:
        raise ModelError(
            f"the weights in {directory} are incomplete",
            got=f"missing {sorted(report['missing_keys'])[:3]}",
            do="a reward model must be trained before it can score" if kind == "reward model" else "export it again",
        )
    if kind == "reward model" and (model.config.num_labels != 1 or "score" not in dict(model.named_children())):
        raise ModelError(
            f"{type(model).__name__} in {directory} is no reward model",
            got=f"{model.config.num_labels} labels, children {[name for name, _ in model.named_children()]}",
            do="use a decoder's sequence classifier with one label and a linear head named `score`",
        )
    return model
