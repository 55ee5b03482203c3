"""Aggregation over trajectories, turns and tokens against plain loops (conformance T5)."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epo.objectives import trajectory_mean, trajectory_weights, turn_means

ragged = st.lists(
    st.dictionaries(st.integers(0, 8), st.lists(st.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)
"""Trajectories as {turn: values of its tokens}; turns may be missing anywhere."""


def flatten(batch: list[dict[int, list[float]]]) -> list[tuple[int, int, float]]:
    return [(7 * j - 3, t, v) for j, turns in enumerate(batch) for t, values in turns.items() for v in values]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@settings(deadline=None)
@given(batch=ragged, seed=st.integers(0, 1000))
def test_trajectory_mean_is_the_mean_of_means_of_means_in_any_token_order(
    batch: list[dict[int, list[float]]], seed: int
) -> None:
    rows = flatten(batch)
    random.Random(seed).shuffle(rows)
    trajectory_ids, turn_ids, values = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = mean([mean([mean(tokens) for tokens in turns.values()]) for turns in batch])
    got = trajectory_mean(values.double(), trajectory_ids, turn_ids)
    assert float(got) == pytest.approx(expected, rel=1e-6)
    weights = trajectory_weights(trajectory_ids, turn_ids, dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    for weight, (trajectory, turn, _) in zip(weights.tolist(), rows, strict=True):
        turns = batch[(trajectory + 3) // 7]
        assert weight == pytest.approx(1 / (len(batch) * len(turns) * len(turns[turn])), rel=1e-12)


def test_a_trajectory_of_one_turn_weighs_as_much_as_one_of_nine() -> None:
    trajectory_ids = torch.tensor([0] * 2 + [1] * 9 * 5)
    turn_ids = torch.cat([torch.zeros(2, dtype=torch.long), torch.arange(9).repeat_interleave(5)])
    weights = trajectory_weights(trajectory_ids, turn_ids, dtype=torch.float64)
    torch.testing.assert_close(weights[:2], torch.full((2,), 1 / 4, dtype=torch.float64))
    torch.testing.assert_close(weights[2:], torch.full((45,), 1 / 90, dtype=torch.float64))


@settings(deadline=None)
@given(batch=ragged)
def test_turn_means_pool_the_tokens_of_a_turn_over_trajectories(batch: list[dict[int, list[float]]]) -> None:
    rows = flatten(batch)
    _, turn_ids, values = (torch.tensor(column) for column in zip(*rows, strict=True))
    pooled: dict[int, list[float]] = {}
    for _, turn, value in rows:
        pooled.setdefault(turn, []).append(value)
    found = turn_means(values.double(), turn_ids)
    assert found.turn_ids_U.tolist() == sorted(pooled)
    assert found.means_U.tolist() == pytest.approx([mean(pooled[turn]) for turn in sorted(pooled)], rel=1e-6)
    assert found.counts_U.tolist() == [len(pooled[turn]) for turn in sorted(pooled)]


def test_gradient_of_the_mean_is_the_weights() -> None:
    trajectory_ids, turn_ids = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 0])
    values = torch.rand(4, dtype=torch.float64, requires_grad=True)
    trajectory_mean(values, trajectory_ids, turn_ids).backward()
    assert values.grad.tolist() == [1 / 8, 1 / 8, 1 / 4, 1 / 2]


def test_tokens_that_are_not_trained_are_refused() -> None:
    with pytest.raises(ValueError, match="-1 marks tokens that are not trained"):
        trajectory_weights(torch.tensor([0, 0]), torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="both be"):
        trajectory_weights(torch.tensor([0, 0]), torch.tensor([0]))


def test_no_tokens_have_no_weights_and_mean_zero() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    assert trajectory_weights(empty, empty).shape == (0,)
    assert float(trajectory_mean(torch.zeros(0), empty, empty)) == 0.0
