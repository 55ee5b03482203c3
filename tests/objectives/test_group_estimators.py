"""Advantages without a critic against loops over literal tokens, on ragged batches; groups that never mix (T9)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epo.objectives import discounted_returns, gigpo, group_relative, leave_one_out, reinforce_plus_plus, whiten

seeds = st.integers(0, 2**32 - 1)
unit = st.floats(0, 1)
rewards_of_group = st.lists(st.floats(-10, 10), min_size=1, max_size=8)


@dataclass
class Turn:
    reward: float
    tokens: int
    anchor: int


Batch = list[list[list[Turn]]]
"""Groups of trajectories of turns."""


def ragged(seed: int) -> Batch:
    """Groups of one to four, trajectories of one to 40 turns (mostly few), turns of one to four tokens."""
    rng = np.random.default_rng(seed)

    def turn(constant: bool) -> Turn:
        reward = 0.5 if constant else float(rng.choice([0.0, 0.0, 1.0, rng.normal()]))
        return Turn(reward, int(rng.integers(1, 5)), int(rng.integers(0, 4)))

    def trajectory(constant: bool) -> list[Turn]:
        turns = int(rng.choice([1, 2, 3, 5, 40]))
        return [turn(constant) for _ in range(1 if constant else turns)]

    equal = rng.random(3) < 0.2
    return [[trajectory(equal[g]) for _ in range(rng.integers(1, 5))] for g in range(rng.integers(1, 4))]


def tokens(trajectories: list[list[Turn]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of turns, then trajectory and turn of every token. Ids are neither dense nor increasing."""
    rewards = [turn.reward for t in trajectories for turn in t]
    ids = [(7 * (len(trajectories) - j), 2 * k) for j, t in enumerate(trajectories) for k, u in enumerate(t)
           for _ in range(u.tokens)]  # fmt: skip
    columns = torch.tensor(ids)
    return torch.tensor(rewards, dtype=torch.float64), columns[:, 0], columns[:, 1]


def standard_scores(values: list[float]) -> list[float]:
    if len(values) < 2 or min(values) == max(values):
        return [0.0] * len(values)
    mean, variance = statistics.fmean(values), statistics.variance(values)
    return [(v - mean) / (variance + 1e-8) ** 0.5 for v in values]


@settings(deadline=None)
@given(rewards=rewards_of_group)
def test_leave_one_out_subtracts_the_mean_of_the_others(rewards: list[float]) -> None:
    got = leave_one_out(torch.tensor(rewards, dtype=torch.float64)).tolist()
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i]
        expected = reward - statistics.fmean(others) if others else 0.0
        assert got[i] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rewards", [[0.1] * 7, [3.7], [1, 1, 1]])
def test_leave_one_out_of_nothing_to_compare_is_exactly_zero(rewards: list[float]) -> None:
    assert leave_one_out(torch.tensor(rewards)).tolist() == [0.0] * len(rewards)


