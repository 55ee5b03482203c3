"""A short training run on every adapter to other people's environments, for real, from nothing.

    python benchmarks/adapters.py                    # all six; some minutes on two cores
    python benchmarks/adapters.py --only openenv mcp
    python benchmarks/adapters.py --table            # the table of docs/environments-yours.md

Writes config.yaml, metrics.jsonl, eval.jsonl and summary.json of every run to benchmarks/results/adapters/. The same
model of a third of a million parameters, made from nothing, imitates an expert briefly and then takes `STEPS` steps of
PPO + EPO. Where the adapter has no expert, `_adapter_experts.py` adds one. Needs what `make test-adapters` installs;
`$OPENENV_PYTHON` names an interpreter that has the package openenv, by default `.venv-openenv/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "adapters"
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "environments")]

import servers  # noqa: E402
from rich.console import Console  # noqa: E402

from epo.environments import register_suite  # noqa: E402
from epo.recipe import parse_config  # noqa: E402
from epo.reporting.terminal.console import ConsoleObserver  # noqa: E402
from epo.training.session import train_run  # noqa: E402

STEPS = 30
TASKS_FILE = "benchmarks/results/adapters/mcp/tasks.jsonl"
THINGS = ["key", "ring", "coin", "lamp", "map", "book", "spoon", "candle", "rope", "hat", "stamp", "button"]
NEW_THINGS = ["paint", "needle", "ladder", "violin"]


for name, target in [("lake", "LakeSuite"), ("guess", "GuessSuite"), ("dial", "DialSuite")]:
    register_suite(name, f"_adapter_experts:{target}")


def write_drawer_tasks() -> None:
    """Put a thing into one of three drawers; `iid` has pairs that training has not, `ood` new words."""
    pairs = [(thing, drawer) for thing in THINGS for drawer in servers.DRAWERS]
    random.Random(0).shuffle(pairs)
    splits = {
        "train": pairs[12:],
        "iid": pairs[:12],
        "ood": [(thing, drawer) for thing in NEW_THINGS for drawer in servers.DRAWERS],
    }
    lines: list[str] = []
    for split, chosen in splits.items():
        for thing, drawer in chosen:
            place = {"thing": thing, "drawer": drawer}
            task = {
                "id": f"{thing}-{drawer}",
                "split": split,
                "kind": "put",
                "goal": f"Put the {thing} into the {drawer} drawer.",
                "check": {"tool": "is_in", "arguments": place},
                "demonstration": [{"tool": "put", "arguments": place}],
            }
            lines.append(json.dumps(task))
    Path(TASKS_FILE).parent.mkdir(parents=True, exist_ok=True)
    Path(TASKS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def dial() -> Iterator[dict[str, Any]]:
    with servers.dial() as options:
        yield {**options, "train": 64, "iid": 64, "ood": 64}


@contextmanager
def drawers() -> Iterator[dict[str, Any]]:
    write_drawer_tasks()
    yield {
        "tasks": TASKS_FILE,
        "command": ["python", "tests/environments/mcp_drawers.py"],
        "tools": ["put"],
        "reset_tool": "empty",
    }


# What is played, the longest episode, and how much is imitated: little, so that something is left to learn.
CASES: dict[str, tuple[str, AbstractContextManager[dict[str, Any]], dict[str, Any]]] = {
    "gymnasium": (
        "lake",
        nullcontext(
            {
                "id": "FrozenLake-v1",
                "options": {"success_rate": 0.8},
                "actions": ["left", "down", "right", "up"],
                "goal": "Reach G.",
                "iid": 64,
            }
        ),
        {"environment.max_turns": 20, "imitation.demonstrations": 32, "imitation.batches": 30},
    ),
    "textworld": (
        "textworld",
        nullcontext({"rooms": 3, "objects": 6, "quest_length": 2, "train": 24, "iid": 12, "ood": 12}),
        {"environment.max_turns": 8, "imitation.demonstrations": 24, "imitation.batches": 150},
    ),
    "reasoning_gym": (
        "reasoning_gym",
        nullcontext(
            {
                "dataset": "chain_sum",
                "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
                "ood_options": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
            }
        ),
        {"environment.max_turns": 1, "imitation.demonstrations": 128, "imitation.batches": 300},
    ),
    "textarena": (
        "guess",
        nullcontext(
            {
                "id": "GuessTheNumber-v0",
                "options": {"max_number": 7, "max_turns": 3},
                "ood_options": {"max_number": 15, "max_turns": 4},
                "iid": 64,
                "ood": 64,
            }
        ),
        {"environment.max_turns": 4, "imitation.demonstrations": 32, "imitation.batches": 20},
    ),
    "openenv": (
        "dial",
        dial(),
        {"environment.max_turns": 10, "imitation.demonstrations": 8, "imitation.batches": 30},
    ),
    "mcp": (
        "mcp",
        drawers(),
        {
            "environment.max_turns": 3,
            "imitation.demonstrations": 24,
            "imitation.batches": 300,
            "agent.max_response_tokens": 40,
        },
    ),
}


def configuration(name: str, suite: str, options: dict[str, Any], changes: dict[str, Any], splits: list[str]) -> Any:
    tree: dict[str, Any] = {
        "name": name,
        "steps": STEPS,
        "environment": {"suite": suite, "options": options, "workers": 2},
        "agent": {"context": "transcript", "format": "action", "prompt": "brief", "max_response_tokens": 8},
        "model": {
            "path": "tiny",
            "device": "cpu",
            "threads": 1,
            "max_context": 1024,
            "tiny": {
                "vocabulary_size": 512,
                "hidden_size": 96,
                "layers": 2,
                "heads": 4,
                "intermediate_size": 288,
            },
        },
        "imitation": {"batch_size": 4, "learning_rate": 0.003},
        "rollout": {"tasks_per_step": 32},
        "algorithm": {"name": "ppo", "advantage": "turn", "gamma": 0.95, "lam": 0.9},
        "entropy": {"method": "epo"},
        "optimizer": {"learning_rate": 0.0006, "epochs": 2, "minibatches": 2},
        "evaluation": {"every": 0, "splits": splits, "episodes": 64},
        "record": {"alternatives": 0},
    }
    for path, value in changes.items():
        section, key = path.split(".")
        tree[section][key] = value
    return parse_config(tree)


def run(name: str, folder: Path) -> None:
    from epo.environments import make_suite

    suite, serving, changes = CASES[name]
    with serving as options:
        splits = [split for split in make_suite(suite, options).splits if split != "train"]
        config = configuration(name, suite, options, changes, splits)
        with ConsoleObserver(STEPS, Console(stderr=True)) as observer:
            train_run(config, folder / name, observer, resume=False)
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("config.yaml", "metrics.jsonl", "eval.jsonl"):
        shutil.copy(folder / name / file, kept / file)
    summary = json.loads((folder / name / "summary.json").read_text())
    told = {key: summary[key] for key in ("finished", "steps", "wall_seconds", "eval")}
    (kept / "summary.json").write_text(json.dumps(told, indent=1) + "\n")


def table() -> str:
    lines = [
        f"| adapter | panel | episodes | after imitation | after {STEPS} steps of RL |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in CASES:
        if not (RESULTS / name / "summary.json").is_file():
            continue
        steps = [json.loads(line) for line in (RESULTS / name / "metrics.jsonl").read_text().splitlines()]
        played = [sum(step["episodes"] for step in part) for part in (steps[:5], steps[-5:])]
        won = [sum(step["success/train"] * step["episodes"] for step in part) for part in (steps[:5], steps[-5:])]
        shares = [f"{rate / count:.2f}" for rate, count in zip(won, played, strict=True)]
        lines.append(f"| `{name}` | training, five steps | {played[0]:.0f} | {' | '.join(shares)} |")
        for split, panel in json.loads((RESULTS / name / "summary.json").read_text())["eval"].items():
            cells = [
                f"{panel[when]['success']:.2f} ({panel[when]['low']:.2f} to {panel[when]['high']:.2f})"
                for when in ("initial", "final")
            ]
            lines.append(f"| | `{split}` | {panel['final']['episodes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not arguments.table:
        with tempfile.TemporaryDirectory(prefix="epo-adapters-") as folder:
            for name in arguments.only:
                run(name, Path(folder))
    print(table())


if __name__ == "__main__":
    main()
