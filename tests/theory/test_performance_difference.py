"""The performance-difference lemma, exactly, on random problems."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from tabular import Case, action_values, cases, chain, rollouts, value, visits


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_policy_gains_what_its_visits_earn_in_the_other_policys_advantages(case: Case) -> None:
    problem = case.problem
    old_S_A, new_S_A = case.logits_S_A.softmax(-1), case.other_S_A.softmax(-1)
    q_S_A, v_S = action_values(problem, old_S_A)
    advantage_S_A = q_S_A - v_S[:, None]
    returns = []
    for policy_S_A in (new_S_A, old_S_A):
        # Trajectory by trajectory: no recursion, no visit counts.
        found = rollouts(problem, policy_S_A)
        assert found.probability_B.sum().item() == pytest.approx(1, abs=1e-12)
        reward_N = problem.reward_S_A[found.state_N, found.action_N]
        returns.append((found.probability_B[found.trajectory_N] * reward_N).sum().item())
    found = rollouts(problem, new_S_A)
    along_N = advantage_S_A[found.state_N, found.action_N]
    along = (found.probability_B[found.trajectory_N] * along_N).sum().item()
    assert returns[0] - returns[1] == pytest.approx(along, rel=1e-9, abs=1e-12)
    by_visits = (visits(problem, new_S_A)[:, None] * new_S_A * advantage_S_A).sum().item()
    assert by_visits == pytest.approx(along, rel=1e-9, abs=1e-12)
    assert value(problem, old_S_A).item() == pytest.approx(returns[1], rel=1e-9, abs=1e-12)


def test_the_old_policys_visits_give_a_first_order_answer_only() -> None:
    generator = torch.Generator().manual_seed(5)
    # Two turns: the first action decides how likely either of two states is.
    next_S_A_S = torch.zeros(3, 2, 3, dtype=torch.float64)
    next_S_A_S[0, 0, 1:], next_S_A_S[0, 1, 1:] = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    reward_S_A, logits_S_A, direction_S_A = torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)
    problem = replace(chain(reward_S_A), next_S_A_S=next_S_A_S)
    old_S_A = logits_S_A.softmax(-1)
    q_S_A, v_S = action_values(problem, old_S_A)
    errors = []
    for size in (1e-1, 1e-2, 1e-3):
        new_S_A = (logits_S_A + size * direction_S_A).softmax(-1)
        surrogate = (visits(problem, old_S_A)[:, None] * new_S_A * (q_S_A - v_S[:, None])).sum()
        errors.append(abs((value(problem, new_S_A) - value(problem, old_S_A) - surrogate).item()))
    assert errors[1] / errors[0] == pytest.approx(1e-2, rel=0.3)
    assert errors[2] / errors[1] == pytest.approx(1e-2, rel=0.1)
