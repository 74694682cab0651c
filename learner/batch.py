"""From scored rollouts to padded tensors, and from a batch to micro-batches that fit a token budget.

Shapes: B sequences, T response tokens, L sequence tokens (prompt then response); all padded right, so a causal model
needs neither left padding nor an attention mask. Masks come from lengths, never from token identity: the padding token
may be a token the policy samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.errors import DataError, NonFiniteError
from cluster.records import ScoredRollout

_PAD_ID = 0
"""Any id in every vocabulary: what stands in the padding is never read."""


@dataclass(frozen=True)
class TrainBatch:
    """B scored rollouts as tensors. Rows keep the order they were given in."""

    sequence_ids_BL: Tensor
    response_ids_BT: Tensor
    behaviour_logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    prompt_tokens_B: Tensor
    response_tokens_B: Tensor
    truncated_B: Tensor
    """Answers cut at their token limit: they end without an end-of-sequence token."""
    temperature_B: Tensor
    """What the logits were divided by when the tokens were sampled."""
    score_B: Tensor
    """Raw reward: aggregate over ensemble members, before normalisation. float64."""
    weight_B: Tensor
    """Of the row in the policy's loss: less where the reward model's members disagree. float32."""
    group_B: Tensor
    """Index of the prompt's group: equal for answers to be compared with each other."""
    oldest_version_B: Tensor
    """Lowest policy version that sampled any token of the row."""
    task_ids: tuple[str, ...]
    rm_versions: tuple[str, ...]
    """Reward-model version that gave each row its score."""

    def __len__(self) -> int:
        return len(self.task_ids)

    @property
    def mask_BT(self) -> Tensor:
        """[B, T] 1.0 on valid response tokens."""
        positions_T = torch.arange(self.response_ids_BT.shape[1], device=self.response_tokens_B.device)
        return (positions_T < self.response_tokens_B[:, None]).float()

    @property
    def sequence_tokens(self) -> list[int]:
        """Length of each row, prompt and response."""
        lengths: list[int] = (self.prompt_tokens_B + self.response_tokens_B).tolist()
        return lengths

    def to(self, device: torch.device) -> TrainBatch:
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name.endswith(("_B", "_BL", "_BT"))
        }
        return replace(self, **moved)

    def select(self, rows: Sequence[int]) -> TrainBatch:
        """These rows, in this order, with the padding that no row needs cut off."""
        index = torch.as_tensor(rows, device=self.response_tokens_B.device)
        response_B, prompt_B = self.response_tokens_B[index], self.prompt_tokens_B[index]
        response_width, sequence_width = int(response_B.max()), int((prompt_B + response_B).max())
        chosen: dict[str, Tensor | tuple[str, ...]] = {
            "sequence_ids_BL": self.sequence_ids_BL[index, :sequence_width],
            "task_ids": tuple(self.task_ids[row] for row in rows),
            "rm_versions": tuple(self.rm_versions[row] for row in rows),
        }
        for name in ("response_ids_BT", "behaviour_logprobs_BT", "ref_logprobs_BT"):
            chosen[name] = getattr(self, name)[index, :response_width]
        for field in fields(self):
            if field.name.endswith("_B"):
                chosen[field.name] = getattr(self, field.name)[index]
        return TrainBatch(**chosen)  # type: ignore[arg-type]


