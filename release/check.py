"""Installs a built wheel and source distribution into empty environments and tries them there, away from the checkout.

    make release     # builds dist/ and runs this: some ten minutes, most of them pip's

Each of the two is installed without extras, with `train`, and with `scienceworld,report`, under the versions of
constraints.txt, and has to do there what the README says it can.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIGHT = (
    "import sys, epo.objectives; sys.exit(any(m in sys.modules for m in ('transformers', 'pydantic', 'tokenizers')))"
)
RECIPE = """
name: try
steps: 2
environment: {suite: corridor, options: {length: 3, choices: 2, tasks: 4}, workers: 2, max_turns: 4}
agent: {format: action, max_response_tokens: 6}
model:
  max_context: 256
  device: cpu
  tiny: {vocabulary_size: 320, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}
imitation: {demonstrations: 4, batches: 20, batch_size: 4, learning_rate: 0.005}
rollout: {tasks_per_step: 4}
optimizer: {learning_rate: 0.001, minibatches: 2}
evaluation: {every: 0, episodes: 4, splits: [iid]}
"""
TRIALS: dict[str, list[tuple[str, int]]] = {
    "": [
        (f'python -c "{LIGHT}"', 0),
        ("python your_own_trainer.py", 0),
        ("epo --help", 2),  # says what to install
    ],
    "train": [
        ("epo --version", 0),
        ("epo recipes", 0),
        ("epo methods epo", 0),
        ("epo train quickstart --dry-run", 0),
        ("epo train try.yaml", 0),
        ("epo eval runs/try --episodes 2", 0),
        ("epo export runs/try", 0),
        ("epo explain smoothing quickstart", 0),
        ("epo plan quickstart --hardware 8xH100-80G", 0),
        ("epo env new maze", 0),
    ],
    "scienceworld,report": [
        ("epo doctor", 0),
        ("epo train scienceworld-ppo steps=0 imitation.demonstrations=2 imitation.batches=2 evaluation.episodes=2 "
         "environment.workers=1", 0),
        ("epo report runs/scienceworld-ppo", 0),
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one wheel and one source distribution")
    dist = parser.parse_args().dist.resolve()
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    for package in (wheel, source):
        for extras in TRIALS:
            try_package(package, extras)
    print("everything works")


def try_package(package: Path, extras: str) -> None:
    """Install it with these extras in an environment of its own, and run its trials there.

    Raises:
        SystemExit: one of them did not end as it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
        wanted = f"{package}[{extras}]" if extras else str(package)
        pip = [place / "venv/bin/python", "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wanted], check=True)
        listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
        print(f"{package.name}[{extras}]: {len(listed.splitlines())} packages, {time.monotonic() - began:.0f} s")
        shutil.copy2(ROOT / "examples/your_own_trainer.py", place)
        (place / "try.yaml").write_text(RECIPE)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
            "PATH": f"{place}/venv/bin:{os.environ['PATH']}",
            "EPO_CACHE": str(place / "cache"),
        }
        for command, code in TRIALS[extras]:
            done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
            if done.returncode != code or "Traceback" in done.stderr:
                sys.exit(f"{command}: exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}")
            print(f"  {command}")


if __name__ == "__main__":
    main()
