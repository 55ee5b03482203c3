"""When the corridor's penalty enforces the corridor: its weight lambda alpha beta against the exact multiplier.

Bandits, where the multiplier has a closed form. Legend: _G points of a grid on the simplex, _A actions.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tabular import chain, entropies, epo_gradient, fixed_corridor
from torch import Tensor

from epo.objectives import phase_weight, smoothing_penalty

GRID = 120


def simplex() -> Tensor:
    """[G, 3] all distributions over three actions with probabilities in steps of 1 / GRID."""
    first, second = torch.meshgrid(torch.arange(GRID + 1), torch.arange(GRID + 1), indexing="ij")
    both = torch.stack([first, second, GRID - first - second], -1).reshape(-1, 3)
    return both[both[:, 2] >= 0].double() / GRID


SIMPLEX_G_A = simplex()
ENTROPY_G = -torch.xlogy(SIMPLEX_G_A, SIMPLEX_G_A).sum(-1)


def soft_entropy(reward_A: Tensor, temperature: float) -> float:
    """Entropy of softmax(r / temperature)."""
    return entropies(reward_A[None] / temperature).item()


def temperature_of(reward_A: Tensor, entropy: float) -> float:
    """The temperature at which softmax(r / temperature) has this entropy, by bisection."""
    low, high = 1e-6, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if soft_entropy(reward_A, middle) < entropy else (low, middle)
    return math.sqrt(low * high)


def penalised(reward_A: Tensor, policy_G_A: Tensor, coefficient: float, weight: float, low: float, high: float):
    """[G] reward + lambda H - weight * P, with the project's penalty and H_ref = 1."""
    entropy_G = -torch.xlogy(policy_G_A, policy_G_A).sum(-1)
    penalty_G = smoothing_penalty(entropy_G, 1.0, kappa_low=low, kappa_high=high)
    return policy_G_A @ reward_A + coefficient * entropy_G - weight * penalty_G


@settings(max_examples=25, deadline=None)
@given(
    gap=st.sampled_from([0.01, 0.3, 1.0]),
    middle=st.floats(0.05, 0.8),
    coefficient=st.sampled_from([0.001, 0.05, 0.3]),
    edge=st.floats(0.1, 0.9),
    share=st.sampled_from([0.0, 0.5, 0.99, 1.01, 1.5, 10.0]),
)
def test_the_floor_holds_exactly_when_the_penalty_outweighs_its_multiplier(
    gap: float, middle: float, coefficient: float, edge: float, share: float
) -> None:
    """Multiplier: tau - lambda, tau the temperature at which the soft policy has the entropy of the floor."""
    reward_A = gap * torch.tensor([1.0, middle, 0.0], dtype=torch.float64)
    tau = temperature_of(reward_A, edge)
    multiplier = tau - coefficient
    assume(multiplier > 1e-3 * tau)  # else the floor is not felt
    weight = share * multiplier
    claimed_A = (reward_A / min(coefficient + weight, tau)).softmax(-1)
    claimed = penalised(reward_A, claimed_A[None], coefficient, weight, edge, 5.0).item()
    rivals_G = penalised(reward_A, SIMPLEX_G_A, coefficient, weight, edge, 5.0)
    # Nothing on the simplex is better, so the claimed policy is the maximiser: the objective is strictly concave.
    assert float(rivals_G.max()) <= claimed + 1e-9
    assert claimed - float(rivals_G.max()) < 0.03 * gap
    entropy = -torch.xlogy(claimed_A, claimed_A).sum().item()
    if share < 1:
        assert entropy < edge - 1e-5
    else:
        assert entropy == pytest.approx(edge, abs=1e-9)
        is_allowed_G = edge <= ENTROPY_G
        best = float((SIMPLEX_G_A @ reward_A + coefficient * ENTROPY_G)[is_allowed_G].max())
        assert best <= float(claimed_A @ reward_A) + coefficient * edge + 1e-9


