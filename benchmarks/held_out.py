"""Success of trained runs on task types that they never trained on, one entry for each run.

    python benchmarks/held_out.py sweeps/cascade/*--seed* sweeps/learning/*--seed*

Plays, of every run folder given, the last checkpoint with

    epo eval RUN environment.options.held_out=[...] environment.workers=4 --split held_out --episodes 48 --json

on the four types of `TYPES`, and writes the panels as a list, with the names of sweep and run, to
benchmarks/results/held_out_types.json. Needs the runs with their checkpoints, which are not kept here: the sweeps come
first. A run without a checkpoint ends it with what `epo eval` says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from epo.files import write_atomically

RESULT = Path(__file__).parent / "results" / "held_out_types.json"
TYPES = ("find-animal", "find-living-thing", "find-plant", "find-non-living-thing")
SPLIT = "held_out"


def command(run: Path, *, episodes: int, workers: int) -> list[str]:
    """Arguments of `epo`."""
    held_out = f"environment.options.held_out=[{','.join(TYPES)}]"
    how = [f"environment.workers={workers}", "--split", SPLIT, "--episodes", str(episodes), "--json"]
    return ["eval", str(run), held_out, *how]


def entry(run: Path, printed: str) -> dict[str, Any]:
    """What is kept of what `epo eval --json` printed of a run."""
    panel = json.loads(printed)[SPLIT]
    return {"sweep": run.parent.name, "run": run.name} | {k: v for k, v in panel.items() if k != "split"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders inside the folders of their sweeps")
    parser.add_argument("--episodes", type=int, default=48)
    parser.add_argument("--workers", type=int, default=4, help="environments at once")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    entries: list[dict[str, Any]] = []
    for run in (path.resolve() for path in options.runs):
        arguments = command(run, episodes=options.episodes, workers=options.workers)
        played = subprocess.run([sys.executable, "-m", "epo", *arguments], stdout=subprocess.PIPE, text=True)
        if played.returncode != 0:
            sys.exit(f"{run.name}: epo eval ended with code {played.returncode}; nothing was written")
        entries.append(entry(run, played.stdout))
        print(f"{run.parent.name}/{run.name}: {entries[-1]['success']:.3f}", flush=True)
    write_atomically(options.out, json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
