"""The policy in training: a causal language model, asked only for the log-probabilities of its responses; all of its
weights are trained, or a low-rank adapter.

Shapes: B sequences, T response tokens, N valid response tokens of a batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from cluster.errors import ModelError
from cluster.weights import AdapterInfo
from configs.run import LoraSection
from learner.backbone import (
    DtypeName,
    compute_dtype,
    inner_decoder,
    linear_head,
    load_pretrained,
    response_states,
    set_gradient_checkpointing,
    to_rows,
)
from learner.batch import TrainBatch
from learner.head import target_logprobs
from learner.lora import adapter_off, adapter_tensors, add_adapter, merged_tensors, save_adapter
from learner.packing import attend_packed, packs
from learner.sharding import compute_device, whole_tensor

ADAPTER_DIR: Final = "adapter"
"""Inside a saved policy's directory: the adapter that its weights contain, for its base model."""
_HEAD_TOLERANCE: Final = 1e-3
_PROBE_PROMPT_TOKENS: Final = 1


class Policy(nn.Module):
    """A causal language model with `base_model` and `lm_head`.

    A module of its own, with all work in `forward`, so that FSDP2 can shard it: `fully_shard` each decoder layer, then
    the Policy with reshard_after_forward=True (a forward without a backward would leave its own weights whole, and the
    optimiser without them). Raises ModelError for a model whose logits are not lm_head(hidden state), for instance
    soft-capped ones.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gradient_checkpointing: bool = False,
        dtype: DtypeName = "float32",
        sequence_packing: bool = False,
        lora: LoraSection | None = None,
    ) -> None:
        """`sequence_packing`: batches are packed without padding on devices that can. `lora`: train an adapter."""
        super().__init__()
        inner_decoder(model)
        linear_head(model, "lm_head")
        self.model = model
        self._dtype: DtypeName = dtype
        set_gradient_checkpointing(model, enabled=False)
        self._check_head()
        self.packing = sequence_packing and torch.cuda.is_available() and attend_packed(model, inner_decoder(model))
        """Whether the weights take packed sequences: found by trying them."""
        self._lora = lora
        self._adapter = None if lora is None else add_adapter(model, inner_decoder(model), section=lora)
        set_gradient_checkpointing(model, enabled=gradient_checkpointing)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        gradient_checkpointing: bool = False,
        dtype: DtypeName = "float32",
        sequence_packing: bool = False,
        lora: LoraSection | None = None,
    ) -> Policy:
        """From a Hugging Face directory. Raises ModelError."""
        from transformers import AutoModelForCausalLM

        return cls(
            load_pretrained(AutoModelForCausalLM, path),
            gradient_checkpointing=gradient_checkpointing,
            dtype=dtype,
            sequence_packing=sequence_packing,
            lora=lora,
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def vocab_size(self) -> int:
        """Ids the model can take."""
        embeddings: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings.num_embeddings

    def forward(self, batch: TrainBatch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """(logprobs_BT, entropy_BT) of the response tokens, at each row's own temperature; 0 on padding.

        Float32 log-softmax over the whole vocabulary, projected at response positions only. `entropy_grad`: keep the
        entropy's graph, for an entropy bonus; else it is detached.
        """
        valid_BT = batch.mask_BT.bool()
        targets_N = batch.response_ids_BT[valid_BT]
        temperature_N = batch.temperature_B[:, None].expand_as(valid_BT)[valid_BT]
        device = targets_N.device
        with compute_dtype(device, self._dtype):
            packed = self.packing and packs(device, dtype=self._dtype)
            logprobs_N, entropy_N = target_logprobs(
                response_states(inner_decoder(self.model), batch, packed=packed),
                head=linear_head(self.model, "lm_head"),
                targets_N=targets_N,
                temperature_N=temperature_N,
                entropy_grad=entropy_grad,
            )
        return to_rows(logprobs_N, batch), to_rows(entropy_N, batch)

    def response_logprobs(self, batch: TrainBatch, *, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """`forward`, by its name."""
        result: tuple[Tensor, Tensor] = self(batch, entropy_grad)
        return result

    @torch.no_grad()
    def probe_logprobs(self, token_ids: Tensor) -> Tensor:
        """[L] ids → [L − 1] log-probability of each token after the first, at temperature 1, float32 on the CPU: to
        compare an engine's weights with these. Of a sharded model every rank must call it."""
        logprobs_BT, _ = self.response_logprobs(_probe_batch(token_ids).to(compute_device(self)))
        return logprobs_BT[0].float().cpu()

    @property
    def adapter_info(self) -> AdapterInfo | None:
        """What `named_tensors` are an adapter for; None when they are whole weights."""
        return self._adapter if self._lora is not None and self._lora.broadcast == "adapter" else None

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What engines are sent. Whole weights: under the model's own (Hugging Face) names, tied ones once, an adapter
        added in one tensor at a time; or with lora.broadcast "adapter" the adapter alone, under peft's names. Live
        views, but for merged weights. Of a sharded model take all of them on every rank."""
        return merged_tensors(self.model) if self.adapter_info is None else adapter_tensors(self.model)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What training changes, by parameter name: with the model directory it began from, all there is to a policy.
        Live views, sharded where the model is: save them before the next step, or write into them to resume."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside the block the policy is the model it began from, as a reference. Raises ModelError without one."""
        if self._adapter is None:
            raise ModelError(
                "the policy has no adapter to take off", got="a fully trained model", do="set learner.lora"
            )
        with adapter_off(self.model):
            yield

    def save_pretrained(self, directory: str | Path | None) -> None:
        """Write an ordinary Hugging Face directory (safetensors), an adapter added into the weights; the adapter also
        by itself, in ADAPTER_DIR. Of a sharded model every rank must call it; those that write nothing give None."""
        write = directory is not None
        weights = _gathered(merged_tensors(self.model), keep=write)
        adapter = {} if self._adapter is None else _gathered(adapter_tensors(self.model), keep=write)
        if directory is None:
            return
        stored = self.model.state_dict()
        weights |= {name: stored[name] for name, _ in self.model.named_buffers() if name in stored}
        self.model.save_pretrained(directory, state_dict=weights)  # type: ignore[operator]
        if self._adapter is not None:
            save_adapter(Path(directory) / ADAPTER_DIR, info=self._adapter, tensors=adapter)

    @torch.no_grad()
    def _check_head(self) -> None:
        ids_BL = torch.arange(4, device=self.device)[None] % self.vocab_size
        states_BLH = inner_decoder(self.model)(input_ids=ids_BL, use_cache=False).last_hidden_state
        ours = linear_head(self.model, "lm_head")(states_BLH)
        theirs = self.model(input_ids=ids_BL, use_cache=False).logits
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=_HEAD_TOLERANCE, rtol=_HEAD_TOLERANCE):
            raise ModelError(
                "the model's logits are not lm_head(hidden state)",
                got=f"{type(self.model).__name__}, which scales or caps its logits after the head",
                do="use a model without logit scaling or soft-capping",
            )


