"""How far from optimal a policy with a small EPO gradient can be, exactly; and what is left of it once alpha beta > 1.

Legend as in tabular.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tabular import (
    Case,
    cases,
    chain,
    entropies,
    epo_gradient,
    fixed_corridor,
    optimal_policy,
    optimal_value,
    state_weights,
    value,
    visits,
)

from epo.objectives import make_control

vectors = st.lists(st.floats(-3, 3), min_size=2, max_size=4)


@settings(max_examples=100, deadline=None)
@given(rewards=vectors, seed=st.integers(0, 1000), weight=st.sampled_from([0.01, 0.3, 2.0]))
def test_one_state_gradient_dominates_the_gap(rewards: list[float], seed: int, weight: float) -> None:
    """||grad||^2 >= 4 tau (min p)^2 (J* - J) for J = p r + tau H, as lemma 15 of Mei et al. 2020 with 2 for 4."""
    reward_A = torch.tensor(rewards, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    logits_A = torch.randn(len(rewards), generator=generator, dtype=torch.float64).requires_grad_()
    policy_A = logits_A.softmax(-1)
    objective = policy_A @ reward_A + weight * entropies(logits_A[None])[0]
    (gradient_A,) = torch.autograd.grad(objective, logits_A)
    gap = weight * torch.logsumexp(reward_A / weight, -1) - objective
    assert gradient_A.square().sum() >= 4 * weight * policy_A.min() ** 2 * gap - 1e-13


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    coefficient=st.sampled_from([0.001, 0.03, 0.5]),
    alpha=st.sampled_from([0.05, 0.5, 0.95]),
    kappa=st.sampled_from([(0.0, 2.0), (0.5, 1.5), (0.8, 1.2)]),
    reference=st.floats(0.05, 1.0),
    near_optimum=st.floats(0, 1),
)
def test_the_bound_holds_for_the_gradient_epo_trains_with(
    case: Case,
    coefficient: float,
    alpha: float,
    kappa: tuple[float, float],
    reference: float,
    near_optimum: float,
) -> None:
    """Every state inside, above or below as it likes; no fixed corridor around the policy is assumed."""
    problem = case.problem
    best_S_A, low, high = optimal_policy(problem), kappa[0] * reference, kappa[1] * reference
    logits_S_A = case.logits_S_A + 6 * near_optimum * best_S_A
    policy_S_A, entropy_S = logits_S_A.softmax(-1), entropies(logits_S_A)
    assume(min(float((entropy_S - edge).abs().min()) for edge in (low, high)) > 1e-9)
    control = fixed_corridor(reference, coefficient=coefficient, alpha=alpha, low=kappa[0], high=kappa[1])
    gradient_S_A = epo_gradient(problem, logits_S_A, control)

    visits_S, best_visits_S = visits(problem, policy_S_A), visits(problem, best_S_A)
    region_S = 1 + alpha * (entropy_S < low).double() - alpha * (entropy_S > high).double()
    weight_S = coefficient * region_S * state_weights(problem, policy_S_A) / visits_S
    floor_S = policy_S_A.min(-1).values
    spread = float((best_visits_S / (4 * weight_S * visits_S**2 * floor_S**2)).max())
    surplus_S = entropy_S + torch.xlogy(best_S_A, best_S_A).sum(-1)
    bias = float((best_visits_S * weight_S * surplus_S).sum())
    loss = optimal_value(problem) - value(problem, policy_S_A).item()
    assert loss <= float(gradient_S_A.square().sum()) * spread + bias + 1e-12
    if kappa[0] == 0:
        # Without a floor the second term is the bonus's own: lambda log A, whatever alpha.
        shares_S = state_weights(problem, policy_S_A) / visits_S
        assert bias <= coefficient * float((best_visits_S * shares_S).sum()) * math.log(problem.shape[1]) + 1e-12


def test_the_bound_along_a_run_tends_to_the_entropy_bias_alone() -> None:
    """Two turns with three actions, epo at the paper's kappa and alpha beta = 0.1, lambda = 1."""
    problem = chain(torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.2, 0.8]]))
    control = fixed_corridor(0.25, coefficient=1.0, alpha=0.1, low=0.0, high=2.0)
    logits_S_A = torch.zeros(2, 3, dtype=torch.float64)
    rows = []
    for steps in range(0, 401, 100):
        policy_S_A, entropy_S = logits_S_A.softmax(-1), entropies(logits_S_A)
        epsilon = float(epo_gradient(problem, logits_S_A, control).norm())
        weight_S = (1 - 0.1 * (entropy_S > 0.5).double()) / 2
        first = epsilon**2 / (4 * float(weight_S.min()) * float(policy_S_A.min()) ** 2)
        loss = optimal_value(problem) - value(problem, policy_S_A).item()
        rows.append((steps, first, float(weight_S @ entropy_S), loss))
        for _ in range(100):
            logits_S_A = logits_S_A + epo_gradient(problem, logits_S_A, control)
    assert all(loss <= first + second + 1e-12 for _, first, second, loss in rows)
    assert all(second <= math.log(3) for _, _, second, _ in rows)
    assert rows[0][1:] == pytest.approx((0.470, 0.989, 0.967), abs=1e-3)
    assert rows[1][1:] == pytest.approx((0.0, 0.720, 0.395), abs=1e-3)
    assert 0 < rows[-1][1] < 1e-12
    assert rows[-1][2:] == pytest.approx((0.720, 0.395), abs=1e-3)