@settings(deadline=None)
@given(rewards=st.lists(st.floats(-10, 10), min_size=2, max_size=8), seed=seeds)
def test_members_of_a_group_in_another_order_keep_their_advantages(rewards: list[float], seed: int) -> None:
    rewards_G = torch.tensor(rewards, dtype=torch.float64)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    for estimate in (leave_one_out, group_relative):
        torch.testing.assert_close(estimate(rewards_G[order]), estimate(rewards_G)[order], rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(rewards=st.lists(st.floats(-5, 5), max_size=12), gamma=unit)
def test_discounted_returns_are_the_sum_of_what_follows(rewards: list[float], gamma: float) -> None:
    got = discounted_returns(torch.tensor(rewards, dtype=torch.float64), gamma=gamma).tolist()
    expected = [sum(gamma ** (j - i) * rewards[j] for j in range(i, len(rewards))) for i in range(len(rewards))]
    assert got == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(seed=seeds, gamma=unit, steps=st.sampled_from(["token", "turn"]))
def test_reinforce_plus_plus_whitens_the_return_to_go(seed: int, gamma: float, steps: Literal["token", "turn"]) -> None:
    trajectories = [t for group in ragged(seed) for t in group]
    returns: list[float] = []
    for turns in trajectories:
        # One entry per token: its reward, and the number of its step.
        rewards = [r for u in turns for r in [0.0] * (u.tokens - 1) + [u.reward]]
        turn_of = [k for k, u in enumerate(turns) for _ in range(u.tokens)]
        step_of = list(range(len(rewards))) if steps == "token" else turn_of
        for i in range(len(rewards)):
            later = [j for j in range(len(rewards)) if step_of[j] >= step_of[i]]
            returns.append(sum(gamma ** (step_of[j] - step_of[i]) * rewards[j] for j in later))
    got = reinforce_plus_plus(*tokens(trajectories), gamma=gamma, steps=steps).tolist()
    assert got == pytest.approx(standard_scores(returns), rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_reinforce_plus_plus_does_not_depend_on_the_order_of_trajectories(seed: int) -> None:
    trajectories = [t for group in ragged(seed) for t in group]

    def per_trajectory(some: list[list[Turn]]) -> list[Tensor]:
        found = reinforce_plus_plus(*tokens(some), gamma=0.9)
        return list(found.split([sum(u.tokens for u in t) for t in some]))

    forward, backward = per_trajectory(trajectories), per_trajectory(trajectories[::-1])
    for ours, theirs in zip(forward, reversed(backward), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_reinforce_plus_plus_of_equal_returns_is_exactly_zero() -> None:
    trajectories = [[Turn(0.0, 3, 0), Turn(0.3, 1, 0)]] * 3
    assert reinforce_plus_plus(*tokens(trajectories)).tolist() == [0.0] * 12
    assert reinforce_plus_plus(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).long()).tolist() == []


def test_steps_of_reinforce_plus_plus_by_hand() -> None:
    """A turn of two tokens earns 0, the next of two earns 1: discounted by token it is 1/8, 1/4, 1/2, 1."""
    rewards, trajectories, turns = torch.tensor([0.0, 1.0]), torch.zeros(4).long(), torch.tensor([0, 0, 1, 1])
    by_token = reinforce_plus_plus(rewards, trajectories, turns, gamma=0.5)
    torch.testing.assert_close(by_token, whiten(torch.tensor([0.125, 0.25, 0.5, 1.0])))
    by_turn = reinforce_plus_plus(rewards, trajectories, turns, gamma=0.5, steps="turn")
    torch.testing.assert_close(by_turn, whiten(torch.tensor([0.5, 0.5, 1.0, 1.0])))


def test_reinforce_plus_plus_refuses_what_does_not_fit() -> None:
    rewards, trajectories, turns = torch.zeros(3), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    reinforce_plus_plus(rewards, trajectories, turns)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        reinforce_plus_plus(rewards, trajectories, turns, gamma=1.5)
    with pytest.raises(ValueError, match="steps must be 'token' or 'turn', got 'row'"):
        reinforce_plus_plus(rewards, trajectories, turns, steps="row")
    with pytest.raises(ValueError, match=r"one per turn with tokens: \[3\], got \[2\]"):
        reinforce_plus_plus(rewards[:2], trajectories, turns)
    with pytest.raises(ValueError, match="equally long"):
        reinforce_plus_plus(rewards, trajectories, turns[:2])
    with pytest.raises(ValueError, match="contiguous"):
        reinforce_plus_plus(rewards, torch.tensor([0, 1, 0]), turns)
    with pytest.raises(ValueError, match="must not decrease"):
        reinforce_plus_plus(rewards, torch.tensor([0, 0, 0]), torch.tensor([0, 2, 1]))


@dataclass
class Row:
    episode: float
    own: float
    """The episode's reward as this row has it, its own penalty taken off."""
    to_go: float
    trajectory: int
    group: int
    anchor: int


def rows(batch: Batch, gamma: float) -> list[Row]:
    found: list[Row] = []
    number = 0
    for g, group in enumerate(batch):
        for turns in group:
            number += 1
            for k, turn in enumerate(turns):
                to_go = sum(gamma**i * later.reward for i, later in enumerate(turns[k:]))
                total = sum(u.reward for u in turns)
                found.append(Row(total, total - 0.01 * (k % 3), to_go, -number, 10 - g, turn.anchor))
    return found


def columns(found: list[Row], *, own: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.tensor([r.own if own else r.episode for r in found], dtype=torch.float64),
        torch.tensor([r.to_go for r in found], dtype=torch.float64),
        torch.tensor([r.trajectory for r in found]),
        torch.tensor([r.group for r in found]),
        torch.tensor([r.anchor for r in found]),
    )


def over(value: float, others: list[float], normalise_std: bool) -> float:
    if min(others) == max(others):
        return 0.0
    return (value - statistics.fmean(others)) / (statistics.stdev(others) + 1e-6 if normalise_std else 1.0)


@settings(deadline=None)
@given(seed=seeds, gamma=unit, weight=st.floats(0, 3), normalise_std=st.booleans(), by_row=st.booleans())
def test_gigpo_compares_episodes_then_turns_of_one_observation(
    seed: int, gamma: float, weight: float, normalise_std: bool, by_row: bool
) -> None:
    found = rows(ragged(seed), gamma)
    expected: list[float] = []
    for row in found:
        group = [r for r in found if r.group == row.group]
        if by_row:
            episode = over(row.own, [r.own for r in group], normalise_std)
        else:
            episode = over(row.episode, list({r.trajectory: r.episode for r in group}.values()), normalise_std)
        met = [r.to_go for r in group if r.anchor == row.anchor]
        expected.append(episode + weight * over(row.to_go, met, normalise_std))
    got = gigpo(
        *columns(found, own=by_row),
        weight=weight,
        normalise_std=normalise_std,
        statistics="row" if by_row else "trajectory",
    )
    assert got.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_gigpo_does_not_depend_on_the_order_of_rows(seed: int) -> None:
    data = columns(rows(ragged(seed), 0.95))
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = gigpo(*(column[order] for column in data), normalise_std=True)
    torch.testing.assert_close(shuffled, gigpo(*data, normalise_std=True)[order], rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, shift=st.floats(-50, 50), statistics=st.sampled_from(["trajectory", "row"]))
def test_another_group_never_changes_a_groups_gigpo(
    seed: int, shift: float, statistics: Literal["trajectory", "row"]
) -> None:
    """The observations of both groups have the same ids, and still do not meet."""
    ours, other = ragged(seed)[:1], ragged(seed + 1)[:1]
    found = rows(ours + other, 0.9)
    count = sum(len(t) for t in ours[0])
    for row in found[count:]:
        row.episode, row.to_go = row.episode + shift, row.to_go * shift
    together = gigpo(*columns(found), statistics=statistics)[:count]
    assert torch.equal(together, gigpo(*columns(found[:count]), statistics=statistics))


def test_gigpo_without_meetings_is_the_group_advantage() -> None:
    rewards, trajectories = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([0, 0, 1])
    group, returns = torch.zeros(3).long(), torch.tensor([5.0, -3.0, 9.0])
    alone = gigpo(rewards, returns, trajectories, group, torch.tensor([0, 1, 2]))
    assert alone.tolist() == [1.0, 1.0, -1.0]
    assert gigpo(rewards, returns, trajectories, group, torch.zeros(3).long(), weight=0.0).tolist() == [1.0, 1.0, -1.0]
    by_row = gigpo(rewards, returns, trajectories, group, torch.tensor([0, 1, 2]), statistics="row")
    torch.testing.assert_close(by_row, torch.tensor([2 / 3, 2 / 3, -4 / 3]))


def test_gigpo_refuses_what_does_not_fit() -> None:
    rewards, returns = torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3)
    trajectories, groups, anchors = torch.tensor([0, 0, 1]), torch.zeros(3).long(), torch.zeros(3).long()
    gigpo(rewards, returns, trajectories, groups, anchors)
    with pytest.raises(ValueError, match="weight must be >= 0, got -1"):
        gigpo(rewards, returns, trajectories, groups, anchors, weight=-1)
    with pytest.raises(ValueError, match="statistics must be 'trajectory' or 'row', got 'turn'"):
        gigpo(rewards, returns, trajectories, groups, anchors, statistics="turn")
    with pytest.raises(ValueError, match="equally long"):
        gigpo(rewards, returns, trajectories, groups, anchors[:2])
    with pytest.raises(ValueError, match="group_ids must be equal inside a trajectory"):
        gigpo(rewards, returns, trajectories, torch.tensor([0, 1, 1]), anchors)
    uneven = torch.tensor([1.0, 0.9, 0.0])
    with pytest.raises(ValueError, match="episode_rewards must be equal inside a trajectory"):
        gigpo(uneven, returns, trajectories, groups, anchors)
    gigpo(uneven, returns, trajectories, groups, anchors, statistics="row")


def test_advantages_carry_no_gradient() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5], requires_grad=True)
    ids = torch.tensor([0, 1, 2])
    group = torch.zeros(3).long()
    for found in (
        leave_one_out(rewards),
        group_relative(rewards),
        reinforce_plus_plus(rewards, ids, group),
        gigpo(rewards, rewards, ids, group, group),
    ):
        assert not found.requires_grad
        assert bool(found.any())
