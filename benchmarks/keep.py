"""Copy the finished runs of a sweep into benchmarks/results, with what tells how they were made and nothing large.

    python benchmarks/keep.py sweeps/cascade              # into benchmarks/results/cascade
    python benchmarks/keep.py sweeps/cascade --to kept    # into kept/cascade

Of every finished run config.yaml, eval.jsonl, metrics.jsonl and summary.json are copied as they are. Its
provenance.json is reduced to commit, packages, Python, suite and machine (system, cores, threads): no command and no
path. Unfinished runs are refused, each named, with exit code 1. A run that is kept already is left alone where it is
the same run, and is an error where it is another.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from epo.errors import UserError
from epo.files import new_folder

RESULTS = Path(__file__).parent / "results"
FILES = ("config.yaml", "eval.jsonl", "metrics.jsonl", "summary.json")
ORIGIN = ("commit", "packages", "python", "suite", "machine")


def why_not(run: Path) -> str | None:
    """What speaks against keeping a run; None where nothing does."""
    try:
        finished = json.loads((run / "summary.json").read_text(encoding="utf-8"))["finished"] is True
    except (OSError, ValueError, KeyError, TypeError):
        finished = False
    if not finished:
        return "not finished"
    missing = [name for name in (*FILES, "provenance.json") if not (run / name).is_file()]
    return f"without {', '.join(missing)}" if missing else None


def origin(run: Path) -> dict[str, Any]:
    """What of a run's provenance is kept.

    Raises:
        UserError: it is not to be read, or one of its texts is a path of the machine.
    """
    file = run / "provenance.json"
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: whole[key] for key in ORIGIN if key in whole}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}): restore it") from None
    if paths := [text for text in texts(kept) if Path(text).is_absolute()]:
        raise UserError(f"{str(file)!r} names a path of this machine, {paths[0]!r}: take it out of the suite's record")
    return kept


def texts(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return texts(list(tree.values()))
    if isinstance(tree, list):
        return [text for branch in tree for text in texts(branch)]
    return [tree] if isinstance(tree, str) else []


def keep(run: Path, place: Path) -> bool:
    """Copy one finished run to `place`; False where it is there already.

    Raises:
        UserError: another run is there, or the provenance cannot be kept.
    """
    if place.exists():
        for name in FILES:
            if not (place / name).is_file() or (place / name).read_bytes() != (run / name).read_bytes():
                raise UserError(f"{str(place)!r} is there and is another run ({name} differs): move it away")
        return False
    provenance = json.dumps(origin(run), indent=1) + "\n"
    place.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(place) as draft:
        for name in FILES:
            shutil.copyfile(run / name, draft / name)
        (draft / "provenance.json").write_text(provenance, encoding="utf-8")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of a sweep, as `epo sweep` leaves it")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of the kept sweeps")
    options = parser.parse_args()
    runs = sorted(file.parent for file in options.sweep.glob("*/config.yaml"))
    refused = {run: reason for run in runs if (reason := why_not(run)) is not None}
    try:
        if not runs:
            raise UserError(f"there is no run in {str(options.sweep)!r}: give the folder of a sweep")
        for run in runs:
            if run not in refused:
                copied = keep(run, options.to / options.sweep.resolve().name / run.name)
                print(f"{run.name}: {'kept' if copied else 'there already'}")
    except UserError as error:
        sys.exit(f"{error}")
    for run, reason in refused.items():
        print(f"{run.name}: refused, {reason}", file=sys.stderr)
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    main()
