"""Advantages against direct double sums, and groups that never mix (conformance T9)."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epo.objectives import bilevel_gae, gae, group_relative, trajectory_gae, turn_gae, whiten, within_turn_gae

unit = st.floats(0, 1)
small = st.integers(-2000, 2000).map(lambda thousandths: thousandths / 1000)
trajectories = st.lists(
    st.tuples(small, st.lists(small, min_size=1, max_size=4), st.integers(1, 3)), min_size=1, max_size=5
)
"""Turns as (reward, values of its tokens, distance to the next turn id)."""


def direct_sum(rewards: list[float], values: list[float], gamma: float, lam: float, last: float) -> list[float]:
    """A_s = sum_l (gamma lam)^l (r_{s+l} + gamma V_{s+l+1} - V_{s+l}), written as a double loop."""
    following = [*values[1:], last]
    return [
        sum(
            (gamma * lam) ** (later - start) * (rewards[later] + gamma * following[later] - values[later])
            for later in range(start, len(values))
        )
        for start in range(len(values))
    ]


def flatten(turns: list[tuple[float, list[float], int]]) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    turn_ids: list[int] = []
    turn = 0
    for _, values, distance in turns:
        turn_ids += [turn] * len(values)
        turn += distance
    values = torch.tensor([v for _, tokens, _ in turns for v in tokens], dtype=torch.float64)
    return [reward for reward, _, _ in turns], values, torch.tensor(turn_ids)


def check(result: object, expected: list[float], values: torch.Tensor) -> None:
    advantages, returns = result
    assert advantages.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(returns, advantages + values)


@settings(deadline=None)
@given(steps=st.lists(st.tuples(small, small), min_size=1, max_size=12), gamma=unit, lam=unit, last=small)
def test_gae_equals_the_direct_sum(steps: list[tuple[float, float]], gamma: float, lam: float, last: float) -> None:
    rewards, values = (torch.tensor(column, dtype=torch.float64) for column in zip(*steps, strict=True))
    result = gae(rewards, values, gamma=gamma, lam=lam, last_value=last)
    check(result, direct_sum(rewards.tolist(), values.tolist(), gamma, lam, last), values)


@settings(deadline=None)
@given(turns=trajectories, gamma=unit, lam=unit)
def test_within_turn_gae_is_gae_of_each_turn_alone(
    turns: list[tuple[float, list[float], int]], gamma: float, lam: float
) -> None:
    rewards, values, turn_ids = flatten(turns)
    expected = [
        a
        for reward, tokens, _ in turns
        for a in direct_sum([0.0] * (len(tokens) - 1) + [reward], tokens, gamma, lam, 0.0)
    ]
    check(within_turn_gae(rewards, values, turn_ids, gamma=gamma, lam=lam), expected, values)


@settings(deadline=None)
@given(turns=trajectories)
def test_within_turn_gae_at_the_release_setting_is_reward_minus_value(
    turns: list[tuple[float, list[float], int]],
) -> None:
    rewards, values, turn_ids = flatten(turns)
    result = within_turn_gae(torch.tensor(rewards, dtype=torch.float64), values, turn_ids)
    assert result.returns_N.tolist() == pytest.approx([r for r, tokens, _ in turns for _ in tokens], abs=1e-9)


@settings(deadline=None)
@given(turns=trajectories, gamma=unit, lam=unit, last=small)
def test_trajectory_gae_is_gae_of_all_tokens_with_rewards_at_turn_ends(
    turns: list[tuple[float, list[float], int]], gamma: float, lam: float, last: float
) -> None:
    rewards, values, turn_ids = flatten(turns)
    token_rewards = [r for reward, tokens, _ in turns for r in [0.0] * (len(tokens) - 1) + [reward]]
    expected = direct_sum(token_rewards, values.tolist(), gamma, lam, last)
    check(trajectory_gae(rewards, values, turn_ids, gamma=gamma, lam=lam, last_value=last), expected, values)


@settings(deadline=None)
@given(turns=trajectories, gamma=unit, lam=unit, last=small)
def test_turn_gae_is_gae_of_turns_shared_by_their_tokens(
    turns: list[tuple[float, list[float], int]], gamma: float, lam: float, last: float
) -> None:
    rewards, values, turn_ids = flatten(turns)
    starts = [tokens[0] for _, tokens, _ in turns]
    of_turns = direct_sum(rewards, starts, gamma, lam, last)
    result = turn_gae(rewards, values, turn_ids, gamma=gamma, lam=lam, last_value=last)
    expected = [(a, a + v) for a, v, (_, tokens, _) in zip(of_turns, starts, turns, strict=True) for _ in tokens]
    assert result.advantages_N.tolist() == pytest.approx([a for a, _ in expected], abs=1e-9)
    assert result.returns_N.tolist() == pytest.approx([r for _, r in expected], abs=1e-9)


@settings(deadline=None)
@given(turns=trajectories, gammas=st.tuples(unit, unit), lams=st.tuples(unit, unit), last=small)
def test_bilevel_gae_is_turn_level_then_token_level(
    turns: list[tuple[float, list[float], int]], gammas: tuple[float, float], lams: tuple[float, float], last: float
) -> None:
    rewards, values, turn_ids = flatten(turns)
    ends = [tokens[-1] for _, tokens, _ in turns]
    worths = [a + v for a, v in zip(direct_sum(rewards, ends, gammas[0], lams[0], last), ends, strict=True)]
    expected = [
        a
        for worth, (_, tokens, _) in zip(worths, turns, strict=True)
        for a in direct_sum([0.0] * (len(tokens) - 1) + [worth], tokens, gammas[1], lams[1], 0.0)
    ]
    result = bilevel_gae(
        rewards,
        values,
        turn_ids,
        gamma_turn=gammas[0],
        lam_turn=lams[0],
        gamma_token=gammas[1],
        lam_token=lams[1],
        last_value=last,
    )
    check(result, expected, values)


@settings(deadline=None)
@given(turns=trajectories, gamma=unit, lam=unit)
def test_all_estimators_agree_when_every_turn_is_one_token(
    turns: list[tuple[float, list[float], int]], gamma: float, lam: float
) -> None:
    rewards, values, turn_ids = flatten([(r, tokens[:1], d) for r, tokens, d in turns])
    expected = trajectory_gae(rewards, values, turn_ids, gamma=gamma, lam=lam).advantages_N
    for other in (
        turn_gae(rewards, values, turn_ids, gamma=gamma, lam=lam),
        bilevel_gae(rewards, values, turn_ids, gamma_turn=gamma, lam_turn=lam),
    ):
        torch.testing.assert_close(other.advantages_N, expected, rtol=1e-9, atol=1e-9)


def test_a_late_reward_reaches_early_turns_except_within_turns() -> None:
    values, turn_ids = torch.zeros(4), torch.tensor([0, 0, 1, 1])
    assert within_turn_gae([0.0, 1.0], values, turn_ids).advantages_N.tolist() == [0, 0, 1, 1]
    for estimator in (trajectory_gae, turn_gae):
        assert estimator([0.0, 1.0], values, turn_ids).advantages_N.tolist() == [1, 1, 1, 1]
    assert bilevel_gae([0.0, 1.0], values, turn_ids, gamma_turn=0.5).advantages_N.tolist() == [0.5, 0.5, 1, 1]


def test_wrong_shapes_and_orders_are_refused() -> None:
    values = torch.zeros(3)
    with pytest.raises(ValueError, match="one entry per turn with tokens: 2, got 3"):
        turn_gae([0.0, 0.0, 0.0], values, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="must not decrease"):
        trajectory_gae([0.0, 0.0], values, torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match="gamma_turn must lie"):
        bilevel_gae([0.0], values, torch.tensor([0, 0, 0]), gamma_turn=1.5)
    with pytest.raises(ValueError, match="both be"):
        gae(torch.zeros(2), values)


rewards_of_group = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


@settings(deadline=None)
@given(rewards=rewards_of_group)
def test_group_relative_is_the_standard_score_of_the_group(rewards: list[float]) -> None:
    got = group_relative(torch.tensor(rewards, dtype=torch.float64)).tolist()
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    if min(rewards) == max(rewards):
        assert got == [0.0] * len(rewards)
    else:
        assert got == pytest.approx([(r - mean) / (deviation + 1e-6) for r in rewards], rel=1e-6, abs=1e-7)
    centred = group_relative(torch.tensor(rewards, dtype=torch.float64), normalise_std=False).tolist()
    assert centred == pytest.approx([r - mean for r in rewards], abs=1e-9)


@pytest.mark.parametrize("normalise_std", [True, False])
def test_nothing_to_compare_gives_exactly_zero(normalise_std: bool) -> None:
    assert group_relative(torch.tensor([7.3]), normalise_std=normalise_std).tolist() == [0.0]
    assert group_relative(torch.full((7,), 0.1), normalise_std=normalise_std).tolist() == [0.0] * 7
    assert group_relative(torch.tensor([1, 1, 1]), normalise_std=normalise_std).tolist() == [0.0] * 3


@settings(max_examples=30, deadline=None)
@given(groups=st.lists(rewards_of_group, min_size=2, max_size=4), shift=st.floats(1, 100))
def test_another_groups_rewards_never_change_a_groups_advantages(groups: list[list[float]], shift: float) -> None:
    before = [group_relative(torch.tensor(group, dtype=torch.float64)) for group in groups]
    changed = [*groups[:-1], [reward * shift + shift for reward in groups[-1]]]
    after = [group_relative(torch.tensor(group, dtype=torch.float64)) for group in changed]
    for ours, theirs in zip(before[:-1], after[:-1], strict=True):
        assert torch.equal(ours, theirs)
    for advantages in before:
        assert float(advantages.sum()) == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None)
@given(values=st.lists(small, min_size=2, max_size=20))
def test_whiten_gives_the_standard_scores(values: list[float]) -> None:
    got = whiten(torch.tensor(values, dtype=torch.float64)).tolist()
    if min(values) == max(values):
        assert got == [0.0] * len(values)
    else:
        mean, variance = statistics.mean(values), statistics.variance(values)
        assert got == pytest.approx([(v - mean) / (variance + 1e-8) ** 0.5 for v in values], rel=1e-9, abs=1e-9)


def test_whiten_without_centre_keeps_signs_and_edges_are_sane() -> None:
    values = torch.tensor([1.0, 2.0, 9.0])
    scaled = whiten(values, centre=False)
    torch.testing.assert_close(scaled, values / values.std())
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert whiten(torch.full((5,), 0.3)).tolist() == [0.0] * 5
