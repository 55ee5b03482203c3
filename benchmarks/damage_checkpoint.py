"""Damage every file of a checkpoint, one bit or one cut at a time, and count what is refused.

    python benchmarks/damage_checkpoint.py runs/try1/checkpoints/step_000010 --out damage.json

Works on a copy. Refused means: `read_state` raises one line of text that names the checkpoint and the damaged file (or
the list of checksums, whose damage may show in any file).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from epo.errors import UserError
from epo.training.checkpoint import read_state
from epo.training.checksums import SUMS_FILE
from epo.training.provenance import commit_of_code
from epo.training.run_folder import RunFolder


def is_refused(checkpoint: Path, name: str) -> bool:
    try:
        read_state(checkpoint)
    except UserError as error:
        message = str(error)
        named = name == SUMS_FILE or f"({name}: " in message
        return named and str(checkpoint) in message and "\n" not in message
    return False


def described(checkpoint: Path) -> dict[str, Any]:
    """Which checkpoint it is, without the folder that the run happens to be in."""
    run = RunFolder(checkpoint.resolve().parent.parent)
    return {"run": run.path.name, "name": checkpoint.name, "digest_of_configuration": run.id}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--flips", type=int, default=150, help="bits flipped in each file")
    parser.add_argument("--cuts", type=int, default=50, help="lengths to which each file is cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    files: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(options.checkpoint, Path(scratch) / options.checkpoint.name))
        for file in sorted(p for p in copy.rglob("*") if p.is_file()):
            name, content = file.relative_to(copy).as_posix(), file.read_bytes()
            count = {"bytes": len(content), "flips": 0, "flips_refused": 0, "cuts": 0, "cuts_refused": 0}
            for _ in range(options.flips):
                place, bit = chance.randrange(len(content)), chance.randrange(8)
                file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
                count["flips"] += 1
                count["flips_refused"] += is_refused(copy, name)
            for length in [0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(options.cuts - 2))]:
                file.write_bytes(content[:length])
                count["cuts"] += 1
                count["cuts_refused"] += is_refused(copy, name)
            file.write_bytes(content)
            files[name] = count
        read_state(copy)
    total = {key: sum(count[key] for count in files.values()) for key in next(iter(files.values()))}
    result = {
        "command": f"python benchmarks/damage_checkpoint.py CHECKPOINT --flips {options.flips} --cuts {options.cuts} "
        f"--seed {options.seed} --out FILE",
        "checkpoint": described(options.checkpoint),
        "commit": commit_of_code(),
        "total": total,
        "files": files,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(total))
    sys.exit(0 if total["flips"] == total["flips_refused"] and total["cuts"] == total["cuts_refused"] else 1)


if __name__ == "__main__":
    main()
