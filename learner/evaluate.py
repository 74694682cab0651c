"""How far a trained policy has moved from the reference, on answers that the trained policy gave; and what texts that
it did not give cost it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cluster.records import PromptTask, Rollout, ScoredRollout, VersionRun, pack_floats, pack_ids
from learner.batch import micro_batches, train_batch
from learner.policy import Policy

_TOKEN_BUDGET = 8192


@torch.inference_mode()
def sequence_kl(
    model_dir: str | Path,
    *,
    ref_dir: str | Path,
    sequences: Sequence[tuple[list[int], list[int]]],
    temperature: float,
) -> dict[str, float]:
    """KL(π‖π_ref) in nats per sequence with its standard error: the mean of log π − log π_ref over answers sampled from
    π (Schulman 2020, estimator k1). `sequences`: (prompt ids, response ids)."""
    policy, reference = Policy.load(model_dir).eval(), Policy.load(ref_dir).eval()
    if torch.cuda.is_available():
        policy, reference = policy.cuda(), reference.cuda()
    batch = train_batch([_unscored(number, *pair, temperature) for number, pair in enumerate(sequences)])
    kl_B = np.zeros(len(batch))
    for rows in micro_batches(batch.sequence_tokens, token_budget=_TOKEN_BUDGET, overhead_tokens=0):
        part = batch.select(rows).to(policy.device)
        difference_BT = policy.response_logprobs(part)[0] - reference.response_logprobs(part)[0]
        kl_B[rows] = difference_BT.sum(dim=1).double().cpu().numpy()
    standard_error = float(kl_B.std(ddof=1) / math.sqrt(len(kl_B))) if len(kl_B) > 1 else 0.0
    return {"kl_nats_per_sequence": float(kl_B.mean()), "kl_standard_error": standard_error}


@torch.inference_mode()
def nats_per_token(model_dir: str | Path, *, sequences: Sequence[tuple[list[int], list[int]]]) -> float:
    """Mean −log p of the responses' tokens at temperature 1: the logarithm of their perplexity. `sequences`: (prompt
    ids, response ids)."""
    policy = Policy.load(model_dir).eval()
    if torch.cuda.is_available():
        policy = policy.cuda()
    batch = train_batch([_unscored(number, *pair, 1.0) for number, pair in enumerate(sequences)])
    nats, tokens = 0.0, sum(len(response) for _, response in sequences)
    for rows in micro_batches(batch.sequence_tokens, token_budget=_TOKEN_BUDGET, overhead_tokens=0):
        part = batch.select(rows).to(policy.device)
        nats -= float(policy.response_logprobs(part)[0].double().sum())
    return nats / tokens


def _unscored(number: int, prompt_ids: list[int], response_ids: list[int], temperature: float) -> ScoredRollout:
    """A sequence in the shape that batches are made of; its scores are not read here."""
    name = str(number)
    zeros = pack_floats(np.zeros(len(response_ids)))
    task = PromptTask(
        task_id=name,
        prompt_id=name,
        group_id=name,
        prompt_ids_i32=pack_ids(prompt_ids),
        max_new_tokens=len(response_ids),
        temperature=temperature,
    )
    rollout = Rollout(
        task=task,
        response_ids_i32=pack_ids(response_ids),
        behaviour_logprobs_f32=zeros,
        version_runs=(VersionRun(0, 0),),
        finish_reason="stop",
        actor="",
        generate_s=0.0,
    )
    return ScoredRollout(
        rollout=rollout, member_scores=(0.0,), reward=0.0, uncertainty=0.0, ref_logprobs_f32=zeros, rm_version=""
    )
