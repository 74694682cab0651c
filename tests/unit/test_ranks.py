"""One batch on one, two and three ranks: the same losses, gradients, weights and statistics, to float32's rounding."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cluster.errors import NonFiniteError
from learner.algo.normalise import ScoreNormaliser
from learner.batch import train_batch
from learner.experience import make_experience, normalised_scores
from learner.ranks import Ranks
from learner.sharding import shard, whole_tensor
from learner.update import ppo_update
from tests.learner_support import new_critic, new_policy, rollouts, trainable, tuned
from tests.ranks_support import alone, on_ranks

Result = dict[str, Any]


def one_update(ranks: Ranks, rows: int, changes: dict[str, Any]) -> Result:
    """Experience and update of one batch; everything that may be compared, as plain numbers and arrays."""
    settings = tuned(**({"max_step_kl_nats_per_token": 100.0} | changes))
    policy, critic = new_policy(), new_critic() if settings.advantages == "gae" else None
    if ranks.mesh is not None:
        for module in (policy, critic):
            if module is not None:
                shard(module, ranks=ranks, dtype="float32", offload=False)
    batch = train_batch(rollouts(rows))
    scores_B, _ = normalised_scores(batch, ScoreNormaliser(), score_clip=5.0)
    experience = make_experience(
        batch, policy=policy, critic=critic, scores_B=scores_B, beta=0.1, settings=settings, ranks=ranks
    )
    models = trainable(policy, critic, settings)
    rng = torch.Generator().manual_seed(0)
    stats = ppo_update(experience, trainable=models, settings=settings, rng=rng, ranks=ranks)
    arrays = {
        f"{what}/{name}": whole_tensor(tensor).numpy().copy()
        for what, module in (("policy", policy), ("critic", critic))
        if module is not None
        for name, tensor in module.named_tensors()
    }
    outputs = {"prox": experience.prox_logprobs_BT, "entropy": experience.entropy_BT,
               "advantages": experience.advantages_BT, "values": experience.values_BT}  # fmt: skip
    arrays |= {name: tensor.numpy() for name, tensor in outputs.items() if tensor is not None}
    return {"stats": asdict(stats), "arrays": arrays}


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """‖a − b‖ / ‖b‖."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def compare(result: Result, expected: Result) -> dict[str, float]:
    """Relative differences of everything that should not depend on the number of ranks."""
    found = {name: difference(result["arrays"][name], expected["arrays"][name]) for name in expected["arrays"]}
    for name, value in expected["stats"].items():
        if name in ("micro_batches", "padding_share"):
            continue
        if value is None or isinstance(value, bool | int):
            assert result["stats"][name] == value, name
        else:
            # Means of terms of size one that nearly cancel, as the policy loss, are exact to the terms' rounding.
            scale = max(abs(value), 1e-2)
            found[name] = abs(result["stats"][name] - value) / scale
    return found


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "defaults": (12, {}),
    "another token budget": (12, {"token_budget": 24, "entropy_bonus": 0.05}),
    "no critic": (12, {"advantages": "group_relative", "samples_per_prompt": 2}),
    "fewer rows than ranks": (2, {"minibatches": 1}),
    "stopped early": (12, {"epochs": 4, "minibatches": 1, "max_step_kl_nats_per_token": 1e-7}),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_an_update_is_the_same_on_any_number_of_ranks(size: int, case: str) -> None:
    rows, changes = CASES[case]
    expected = alone(one_update, rows, changes)
    assert expected["stats"]["stopped_early"] == (case == "stopped early")
    for result in on_ranks(one_update, rows, changes, size=size):
        differences = compare(result, expected)
        worst = max(differences, key=lambda name: differences[name])
        assert differences[worst] < 1e-5, f"{worst}: {differences[worst]:.2e}"


def poisoned_update(ranks: Ranks) -> str:
    """A gradient that is not finite on one rank alone."""
    policy, critic = new_policy(), new_critic()
    if ranks.mesh is not None:
        for module in (policy, critic):
            shard(module, ranks=ranks, dtype="float32", offload=False)
    batch = train_batch(rollouts(8))
    scores_B, _ = normalised_scores(batch, ScoreNormaliser(), score_clip=5.0)
    experience = make_experience(
        batch, policy=policy, critic=critic, scores_B=scores_B, beta=0.1, settings=tuned(), ranks=ranks
    )
    advantages_BT = experience.advantages_BT.clone()
    advantages_BT[0, 0] = float("nan")  # Row 0 is some one rank's.
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    try:
        ppo_update(
            replace(experience, advantages_BT=advantages_BT),
            trainable=trainable(policy, critic),
            settings=tuned(minibatches=1),
            rng=torch.Generator().manual_seed(0),
            ranks=ranks,
        )
    except NonFiniteError as error:
        same = all(
            torch.equal(whole_tensor(old), whole_tensor(new.detach()))
            for old, new in zip(before, policy.parameters(), strict=True)
        )
        return error.what if same else "stepped"
    return "no error"


def test_all_ranks_refuse_what_is_not_finite_on_one() -> None:
    assert on_ranks(poisoned_update, size=2) == ["the policy loss is not finite"] * 2
