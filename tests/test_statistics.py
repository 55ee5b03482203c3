"""The Wilson interval against the equation that defines it, and against the coin it is about."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epo.evaluation.panels import summarise
from epo.evaluation.statistics import wilson_interval
from epo.types import StopReason, Task, Trajectory

Z95 = 1.959963984540054


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    sign = math.copysign(1, function(high))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if sign * function(middle) > 0 else (middle, high)
    return (low + high) / 2


@given(trials=st.integers(1, 400), data=st.data())
def test_the_bounds_solve_the_score_equation(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    rate = successes / trials

    def score(p: float) -> float:
        # (rate - p) / sqrt(p (1-p) / n) = +-z, squared and cleared of its denominator; negative inside the interval.
        return (rate - p) ** 2 - Z95**2 * p * (1 - p) / trials

    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= rate <= high <= 1
    assert low == pytest.approx(0.0 if successes == 0 else bisect(score, rate, 0.0), abs=1e-9)
    assert high == pytest.approx(1.0 if successes == trials else bisect(score, rate, 1.0), abs=1e-9)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3: the score interval without correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("trials", [20, 64, 128])
def test_coverage_by_enumeration(trials: int) -> None:
    # For each true rate, the exact probability that the interval holds it; on average it is close to what it claims.
    intervals = [wilson_interval(k, trials) for k in range(trials + 1)]
    rates = [(i + 0.5) / 200 for i in range(200)]
    coverage = [
        sum(
            math.comb(trials, k) * p**k * (1 - p) ** (trials - k)
            for k, (low, high) in enumerate(intervals)
            if low <= p <= high
        )
        for p in rates
    ]
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.006)
    assert min(coverage) > 0.83  # its known weak spot, next to 0 and 1


def test_more_confidence_is_wider() -> None:
    low90, high90 = wilson_interval(7, 30, confidence=0.9)
    low99, high99 = wilson_interval(7, 30, confidence=0.99)
    assert low99 < low90 < 7 / 30 < high90 < high99


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
        wilson_interval(successes, trials)


def test_a_panel_counts_lost_episodes_as_failures() -> None:
    def episode(goal: str, *, success: bool, error: bool = False) -> Trajectory:
        reason = StopReason.ENVIRONMENT_ERROR if error else StopReason.SUCCESS if success else StopReason.FAILURE
        task = Task(suite="s", id=goal, split="iid", goal=goal)
        return Trajectory(task=task, success=success, score=1.0 if success else 0.5, stop_reason=reason)

    result = summarise(
        "iid",
        [
            episode("find", success=True),
            episode("find", success=False),
            episode("boil", success=True),
            episode("boil", success=False, error=True),
            episode("boil", success=False),
        ],
    )
    assert (result.success, result.episodes, result.errors, result.invalid) == (0.4, 5, 1, 0.0)
    assert (result.low, result.high) == wilson_interval(2, 5)
    assert result.score == pytest.approx(0.7)
    assert result.by_goal == {"boil": pytest.approx(1 / 3), "find": 0.5}
