"""What counts as bad: one rule per alarm, each a pure function of the metrics up to a step.

A rule sees the latest step and everything before it, and answers with the number it looked at and the limit that number
is held against, or with None where it cannot judge yet. Two ideas serve most of them:

- *Surge*: a number jumps above a multiple of its recent median, by more than a least amount, and by more than the noise
  of the recent steps explains. The noise is the median absolute deviation times 1.4826, which is the standard deviation
  for normal noise and does not see outliers (Rousseeuw and Croux 1993).
- *Cliff*: a number falls to a share of the best the run had.

Where every task of the step succeeds, nothing is wrong with rewards that do not vary: see `SOLVED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the configuration names the alarms, so it comes after them
    from epo.config import HealthConfig

SIGMAS = 4.0
"""A surge is this many robust standard deviations above the recent median."""
SOLVED = 0.95
"""From this share of successful episodes on, rewards without variance and a sure policy are what is wanted."""
ENTROPY_RISE = 0.1
"""Least rise of an entropy that is called one, nats per token."""
SLOW = 1.5
"""A slow rise is measured against the calmest stretch of the run, with this many times the factor of a sudden one."""
CERTAIN = 0.01
"""Entropy below which a policy is as good as deterministic, whatever it started from; nats per token."""
SHARE_FACTOR = 2.0
"""Factor of a surge of shares; their limit is mostly the least rise."""
LENGTH_RISE = 2.0
"""Least rise of the mean response that is called one, tokens."""
LEAST_SPIKE = 1.0
"""Gradient norm below which no jump is called a spike: the usual clipping norm."""
LEAST_INFORMATION = 0.02
"""Mutual information below which responses do not depend on prompts, whatever the run began with; nats per response."""

Floats = NDArray[np.float64]
Rule = Callable[["Series", "HealthConfig"], "Reading | None"]


class Series:
    """The metrics of the steps so far, oldest first; what a step lacks, or what is not finite, is missing."""

    def __init__(self) -> None:
        self._columns: dict[str, list[float]] = {}
        self._length = 0

    def append(self, metrics: Mapping[str, object]) -> None:
        """Add a step, as recorded: numbers by name; null and text are skipped."""
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                column = self._columns.setdefault(name, [])
                column += [math.nan] * (self._length - len(column)) + [float(value)]
        self._length += 1

    def all(self, name: str) -> Floats:
        """Every step's value, NaN where missing."""
        column = self._columns.get(name, [])
        return np.array(column + [math.nan] * (self._length - len(column)))

    def last(self, name: str, default: float | None = None) -> float | None:
        column = self._columns.get(name, [])
        return column[-1] if column and len(column) == self._length else default

    def before(self, name: str) -> Floats:
        """The values there are of the steps before the last."""
        values = self.all(name)[:-1]
        return values[np.isfinite(values)]

    @property
    def is_solved(self) -> bool:
        """The last step's episodes nearly all succeeded."""
        return (self.last("success/train") or 0.0) >= SOLVED


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rule found: `value` of `metric`, held against `limit`."""

    metric: str
    value: float
    limit: float
    side: Literal["above", "below"]
    """The wrong side of the limit."""
    fires: bool


def above(metric: str, value: float, limit: float, *, unless: bool = False) -> Reading:
    """A reading that fires above its limit, unless there is an excuse."""
    return Reading(metric, value, limit, "above", value > limit and not unless)


def below(metric: str, value: float, limit: float, *, unless: bool = False) -> Reading:
    """A reading that fires below its limit, unless there is an excuse."""
    return Reading(metric, value, limit, "below", value < limit and not unless)


def surge(
    metric: str, now: float, before: Floats, config: HealthConfig, *, factor: float, rise: float, slow: bool = False
) -> Reading | None:
    """Whether `now` is far above what came `before`; None with fewer than `warmup` steps to compare with.

    The limit is `factor` times the median of the last `window` steps, and at least `rise` and `SIGMAS` robust standard
    deviations above it. With `slow`, a rise to `SLOW` * factor times the lowest median that any `window` consecutive
    steps had counts too, however long it took.
    """
    if len(before) < config.warmup:
        return None

    def limit_over(reference: Floats, times: float) -> float:
        middle = float(np.median(reference))
        noise = 1.4826 * float(np.median(np.abs(reference - middle)))
        return max(times * middle, max(middle, 0.0) + max(rise, SIGMAS * noise))  # a gap may be negative

    limit = limit_over(before[-config.window :], factor)
    if slow and len(before) >= config.window:
        windows = np.lib.stride_tricks.sliding_window_view(before, config.window)
        calmest = windows[int(np.argmin(np.median(windows, axis=1)))]
        limit = min(limit, limit_over(calmest, SLOW * factor))
    return above(metric, now, limit)


def best_level(before: Floats, window: int) -> float:
    """The highest median of `window` consecutive values (of all there are, when they are fewer)."""
    width = min(window, len(before))
    return float(np.median(np.lib.stride_tricks.sliding_window_view(before, width), axis=1).max())


def _surge_of(
    series: Series, metrics: Iterable[str], config: HealthConfig, *, factor: float, rise: float, least: float = 0.0
) -> Reading | None:
    """The first metric that surges, else the last that can be judged. No limit is below `least`."""
    found: Reading | None = None
    for metric in metrics:
        now = series.last(metric)
        reading = None if now is None else surge(metric, now, series.before(metric), config, factor=factor, rise=rise)
        if reading is not None:
            found = above(metric, reading.value, max(reading.limit, least))
            if found.fires:
                break
    return found


def entropy_eruption(series: Series, config: HealthConfig) -> Reading | None:
    now = series.last("entropy/mean")
    if now is None:
        return None
    before = series.before("entropy/mean")
    return surge("entropy/mean", now, before, config, factor=config.entropy_eruption, rise=ENTROPY_RISE, slow=True)


def entropy_collapse(series: Series, config: HealthConfig) -> Reading | None:
    now, before = series.last("entropy/mean"), series.before("entropy/mean")
    if now is None or len(before) < config.warmup:
        return None
    start = float(np.median(before[: config.warmup]))
    limit = max(config.entropy_collapse * start, CERTAIN)
    return below("entropy/mean", now, limit, unless=series.is_solved)


def entropy_oscillation(series: Series, config: HealthConfig) -> Reading | None:
    now, before = series.last("entropy/oscillation"), series.before("entropy/mean")
    if now is None or len(before) < config.warmup:
        return None
    level = float(np.mean(before[-10:]))  # without this step, which may be the one that jumped
    return above("entropy/oscillation", now, max(config.entropy_oscillation * level, ENTROPY_RISE))


def cascade(series: Series, config: HealthConfig) -> Reading | None:
    gap = series.all("entropy/turn_late") - series.all("entropy/turn_early")
    if not len(gap) or not math.isfinite(gap[-1]):
        return None
    before = gap[:-1][np.isfinite(gap[:-1])]
    name = "entropy/turn_late - entropy/turn_early"
    return surge(name, float(gap[-1]), before, config, factor=config.cascade, rise=ENTROPY_RISE, slow=True)


def reward_variance(series: Series, config: HealthConfig) -> Reading | None:
    now, before = series.last("reward/std"), series.before("reward/std")
    if now is None or len(before) < config.warmup:
        return None
    limit = config.reward_variance * best_level(before, config.window)
    return below("reward/std", now, limit, unless=series.is_solved)


def gradient_spike(series: Series, config: HealthConfig) -> Reading | None:
    skipped = series.last("update/skipped")
    if skipped:  # the loss or its gradient was not finite
        return above("update/skipped", skipped, 0.0)
    metrics = ("policy/grad_norm", "value/grad_norm")
    return _surge_of(series, metrics, config, factor=config.gradient_spike, rise=0.0, least=LEAST_SPIKE)


def invalid_actions(series: Series, config: HealthConfig) -> Reading | None:
    metrics = ("turns/invalid", "turns/not_understood")
    return _surge_of(series, metrics, config, factor=SHARE_FACTOR, rise=config.invalid_actions)


def length(series: Series, config: HealthConfig) -> Reading | None:
    return _surge_of(series, ("response/tokens",), config, factor=config.length, rise=LENGTH_RISE)


def repetition(series: Series, config: HealthConfig) -> Reading | None:
    metrics = ("response/repetition", "turns/repeated")
    return _surge_of(series, metrics, config, factor=SHARE_FACTOR, rise=config.repetition)


def template_collapse(series: Series, config: HealthConfig) -> Reading | None:
    metric = "input/mutual_information"
    now, before = series.last(metric), series.before(metric)
    if now is None or len(before) < config.window:
        return None
    recent = float(np.median([*before[1 - config.window :], now]))  # a few responses a step are a noisy estimate
    limit = max(config.template_collapse * best_level(before, config.window), LEAST_INFORMATION)
    return below(metric, recent, limit, unless=series.is_solved)


def sampler_mismatch(series: Series, config: HealthConfig) -> Reading | None:
    now = series.last("sampler/mismatch_kl")
    return None if now is None else above("sampler/mismatch_kl", now, config.sampler_mismatch)


def equal_groups(series: Series, config: HealthConfig) -> Reading | None:
    now = series.last("groups/all_equal")
    return None if now is None else above("groups/all_equal", now, config.equal_groups, unless=series.is_solved)


def environment_errors(series: Series, config: HealthConfig) -> Reading | None:
    now = series.last("stop/environment_error")
    return None if now is None else above("stop/environment_error", now, config.environment_errors)


def dead_critic(series: Series, config: HealthConfig) -> Reading | None:
    explained, spread = series.all("value/explained_variance"), series.all("value/returns_std")
    known = np.isfinite(explained)
    if np.isfinite(spread).any():
        # Where returns hardly vary, there is little to explain, and nothing to conclude.
        known &= spread >= 0.5 * np.nanmax(spread)
    values = explained[config.warmup :][known[config.warmup :]]
    if len(values) < config.window or not known[-1]:
        return None
    best = float(values[-config.window :].max())
    return below("value/explained_variance", best, config.dead_critic)
