"""Small problems with tabular softmax policies, where values, visits and trajectories are computed exactly, in float64.

A problem is a graph of states without cycles: successors have higher numbers, an episode ends with the probability that
is missing from a row of `next_S_A_S`. One decision is one token. `turn_S` says to which turn a state's token belongs.

Legend for tensor suffixes: _S states, _A actions, _B enumerated trajectories, _N their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from epo.objectives import (
    EntropyControl,
    EPOControl,
    logits_logprobs_and_entropy,
    make_control,
    trajectory_weights,
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A finite problem; everything float64."""

    start_S: Tensor
    """Distribution of the first state."""
    next_S_A_S: Tensor
    """Probability of the next state; what is missing to 1 ends the episode."""
    reward_S_A: Tensor
    turn_S: Tensor
    """Turn index of the state's token."""

    @property
    def shape(self) -> torch.Size:
        """States, actions."""
        return self.reward_S_A.shape


class Rollouts(NamedTuple):
    """Every trajectory of a policy, with its probability."""

    probability_B: Tensor
    state_N: Tensor
    action_N: Tensor
    trajectory_N: Tensor
    turn_N: Tensor


def entropies(logits_S_A: Tensor) -> Tensor:
    """[S] nats, by the function the training uses."""
    return logits_logprobs_and_entropy(logits_S_A, torch.zeros(logits_S_A.shape[:-1], dtype=torch.long))[1]