def train_batch(rollouts: Sequence[ScoredRollout]) -> TrainBatch:
    """Scored rollouts → padded tensors. Raises DataError without rollouts or with an empty answer, NonFiniteError where
    a score or a log-probability is NaN or infinite, naming the task."""
    if not rollouts:
        raise DataError("a training batch needs rollouts", got="none")
    for scored in rollouts:
        _check(scored)
    rows = [scored.rollout for scored in rollouts]
    prompts = [row.task.prompt_ids for row in rows]
    responses = [row.response_ids for row in rows]
    groups: dict[str, int] = {}
    return TrainBatch(
        sequence_ids_BL=_padded([np.concatenate(pair) for pair in zip(prompts, responses, strict=True)], np.int64),
        response_ids_BT=_padded(responses, np.int64),
        behaviour_logprobs_BT=_padded([row.behaviour_logprobs for row in rows], np.float32),
        ref_logprobs_BT=_padded([scored.ref_logprobs for scored in rollouts], np.float32),
        prompt_tokens_B=torch.tensor([len(prompt) for prompt in prompts]),
        response_tokens_B=torch.tensor([len(response) for response in responses]),
        truncated_B=torch.tensor([row.finish_reason == "length" for row in rows]),
        temperature_B=torch.tensor([row.task.temperature for row in rows], dtype=torch.float32),
        score_B=torch.tensor([scored.reward for scored in rollouts], dtype=torch.float64),
        weight_B=torch.tensor([scored.weight for scored in rollouts], dtype=torch.float32),
        group_B=torch.tensor([groups.setdefault(row.task.group_id, len(groups)) for row in rows]),
        oldest_version_B=torch.tensor([row.oldest_version for row in rows]),
        task_ids=tuple(row.task.task_id for row in rows),
        rm_versions=tuple(scored.rm_version for scored in rollouts),
    )


def micro_batches(sequence_tokens: Sequence[int], *, token_budget: int, overhead_tokens: int) -> list[list[int]]:
    """Row indices split into groups of similar length, each at most `token_budget` tokens padding included, at the
    least total cost: padded tokens, plus `overhead_tokens` for every group (what one more forward pass costs).

    Every row is in one group; a row longer than the budget is alone in its own. Rows are sorted by length, groups are
    runs of that order, and the best cuts are found by dynamic programming: O(rows × rows in a group).

    Example: lengths (10, 2, 2), budget 100: overhead 5 gives [[1, 2], [0]] (14 tokens + 2·5 < 30 + 5); overhead 20
    gives one group (30 + 20 < 14 + 40).
    """
    order = sorted(range(len(sequence_tokens)), key=lambda row: (sequence_tokens[row], row))
    lengths = [sequence_tokens[row] for row in order]
    best_cost, cut_before = [0], [0]
    for end in range(1, len(order) + 1):
        width = lengths[end - 1]
        cost, cut = best_cost[end - 1] + width + overhead_tokens, end - 1
        for start in range(end - 2, -1, -1):
            padded = (end - start) * width
            if padded > token_budget:
                break
            if best_cost[start] + padded + overhead_tokens < cost:
                cost, cut = best_cost[start] + padded + overhead_tokens, start
        best_cost.append(cost)
        cut_before.append(cut)
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        groups.append(order[cut_before[end] : end])
        end = cut_before[end]
    return groups[::-1]


def padding_share(sequence_tokens: Sequence[int], *, groups: Sequence[Sequence[int]]) -> float:
    """Share of the tokens in these groups, padded each to its longest row, that is padding. Example: lengths 2 and 4 in
    one group: 2/8 = 0.25."""
    padded = sum(len(group) * max(sequence_tokens[row] for row in group) for group in groups)
    real = sum(sequence_tokens[row] for group in groups for row in group)
    return 1.0 - real / padded if padded else 0.0


def _padded(rows: Sequence[np.typing.NDArray[np.int32] | np.typing.NDArray[np.float32]], dtype: type) -> Tensor:
    """Ragged rows → [len(rows), longest], padded right."""
    out: np.typing.NDArray[Any] = np.full((len(rows), max(len(row) for row in rows)), _PAD_ID, dtype=dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(out)


def _check(scored: ScoredRollout) -> None:
    rollout = scored.rollout
    sizes = {len(rollout.response_ids), len(rollout.behaviour_logprobs), len(scored.ref_logprobs)}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(
            f"rollout {rollout.task.task_id} has an empty answer or not one log-probability per token",
            got=f"{len(rollout.response_ids)} tokens, {len(rollout.behaviour_logprobs)} behaviour and "
            f"{len(scored.ref_logprobs)} reference log-probabilities",
        )
    numbers = (
        ("score", [scored.reward]),
        ("weight", [scored.weight]),
        ("behaviour log-probability", rollout.behaviour_logprobs),
        ("reference log-probability", scored.ref_logprobs),
    )
    for what, values in numbers:
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"the {what} of rollout {rollout.task.task_id} is not finite",
                got=f"scored by {scored.rm_version}, sampled by {rollout.actor}",
                do="look at the model that gave it; training on it would destroy the policy",
            )