def _gathered(tensors: Iterator[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU; {} where only shards are lent."""
    gathered = ((name, whole_tensor(tensor)) for name, tensor in tensors)
    return {name: tensor.cpu() for name, tensor in gathered if keep}


def _probe_batch(token_ids: Tensor) -> TrainBatch:
    """One sequence as a batch, all but its first token as the answer. What only training reads is zero."""
    ids_BL, answer_BT = token_ids[None], token_ids[None, _PROBE_PROMPT_TOKENS:]
    zeros_BT, zeros_B = torch.zeros(answer_BT.shape), torch.zeros(1)
    return TrainBatch(
        sequence_ids_BL=ids_BL,
        response_ids_BT=answer_BT,
        behaviour_logprobs_BT=zeros_BT,
        ref_logprobs_BT=zeros_BT,
        prompt_tokens_B=torch.tensor([_PROBE_PROMPT_TOKENS]),
        response_tokens_B=torch.tensor([answer_BT.shape[1]]),
        truncated_B=torch.tensor([False]),
        temperature_B=torch.ones(1),
        score_B=zeros_B.double(),
        weight_B=torch.ones(1),
        group_B=torch.tensor([0]),
        oldest_version_B=torch.tensor([0]),
        task_ids=("probe",),
        rm_versions=("",),
    )
