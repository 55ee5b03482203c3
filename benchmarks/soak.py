"""Ten thousand resets of real environments in one process, and what grows meanwhile.

Three pools live at once: ScienceWorld (a JVM for each worker), household games (ALFWorld's engine) and the corridor. In
rounds, each plays its share of short episodes with seeded actions, sense and nonsense; after each round the memory of
this process, of the workers and of the JVMs is read from /proc, and the file descriptors, processes and temporary files
counted. Workers are not recycled here: growth is to be seen, not mended.

    python benchmarks/soak.py                       # 10,000 resets
    python benchmarks/soak.py --rounds 10           # a tenth
    python benchmarks/soak.py --figure              # draw docs/images/soak.svg again from the data

The verdict is a slope over the second half of the rounds, per 1,000 resets, with a 95 % interval: a straight line
through the means of ten blocks of rounds (neighbouring rounds are not independent), Student's t with 8 degrees of
freedom. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from epo.environments.pool import EnvPool, Job, Request
from epo.environments.registry import make_suite
from epo.files import write_atomically
from epo.types import Observation, Step, Task

RESULT = Path(__file__).parent / "results" / "soak.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "soak.svg"
STEPS = 4
"""Actions in each episode."""
BLOCKS = 10
T_975 = 2.306
"""Student's t, 8 degrees of freedom."""

