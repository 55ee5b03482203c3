"""Gradients of entropy, exactly: of one state, of L^H and EPO under the paper's weights, and what a policy step does.

Legend as in tabular.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tabular import (
    Case,
    action_values,
    cases,
    entropies,
    epo_gradient,
    rollouts,
    tree,
    value,
    visits,
)
from torch import Tensor

from epo.objectives import EPOControl, make_control, phase_weight, trajectory_mean


def entropy_slopes(logits_S_A: Tensor) -> Tensor:
    """dH/dz_a = -p_a (log p_a + H), by hand."""
    policy_S_A = logits_S_A.softmax(-1)
    entropy_S = -torch.xlogy(policy_S_A, policy_S_A).sum(-1)
    return -policy_S_A * (policy_S_A.log() + entropy_S[:, None])


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_the_gradient_of_an_entropy(case: Case) -> None:
    logits_S_A = case.logits_S_A.clone().requires_grad_()
    (gradient_S_A,) = torch.autograd.grad(entropies(logits_S_A).sum(), logits_S_A)
    torch.testing.assert_close(gradient_S_A, entropy_slopes(case.logits_S_A), rtol=1e-9, atol=1e-14)

    def naive(logits: Tensor) -> Tensor:
        policy = logits.softmax(-1)
        return -(policy * policy.log()).sum()

    for state, action in ((0, 0), (-1, -1)):
        shift = torch.zeros_like(case.logits_S_A)
        shift[state, action] = 1e-6
        difference = naive(case.logits_S_A + shift) - naive(case.logits_S_A - shift)
        assert difference.item() / 2e-6 == pytest.approx(gradient_S_A[state, action].item(), rel=1e-5, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    case=cases() | cases(tokens_per_turn=2),
    reference=st.floats(0.05, 1.0),
    alpha=st.sampled_from([0.05, 0.5, 2.0]),
    kappa=st.sampled_from([(0.0, 2.0), (0.5, 1.5), (0.8, 1.2)]),
    step=st.sampled_from([0, 1, 50, 99]),
)
def test_epos_gradient_is_lambda_w_times_the_sign_of_the_corridor(
    case: Case, reference: float, alpha: float, kappa: tuple[float, float], step: int
) -> None:
    problem, logits_S_A, coefficient = case.problem, case.logits_S_A, 0.3
    control = make_control(
        "epo", coefficient=coefficient, alpha=alpha, kappa_low=kappa[0], kappa_high=kappa[1], gamma=3.0
    )
    assert isinstance(control, EPOControl)
    control.history.append(reference)
    policy_S_A = logits_S_A.softmax(-1)
    entropy_S = -torch.xlogy(policy_S_A, policy_S_A).sum(-1)
    low, high = kappa[0] * reference, kappa[1] * reference
    assume(min(float((entropy_S - edge).abs().min()) for edge in (low, high)) > 1e-9)

    # c(s), trajectory by trajectory: its probability over its number of turns over the tokens of the turn.
    found = rollouts(problem, policy_S_A)
    weight_S = [0.0] * problem.shape[0]
    for trajectory, chance in enumerate(found.probability_B.tolist()):
        path = found.state_N[found.trajectory_N == trajectory].tolist()
        turns = [int(problem.turn_S[state]) for state in path]
        for state, turn in zip(path, turns, strict=True):
            weight_S[state] += chance / len(set(turns)) / turns.count(turn)
    assert sum(weight_S) == pytest.approx(1, abs=1e-12)

    strength = alpha * phase_weight(step, 100)
    leaf_S_A = logits_S_A.clone().requires_grad_()
    (reward_S_A,) = torch.autograd.grad(value(problem, leaf_S_A.softmax(-1)), leaf_S_A)
    for state, weight in enumerate(weight_S):
        factor = 1 + strength * float(entropy_S[state] < low) - strength * float(entropy_S[state] > high)
        reward_S_A[state] += coefficient * weight * factor * entropy_slopes(logits_S_A)[state]
    gradient_S_A = epo_gradient(problem, logits_S_A, control, step=step)
    torch.testing.assert_close(gradient_S_A, reward_S_A, rtol=1e-9, atol=1e-13)


def test_the_bonus_as_trained_leaves_out_that_actions_lead_to_entropy() -> None:
    """Two turns; the first action leads to a state that is nearly deterministic or to one that is uniform."""
    problem = tree(torch.zeros(2, 2), turns=2)
    logits_S_A = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    trained_S_A = epo_gradient(problem, logits_S_A, make_control("bonus", coefficient=1.0))
    # A uniform first turn has entropy gradient 0: the term as trained gives it no reason to move.
    assert trained_S_A[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-15)

    leaf_S_A = logits_S_A.clone().requires_grad_()
    policy_S_A = leaf_S_A.softmax(-1)
    found = rollouts(problem, policy_S_A)
    chance_N = torch.stack([policy_S_A[s, a] for s, a in zip(found.state_N, found.action_N, strict=True)])
    chance_B = torch.stack([chance_N[found.trajectory_N == b].prod() for b in range(len(found.probability_B))])
    mean_B = torch.stack(
        [entropies(leaf_S_A)[found.state_N[found.trajectory_N == b]].mean() for b in range(len(chance_B))]
    )
    (whole_S_A,) = torch.autograd.grad((chance_B * mean_B).sum(), leaf_S_A)
    # The gradient of E[L^H] does: pi (1 - pi) times half the difference of the two entropies to come.
    entropy_S = entropies(logits_S_A)
    assert whole_S_A[0, 1].item() == pytest.approx(0.25 * 0.5 * (entropy_S[2] - entropy_S[1]).item(), rel=1e-9)
    assert whole_S_A[0, 1] > 0.07


def test_l_h_is_the_mean_over_trajectories_of_the_mean_over_turns() -> None:
    entropy_N = torch.tensor([1.0, 3.0, 0.5, 0.1], dtype=torch.float64)
    trajectory_N, turn_N = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 0])
    assert trajectory_mean(entropy_N, trajectory_N, turn_N).item() == pytest.approx(((2.0 + 0.5) / 2 + 0.1) / 2)


@pytest.mark.parametrize("natural", [False, True])
@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_a_policy_step_moves_entropy_by_minus_a_covariance(natural: bool, case: Case) -> None:
    """Vanilla: dH = -eta d(s) sum_a p_a^2 (log p_a + H) A_a. Natural: dH = -eta Cov_p(log p, A)."""
    problem, logits_S_A = case.problem, case.logits_S_A
    policy_S_A = logits_S_A.softmax(-1)
    q_S_A, v_S = action_values(problem, policy_S_A)
    advantage_S_A = q_S_A - v_S[:, None]
    entropy_S = -torch.xlogy(policy_S_A, policy_S_A).sum(-1)
    if natural:
        direction_S_A = advantage_S_A
        centred_S_A = policy_S_A.log() - (policy_S_A * policy_S_A.log()).sum(-1, keepdim=True)
        drift_S = -(policy_S_A * centred_S_A * advantage_S_A).sum(-1)
    else:
        direction_S_A = epo_gradient(problem, logits_S_A, make_control("none"))
        surprise_S_A = policy_S_A.log() + entropy_S[:, None]
        drift_S = -visits(problem, policy_S_A) * (policy_S_A.square() * surprise_S_A * advantage_S_A).sum(-1)
    size = float(direction_S_A.abs().max())
    assume(float(drift_S.abs().max()) > 1e-3 * size > 0)
    for moved in (1e-2, 1e-3, 1e-4):
        step = moved / size
        entropy_moved_S = entropies(logits_S_A + step * direction_S_A) - entropy_S
        # The first order is exact: what is left is of the order of the squared step in the logits.
        assert float((entropy_moved_S - step * drift_S).abs().max()) < 2 * moved**2
