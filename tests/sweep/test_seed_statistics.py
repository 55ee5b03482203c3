"""Statistics over seeds, against enumeration, known values and coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epo.evaluation.statistics import (
    bootstrap_interval,
    improvement_probability,
    interquartile_mean,
    pointwise_intervals,
    relative_change,
)

scores = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(np.array)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 3.0], 2.0),
        ([0.0, 1.0, 2.0, 100.0], 1.5),
        ([9.0, 1.0, 2.0, 3.0, -50.0], 2.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 80.0], 4.5),
    ],
)
def test_interquartile_mean_drops_a_quarter_at_each_end(values: list[float], expected: float) -> None:
    assert interquartile_mean(np.array(values)) == pytest.approx(expected)


def test_interquartile_mean_is_taken_row_by_row() -> None:
    rows = np.array([[0.0, 1.0, 2.0, 100.0], [4.0, 4.0, 0.0, 0.0]])
    assert interquartile_mean(rows) == pytest.approx([1.5, 2.0])


def test_the_interval_of_two_strata_is_that_of_every_resample_there_is() -> None:
    strata = [np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3])]
    means = sorted(
        np.mean([*first, *second])
        for first in itertools.product(strata[0], repeat=3)
        for second in itertools.product(strata[1], repeat=2)
    )  # 27 * 4 resamples, each as likely as the others
    low, high = bootstrap_interval(strata, confidence=0.9, resamples=40_000) or (0, 0)
    # Quantiles of so few values are steps: the sampled one may be a step beside.
    assert means[3] <= low <= means[7]
    assert means[-8] <= high <= means[-4]


def test_pointwise_intervals_are_those_of_every_step_on_its_own() -> None:
    values_S_R = np.random.default_rng(0).normal(size=(7, 5))
    found = pointwise_intervals(values_S_R, resamples=1000)
    for step, values in enumerate(values_S_R):
        assert found[step] == pytest.approx(bootstrap_interval([values], resamples=1000))


def test_strata_are_kept_apart() -> None:
    # Between the task sets lies everything, inside them nothing: resampling across them would give an interval.
    low, high = bootstrap_interval([np.array([0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0])]) or (0, 1)
    assert low == high == 0.5
    mixed = bootstrap_interval([np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])])
    assert mixed is not None and mixed[0] < 0.2 and mixed[1] > 0.8


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(400):
        interval = bootstrap_interval([rng.normal(0.4, 0.1, size=30)], resamples=500)
        assert interval is not None
        hits += interval[0] <= 0.4 <= interval[1]
    assert 0.90 <= hits / 400 <= 0.98


@given(scores)
def test_the_interval_is_repeatable_and_inside_the_scores(values: np.ndarray) -> None:
    interval = bootstrap_interval([values], resamples=200)
    if len(values) == 1:
        assert interval is None
        return
    assert interval is not None and interval == bootstrap_interval([values], resamples=200)
    assert values.min() - 1e-12 <= interval[0] <= interval[1] <= values.max() + 1e-12


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=3))
def test_probability_of_improvement_counts_pairs(strata: list[tuple[np.ndarray, np.ndarray]]) -> None:
    expected = np.mean(
        [np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in ours for y in theirs]) for ours, theirs in strata]
    )
    assert improvement_probability(strata) == pytest.approx(expected)
    swapped = improvement_probability([(theirs, ours) for ours, theirs in strata])
    assert improvement_probability(strata) + swapped == pytest.approx(1.0)


def test_relative_change() -> None:
    assert relative_change(0.6, 0.4) == pytest.approx(0.5)
    assert relative_change(0.2, 0.4) == pytest.approx(-0.5)
    assert relative_change(0.2, 0.0) is None