SUITES: dict[str, tuple[dict[str, Any], int]] = {
    "scienceworld": ({}, 30),
    "household": ({"counts": {"train": 18, "iid": 1, "ood": 1}, "max_receptacles": 12}, 30),
    "corridor": ({}, 40),
}
"""Options, and resets in each round."""
WORKERS = 2
WORDS = [
    "look around",
    "inventory",
    "open door to kitchen",
    "go to hallway",
    "wait1",
    "focus on door",
    "teleport to kitchen",
    "push",
    "pull",
    "go to countertop 1",
    "open drawer 1",
    "",
    "\ud800<|im_end|>",
    "дверь 門 🚪",
    "x" * 2000,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of 100 resets each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the round that exceeds this")
    parser.add_argument("--until", type=int, help="trends of the samples up to so many resets only")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--figure", action="store_true", help="only draw the figure of the data in --out")
    arguments = parser.parse_args()
    if not arguments.figure:
        with tempfile.TemporaryDirectory(prefix="epo-soak-") as scratch:
            os.environ["TMPDIR"] = scratch  # the workers' temporary files, and those of their engines
            tempfile.tempdir = scratch
            result = soak(arguments.rounds, arguments.minutes, Path(scratch))
        write_atomically(arguments.out, json.dumps(result, indent=1) + "\n")
    result = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.until:
        samples = [sample for sample in result["samples"] if sample["resets"] <= arguments.until]
        result["trends"] = {key: trend(samples, key) for key in result["trends"]}
    draw(result, FIGURE if arguments.out == RESULT else arguments.out.with_suffix(".svg"))
    print(report(result))


def soak(rounds: int, minutes: float, scratch: Path) -> dict[str, Any]:
    tasks: dict[str, Sequence[Task]] = {}
    for name, (options, _) in SUITES.items():
        suite = make_suite(name, options)
        suite.prepare()
        tasks[name] = suite.tasks("train")
    rng, began = random.Random(0), time.monotonic()
    samples: list[dict[str, Any]] = []
    counts = dict.fromkeys(SUITES, 0)
    with contextlib.ExitStack() as stack:
        pools = {
            name: stack.enter_context(EnvPool(name, options, size=WORKERS)) for name, (options, _) in SUITES.items()
        }
        for number in range(1, rounds + 1):
            for name, pool in pools.items():
                share = SUITES[name][1]
                pool.map(episode, [(rng.choice(tasks[name]), rng.random()) for _ in range(share)])
                counts[name] += share
            samples.append({"round": number, "resets": sum(counts.values()), **measure(pools, scratch)})
            if number % 5 == 0 or number == 1:
                print(f"{time.monotonic() - began:7.0f} s", json.dumps(samples[-1]), flush=True)
            if time.monotonic() - began > minutes * 60:
                break
        stats = {name: pool.stats() for name, pool in pools.items()}
    return {
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "resets": counts,
        "steps_per_episode": STEPS,
        "workers_per_suite": WORKERS,
        "wall_seconds": round(time.monotonic() - began),
        "restarts": {name: s.restarts for name, s in stats.items()},
        "failures": {name: s.failures for name, s in stats.items()},
        "temporary_files_left_after_close": sum(1 for _ in scratch.rglob("*")),
        "trends": {key: trend(samples, key) for key in samples[-1] if key not in ("round", "resets")},
        "samples": samples,
    }


def episode(item: tuple[Task, float]) -> Job[int]:
    task, seed = item
    rng = random.Random(seed)
    observation: Observation = yield Request("reset", task)
    for _ in range(STEPS):
        offered = observation.admissible_actions
        action = rng.choice(offered) if offered and rng.random() < 0.7 else rng.choice(WORDS)
        step: Step = yield Request("step", action)
        if step.terminated or step.truncated:
            break
        observation = step.observation
    return 0


def measure(pools: dict[str, EnvPool], scratch: Path) -> dict[str, float]:
    """MiB of resident memory by kind of process, and counts, at this moment."""
    sessions = {slot.worker.pid: name for name, pool in pools.items() for slot in pool._slots if slot.worker}
    found = {"main_mib": mib(os.getpid()), **{f"{name}_workers_mib": 0.0 for name in pools}, "jvms_mib": 0.0}
    pids = [os.getpid()]
    for pid, session, command in processes():
        if (name := sessions.get(session)) is not None:
            found["jvms_mib" if command == "java" else f"{name}_workers_mib"] += mib(pid)
            pids.append(pid)
    open_files = {pid: descriptors(pid) for pid in pids}
    found["processes"] = len(pids)
    found["descriptors"] = sum(map(len, open_files.values()))
    found["temporary_files"] = sum(1 for path in scratch.rglob("*") if path.is_file())
    # Files that have no name any more and take room as long as someone holds them.
    held = {target for files in open_files.values() for target in files if str(scratch) in target and "(del" in target}
    found["unnamed_open_files"] = len(held)
    found["unnamed_mapped_files"] = len({line for pid in pids for line in mapped(pid) if str(scratch) in line})
    return {key: round(value, 2) for key, value in found.items()}


def processes() -> Iterator[tuple[int, int, str]]:
    """Process id, session and command name of everything in /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = stat.read_text().partition(" (")
            command, _, fields = rest.rpartition(") ")
            yield int(pid), int(fields.split()[3]), command


def mib(pid: int) -> float:
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def descriptors(pid: int) -> list[str]:
    targets: list[str] = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                targets.append(f"{pid}:{os.readlink(link)}")
    return targets


def mapped(pid: int) -> set[str]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        return {f"{pid}:{line.split(maxsplit=5)[-1]}" for line in lines if line.endswith("(deleted)")}
    return set()


def trend(samples: list[dict[str, Any]], key: str) -> dict[str, float] | None:
    """Start, end, and the slope per 1,000 resets over the second half with its 95 % interval."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2 * BLOCKS:
        return None
    blocks = np.array_split(np.array([[s["resets"], s[key]] for s in half], dtype=float), BLOCKS)
    x, y = np.array([block.mean(axis=0) for block in blocks]).T
    x = (x - x.mean()) / 1000
    slope = float((x * y).sum() / (x * x).sum())
    residuals = y - y.mean() - slope * x
    error = T_975 * float(np.sqrt((residuals**2).sum() / (BLOCKS - 2) / (x * x).sum()))
    return {
        "first": samples[0][key],
        "middle": half[0][key],
        "last": samples[-1][key],
        "slope_per_1000": round(slope, 3),
        "low": round(slope - error, 3),
        "high": round(slope + error, 3),
    }


def report(result: dict[str, Any]) -> str:
    """The table of the trends, in Markdown."""
    lines = [
        "| measured | first round | half-way | last round | slope per 1,000 resets, second half (95 %) |",
        "|" + " --- |" * 5,
    ]
    for key, found in result["trends"].items():
        if found:
            lines.append(
                f"| {key.replace('_', ' ')} | {found['first']:g} | {found['middle']:g} | {found['last']:g} | "
                f"{found['slope_per_1000']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f}) |"
            )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    samples = result["samples"]
    resets = [sample["resets"] for sample in samples]
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, keys) in zip(
        figure.subplots(2, 2).flat,
        [
            ("JVMs, resident MiB", ["jvms_mib"]),
            ("Python, resident MiB", ["main_mib", *(f"{name}_workers_mib" for name in SUITES)]),
            ("file descriptors", ["descriptors"]),
            (
                "processes and temporary files",
                ["processes", "temporary_files", "unnamed_open_files", "unnamed_mapped_files"],
            ),
        ],
        strict=True,
    ):
        for key in keys:
            axes.plot(resets, [s[key] for s in samples], label=key.removesuffix("_mib").replace("_", " "))
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("resets", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False, loc="center right")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
