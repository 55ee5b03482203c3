"""Numbers that say how sure we are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


def _mean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return scores.mean(axis=-1)


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927): right also near 0 and 1, where the normal one is not.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At the ends the bound is exactly 0 or 1; rounding must not move it.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half)


def interquartile_mean(scores: NDArray[np.float64], *, axis: int = -1) -> NDArray[np.float64]:
    """Mean without the lowest and the highest quarter (each rounded down): less noisy than the median, less bent by
    one odd seed than the mean."""
    ordered = np.sort(scores, axis=axis)
    count = ordered.shape[axis]
    cut = count // 4
    return np.take(ordered, range(cut, count - cut), axis=axis).mean(axis=axis)


def bootstrap_interval(
    strata: Sequence[NDArray[np.float64]],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] = _mean,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of `statistic` by the stratified bootstrap (Agarwal et al. 2021, arXiv 2108.13264).

    Seeds are drawn anew, with replacement, inside each stratum, so every task set keeps its number of runs. Of few
    seeds the interval is too short: two can only give values between themselves.

    Args:
        strata: for each task set, one score for each seed.
        statistic: of all scores together, over the last axis.
        seed: of the resampling; the same scores always give the same interval.

    Returns:
        Lower and upper bound; None where no stratum has two seeds, which says nothing of their spread.
    """
    if all(len(scores) < 2 for scores in strata):
        return None
    rng = np.random.default_rng(seed)
    drawn = [scores[rng.integers(len(scores), size=(resamples, len(scores)))] for scores in strata if len(scores)]
    values = statistic(np.concatenate(drawn, axis=-1))
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def pointwise_intervals(
    values_S_R: NDArray[np.float64], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """[S, 2] percentile intervals of the mean over R >= 2 runs at each of S steps: those of `bootstrap_interval`, with
    the same draws of runs at every step."""
    runs = values_S_R.shape[1]
    drawn = np.random.default_rng(seed).integers(runs, size=(resamples, runs))
    # How often each run was drawn: one product instead of a copy of the values for every resample.
    weights_B_R = (drawn[:, :, None] == np.arange(runs)).mean(axis=1)
    bounds = ((1 - confidence) / 2, (1 + confidence) / 2)
    return np.quantile(values_S_R @ weights_B_R.T, bounds, axis=1).T


def improvement_probability(strata: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> float:
    """Probability that a run of the first is better than one of the second on the same task set; ties count one half.

    Mann and Whitney's U over the number of pairs, mean over task sets (arXiv 2108.13264, section 4.3).

    Args:
        strata: for each task set, the scores of both, one for each seed.
    """
    shares: list[float] = []
    for ours, theirs in strata:
        difference = np.sign(ours[:, None] - theirs[None, :])
        shares.append(float((difference.mean() + 1) / 2))
    return sum(shares) / len(shares)


def relative_change(value: float, reference: float) -> float | None:
    """(value - reference) / reference; None where the reference is 0."""
    return None if reference == 0 else (value - reference) / reference