def test_where_a_policy_rests_on_an_edge_the_gradient_never_becomes_small() -> None:
    """Two actions, lambda = 1, alpha beta = 0.4, ceiling 0.45: the gradient jumps over zero there."""
    problem = chain(torch.tensor([[1.0, 0.0]]))
    control = fixed_corridor(0.3, coefficient=1.0, alpha=0.4, low=0.5, high=1.5)
    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        entropy = entropies(torch.tensor([[middle, 0.0]], dtype=torch.float64)).item()
        low, high = (middle, high) if entropy > 0.45 else (low, middle)
    slopes = [
        epo_gradient(problem, torch.tensor([[low + shift, 0.0]], dtype=torch.float64), control)[0, 0].item()
        for shift in (-1e-6, 1e-6)
    ]
    assert slopes == pytest.approx([0.0055, -0.0843], abs=1e-3)


def test_at_alpha_beta_of_one_only_the_bound_of_plain_policy_gradient_is_left() -> None:
    """Above the corridor the entropies cancel: ||grad|| >= p(a*) (V* - V), however small lambda is."""
    problem = chain(torch.tensor([[1.0, 0.0, 0.3]]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits_S_A = torch.randn(1, 3, generator=generator, dtype=torch.float64)
        control = fixed_corridor(0.01, coefficient=0.7, alpha=1.0, low=0.5, high=1.5)
        gradient_S_A = epo_gradient(problem, logits_S_A, control)
        torch.testing.assert_close(gradient_S_A, epo_gradient(problem, logits_S_A, make_control("none")))
        loss = 1 - value(problem, logits_S_A.softmax(-1)).item()
        assert float(gradient_S_A.norm()) >= logits_S_A.softmax(-1)[0, 0].item() * loss


def test_beyond_one_a_gradient_of_zero_promises_nothing() -> None:
    """lambda = 1, alpha beta = 2: above the corridor the entropy weighs -1, and p = softmax(-r) is stationary."""
    problem = chain(torch.tensor([[1.0, 0.0]]))
    logits_S_A = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    control = fixed_corridor(0.3, coefficient=1.0, alpha=2.0, low=0.5, high=1.5)
    assert entropies(logits_S_A).item() == pytest.approx(0.5822, abs=1e-4)  # above 1.5 * 0.3
    assert float(epo_gradient(problem, logits_S_A, control).abs().max()) < 1e-15
    loss = 1 - value(problem, logits_S_A.softmax(-1)).item()
    assert loss == pytest.approx(0.7311, abs=1e-4)
    # What the bound would say with a weight of 1 - 2: a negative loss.
    assert -1.0 * entropies(logits_S_A).item() < 0 < loss
    # The uniform policy is worth more; the stationary point is the worst of its region, not the best.
    assert value(problem, torch.full((1, 2), 0.5, dtype=torch.float64)).item() > 1 - loss


@pytest.mark.parametrize(("alpha", "expected_loss"), [(0.0, 0.2689), (0.4, 0.1678), (2.0, 0.8322)])
def test_beyond_one_the_ceiling_can_lock_a_policy_in_on_the_wrong_side(alpha: float, expected_loss: float) -> None:
    """To change its mind a policy must pass through high entropy, and the corridor pushes it back."""
    problem = chain(torch.tensor([[1.0, 0.0]]))
    # The bonus alone ends at an entropy of 0.582 and a loss of 0.2689. The ceiling is at 0.45, which is a loss of
    # 0.1678 on the one side and of 0.8322 on the other.
    logits_S_A = torch.tensor([[-3.0, 0.0]], dtype=torch.float64)
    control = fixed_corridor(0.3, coefficient=1.0, alpha=alpha, low=0.5, high=1.5)
    for _ in range(600):
        logits_S_A = logits_S_A + 0.05 * epo_gradient(problem, logits_S_A, control)
    loss = 1 - value(problem, logits_S_A.softmax(-1)).item()
    assert loss == pytest.approx(expected_loss, abs=5e-3)