def action_values(problem: Problem, policy_S_A: Tensor, bonus_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Q_S_A and V_S of the sum of rewards (and of `bonus_S` on every visit), backwards from the last state."""
    states, _ = problem.shape
    later = torch.zeros(states, dtype=torch.float64)
    q_rows: list[Tensor] = []
    for state in reversed(range(states)):
        q_A = problem.reward_S_A[state] + problem.next_S_A_S[state] @ later
        value = (policy_S_A[state] * q_A).sum() + (0.0 if bonus_S is None else bonus_S[state])
        later = torch.where(torch.arange(states) == state, value, later)
        q_rows.insert(0, q_A)
    return torch.stack(q_rows), later


def value(problem: Problem, policy_S_A: Tensor) -> Tensor:
    """Expected sum of rewards, differentiable."""
    return (problem.start_S * action_values(problem, policy_S_A)[1]).sum()


def visits(problem: Problem, policy_S_A: Tensor) -> Tensor:
    """[S] probability that an episode visits the state."""
    reached = problem.start_S
    for state in range(problem.shape[0]):
        step_S = policy_S_A[state] @ problem.next_S_A_S[state]
        reached = reached + reached[state] * step_S
    return reached


def optimal_value(problem: Problem) -> float:
    """V*: the best expected sum of rewards."""
    return value(problem, optimal_policy(problem)).item()


def optimal_policy(problem: Problem) -> Tensor:
    """[S, A] uniform over the optimal actions of every state: of all optimal policies one with entropy to spare."""
    states, _ = problem.shape
    later = torch.zeros(states, dtype=torch.float64)
    policy_S_A = torch.zeros(problem.shape, dtype=torch.float64)
    for state in reversed(range(states)):
        q_A = problem.reward_S_A[state] + problem.next_S_A_S[state] @ later
        best_A = (q_A > q_A.max() - 1e-12).double()
        policy_S_A[state] = best_A / best_A.sum()
        later[state] = q_A.max()
    return policy_S_A


def rollouts(problem: Problem, policy_S_A: Tensor, *, by_action: bool = True) -> Rollouts:
    """Every trajectory of states and actions that has a probability; or of states alone, their actions all 0."""
    policy_S_A, next_S_A_S = policy_S_A.detach(), problem.next_S_A_S
    if not by_action:
        next_S_A_S = (policy_S_A[:, :, None] * next_S_A_S).sum(1, keepdim=True)
        policy_S_A = torch.ones_like(policy_S_A[:, :1])
    policy, following = policy_S_A.tolist(), next_S_A_S.tolist()
    states, actions = policy_S_A.shape
    found: list[tuple[float, list[int], list[int]]] = []
    live = [(chance, [state], []) for state, chance in enumerate(problem.start_S.tolist()) if chance > 0]
    while live:
        chance, path, chosen = live.pop()
        for action in range(actions):
            taken = chance * policy[path[-1]][action]
            ends = 1 - sum(following[path[-1]][action])
            if ends > 1e-12 and taken > 0:
                found.append((taken * ends, path, [*chosen, action]))
            for state in range(states):
                onward = taken * following[path[-1]][action][state]
                if onward > 0:
                    live.append((onward, [*path, state], [*chosen, action]))
    state_N = torch.tensor([state for _, path, _ in found for state in path])
    return Rollouts(
        probability_B=torch.tensor([chance for chance, _, _ in found], dtype=torch.float64),
        state_N=state_N,
        action_N=torch.tensor([action for _, _, chosen in found for action in chosen]),
        trajectory_N=torch.tensor([number for number, (_, path, _) in enumerate(found) for _ in path]),
        turn_N=problem.turn_S[state_N],
    )


def expected_weights(found: Rollouts) -> Tensor:
    """[N] the paper's weights 1/(B T_j n_jt), each trajectory counting by its probability instead of by 1/B."""
    weights_N = trajectory_weights(found.trajectory_N, found.turn_N, dtype=torch.float64)
    return weights_N * len(found.probability_B) * found.probability_B[found.trajectory_N]


def state_weights(problem: Problem, policy_S_A: Tensor) -> Tensor:
    """[S] c(s): the expected weight the entropy of state s has in L^H."""
    found = rollouts(problem, policy_S_A, by_action=False)
    return torch.zeros(problem.shape[0], dtype=torch.float64).index_add(0, found.state_N, expected_weights(found))


def epo_gradient(
    problem: Problem, logits_S_A: Tensor, control: EntropyControl, *, step: int = 0, total_steps: int = 100
) -> Tensor:
    """[S, A] what a policy is moved along: the gradient of V - control's loss, with infinite batches on policy.

    As in training the tokens and their weights are given by the sampling policy and carry no gradient.
    """
    leaf_S_A = logits_S_A.detach().clone().requires_grad_()
    policy_S_A = leaf_S_A.softmax(-1)
    found = rollouts(problem, policy_S_A, by_action=False)
    term = control.entropy_loss(
        entropies(leaf_S_A)[found.state_N], expected_weights(found), found.turn_N, step=step, total_steps=total_steps
    )
    (gradient_S_A,) = torch.autograd.grad(value(problem, policy_S_A) - term.loss, leaf_S_A)
    return gradient_S_A


def fixed_corridor(reference: float, *, coefficient: float, alpha: float, low: float, high: float) -> EPOControl:
    """EPO with H_ref as given, and beta = 1: alpha is alpha beta."""
    control = make_control(
        "epo", coefficient=coefficient, alpha=alpha, kappa_low=low, kappa_high=high, schedule="constant"
    )
    assert isinstance(control, EPOControl)
    control.history.append(reference)
    return control


class Course(NamedTuple):
    """What a run left behind; _K its steps."""

    logits_S_A: Tensor
    entropy_K_S: Tensor
    variance_K: Tensor
    """Variance over tokens in the paper's weights, before each step."""
    value_K: Tensor


def train(problem: Problem, logits_S_A: Tensor, control: EntropyControl, *, rate: float, steps: int) -> Course:
    """Plain gradient ascent on exact gradients, the history fed with the exact token mean after every step."""
    logits_S_A = logits_S_A.clone()
    entropy_K, variance_K, value_K = [], [], []
    for step in range(steps):
        policy_S_A = logits_S_A.softmax(-1)
        entropy_S = entropies(logits_S_A)
        entropy_K.append(entropy_S)
        variance_K.append(variance(entropy_S, state_weights(problem, policy_S_A)))
        value_K.append(value(problem, policy_S_A))
        gradient_S_A = epo_gradient(problem, logits_S_A, control, step=step, total_steps=steps)
        if isinstance(control, EPOControl):
            visits_S = visits(problem, policy_S_A)
            control.history.append(float((visits_S * entropy_S).sum() / visits_S.sum()))
        logits_S_A = logits_S_A + rate * gradient_S_A
    return Course(logits_S_A, torch.stack(entropy_K), torch.stack(variance_K), torch.stack(value_K))


def variance(values_S: Tensor, weights_S: Tensor) -> Tensor:
    """Weighted variance; the weights sum to 1."""
    return (weights_S * (values_S - (weights_S * values_S).sum()).square()).sum()


def chain(reward_S_A: Tensor) -> Problem:
    """One state per turn, visited in order whatever is done: bandits one after the other."""
    states, actions = reward_S_A.shape
    next_S_A_S = torch.zeros(states, actions, states, dtype=torch.float64)
    for state in range(states - 1):
        next_S_A_S[state, :, state + 1] = 1
    start_S = torch.zeros(states, dtype=torch.float64)
    start_S[0] = 1
    return Problem(start_S=start_S, next_S_A_S=next_S_A_S, reward_S_A=reward_S_A.double(), turn_S=torch.arange(states))


def tree(reward_L_A: Tensor, *, turns: int) -> Problem:
    """States are whole histories; actions decide, rewards come with the last action, one for each of the L leaves."""
    actions = reward_L_A.shape[1]
    sizes = [actions**turn for turn in range(turns)]
    states = sum(sizes)
    next_S_A_S = torch.zeros(states, actions, states, dtype=torch.float64)
    reward_S_A = torch.zeros(states, actions, dtype=torch.float64)
    child = 1
    for state in range(states - sizes[-1]):
        for action in range(actions):
            next_S_A_S[state, action, child] = 1
            child += 1
    reward_S_A[states - sizes[-1] :] = reward_L_A
    start_S = torch.zeros(states, dtype=torch.float64)
    start_S[0] = 1
    turn_S = torch.cat([torch.full((size,), turn) for turn, size in enumerate(sizes)])
    return Problem(start_S=start_S, next_S_A_S=next_S_A_S, reward_S_A=reward_S_A, turn_S=turn_S)


class Case(NamedTuple):
    """A random problem and two random policies."""

    problem: Problem
    logits_S_A: Tensor
    other_S_A: Tensor


@st.composite
def cases(draw: st.DrawFn, *, can_end: bool = True, tokens_per_turn: int = 1) -> Case:
    """Two to four layers of one to three states, two or three actions; an episode may end after any token."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    sizes = [draw(st.integers(1, 2 if layer == 0 else 3)) for layer in range(draw(st.integers(2, 4)))]
    actions = draw(st.integers(2, 3))
    scale = draw(st.sampled_from([0.1, 1.0, 3.0]))
    states = sum(sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    next_S_A_S = torch.zeros(states, actions, states, dtype=torch.float64)
    layer_S = torch.cat([torch.full((size,), layer) for layer, size in enumerate(sizes)])
    for layer in range(len(sizes) - 1):
        here, there = layer_S == layer, layer_S == layer + 1
        onward = normal(sizes[layer], actions, sizes[layer + 1] + can_end).softmax(-1)[..., : sizes[layer + 1]]
        next_S_A_S[here.nonzero().squeeze(1)[:, None, None], torch.arange(actions)[:, None], there.nonzero().T] = onward
    start_S = torch.zeros(states, dtype=torch.float64)
    start_S[: sizes[0]] = normal(sizes[0]).softmax(-1)
    problem = Problem(
        start_S=start_S,
        next_S_A_S=next_S_A_S,
        reward_S_A=normal(states, actions),
        turn_S=layer_S // tokens_per_turn,
    )
    return Case(problem, scale * normal(states, actions), scale * normal(states, actions))
