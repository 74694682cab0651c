"""A policy sharded over two gloo ranks: adapters train, merge and are saved as in one process, and so does a head whose
logits come in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import learner.head
import learner.policy
from configs.run import LoraSection
from learner.backbone import DtypeName
from learner.batch import train_batch
from learner.head import Chunking, target_logprobs
from learner.policy import ADAPTER_DIR, Policy
from learner.ranks import Ranks
from learner.schedule import ScheduledAdamW
from learner.sharding import shard, whole_tensor
from tests.learner_support import SETTINGS, llama_config, rollouts
from tests.ranks_support import alone, on_ranks

Result = dict[str, Any]
LORA = LoraSection(rank=3, alpha=6.0)


def two_steps(ranks: Ranks, lora: LoraSection | None, dtype: DtypeName, directory: Path) -> Result:
    """Log-probabilities before and after two steps on one batch, and the weights that would be sent."""
    with mock.patch.object(learner.head, "CPU_CHUNKING", Chunking(bytes=64, tokens=2)):
        return _two_steps(ranks, lora, dtype, directory)


def _two_steps(ranks: Ranks, lora: LoraSection | None, dtype: DtypeName, directory: Path) -> Result:
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(llama_config()), dtype=dtype, lora=lora, gradient_checkpointing=True)
    if ranks.mesh is not None:
        shard(policy, ranks=ranks, dtype=dtype, offload=False)
    batch = train_batch(rollouts())
    optimiser = ScheduledAdamW(policy, section=SETTINGS.policy, total_steps=2)
    seen = []
    for _ in range(2):
        logprobs_BT, _ = policy.response_logprobs(batch)
        seen.append(logprobs_BT.detach().numpy().copy())
        (-logprobs_BT.sum() / batch.mask_BT.sum()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        seen.append(policy.response_logprobs(batch)[0].numpy().copy())
        if lora is not None:
            with policy.adapter_off():
                seen.append(policy.response_logprobs(batch)[0].numpy().copy())
    sent = {name: whole_tensor(tensor).numpy().copy() for name, tensor in policy.named_tensors()}
    policy.save_pretrained(directory / f"ranks-{ranks.size}" if ranks.rank == 0 else None)
    sharded = [type(tensor).__name__ for tensor in policy.checkpoint_tensors().values()]
    return {"seen": seen, "sent": sent, "sharded": sharded}


@pytest.mark.parametrize(
    "lora", [None, LORA, LORA.model_copy(update={"broadcast": "adapter"})], ids=["full", "merged", "adapter"]
)
def test_two_ranks_train_send_and_save_what_one_process_does(lora: LoraSection | None, tmp_path: Path) -> None:
    expected = alone(two_steps, lora, "float32", tmp_path)
    for result in on_ranks(two_steps, lora, "float32", tmp_path, size=2):
        assert set(result["sharded"]) == {"DTensor"}
        for ours, theirs in zip(result["seen"], expected["seen"], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert result["sent"].keys() == expected["sent"].keys()
        for name, theirs in expected["sent"].items():
            np.testing.assert_allclose(result["sent"][name], theirs, atol=1e-5, err_msg=name)
    seen = expected["seen"]
    assert np.abs(seen[2] - seen[0]).max() > 1e-3, "training moved it"
    if lora is not None:
        np.testing.assert_array_equal(seen[3], seen[0])
    saved = [Policy.load(tmp_path / f"ranks-{size}") for size in (1, 2)]
    batch = train_batch(rollouts())
    with torch.no_grad():
        for policy in saved:
            np.testing.assert_allclose(policy.response_logprobs(batch)[0].numpy(), seen[2], atol=1e-5)
    assert (tmp_path / "ranks-2" / ADAPTER_DIR).exists() == (lora is not None)


def test_two_ranks_train_an_adapter_with_bfloat16_products(tmp_path: Path) -> None:
    expected = alone(two_steps, LORA, "float32", tmp_path)["seen"]
    for result in on_ranks(two_steps, LORA, "bfloat16", tmp_path, size=2):
        for ours, theirs in zip(result["seen"], expected, strict=True):
            assert np.abs(ours - theirs).mean() < 0.05
            np.testing.assert_array_equal(np.isfinite(ours), True)
        assert np.abs(result["seen"][2] - result["seen"][0]).max() > 1e-3


def temperatures(ranks: Ranks) -> list[float]:
    """That the logits are divided by, in a forward with bfloat16 products."""
    policy = Policy(LlamaForCausalLM(llama_config()), dtype="bfloat16")
    shard(policy, ranks=ranks, dtype="bfloat16", offload=False)
    with mock.patch.object(learner.policy, "target_logprobs", wraps=target_logprobs) as called, torch.no_grad():
        policy.response_logprobs(train_batch(rollouts()))
    given: list[float] = called.call_args.kwargs["temperature_N"].tolist()
    return sorted(set(given))


def test_a_batch_is_not_rounded_to_the_products_type() -> None:
    """0.8 in bfloat16 is 0.80078: every log-probability would be off by a thousandth of its logits."""
    expected = sorted(set(train_batch(rollouts()).temperature_B.tolist()))
    assert on_ranks(temperatures, size=2) == [expected] * 2
