"""Runs compared: arms, their table and their curves, by rules that are fixed before any result is seen.

An arm is every run of one configuration, whatever its seed. Its score on a split is the mean success of the evaluations
in the last fifth of the steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from epo.config import Config
from epo.environments.identity import differing_facts
from epo.errors import UserError
from epo.evaluation.figures import paper_figures
from epo.evaluation.statistics import (
    bootstrap_interval,
    improvement_probability,
    interquartile_mean,
    pointwise_intervals,
    relative_change,
)
from epo.recipe import parse_config

CONFIDENCE = 0.95
CURVES = (
    "success/train",
    "reward/mean",
    "entropy/mean",
    "entropy/turn_early",
    "entropy/turn_late",
    "turns/mean",
    "turns/invalid",
    "policy/grad_norm",
    "policy/kl",
)
"""Metrics that get a curve, besides success on every split."""
TRAINING = "training"
"""Row of the table for the episodes of training: many, but at the training temperature and on tasks that were seen."""
_NO_OTHER_ARM = (
    *("seed", "name", "record", "health", "logging", "checkpoint", "model.threads", "environment.workers"),
    *("environment.worker_memory_mb", "sampler.kv_gib", "sampler.block_size", "sampler.max_weight_error"),
)
"""Settings that may differ inside an arm."""


class ComparedRun(Protocol):
    """What is read of a run; `epo.reporting.reading.run_reader.RunData` has it."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def provenance(self) -> Mapping[str, Any] | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def steps(self) -> Sequence[int]: ...
    @property
    def metrics(self) -> Mapping[str, Sequence[float | None]]: ...
    @property
    def evaluations(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """All runs of one configuration."""

    name: str
    config: Mapping[str, Any]
    runs: tuple[int, ...]
    """Positions in the list that was compared."""
    first: tuple[int, ...]
    """One of them for each seed: what curves are drawn from."""
    complete: tuple[int, ...]
    """Those of these that reached their last step; only they are scored."""

    @property
    def algorithm(self) -> str:
        return _algorithm(self.config)

    @property
    def method(self) -> str:
        return _method(self.config)

    @property
    def model(self) -> str:
        return self.config.get("model", {}).get("path", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What `epo compare` prints and reports draw."""

    runs: Sequence[ComparedRun]
    arms: Sequence[Arm]
    baseline: str
    window: float
    notes: list[str] = field(default_factory=list[str])

    def page(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        names = {arm.name: arm for arm in self.arms}
        table = [self._row(arm, split) for split in [*self._splits(), TRAINING] for arm in self.arms]
        return {
            "baseline": self.baseline,
            "arms": [self._arm(arm) for arm in self.arms],
            "window": self.window,
            "confidence": CONFIDENCE,
            "table": [row for row in table if row is not None],
            "curves": self._curves(),
            "figures": paper_figures(
                {name: (arm.algorithm, arm.method) for name, arm in names.items()},
                splits=self._splits(),
                suite=str(self.arms[0].config["environment"].get("suite")),
            ),
            "notes": self.notes,
        }

    def baseline_of(self, arm: Arm) -> Arm | None:
        """What `arm` is measured against: its algorithm without entropy control, else the overall baseline.

        Only on the same tasks, with the same model and budget; None where there is no such arm.
        """
        if arm.method == "none":
            return None
        comparable = [a for a in self.arms if a is not arm and _conditions(a.config) == _conditions(arm.config)]
        own = [a for a in comparable if a.method == "none" and a.algorithm == arm.algorithm]
        overall = [a for a in comparable if a.name == self.baseline]
        return next(iter([*own, *overall]), None)

    def scores(self, arm: Arm, split: str) -> dict[str, NDArray[np.float64]]:
        """Success in the window: for each task set, one value for each complete run that was evaluated on `split`."""
        return self._by_task_set(arm, lambda run: window_mean(run, split, window=self.window))

    def _best(self, arm: Arm, split: str) -> dict[str, NDArray[np.float64]]:
        return self._by_task_set(arm, lambda run: max(success_by_step(run, split).values(), default=None))

    def _by_task_set(self, arm: Arm, score: Any) -> dict[str, NDArray[np.float64]]:
        values: dict[str, list[float]] = {}
        for index in arm.complete:
            if (value := score(self.runs[index])) is not None:
                values.setdefault(_task_set(self.runs[index].config), []).append(value)
        return {key: np.array(found) for key, found in values.items()}

    def _row(self, arm: Arm, split: str) -> dict[str, Any] | None:
        scores = self.scores(arm, split)
        if not scores:
            return None
        together, best = np.concatenate(list(scores.values())), self._best(arm, split)
        interval = bootstrap_interval(list(scores.values()), confidence=CONFIDENCE)
        mean, relative, better, baseline = float(together.mean()), None, None, self.baseline_of(arm)
        if baseline is not None:
            theirs = self.scores(baseline, split)
            if theirs:
                relative = relative_change(mean, float(np.concatenate(list(theirs.values())).mean()))
            pairs = [(scores[key], theirs[key]) for key in scores if key in theirs]
            if any(min(map(len, pair)) >= 2 for pair in pairs):  # one pair of runs is no probability
                better = improvement_probability(pairs)
        return {
            "arm": arm.name,
            "split": split,
            "seeds": len(together),
            "best_mean": float(np.concatenate(list(best.values())).mean()),
            "window_mean": mean,
            "low": None if interval is None else interval[0],
            "high": None if interval is None else interval[1],
            "iqm": float(interquartile_mean(together)),
            "relative": relative,
            "improvement_probability": better,
            "baseline": None if baseline is None else baseline.name,
            "environment_steps": self._mean(arm, environment_steps),
            "tokens": self._mean(arm, sampled_tokens),
        }

    def _arm(self, arm: Arm) -> dict[str, Any]:
        oscillation = [v for i in arm.complete if (v := oscillation_of_entropy(self.runs[i])) is not None]
        interval = bootstrap_interval([np.array(oscillation)]) if oscillation else None
        return {
            "name": arm.name,
            "algorithm": arm.algorithm,
            "method": arm.method,
            "model": arm.model,
            "runs": list(arm.runs),
            "seeds": [self.runs[i].seed for i in arm.runs],
            "complete": list(arm.complete),
            "environment_steps": self._mean(arm, environment_steps),
            "tokens": self._mean(arm, sampled_tokens),
            "entropy": self._mean(arm, lambda run: last_part(run, "entropy/mean", window=self.window)),
            "entropy_oscillation": float(np.mean(oscillation)) if oscillation else None,
            "oscillation_low": None if interval is None else interval[0],
            "oscillation_high": None if interval is None else interval[1],
        }

    def _mean(self, arm: Arm, value: Any) -> float | None:
        found = [v for i in arm.complete if (v := value(self.runs[i])) is not None]
        return float(np.mean(found)) if found else None

    def _splits(self) -> list[str]:
        return list(dict.fromkeys(p["split"] for run in self.runs for e in run.evaluations for p in e["panels"]))

    def _curves(self) -> dict[str, dict[str, Any]]:
        curves: dict[str, dict[str, Any]] = {}
        series: dict[str, Any] = {name: lambda run, name=name: metric_by_step(run, name) for name in CURVES}
        for split in self._splits():
            series[f"eval/{split}/success"] = lambda run, split=split: success_by_step(run, split)
        for name, read in series.items():
            for arm in self.arms:
                if (drawn := _curve([read(self.runs[i]) for i in arm.first])) is not None:
                    curves.setdefault(name, {})[arm.name] = drawn
        return curves


def arm_name(config: Config | Mapping[str, Any]) -> str:
    """What a run is called by what it does: its algorithm, and its entropy control if it has one."""
    tree = config.model_dump(mode="json") if isinstance(config, Config) else config
    algorithm, method = _algorithm(tree), _method(tree)
    return algorithm if method == "none" else f"{algorithm} + {method}"


def compare(runs: Sequence[ComparedRun], *, window: float = 0.2) -> Comparison:
    """Group runs into arms.

    Args:
        window: share of the steps, at the end of training, whose evaluations count.

    Raises:
        UserError: no runs.
    """
    if not runs:
        raise UserError("there is no run to compare: give run folders, or the folder of a sweep")
    # Without entropy control first, and seeds in order, in whatever order the folders came.
    ordered = sorted(range(len(runs)), key=lambda i: (_method(runs[i].config) != "none", runs[i].seed or 0))
    groups: dict[str, list[int]] = {}
    for index in ordered:
        groups.setdefault(json.dumps(_experiment(runs[index].config), sort_keys=True), []).append(index)
    notes: list[str] = []
    arms: list[Arm] = []
    for name, members in zip(_names(runs, list(groups.values())), groups.values(), strict=True):
        seeds = [runs[i].seed for i in members]
        first = tuple(i for place, i in enumerate(members) if seeds[place] not in seeds[:place])
        if again := [runs[i].name for i in members if i not in first]:
            notes.append(f"{name}: same settings and seed as another run, and left out: {', '.join(again)}")
        complete = tuple(i for i in first if _is_complete(runs[i]))
        if left_out := [runs[i].name for i in first if i not in complete]:
            notes.append(f"{name}: not at its last step yet and left out of the table: {', '.join(left_out)}")
        arms.append(Arm(name=name, config=runs[members[0]].config, runs=tuple(members), first=first, complete=complete))
    if len(plays := {_episodes(arm.config) for arm in arms}) > 1:
        notes.append(f"the arms' budgets differ: {', '.join(str(n) for n in sorted(plays))} episodes of training")
    scored = {arm.name: sorted(runs[i].seed or 0 for i in arm.complete) for arm in arms if arm.complete}
    if len({tuple(seeds) for seeds in scored.values()}) > 1:
        named = "; ".join(f"{name}: {', '.join(map(str, seeds))}" for name, seeds in scored.items())
        notes.append(f"the arms' seeds differ, and seeds differ in their warm start: {named}")
    notes += _environment_notes(runs)
    baseline = next((arm for arm in arms if arm.method == "none"), arms[0])
    return Comparison(runs=runs, arms=arms, baseline=baseline.name, window=window, notes=notes)


def _environment_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """A note for each task set on whose environment the runs' records disagree."""
    records: dict[str, list[tuple[str, object]]] = {}
    for run in runs:
        records.setdefault(_task_set(run.config), []).append((run.name, (run.provenance or {}).get("suite")))
    return [
        f"the runs did not have the same environment, suite {json.loads(task_set)[0]}: {'; '.join(facts)}"
        for task_set, recorded in records.items()
        if (facts := differing_facts(recorded))
    ]


def success_by_step(run: ComparedRun, split: str) -> dict[int, float]:
    """Success on a split's panel, by RL steps done; with `TRAINING`, of the episodes that were learned from."""
    if split == TRAINING:
        return metric_by_step(run, "success/train")
    panels = [(e["step"], p) for e in run.evaluations for p in e["panels"] if p["split"] == split]
    return {step: p["success"] for step, p in panels if isinstance(p.get("success"), int | float)}


def metric_by_step(run: ComparedRun, name: str) -> dict[int, float]:
    """A metric by step, where it is there and finite."""
    values = run.metrics.get(name, ())
    return {step: value for step, value in zip(run.steps, values, strict=False) if value is not None}


def window_mean(run: ComparedRun, split: str, *, window: float) -> float | None:
    """Mean success over the evaluations in the last `window` of the run's steps; None without any."""
    first, last = _before_window(run, window), run.total_steps
    values = [v for step, v in success_by_step(run, split).items() if step > first or step == last]
    return float(np.mean(values)) if values else None


def _before_window(run: ComparedRun, window: float) -> float:
    """The last step before the window; rounded, or 0.34 of 50 steps would begin a step too early."""
    return round((1 - window) * run.total_steps, 9)


def last_part(run: ComparedRun, name: str, *, window: float) -> float | None:
    """Mean of a metric over the last `window` of the run's steps."""
    first = _before_window(run, window)
    values = [v for step, v in metric_by_step(run, name).items() if step > first]
    return float(np.mean(values)) if values else None


def oscillation_of_entropy(run: ComparedRun) -> float | None:
    """Standard deviation of the change of mean entropy from one step to the next, over the whole run, in nats."""
    values = list(metric_by_step(run, "entropy/mean").values())
    return float(np.std(np.diff(values))) if len(values) >= 3 else None


def environment_steps(run: ComparedRun) -> float | None:
    """Turns played in training, evaluations not counted."""
    turns, episodes = metric_by_step(run, "turns/mean"), metric_by_step(run, "episodes")
    return sum(turns[step] * episodes[step] for step in turns if step in episodes) if turns else None


def sampled_tokens(run: ComparedRun) -> float | None:
    """Tokens drawn in training, evaluations not counted."""
    tokens = metric_by_step(run, "tokens/sampled")
    return sum(tokens.values()) if tokens else None


def _curve(series: Sequence[Mapping[int, float]]) -> dict[str, Any] | None:
    """Mean and pointwise interval over the runs that have the step; `runs` says how many do."""
    steps = sorted({step for one in series for step in one})
    if not steps:
        return None
    values = [np.array([one[step] for one in series if step in one]) for step in steps]
    low: list[float | None] = [None] * len(steps)
    high = low.copy()
    for count in {len(v) for v in values if len(v) > 1}:  # steps that as many runs have share their draws
        places = [place for place, v in enumerate(values) if len(v) == count]
        bounds = pointwise_intervals(np.stack([values[place] for place in places]), confidence=CONFIDENCE)
        for place, (lower, upper) in zip(places, bounds.tolist(), strict=True):
            low[place], high[place] = lower, upper
    return {
        "steps": steps,
        "mean": [float(v.mean()) for v in values],
        "low": low,
        "high": high,
        "runs": [len(v) for v in values],
    }


def _is_complete(run: ComparedRun) -> bool:
    last = max((e["step"] for e in run.evaluations), default=-1)
    return last >= run.total_steps


def _experiment(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that makes an arm."""
    try:
        # An older version had fewer options: with their defaults.
        tree = parse_config(config).model_dump(mode="json")
    except UserError:
        tree = json.loads(json.dumps(config))
    for name in _NO_OTHER_ARM:
        section, _, key = name.rpartition(".")
        holder = tree.get(section) if section else tree
        if isinstance(holder, dict):
            cast("dict[str, Any]", holder).pop(key, None)
    return tree


def _algorithm(config: Mapping[str, Any]) -> str:
    return str(config["algorithm"].get("name", "ppo"))


def _method(config: Mapping[str, Any]) -> str:
    return str(config["entropy"].get("method", "none"))


def _task_set(config: Mapping[str, Any]) -> str:
    environment = config["environment"]
    return json.dumps([environment.get("suite"), environment.get("options")], sort_keys=True)


def _conditions(config: Mapping[str, Any]) -> tuple[str, str, int]:
    """What two arms must share before their success can be divided: task set, model, episodes of training."""
    return _task_set(config), str(config.get("model", {}).get("path", "")), _episodes(config)


def _episodes(config: Mapping[str, Any]) -> int:
    rollout = config.get("rollout", {})
    return config["steps"] * rollout.get("tasks_per_step", 0) * rollout.get("group_size", 1)


def _names(runs: Sequence[ComparedRun], groups: Sequence[Sequence[int]]) -> list[str]:
    """A name for each arm; where algorithm and method do not tell two apart, with what does in brackets."""
    plain = [arm_name(runs[group[0]].config) for group in groups]
    flat = [_flat(_experiment(runs[group[0]].config)) for group in groups]
    names: list[str] = []
    for index, name in enumerate(plain):
        alike = [j for j, other in enumerate(plain) if other == name]
        if len(alike) == 1:
            names.append(name)
            continue
        keys = [key for key in flat[index] if len({repr(flat[j].get(key)) for j in alike}) > 1]
        candidates = [
            ({runs[i].name.rpartition("--seed")[0] for i in groups[j]} for j in alike),  # the arm's name in its sweep
            ({", ".join(f"{key}={flat[j].get(key)}" for key in keys[:2])} if len(keys) <= 2 else set() for j in alike),
            ({str(runs[i].config.get("name", "")) for i in groups[j]} for j in alike),  # the recipe's
            ({", ".join(runs[i].name for i in groups[j])} for j in alike),
        ]
        for found in map(list, candidates):
            if all(len(one) == 1 and "" not in one for one in found) and len(set[str]().union(*found)) == len(alike):
                names.append(f"{name} ({found[alike.index(index)].pop()})")
                break
        else:
            names.append(f"{name} ({index})")
    return names


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
