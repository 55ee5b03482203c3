"""A whole run with vLLM as sampler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from engines import lively_policy, untie

RECIPE = """
name: minute
steps: 2
environment: {{suite: corridor, options: {{length: 3, choices: 2, tasks: 4}}, workers: 4, max_turns: 4}}
agent: {{format: action, max_response_tokens: 6}}
model: {{path: {model}, max_context: 256, device: cpu, threads: 1, compute: float32}}
imitation: {{demonstrations: 0}}
rollout: {{tasks_per_step: 4, group_size: 2, temperature: 0.8}}
sampler: {{name: vllm, kv_gib: 0.25, max_weight_error: 0.001}}
algorithm: {{name: grpo}}
optimizer: {{learning_rate: 0.001, minibatches: 2}}
evaluation: {{every: 1, episodes: 4, splits: [iid]}}
"""


def test_a_short_run_ends_well(tokenizer: Any, tmp_path: Path):
    untie(lively_policy(tokenizer)).save(tmp_path / "model")
    (tmp_path / "minute.yaml").write_text(RECIPE.format(model=tmp_path / "model"))
    done = subprocess.run(
        [sys.executable, "-m", "epo", "train", "minute.yaml", "--name", "run"],
        cwd=tmp_path,
        env={**os.environ, "EPO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in next(tmp_path.glob("**/run/metrics.jsonl")).read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert 0 <= step["sampler/mismatch_kl"] < 1e-6
        assert step["update/optimizer_steps"] == 2 and step["update/skipped"] == 0
    left = [p for p in psutil.process_iter(["cmdline"]) if "epo.sampling._vllm_worker" in (p.info["cmdline"] or [])]
    assert not [p for p in left if str(tmp_path) in " ".join(p.info["cmdline"])]
