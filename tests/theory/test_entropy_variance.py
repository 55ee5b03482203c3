"""When the variance of entropy over tokens falls from step to step, and when it rises, on exact gradients.

The variance is the one over tokens in the paper's weights; every state of a chain is one token of weight 1 / T.
Legend as in tabular.py, and _K steps.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import Course, chain, entropies, epo_gradient, fixed_corridor, train, variance
from torch import Tensor

from epo.objectives import EntropyControl, make_control


def profile(name: str, **options: Any) -> EntropyControl:
    """A method by name; `floor` is EPO with kappa = 0.5 and 1.5 and alpha = 2."""
    if name == "floor":
        return make_control("epo", alpha=2.0, kappa_low=0.5, kappa_high=1.5, **options)
    return make_control(name, **options)


def two_actions(*gaps: float) -> Tensor:
    """[S, 2] logits, one state per difference of logits."""
    return torch.tensor([[gap, 0.0] for gap in gaps], dtype=torch.float64)


def rises(variance_K: Tensor) -> int:
    """Number of steps at which the variance rose, rounding aside."""
    return int((variance_K.diff() > 1e-12).sum())


logit_rows = st.lists(st.floats(-3, 3), min_size=9, max_size=9)


@settings(max_examples=60, deadline=None)
@given(
    rows=logit_rows,
    rewards=logit_rows,
    alpha=st.sampled_from([0.0, 0.1, 0.9, 3.0]),
    coefficient=st.sampled_from([0.0, 0.1, 2.0]),
)
def test_the_variance_falls_exactly_when_entropy_and_its_speed_are_anticorrelated(
    rows: list[float], rewards: list[float], alpha: float, coefficient: float
) -> None:
    """dVar/dt = 2 Cov_w(H, dH/dt), dH_s/dt = policy drift + lambda w_s (1 -+ alpha beta) |dH/dz|^2."""
    logits_S_A = torch.tensor(rows, dtype=torch.float64).view(3, 3)
    problem = chain(torch.tensor(rewards, dtype=torch.float64).view(3, 3))
    entropy_S, weight_S = entropies(logits_S_A), torch.full((3,), 1 / 3, dtype=torch.float64)
    reference = float(entropy_S.mean()) + 1e-3
    control = fixed_corridor(reference, coefficient=coefficient, alpha=alpha, low=0.9, high=1.1)

    policy_S_A = logits_S_A.softmax(-1)
    slope_S_A = -policy_S_A * (policy_S_A.log() + entropy_S[:, None])
    advantage_S_A = problem.reward_S_A - (policy_S_A * problem.reward_S_A).sum(-1, keepdim=True)
    region_S = 1 + alpha * (entropy_S < 0.9 * reference).double() - alpha * (entropy_S > 1.1 * reference).double()
    speed_S = (slope_S_A * policy_S_A * advantage_S_A).sum(-1)
    speed_S += coefficient * weight_S * region_S * slope_S_A.square().sum(-1)
    covariance = float((weight_S * (entropy_S - entropy_S.mean()) * speed_S).sum())

    rate = 1e-6
    moved_S = entropies(logits_S_A + rate * epo_gradient(problem, logits_S_A, control))
    change = float(variance(moved_S, weight_S) - variance(entropy_S, weight_S)) / rate
    assert change == pytest.approx(2 * covariance, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_a_corridor_that_can_push_down_narrows_the_range_at_every_step(seed: int) -> None:
    """No reward, H_ref fixed, alpha beta > 1, tokens on both sides of the ceiling: what is above falls, what is below
    rises. So the range shrinks to nothing, and with it the variance, which is at most range^2 / 4.
    """
    generator = torch.Generator().manual_seed(seed)
    ceiling = 0.75  # of at most log 3 = 1.0986
    while True:
        logits_S_A = 2 * torch.randn(5, 3, generator=generator, dtype=torch.float64)
        entropy_S = entropies(logits_S_A)
        separates = bool(((entropy_S > ceiling) == (entropy_S > entropy_S.mean())).all())
        is_spread = float(entropy_S.min()) > 0.2 and float((entropy_S - ceiling).abs().min()) > 0.05
        if separates and is_spread:
            break
    problem = chain(torch.zeros(5, 3))
    control = fixed_corridor(0.5, coefficient=1.0, alpha=3.0, low=0.5, high=1.5)
    band, weight_S, separated = 0.02, torch.full((5,), 0.2, dtype=torch.float64), 0
    start = variance(entropy_S, weight_S).item()
    for _ in range(400):
        logits_S_A = logits_S_A + 0.1 * epo_gradient(problem, logits_S_A, control)
        moved_S = entropies(logits_S_A)
        # Both ends of the range close in on the ceiling; a token that has arrived hops about it by less than the band.
        for side in (1, -1):
            before, after = (float((side * (values_S - ceiling)).max()) for values_S in (entropy_S, moved_S))
            assert after <= max(before, band) + 1e-12
        # Sharper: where the mean lies at the ceiling, no token between the two, the variance itself falls.
        is_above_S, mean = entropy_S > ceiling, entropy_S.mean()
        outside_band = float((entropy_S - ceiling).abs().min()) > band
        if outside_band and bool((is_above_S == (entropy_S > mean)).all()):
            separated += 1
            assert variance(moved_S, weight_S) < variance(entropy_S, weight_S)
        entropy_S = moved_S
    assert separated > 0
    assert float((entropy_S - ceiling).abs().max()) < band
    assert variance(entropy_S, weight_S).item() < band**2 < start / 10


def test_below_one_the_same_corridor_sends_everything_to_the_uniform_policy() -> None:
    """Same start, alpha beta = 0.2 as published for ALFWorld: the ceiling is passed as if it were not there."""
    problem = chain(torch.zeros(2, 2))
    ends = {}
    for alpha in (0.2, 3.0):
        logits_S_A = two_actions(0.8, 3.0)
        control = fixed_corridor(0.3, coefficient=1.0, alpha=alpha, low=0.0, high=1.5)
        for _ in range(400):
            logits_S_A = logits_S_A + 0.2 * epo_gradient(problem, logits_S_A, control)
        ends[alpha] = entropies(logits_S_A).tolist()
    assert ends[0.2] == pytest.approx([math.log(2)] * 2, abs=1e-3)
    assert ends[3.0] == pytest.approx([0.45] * 2, abs=0.02)


@pytest.mark.parametrize(("method", "growth"), [("epo_base", 10.0), ("epo", 10.0), ("floor", 1.4)])
def test_counter_example_tokens_on_one_side_drift_apart_first(method: str, growth: float) -> None:
    """No reward, two actions, both states nearly determined: the freer one gains entropy faster."""
    course = train(
        chain(torch.zeros(2, 2)), two_actions(3.0, 4.0), profile(method, coefficient=1.0), rate=0.5, steps=600
    )
    assert course.variance_K[0].item() == pytest.approx(0.0025, abs=1e-4)
    assert float(course.variance_K.max()) > growth * course.variance_K[0].item()
    assert rises(course.variance_K) > 15
    assert course.variance_K[-1].item() < 1e-6


@pytest.mark.parametrize(("method", "least"), [("epo_base", 0.2098), ("epo", 0.2098), ("floor", 0.18)])
def test_counter_example_action_sets_of_different_size(method: str, least: float) -> None:
    """No reward; two or five actions, both states at 0.5 nats. Variance 0 becomes ((log 5 - log 2) / 2)^2."""
    logits_S_A = torch.full((2, 5), -math.inf, dtype=torch.float64)
    for state, actions in enumerate((2, 5)):
        low, high = 0.0, 20.0
        for _ in range(80):
            logits_S_A[state, :actions] = 0
            logits_S_A[state, 0] = (low + high) / 2
            is_open = entropies(logits_S_A)[state].item() > 0.5
            low, high = (logits_S_A[state, 0].item(), high) if is_open else (low, logits_S_A[state, 0].item())
    course = train(chain(torch.zeros(2, 5)), logits_S_A, profile(method, coefficient=1.0), rate=0.5, steps=300)
    assert course.variance_K[0].item() < 1e-20
    assert least < course.variance_K[-1].item() < (math.log(2.5) / 2) ** 2 + 1e-9


@cache
def decisive(method: str, coefficient: float | None = None, **options: str) -> Course:
    """Four turns with three actions; the first action of the first turn pays 1, the other turns do not matter."""
    reward_S_A = torch.zeros(4, 3)
    reward_S_A[0, 0] = 1
    logits_S_A = torch.tensor([[0.2, 0, 0], [0.5, 0, 0], [0, 0.8, 0], [0, 0, 1.0]], dtype=torch.float64)
    settings_of = {**options} if coefficient is None else {**options, "coefficient": coefficient}
    return train(chain(reward_S_A), logits_S_A, profile(method, **settings_of), rate=0.25, steps=400)


@pytest.mark.parametrize(
    ("method", "coefficient", "last", "lowest", "reward"),
    [
        ("none", None, 0.1788, 0.048, 0.993),
        ("epo_base", 0.001, 0.1793, 0.048, 0.993),
        ("epo", 0.001, 0.1793, 0.048, 0.993),
        ("floor", 0.001, 0.1793, 0.048, 0.993),
        ("epo_strong", 0.001, 0.1793, 0.048, 0.993),
        ("epo_base", 0.1, 0.2005, 0.053, 0.992),
        ("epo_strong", 0.1, 0.2005, 0.053, 0.992),
        ("floor", 0.1, 0.1948, 0.068, 0.989),
        ("epo_base", 1.0, 0.1482, 0.209, 0.956),
        ("epo", 1.0, 0.1482, 0.209, 0.956),
        ("epo_strong", 1.0, 0.1482, 0.209, 0.956),
        ("floor", 1.0, 0.0723, 0.472, 0.870),
    ],
)
def test_counter_example_one_turn_matters_and_the_others_do_not(
    method: str, coefficient: float | None, last: float, lowest: float, reward: float
) -> None:
    """The ordinary case of learning: variance rises at nearly every step, under every profile."""
    course = decisive(method, coefficient)
    assert course.variance_K[0].item() == pytest.approx(0.0021, abs=1e-4)
    assert course.variance_K[-1].item() == pytest.approx(last, abs=1e-4)
    assert rises(course.variance_K) > 300
    assert course.entropy_K_S.min().item() == pytest.approx(lowest, abs=1e-3)
    assert course.value_K[-1].item() == pytest.approx(reward, abs=1e-3)


def test_the_indicator_and_here_the_published_corridor_are_the_bonus_bit_for_bit() -> None:
    base = decisive("epo_base", 0.001)
    for same in (decisive("epo", 0.001, penalty="indicator"), decisive("epo", 0.001)):
        assert torch.equal(same.logits_S_A, base.logits_S_A)
    # The published corridor is not inert everywhere: it acts on what exceeds twice the mean of the past.
    control = fixed_corridor(0.2, coefficient=0.001, alpha=0.05, low=0.0, high=2.0)
    logits_S_A = torch.ones(1, 3, dtype=torch.float64) * torch.tensor([0.5, 0.0, 0.1])
    ours = epo_gradient(chain(torch.zeros(1, 3)), logits_S_A, control)
    plain = epo_gradient(chain(torch.zeros(1, 3)), logits_S_A, make_control("epo_base"))
    torch.testing.assert_close(ours, 0.95 * plain, rtol=1e-9, atol=1e-18)


def test_variance_also_falls_where_everything_collapses() -> None:
    """No entropy control at all, every turn matters and is nearly settled: the variance falls at every step."""
    reward_S_A = torch.zeros(4, 3)
    reward_S_A[:, 0] = torch.tensor([1.0, 0.6, 0.3, 0.1])
    logits_S_A = torch.zeros(4, 3, dtype=torch.float64)
    logits_S_A[:, 0] = torch.tensor([5.0, 4.0, 3.0, 2.5])
    course = train(chain(reward_S_A), logits_S_A, make_control("none"), rate=1.0, steps=300)
    assert rises(course.variance_K) == 0
    assert course.variance_K[[0, -1]].tolist() == pytest.approx([0.0271, 0.0015], abs=1e-4)
    assert float(course.entropy_K_S[-1].max()) < 0.12
    # From the uniform policy it rises first.
    course = train(chain(reward_S_A), torch.zeros(4, 3, dtype=torch.float64), make_control("none"), rate=1.0, steps=300)
    assert course.variance_K[0].item() < 1e-20 < 0.1 < float(course.variance_K.max())
    assert course.variance_K[-1].item() < 0.02


def test_a_corridor_that_acts_adds_oscillation_from_step_to_step() -> None:
    """At its edge the gradient turns around: entropy hops to and fro by an amount proportional to the learning rate."""
    problem, hops = chain(torch.zeros(1, 2)), {}
    for alpha, rate in ((0.0, 0.2), (3.0, 0.2), (3.0, 0.04)):
        logits_S_A = two_actions(2.0)
        control = fixed_corridor(0.3, coefficient=1.0, alpha=alpha, low=0.5, high=1.5)
        course = []
        for _ in range(int(20 / rate)):
            course.append(entropies(logits_S_A).item())
            logits_S_A = logits_S_A + rate * epo_gradient(problem, logits_S_A, control)
        steps_K = torch.tensor(course, dtype=torch.float64)[len(course) // 2 :].diff()
        turns = int((steps_K[1:].sign() != steps_K[:-1].sign()).sum())
        hops[alpha, rate] = (turns, float(steps_K.abs().mean()))
    assert hops[0.0, 0.2][0] == 0
    assert min(hops[3.0, 0.2][0], hops[3.0, 0.04][0]) > 20
    assert hops[3.0, 0.2][1] / hops[3.0, 0.04][1] == pytest.approx(5, rel=0.2)
