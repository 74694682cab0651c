"""The shape of a decoder model, from its configuration alone, and how many parameters follow from it. Pure arithmetic:
no torch, no weights are read.

Names: H hidden size, I inner size of the feed-forward block, A = heads × head size, K = key-value heads × head size,
V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.errors import ModelError
from cluster.text import resolve_model_dir
from configs.run import ModelSection, NewModel

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the decoders counted exactly. Any other is counted as a Llama of its sizes."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of one decoder of the Llama kind: pre-normalised, rotary positions, gated feed-forward block."""

    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    """The head is the embedding matrix."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    """Queries and keys are normalised head by head (Qwen3)."""

    @property
    def exact(self) -> bool:
        """Whether parameters are counted and not estimated."""
        return self.family in FAMILIES

    @property
    def query_size(self) -> int:
        """A."""
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        """K."""
        return self.kv_heads * self.head_size

    def layer_linears(self) -> Iterator[tuple[str, int, int, bool]]:
        """(name, inputs, outputs, bias) of each matrix of a layer."""
        yield "q_proj", self.hidden, self.query_size, self.qkv_bias
        yield "k_proj", self.hidden, self.kv_size, self.qkv_bias
        yield "v_proj", self.hidden, self.kv_size, self.qkv_bias
        yield "o_proj", self.query_size, self.hidden, self.output_bias
        yield "gate_proj", self.hidden, self.inner, self.mlp_bias
        yield "up_proj", self.hidden, self.inner, self.mlp_bias
        yield "down_proj", self.inner, self.hidden, self.mlp_bias

    @property
    def layer_parameters(self) -> int:
        """Matrices, biases, and the norms before attention and feed-forward."""
        matrices = sum(inputs * outputs + outputs * bias for _, inputs, outputs, bias in self.layer_linears())
        return matrices + 2 * self.hidden + 2 * self.head_size * self.head_norms

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def root_parameters(self) -> int:
        """Of the policy, all that is in no layer: embedding, final norm, and the head where it is not the embedding."""
        return self.embedding_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def policy_parameters(self) -> int:
        """With a language-model head."""
        return self.layers * self.layer_parameters + self.root_parameters

    @property
    def scorer_parameters(self) -> int:
        """Of a reward model or critic: the decoder, and a head of one output without bias."""
        return self.layers * self.layer_parameters + self.embedding_parameters + 2 * self.hidden

    def adapter_parameters(self, rank: int, *, targets: tuple[str, ...]) -> int:
        """Of low-rank adapters (Hu et al. 2021) on the layers' matrices named so, or on all of them where `targets` is
        empty: rank × (inputs + outputs) each."""
        return self.layers * sum(
            rank * (inputs + outputs)
            for name, inputs, outputs, _ in self.layer_linears()
            if not targets or name in targets
        )


def architecture_of(model: ModelSection) -> Architecture:
    """Of a run's model: as the configuration makes it, or from the directory's config.json. A new model's vocabulary is
    the most it can be; a tokenizer may find fewer words. Raises ModelError when there is nothing to read."""
    if isinstance(model, NewModel):
        return Architecture(
            family=model.architecture,
            hidden=model.hidden_size,
            inner=model.intermediate_size,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.heads,
            head_size=model.hidden_size // model.heads,
            vocabulary=model.vocab_size,
            tied=model.tie_word_embeddings,
            qkv_bias=model.architecture == "qwen2",
        )
    path = resolve_model_dir(model.path) / "config.json"
    try:
        return from_config_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"cannot read the model's sizes from {path}",
            got=f"{type(error).__name__}: {error}",
            do="point model.path at a Hugging Face directory of a decoder model",
        ) from error


def from_config_json(fields: Mapping[str, Any]) -> Architecture:
    """From the fields of a Hugging Face config.json. Raises KeyError without the sizes of a decoder."""
    fields = fields.get("text_config") or fields
    family = str(fields.get("model_type", "unknown"))
    heads = int(fields["num_attention_heads"])
    hidden = int(fields["hidden_size"])
    bias = bool(fields.get("attention_bias", False))
    return Architecture(
        family=family,
        hidden=hidden,
        inner=int(fields["intermediate_size"]),
        layers=int(fields["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(fields.get("num_key_value_heads") or heads),
        head_size=int(fields.get("head_dim") or hidden // heads),
        vocabulary=int(fields["vocab_size"]),
        tied=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (bias and family != "mistral"),
        output_bias=bias and family not in ("qwen2", "mistral"),
        mlp_bias=bool(fields.get("mlp_bias", False)) and family == "llama",
        head_norms=family == "qwen3",
    )
