"""Sizes from a configuration against real models: parameters exactly, activations tensor by tensor, memory measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from cluster import footprint
from cluster.architecture import Architecture, architecture_of, from_config_json
from cluster.errors import ModelError
from cluster.footprint import (
    Footprint,
    Precision,
    activation_bytes,
    engine,
    layer_activation_bytes,
    learner_rank,
    payload_bytes,
    publishing_bytes,
    reward_worker,
)
from cluster.footprint_disk import disk_use
from cluster.footprint_refresh import refresh_trainer
from configs.load import load_config
from configs.run import LoraSection, NewModel, PretrainedModel, RunConfig
from learner import head
from reward_service.rm import measure as rm_measure

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied, grouped, biases": LlamaConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=32
    ),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen2, tied": Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
}


def parameters(auto_class: Any, config: Any) -> int:
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_exactly(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    config.save_pretrained(tmp_path)
    architecture = architecture_of(PretrainedModel(path=str(tmp_path)))
    assert architecture.exact
    assert architecture.policy_parameters == parameters(AutoModelForCausalLM, config)
    config.num_labels = 1
    assert architecture.scorer_parameters == parameters(AutoModelForSequenceClassification, config)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_new_model_counts_like_the_one_that_is_made(kind: Any) -> None:
    section = NewModel(architecture=kind, hidden_size=64, intermediate_size=96, layers=2, heads=2, vocab_size=50)
    family = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    made = family(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    assert architecture_of(section).policy_parameters == parameters(AutoModelForCausalLM, made)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    from peft import LoraConfig, get_peft_model

    config = MODELS["qwen2"]
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    architecture = from_config_json(config.to_dict())
    assert architecture.adapter_parameters(8, targets=()) == trained
    assert architecture.adapter_parameters(8, targets=("q_proj",)) == 3 * 8 * (64 + 64)


def test_a_model_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 512}))
    with pytest.raises(ModelError, match="cannot read the model's sizes"):
        architecture_of(PretrainedModel(path=str(tmp_path)))
    assert not from_config_json({**SIZES, "model_type": "other"}).exact


# ---------------------------------------------------------------- activations


def saved_bytes(config: Any, *, precision: Precision, rows: int, tokens: int) -> int:
    """What autograd keeps of a forward pass, parameters and their casts aside."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model = (model.bfloat16() if precision == "bfloat16" else model).train()
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        cast = (
            precision == "autocast" and tensor.ndim == 2 and {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes
        )
        if storage.data_ptr() not in own and not cast:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # a freed one's address would be taken again
        return tensor

    ids_BL = torch.randint(0, config.vocab_size, (rows, tokens))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model.base_model(input_ids=ids_BL, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_layer_keeps_what_the_formula_says(name: str, precision: Precision) -> None:
    """Exactly: the difference between three layers and two."""
    config = MODELS[name]
    two = type(config)(**{**config.to_dict(), "num_hidden_layers": 2, "layer_types": None})
    rows, tokens = 3, 50
    layer = saved_bytes(config, precision=precision, rows=rows, tokens=tokens) - saved_bytes(
        two, precision=precision, rows=rows, tokens=tokens
    )
    expected = layer_activation_bytes(from_config_json(config.to_dict()), precision=precision)
    assert layer == pytest.approx(rows * tokens * expected, rel=0.01)


def test_checkpointing_keeps_an_input_a_layer_and_one_layer() -> None:
    architecture = from_config_json({**SIZES, "num_hidden_layers": 40, "model_type": "llama"})
    plain, checkpointed = (
        activation_bytes(architecture, tokens=10, precision="float32", checkpointing=on) for on in (False, True)
    )
    layer = layer_activation_bytes(architecture, precision="float32")
    assert plain - checkpointed == 10 * (39 * layer - 40 * 4 * 64)


# ---------------------------------------------------------------- roles


@pytest.fixture
def big() -> tuple[Architecture, RunConfig]:
    """About a billion parameters on GPUs."""
    architecture = from_config_json(
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504,
            "num_hidden_layers": 22, "num_attention_heads": 16,
        }
    )  # fmt: skip
    settings = [
        "learner.gpus_per_rank=1",
        "rollout.gpus_per_actor=1",
        "rollout.dtype=bfloat16",
        "reward.gpus_per_worker=1",
    ]
    return architecture, load_config("demo", overrides=settings)


def test_states_are_16_bytes_a_parameter_over_the_ranks(big: tuple[Architecture, RunConfig]) -> None:
    architecture, config = big
    trained = architecture.policy_parameters + architecture.scorer_parameters
    for ranks in (1, 4):
        learner = config.learner.model_copy(update={"ranks": ranks})
        gpu = learner_rank(architecture, config.model_copy(update={"learner": learner})).gpu
        assert gpu["weights"] + gpu["gradients"] + gpu["optimiser"] == pytest.approx(16 * trained / ranks, rel=1e-6)


def test_adapters_train_little_and_travel_small(big: tuple[Architecture, RunConfig]) -> None:
    architecture, config = big
    learner = config.learner.model_copy(
        update={"lora": LoraSection(rank=8, broadcast="adapter"), "advantages": "group_relative"}
    )
    lora = config.model_copy(update={"learner": learner})
    adapter = architecture.adapter_parameters(8, targets=())
    assert learner_rank(architecture, lora).gpu["optimiser"] == 8 * adapter
    assert payload_bytes(architecture, lora) == 2 * adapter
    assert disk_use(architecture, lora).checkpoint == 12 * adapter


def test_offloaded_states_leave_the_gpu(big: tuple[Architecture, RunConfig]) -> None:
    architecture, config = big
    learner = config.learner.model_copy(update={"optimizer_offload": True})
    made = learner_rank(architecture, config.model_copy(update={"learner": learner}))
    assert "optimiser" in made.host
    assert "optimiser" not in made.gpu


def test_an_engine_gives_the_rest_of_its_share_to_the_cache(big: tuple[Architecture, RunConfig]) -> None:
    architecture, config = big
    made = engine(architecture, config, gpu_bytes=24 << 30)
    assert made.kv_bytes_per_token == 2 * 22 * 2048 * 2
    assert made.footprint.gpu_bytes == pytest.approx(0.85 * (24 << 30), rel=1e-6)
    assert made.sequences == made.kv_bytes // (made.kv_bytes_per_token * config.max_sequence_tokens)
    split = config.rollout.model_copy(update={"tensor_parallel_size": 2, "gpus_per_actor": 2.0})
    halves = engine(architecture, config.model_copy(update={"rollout": split}), gpu_bytes=24 << 30)
    assert halves.footprint.gpu["weights"] == made.footprint.gpu["weights"] // 2
    assert halves.sequences > 2 * made.sequences


def test_the_heads_chunks_are_the_learners() -> None:
    chunkings = {"cpu": head.CPU_CHUNKING, "cuda": head.GPU_CHUNKING}
    assert {device: one.bytes for device, one in chunkings.items()} == footprint.HEAD_CHUNK_BYTES
    assert {device: one.kept_bytes for device, one in chunkings.items()} == footprint.HEAD_KEPT_BYTES


def test_versions_travel_in_the_engines_type(big: tuple[Architecture, RunConfig]) -> None:
    architecture, config = big
    for dtype, width in (("bfloat16", 2), ("float16", 2), ("float32", 4)):
        rollout = config.rollout.model_copy(update={"dtype": dtype})
        other = config.model_copy(update={"rollout": rollout})
        assert payload_bytes(architecture, other) == width * architecture.policy_parameters


def test_a_version_of_another_type_is_copied_before_it_is_packed() -> None:
    """On one rank without a GPU, float32 tensors are packed from where they are."""
    same, other = load_config("demo"), load_config("demo", overrides=["rollout.dtype=bfloat16"])
    architecture = architecture_of(same.model)
    assert publishing_bytes(architecture, same) == 4 * architecture.policy_parameters
    assert publishing_bytes(architecture, other) == 2 * 2 * architecture.policy_parameters


def test_reward_weights_are_in_their_type(big: tuple[Architecture, RunConfig]) -> None:
    architecture, config = big
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        reward = config.reward.model_copy(update={"dtype": dtype})
        sizes[dtype] = reward_worker(architecture, config.model_copy(update={"reward": reward})).gpu
    assert sizes["float32"]["weights"] == 2 * sizes["bfloat16"]["weights"]
    assert sizes["float32"]["activations"] > 1.5 * sizes["bfloat16"]["activations"]


def test_a_refresh_trains_one_model_and_then_measures_two_versions(big: tuple[Architecture, RunConfig]) -> None:
    architecture, _ = big
    on_gpu = ["learner.gpus_per_rank=1", "rm.refresh={gpus: 1}", "reward.dtype=bfloat16", "rm.parallel=3"]

    def trainer(*settings: str) -> Footprint:
        return refresh_trainer(architecture, load_config("demo", overrides=[*on_gpu, *settings]))

    one, scorer = trainer("rm.members=1"), architecture.scorer_parameters
    assert one.gpu["weights"] + one.gpu["gradients"] + one.gpu["optimiser"] == 16 * scorer
    assert trainer("rm.members=3").gpu == one.gpu, "one member after another, whatever rm.parallel is"
    many = trainer("rm.members=9", "rm.discriminator=true")
    assert many.gpu["weights"] == 2 * 10 * 2 * scorer > one.gpu_bytes
    assert "optimiser" not in many.gpu
    int8 = trainer("rm.members=9", "reward.dtype=int8")
    assert int8.gpu == one.gpu, "int8 is measured on the CPU"
    assert int8.host["weights"] > 2 * 9 * scorer
    on_cpu = trainer("rm.refresh.gpus=0", "rm.members=1")
    assert on_cpu.gpu == {}
    assert on_cpu.host["optimiser"] == 8 * scorer


def test_measured_batches_are_the_stages() -> None:
    assert rm_measure.SCORING_BATCH == footprint.MEASURED_ROWS
