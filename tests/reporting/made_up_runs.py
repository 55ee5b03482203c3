"""Metric histories of runs: recorded ones, and made-up ones with the noise of recorded ones.

Made-up runs follow the recorded quickstart (70 steps on ScienceWorld, 48 episodes a step): each metric has a trend and
a noise, taken from that run's levels and step-to-step scatter, smaller or larger with the episodes of a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
History = list[dict[str, float]]
Shape = Callable[[float], float]


def read(path: Path) -> History:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recorded(name: str) -> History:
    """A run of `benchmarks/results`, or of `series` here."""
    inside = RESULTS / name / "metrics.jsonl"
    return read(inside if inside.exists() else HERE / "series" / f"{name}.jsonl")


def between(start: float, end: float, *, rate: float = 4.0) -> Shape:
    """From `start` towards `end`, fast at first; the argument is the share of the run that is over."""
    return lambda x: end + (start - end) * math.exp(-rate * x)


QUICKSTART: Mapping[str, Shape] = {
    "success/train": between(0.55, 0.85, rate=2),
    "turns/invalid": between(0.32, 0.003, rate=15),
    "turns/not_understood": between(0.6, 0.48),
    "turns/repeated": between(0.2, 0.05),
    "response/tokens": between(6.9, 4.6, rate=10),
    "response/repetition": between(0.04, 0.01),
    "entropy/mean": between(0.5, 0.25),
    "entropy/turn_early": between(0.11, 0.05),
    "entropy/turn_late": between(0.45, 0.28),
    "policy/grad_norm": between(0.7, 0.36),
    "value/grad_norm": between(0.45, 0.45),
    "value/explained_variance": between(0.05, 0.12),
    "input/mutual_information": between(0.9, 1.1),
}
NOISE: Mapping[str, float] = {
    "policy/grad_norm": 0.17,
    "value/grad_norm": 0.35,
    "entropy/mean": 0.05,
    "entropy/turn_early": 0.2,
    "entropy/turn_late": 0.07,
    "response/tokens": 0.015,
    "input/mutual_information": 0.2,
}
"""Relative standard deviation of a step at 48 episodes, as the recorded run shows it after its first 20 steps; shares
have that of a count instead."""


def run(
    *,
    seed: int,
    steps: int = 70,
    episodes: int = 48,
    group_size: int = 1,
    shapes: Mapping[str, Shape] | None = None,
) -> History:
    """A made-up run; `shapes` replace trends of the quickstart."""
    rng = np.random.default_rng([6, seed])
    scale = math.sqrt(48 / episodes)
    trends = {**QUICKSTART, **(shapes or {})}
    history: History = []
    entropies: list[float] = []
    for step in range(1, steps + 1):
        x = (step - 1) / (steps - 1)
        level = {name: trend(x) for name, trend in trends.items()}
        line = {
            name: max(0.0, value * (1 + scale * NOISE.get(name, 0) * rng.normal())) for name, value in level.items()
        }
        for name in ("turns/invalid", "turns/not_understood", "turns/repeated"):
            line[name] = rng.binomial(6 * episodes, min(1.0, level[name])) / (6 * episodes)
        won = rng.random((episodes // group_size, group_size)) < level["success/train"]
        line["success/train"] = float(won.mean())
        line["reward/std"] = float(won.std(axis=1).mean() if group_size > 1 else won.std())
        line["groups/all_equal"] = float((won.std(axis=1) == 0).mean()) if group_size > 1 else 0.0
        line["value/explained_variance"] = level["value/explained_variance"] + scale * 0.07 * rng.normal()
        line["value/returns_std"] = float(won.std())
        line["sampler/mismatch_kl"] = 1e-13 * math.exp(rng.normal())
        line["update/skipped"] = 0.0
        line["stop/environment_error"] = 0.0
        entropies.append(line["entropy/mean"])
        changes = np.diff(entropies[-11:])
        line["entropy/oscillation"] = float(changes.std()) if len(changes) >= 2 else 0.0
        history.append({"step": float(step), **line})
    return history


def spoilt(history: History, start: int, change: Callable[[int, dict[str, float]], Mapping[str, float]]) -> History:
    """From step `start` on, `change(steps since, metrics)` replaces metrics; what follows from entropies follows."""
    found = [dict(line) for line in history]
    for i, line in enumerate(found[start - 1 :]):
        line.update(change(i, line))
    entropies = [line["entropy/mean"] for line in found]
    for i in range(start - 1, len(found)):
        found[i]["entropy/oscillation"] = float(np.diff(entropies[max(0, i - 10) : i + 1]).std())
    return found
