"""Rollout workers with vLLM engines on Ray: new weights every step, and a killed engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engines import lively_policy, untie
from test_training import RECIPE

PROGRAM = """
import os, signal, sys
from pathlib import Path
import psutil
from epo.recipe import load_config
from epo.training.session import train_run

class Watcher:
    stage, killed = "", False
    def begin(self, what, total): self.stage = what
    def advance(self, done, note=""):
        if self.stage == "step 2/2" and done == 1 and not self.killed:
            mine = psutil.Process().children(recursive=True)
            engines = [p for p in mine if "epo.sampling._vllm_worker" in p.cmdline()]
            self.killed = bool(engines)
            engines[0].send_signal(signal.SIGKILL)
            print("killed", len(engines))
    def step(self, step, metrics): print("mismatch", metrics["sampler/mismatch_kl"])
    def evaluated(self, step, results): pass
    def note(self, text): print(text)

config = load_config("minute.yaml", ["evaluation.every=0", "cluster={workers: 1, episodes_per_worker: 4}"])
train_run(config, Path("run"), Watcher(), resume=False, cluster="local")
"""


def test_a_killed_engine_costs_nothing(tokenizer: Any, tmp_path: Path):
    untie(lively_policy(tokenizer)).save(tmp_path / "model")
    (tmp_path / "minute.yaml").write_text(RECIPE.format(model=tmp_path / "model"))
    environment = {"EPO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert "killed 1" in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["episodes"] for step in steps] == [8, 8]
    for step in steps:
        assert 0 <= step["sampler/mismatch_kl"] < 1e-6  # drawn with the weights of the step, not those before
