"""Made-up runs for tests of the page: every metric, evaluations, entropies by turn, alarms; always the same.

The story: without entropy control the entropy of late turns climbs away and success stalls; with EPO it stays inside.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from viewer_run import Vocabulary, make_records

from epo.evaluation.statistics import wilson_interval
from epo.recipe import load_config
from epo.reporting.health import ALARMS
from epo.reporting.trajectories import index_entry

TURNS = 8
EPISODES = 50  # shares are whole per cents
STAGES = ("environment", "prefill", "decode", "sampling_rest", "old_logprobs", "values", "update", "other")
PROVENANCE = {
    "packages": {"epo-agents": "0.1.0", "torch": "2.13.0", "peft": None},
    "python": "3.11.7",
    "commit": "0" * 40,
    "suite": {"name": "corridor", "length": 5},
    "machine": {"system": "Linux", "cores": 2, "torch_threads": 2},
    "command": ["epo", "train", "base", "environment.options={length: 5}"],
}


def make_run(
    path: Path,
    *,
    method: str = "epo",
    seed: int = 0,
    steps: int = 30,
    every: int = 5,
    trajectories: bool = False,
    finished: bool = True,
    name: str | None = None,
) -> Path:
    """Write the folder of a run.

    Args:
        method: `epo`, or `none` for the run whose entropy cascades.
        every: steps between evaluations.
        trajectories: with files of trajectories for the first and the last step.
    """
    rng = random.Random(f"{method}/{seed}")
    path.mkdir(parents=True)
    config = load_config("base", [
        f"name={name or path.name}", f"seed={seed}", f"steps={steps}", f"entropy.method={method}",
        "environment.suite=corridor", "evaluation.splits=[iid, ood]", f"evaluation.every={every}",
        *(["entropy.coefficient=0.001", "entropy.alpha=0.05", "entropy.kappa_low=0.5"] if method == "epo" else []),
    ])  # fmt: skip
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (path / "provenance.json").write_text(json.dumps(PROVENANCE), encoding="utf-8")
    if finished:
        (path / "summary.json").write_text('{"finished": true, "wall_seconds": 634.0}', encoding="utf-8")
    lines = metric_lines(rng, method=method, steps=steps)
    _write(path / "metrics.jsonl", lines)
    _write(
        path / "eval.jsonl", [evaluation(rng, step, method=method, steps=steps) for step in range(0, steps + 1, every)]
    )
    vocabulary = Vocabulary()
    (path / "trajectories").mkdir()
    index = []
    for line in lines:
        step = line["step"]
        records = make_records(vocabulary, step=step, groups=2, members=2)
        entry = index_entry(records)
        entry["turn_entropy"], entry["turn_count"] = turn_entropies(rng, line)
        index.append(entry)
        if trajectories and step in (1, steps):
            _write(path / "trajectories" / f"step_{step:06d}.jsonl", records)
    _write(path / "trajectories" / "index.jsonl", index)
    (path / "vocabulary.json").write_text(json.dumps(vocabulary.pieces), encoding="utf-8")
    return path


def skill(step: float, *, method: str, steps: int) -> float:
    """Share of tasks that are solved after so many steps."""
    top = 0.85 if method != "none" else 0.55
    return 0.08 + (top - 0.08) / (1 + math.exp(-10 * (step / steps - 0.4)))


def metric_lines(rng: random.Random, *, method: str, steps: int) -> list[dict[str, Any]]:
    lines = []
    history: list[float] = []
    for step in range(1, steps + 1):
        done = step / steps
        rate = min(1.0, max(0.0, skill(step, method=method, steps=steps) + rng.gauss(0, 0.05)))
        early = 0.95 - 0.35 * done + rng.gauss(0, 0.02)
        climb = 0.9 * max(0.0, done - 0.35) ** 1.2 if method == "none" else 0.05
        late = early + climb + abs(rng.gauss(0, 0.03 + 0.2 * climb))
        mean = (early + late) / 2
        line = {
            "step": step,
            "success/train": rate,
            "reward/mean": 10 * rate - 0.3,
            "score/train": min(1.0, rate + 0.1),
            "episodes": 64.0,
            "turns/mean": 7.5 - 3 * rate,
            "turns/invalid": 0.2 * math.exp(-4 * done),
            "turns/not_understood": 0.3 * math.exp(-3 * done),
            "response/tokens": 9 + 4 * climb + rng.gauss(0, 0.3),
            "groups/all_equal": 0.1 + 0.3 * done,
            "entropy/mean": mean,
            "entropy/turn_early": early,
            "entropy/turn_late": late,
            "entropy/oscillation": 0.02 + 0.1 * climb,
            "policy/kl": 0.002 + abs(rng.gauss(0, 0.001)),
            "policy/clip_fraction": 0.02 + abs(rng.gauss(0, 0.01)),
            "policy/grad_norm": 0.5 + abs(rng.gauss(0, 0.1)) + (4 if rng.random() < 0.03 else 0),
            "value/explained_variance": 0.8 * done + rng.gauss(0, 0.05),
            "value/grad_norm": 0.4,
            "sampler/mismatch_kl": 3e-13 * (1 + rng.random()),
            "update/learning_rate": 1e-5 * (1 - 0.9 * done),
            "tokens/sampled": 2400.0 + 400 * rng.random(),
            "tokens/trained": 2300.0,
            "tokens/processed": 21000.0,
            "tokens/per_second": 330.0 + rng.gauss(0, 10),
            "stop/success": rate,
            "stop/failure": 0.3 * (1 - rate),
            "stop/max_turns": 0.7 * (1 - rate),
            "stop/context_overflow": 0.0,
        }
        line |= {f"time/{stage}": 0.4 + 0.3 * i * rng.random() for i, stage in enumerate(STAGES)}
        line["time/step"] = sum(line[f"time/{stage}"] for stage in STAGES)
        if method == "epo":
            line |= {"epo/beta": 1 + math.exp(-6 * done), "epo/effective_weight": 0.00098, "epo/smoothing": 0.01}
            line |= {"entropy/below": 0.12 + 0.05 * rng.random(), "entropy/above": 0.08 * rng.random()}
            if history:
                line["entropy/reference"] = sum(history) / len(history)
        history.append(mean)
        line |= {f"health/{name}": 0.0 for name in ALARMS}
        line["health/cascade"] = float(late - early > 0.3)
        line["health/gradient_spike"] = float(line["policy/grad_norm"] > 3)
        line["health/invalid_actions"] = float(step in (2, 3))
        lines.append(line)
    return lines


def evaluation(rng: random.Random, step: int, *, method: str, steps: int) -> dict[str, Any]:
    panels = []
    for split, share in (("iid", 1.0), ("ood", 0.8)):
        chance = share * skill(step, method=method, steps=steps)
        solved = sum(rng.random() < chance for _ in range(EPISODES))
        low, high = wilson_interval(solved, EPISODES)
        panels.append({
            "split": split, "success": solved / EPISODES, "low": low, "high": high, "episodes": EPISODES,
            "score": solved / EPISODES, "turns": 6.0, "invalid": 0.01, "errors": 0, "by_goal": {},
        })  # fmt: skip
    return {"step": step, "panels": panels}


def turn_entropies(rng: random.Random, line: dict[str, Any]) -> tuple[list[float], list[int]]:
    """From the entropy of early turns to that of late ones; fewer episodes reach late turns."""
    early, late = line["entropy/turn_early"], line["entropy/turn_late"]
    values = [early + (late - early) * k / (TURNS - 1) + rng.gauss(0, 0.02) for k in range(TURNS)]
    return values, [round(64 * (1 - 0.6 * line["success/train"] * k / TURNS)) for k in range(TURNS)]


def _write(file: Path, entries: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
