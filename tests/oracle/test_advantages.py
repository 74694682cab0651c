"""Advantage estimators against independent forms and hand computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algo.advantages import ESTIMATORS, Trajectories, gae, group_relative, leave_one_out, reinforce, whiten


def gae_by_double_sum(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """A_t = Σ_{l≥0} (γλ)^l·δ_{t+l}, written out; and the returns as the λ-weighted mixture of n-step returns."""
    steps = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(steps)]
    advantages = [sum((gamma * lam) ** k * deltas[t + k] for k in range(steps - t)) for t in range(steps)]
    returns = []
    for t in range(steps):
        left = steps - t
        n_step = [
            sum(gamma**k * rewards[t + k] for k in range(n)) + (gamma**n * values[t + n] if n < left else 0.0)
            for n in range(1, left + 1)
        ]
        returns.append(sum((1 - lam) * lam**n * n_step[n] for n in range(left - 1)) + lam ** (left - 1) * n_step[-1])
    return advantages, returns


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    gamma=st.sampled_from([0.0, 0.7, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_gae_is_the_double_sum(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 2)
    rewards_BT = torch.randn(shape, generator=generator, dtype=torch.float64)
    values_BT = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask_BT = torch.tensor([[float(t < n) for t in range(shape[1])] for n in lengths], dtype=torch.float64)
    advantages_BT, returns_BT = gae(Trajectories(rewards_BT, mask_BT, values_BT, gamma=gamma, gae_lambda=lam))
    assert returns_BT is not None
    for row, n in enumerate(lengths):
        advantages, returns = gae_by_double_sum(rewards_BT[row, :n].tolist(), values_BT[row, :n].tolist(), gamma, lam)
        assert advantages_BT[row, :n].tolist() == pytest.approx(advantages, abs=1e-12)
        assert returns_BT[row, :n].tolist() == pytest.approx(returns, abs=1e-12)
        assert not advantages_BT[row, n:].any()
        assert not returns_BT[row, n:].any()


def test_gae_by_hand() -> None:
    """Rewards (0, 1), values (0.5, 0.6), γ 1, λ 0.5: δ = (0.1, 0.4), A = (0.3, 0.4), returns (0.8, 1.0)."""
    advantages_BT, returns_BT = gae(
        Trajectories(
            torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), torch.tensor([[0.5, 0.6]]), gamma=1.0, gae_lambda=0.5
        )
    )
    assert returns_BT is not None
    assert advantages_BT.tolist()[0] == pytest.approx([0.3, 0.4])
    assert returns_BT.tolist()[0] == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_padding_never_leaks(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    mask_BT = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    rewards_BT, values_BT = torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator)
    group_B = torch.tensor([7, 7])

    def run(garbage: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        noise_BT = garbage * (1 - mask_BT)
        return ESTIMATORS[name](Trajectories(rewards_BT + noise_BT, mask_BT, values_BT + noise_BT, group_B))

    clean, dirty = run(0.0), run(1e3)
    assert torch.equal(clean[0], dirty[0])
    assert not (clean[0] * (1 - mask_BT)).any()
    if clean[1] is not None and dirty[1] is not None:
        assert torch.equal(clean[1], dirty[1])


def test_leave_one_out_by_hand() -> None:
    """Returns (1, 2, 6) in one group: −3, −1.5, 4.5. (10, 20) in another: −10, 10. Interleaved rows."""
    rewards_BT = torch.tensor([[0.5, 0.5], [10.0, 0.0], [2.0, 0.0], [5.0, 1.0], [20.0, 0.0]])
    mask_BT = torch.tensor([[1.0, 1], [1, 0], [1, 0], [1, 1], [1, 0]])
    advantages_BT, returns_BT = leave_one_out(Trajectories(rewards_BT, mask_BT, group_B=torch.tensor([4, 9, 4, 4, 9])))
    assert returns_BT is None
    assert advantages_BT.tolist() == [[-3.0, -3.0], [-10.0, 0.0], [-1.5, 0.0], [4.5, 4.5], [10.0, 0.0]]


def test_group_relative_by_hand() -> None:
    """Returns (1, 3): mean 2, population std 1. An even group and a lone answer give 0."""
    rewards_BT = torch.tensor([[1.0], [3.0], [5.0], [5.0], [8.0]])
    advantages_BT, _ = group_relative(Trajectories(rewards_BT, torch.ones(5, 1), group_B=torch.tensor([0, 0, 1, 1, 2])))
    assert advantages_BT[:, 0].tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0, 0.0])


def test_lone_answers_have_no_baseline() -> None:
    rewards_BT = torch.tensor([[1.0], [3.0], [8.0]])
    trajectories = Trajectories(rewards_BT, torch.ones(3, 1), group_B=torch.tensor([0, 0, 1]))
    assert leave_one_out(trajectories)[0][:, 0].tolist() == [-2.0, 2.0, 0.0]


@pytest.mark.parametrize("estimator", [group_relative, leave_one_out])
def test_group_estimators_refuse_a_batch_without_groups(estimator: object) -> None:
    assert callable(estimator)
    for group_B in (None, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="group"):
            estimator(Trajectories(torch.ones(2, 1), torch.ones(2, 1), group_B=group_B))


def test_reinforce_by_hand() -> None:
    """Rewards (0, 1, 3) and (6), γ ½: G = (1.25, 2.5, 3) and (6); mean 12.75/4 = 3.1875."""
    advantages_BT, returns_BT = reinforce(
        Trajectories(
            torch.tensor([[0.0, 1.0, 3.0], [6.0, 99.0, 99.0]]),
            torch.tensor([[1.0, 1, 1], [1, 0, 0]]),
            gamma=0.5,
        )
    )
    assert returns_BT is None
    assert advantages_BT.tolist() == [[-1.9375, -0.6875, -0.1875], [2.8125, 0.0, 0.0]]


def test_whiten_removes_the_mean_and_ignores_padding() -> None:
    """Values (1, 3) and padding 9: mean 2, population std 1."""
    got = whiten(torch.tensor([[1.0, 3.0, 9.0]]), mask_BT=torch.tensor([[1.0, 1.0, 0.0]]))
    assert got.tolist()[0] == pytest.approx([-1.0, 1.0, 0.0])


def test_whiten_of_equal_values_is_zero() -> None:
    assert whiten(torch.full((2, 3), 7.0), mask_BT=torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2
    assert whiten(torch.tensor([[5.0, 1.0]]), mask_BT=torch.tensor([[1.0, 0.0]])).tolist() == [[0.0, 0.0]]
