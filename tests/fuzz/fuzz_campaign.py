"""`make fuzz`: many cases at every target, counted into benchmarks/results/fuzz.json, with a table for the docs.

    python tests/fuzz/fuzz_campaign.py [--scale 0.1] [--only config_trees ...] [--out FILE]

A crash does not end it: each is told with the seed that makes it again, the target's file and this one unchanged.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "reporting")]

from fuzz_guard import Hang  # noqa: E402
from fuzz_targets import TARGETS, Target, throw_case  # noqa: E402

RESULT = HERE.parents[1] / "benchmarks" / "results" / "fuzz.json"


def campaign(target: Target, *, count: int, seed: int) -> dict[str, Any]:
    counts, crashes = Counter[str](), dict[str, dict[str, Any]]()
    began, computed = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="epo-fuzz-") as name, target.open(Path(name)) as throw:
        for number in range(count):
            try:
                verdict = throw_case(target, throw, random.Random(f"{target.name}/{seed}/{number}"), Path(name))
            except (Exception, Hang) as error:
                verdict = "crashed"
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "/src/epo/" in f.filename]
                where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
                kind = f"{type(error).__name__} in {where}"
                known = crashes.setdefault(kind, {"count": 0, "first": number, "message": str(error)[:300]})
                known["count"] += 1
            counts[verdict] += 1
    return {
        "what": target.what,
        "cases": count,
        **{verdict: counts[verdict] for verdict in ("accepted", "refused", "crashed")},
        "crashes": crashes,
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(time.process_time() - computed),  # of this process; others may have needed the machine
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of cases")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.out.is_file():
        results = json.loads(arguments.out.read_text())
    for name in arguments.only:
        target = TARGETS[name]
        count = max(1, round(target.full * arguments.scale))
        results[name] = found = campaign(target, count=count, seed=arguments.seed)
        print(name, {k: v for k, v in found.items() if k not in ("what", "crashes")}, flush=True)
        for kind, crash in found["crashes"].items():
            print(f"  {crash['count']} x {kind} (first: case {crash['first']}): {crash['message']}", flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(found["crashed"] for found in results.values()))


if __name__ == "__main__":
    main()