@settings(max_examples=25, deadline=None)
@given(
    gap=st.sampled_from([0.01, 0.3, 1.0]),
    middle=st.floats(0.05, 0.8),
    coefficient=st.sampled_from([0.05, 0.3, 1.0]),
    edge=st.floats(0.1, 0.9),
    share=st.sampled_from([0.0, 0.5, 0.99, 1.01, 1.5, 10.0]),
)
def test_the_ceilings_multiplier_is_always_less_than_lambda(
    gap: float, middle: float, coefficient: float, edge: float, share: float
) -> None:
    """Multiplier: lambda - tau. So alpha beta >= 1 always suffices for the best policy, and less often does not."""
    reward_A = gap * torch.tensor([1.0, middle, 0.0], dtype=torch.float64)
    tau = temperature_of(reward_A, edge)
    multiplier = coefficient - tau
    assume(multiplier > 1e-3 * coefficient)
    assert multiplier < coefficient
    weight = share * multiplier
    claimed_A = (reward_A / max(coefficient - weight, tau)).softmax(-1)
    claimed = penalised(reward_A, claimed_A[None], coefficient, weight, 0.0, edge).item()
    rivals_G = penalised(reward_A, SIMPLEX_G_A, coefficient, weight, 0.0, edge)
    assert float(rivals_G.max()) <= claimed + 1e-9
    entropy = -torch.xlogy(claimed_A, claimed_A).sum().item()
    if share < 1:
        assert entropy > edge + 1e-5
    else:
        assert entropy == pytest.approx(edge, abs=1e-9)


@pytest.mark.parametrize(
    ("gap", "multiplier", "strength"),
    [(1.0, 0.7194, 719.4), (0.1, 0.0710, 71.0), (0.01, 0.0062, 6.2), (0.003, 0.0012, 1.16), (0.001, 0.0, 0.0)],
)
def test_figures_a_floor_of_half_a_nat_at_the_papers_lambda(gap: float, multiplier: float, strength: float) -> None:
    """Two actions, rewards 0 and `gap`, H_ref = 1, kappa_low = 0.5: the alpha beta that would hold the floor."""
    reward_A = torch.tensor([gap, 0.0], dtype=torch.float64)
    needed = max(0.0, temperature_of(reward_A, 0.5) - 0.001)
    assert needed == pytest.approx(multiplier, abs=6e-5)
    assert needed / 0.001 == pytest.approx(strength, abs=0.06)
    # The paper's 0.001 * 0.05 * 2, and the largest of alpha = 2 and 10: what they have.
    published, two, ten = (0.001 * alpha * phase_weight(0, 125) for alpha in (0.05, 2.0, 10.0))
    assert (published, two, ten) == pytest.approx((1e-4, 4e-3, 0.02))
    assert (published >= needed) == (gap <= 0.001)
    assert (two >= needed) == (gap <= 0.003)
    assert (ten >= needed) == (gap <= 0.01)


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_with_t_turns_a_floor_needs_t_times_the_penalty(turns: int) -> None:
    """Equal bandits one after the other: a token's penalty weighs 1/T, its reward 1. Threshold: T tau - lambda."""
    reward_A, coefficient, edge = torch.tensor([0.2, 0.0], dtype=torch.float64), 0.01, 0.5
    problem = chain(reward_A.repeat(turns, 1))
    tau = temperature_of(reward_A, edge)
    for share in (0.3, 0.9, 0.999, 1.1):
        alpha = share * (turns * tau - coefficient) / coefficient
        control = fixed_corridor(1.0, coefficient=coefficient, alpha=alpha, low=0.5, high=2.0)
        # Below the floor the bonus weighs lambda (1 + alpha beta) / T: its soft policy is where the policy rests,
        # unless that lies above the floor.
        logits_S_A = (reward_A * turns / (coefficient * (1 + alpha))).repeat(turns, 1)
        is_below = entropies(logits_S_A)[0].item() < edge
        gradient = float(epo_gradient(problem, logits_S_A, control).abs().max())
        assert is_below == (share < 1) == (gradient < 1e-12)
