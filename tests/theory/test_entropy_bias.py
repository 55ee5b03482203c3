"""What an entropy bonus costs in reward, exactly: the maximiser of V + lambda h, and the policy EPO-Base stops at.

Legend as in tabular.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import (
    Case,
    Problem,
    action_values,
    cases,
    chain,
    entropies,
    epo_gradient,
    optimal_policy,
    optimal_value,
    state_weights,
    tree,
    value,
    visits,
)
from torch import Tensor

from epo.objectives import make_control


def soft_optimal(problem: Problem, temperature: float) -> tuple[Tensor, float]:
    """Logits and value of the maximiser of V + temperature * (sum of the entropies on the way), backwards."""
    states, _ = problem.shape
    later = torch.zeros(states, dtype=torch.float64)
    logits_S_A = torch.zeros(problem.shape, dtype=torch.float64)
    for state in reversed(range(states)):
        logits_S_A[state] = (problem.reward_S_A[state] + problem.next_S_A_S[state] @ later) / temperature
        later[state] = temperature * logits_S_A[state].logsumexp(-1)
    return logits_S_A, float(problem.start_S @ later)


def entropy_sum(problem: Problem, policy_S_A: Tensor) -> float:
    """Expected sum of the entropies on the way."""
    entropy_S = -torch.xlogy(policy_S_A, policy_S_A).sum(-1)
    return float(visits(problem, policy_S_A) @ entropy_S)


temperatures = st.sampled_from([0.001, 0.03, 0.3, 2.0])


@settings(max_examples=60, deadline=None)
@given(case=cases(), temperature=temperatures)
def test_the_maximiser_of_reward_plus_entropies_is_the_soft_optimal_policy(case: Case, temperature: float) -> None:
    problem = case.problem

    def objective(policy_S_A: Tensor) -> float:
        return value(problem, policy_S_A).item() + temperature * entropy_sum(problem, policy_S_A)

    logits_S_A, best = soft_optimal(problem, temperature)
    assert objective(logits_S_A.softmax(-1)) == pytest.approx(best, rel=1e-9, abs=1e-12)
    for rival_S_A in (case.logits_S_A, logits_S_A + 0.1 * case.other_S_A):
        assert objective(rival_S_A.softmax(-1)) <= best + 1e-12

    # Its gradient is zero there, through visits and entropies alike.
    leaf_S_A = logits_S_A.clone().requires_grad_()
    policy_S_A = leaf_S_A.softmax(-1)
    _, soft_S = action_values(problem, policy_S_A, temperature * entropies(leaf_S_A))
    (gradient_S_A,) = torch.autograd.grad((problem.start_S * soft_S).sum(), leaf_S_A)
    assert float(gradient_S_A.abs().max()) < 1e-11


@settings(max_examples=80, deadline=None)
@given(case=cases(), temperature=temperatures, is_tied=st.booleans())
def test_its_loss_in_reward_is_at_most_lambda_times_the_entropy_it_has_more(
    case: Case, temperature: float, is_tied: bool
) -> None:
    problem = case.problem
    if is_tied:
        # Rewards of 0 or 1 leave several optimal actions in places.
        problem = Problem(
            start_S=problem.start_S,
            next_S_A_S=torch.zeros_like(problem.next_S_A_S),
            reward_S_A=(problem.reward_S_A > 0).double(),
            turn_S=problem.turn_S,
        )
    policy_S_A, best_S_A = soft_optimal(problem, temperature)[0].softmax(-1), optimal_policy(problem)
    loss = optimal_value(problem) - value(problem, policy_S_A).item()
    surplus = entropy_sum(problem, policy_S_A) - entropy_sum(problem, best_S_A)
    turns = int(problem.turn_S.max()) + 1
    assert -1e-12 <= loss <= temperature * surplus + 1e-12
    assert loss <= temperature * turns * math.log(problem.shape[1]) + 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), turns=st.integers(1, 3), actions=st.integers(2, 3), winners=st.integers(1, 4))
def test_on_a_tree_of_histories_the_bound_counts_winning_sequences(
    seed: int, turns: int, actions: int, winners: int
) -> None:
    """lambda (H log A - log N): A actions in each of H turns, N optimal sequences among A^H."""
    leaves = actions**turns
    generator = torch.Generator().manual_seed(seed)
    reward = torch.zeros(leaves, dtype=torch.float64)
    won = torch.randperm(leaves, generator=generator)[: min(winners, leaves)]
    reward[won] = 1.0
    problem = tree(reward.view(-1, actions), turns=turns)
    for temperature in (0.05, 0.5, 5.0):
        logits_S_A, best = soft_optimal(problem, temperature)
        loss = 1 - value(problem, logits_S_A.softmax(-1)).item()
        # The soft-optimal policy draws each sequence with probability proportional to exp(R / lambda).
        n, others = len(won), leaves - len(won)
        assert loss == pytest.approx(others / (others + n * math.exp(1 / temperature)), rel=1e-9, abs=1e-14)
        assert best == pytest.approx(temperature * math.log(others + n * math.exp(1 / temperature)), rel=1e-9)
        assert loss <= temperature * (turns * math.log(actions) - math.log(n)) + 1e-12


def test_the_bound_is_tight_to_a_constant_and_grows_with_turns_for_a_sum_but_not_for_a_mean() -> None:
    """Two actions per turn, action 1 pays 1 at every turn. Worst over lambda: loss / (lambda T log 2)."""
    for turns in (1, 2, 4, 8):
        problem = chain(torch.tensor([[0.0, 1.0]]).repeat(turns, 1))
        ratios, mean_losses = [], []
        for temperature in torch.linspace(0.05, 3.0, 60, dtype=torch.float64).tolist():
            loss = turns - value(problem, soft_optimal(problem, temperature)[0].softmax(-1)).item()
            ratios.append(loss / (temperature * turns * math.log(2)))
            # With weights 1/T the same lambda is a temperature of lambda / T.
            mean = turns - value(problem, soft_optimal(problem, temperature / turns)[0].softmax(-1)).item()
            mean_losses.append(mean / (temperature * math.log(2)))
        # x / (1 + e^x) is at most 0.2785 (at x = 1.2785), over log 2.
        assert max(ratios) == pytest.approx(0.4018, abs=2e-4)
        assert max(mean_losses) < 0.4018 + 1e-4


@settings(max_examples=60, deadline=None)
@given(case=cases(can_end=False), temperature=temperatures)
def test_epo_base_stops_where_each_turn_is_soft_in_plain_action_values(case: Case, temperature: float) -> None:
    """pi(a|s) = softmax(Q^pi(s, a) T / lambda): no entropies of later turns in Q; loss at most lambda log A."""
    problem = case.problem
    states, actions = problem.shape
    turns = int(problem.turn_S.max()) + 1
    control = make_control("epo_base", coefficient=temperature)
    policy_S_A = torch.full(problem.shape, 1 / actions, dtype=torch.float64)
    logits_S_A = torch.zeros(problem.shape, dtype=torch.float64)
    for state in reversed(range(states)):
        # The action values of a state depend on later states alone, which are settled.
        logits_S_A[state] = action_values(problem, policy_S_A)[0][state] * turns / temperature
        policy_S_A[state] = logits_S_A[state].softmax(-1)
    assert float(epo_gradient(problem, logits_S_A, control).abs().max()) < 1e-11

    best_S_A = optimal_policy(problem)
    entropy_S = -torch.xlogy(policy_S_A, policy_S_A).sum(-1)
    along_best = float(visits(problem, best_S_A) @ entropy_S)
    loss = optimal_value(problem) - value(problem, policy_S_A).item()
    assert loss <= temperature / turns * along_best + 1e-12 <= temperature * math.log(actions) + 2e-12


def test_what_the_bonus_stops_at_is_not_the_maximiser_of_reward_and_mean_entropy() -> None:
    """Action 0 leads to a turn with one thing to do, action 1 to a turn with an open choice; nothing pays."""
    problem = tree(torch.tensor([[0.0, -30.0], [0.0, 0.0]]), turns=2)
    trained_S_A = torch.zeros(3, 2, dtype=torch.float64)
    trained_S_A[1, 0] = 30 * 2 / 1.0
    assert float(epo_gradient(problem, trained_S_A, make_control("bonus", coefficient=1.0)).abs().max()) < 1e-11
    best_S_A = soft_optimal(problem, 1.0 / 2)[0].softmax(-1)
    assert trained_S_A.softmax(-1)[0, 1].item() == pytest.approx(0.5)
    assert best_S_A[0, 1].item() == pytest.approx(2 / 3)
    means = [
        0.5 * entropy_sum(problem, policy_S_A) + value(problem, policy_S_A).item()
        for policy_S_A in (trained_S_A.softmax(-1), best_S_A)
    ]
    assert means == pytest.approx([0.75 * math.log(2), 0.5 * math.log(3)], rel=1e-9)


def test_in_episodes_of_unequal_length_the_bonus_weighs_a_token_by_its_episode() -> None:
    """A state's bonus is c(s) / d(s) = E[1 / T | s]: 1 where the episode ends at once, less where it goes on."""
    problem = tree(torch.zeros(2, 2), turns=2)
    problem.next_S_A_S[0, 1] = 0  # action 1 ends the episode
    policy_S_A = torch.full((3, 2), 0.5, dtype=torch.float64)
    weight_S, visits_S = state_weights(problem, policy_S_A), visits(problem, policy_S_A)
    assert (weight_S[:2] / visits_S[:2]).tolist() == pytest.approx([0.75, 0.5])
