"""Rollout workers with vLLM engines on Ray: new weights every step, and a killed engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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

overrides = ["evaluation.every=0", "cluster={workers: 1, episodes_per_worker: 4}", *sys.argv[1:]]
config = load_config("minute.yaml", overrides)
train_run(config, Path("run"), Watcher(), resume=False, cluster="local")
"""


GROUP = """
import sys
from pathlib import Path
from epo.recipe import load_config
from epo.training.session import train_run

class Watcher:
    def begin(self, what, total): pass
    def advance(self, done, note=""): pass
    def step(self, step, metrics): pass
    def evaluated(self, step, results): pass
    def note(self, text): pass

cluster = "cluster={workers: 1, worker_cpus: 0.5, learners: %s, learner_cpus: 0.5}" % sys.argv[1]
config = load_config("minute.yaml", ["evaluation.every=0", cluster, *sys.argv[2:]])
train_run(config, Path("run"), Watcher(), resume=False, cluster="local")
"""


@pytest.mark.parametrize(
    ("learners", "more"),
    [(1, ()), (2, ()), (2, ("model.lora.rank=4", "optimizer.learning_rate=0.05"))],
    ids=["one rank", "two ranks", "two ranks, adapters"],
)
def test_engines_draw_with_the_weights_of_a_learner_group(
    learners: int, more: tuple[str, ...], tokenizer: Any, tmp_path: Path
):
    steps = steps_of(GROUP, str(learners), *more, tokenizer=tokenizer, folder=tmp_path)[0]
    assert len(steps) == 2
    for step in steps:
        assert 0 <= step["sampler/mismatch_kl"] < 1e-6  # drawn with the weights of the step, not those before
    assert steps[0]["policy/grad_norm"] > 0  # so that these differ


def test_a_killed_engine_costs_nothing(tokenizer: Any, tmp_path: Path):
    steps, out = steps_of(PROGRAM, tokenizer=tokenizer, folder=tmp_path)
    assert "killed 1" in out
    assert [step["episodes"] for step in steps] == [8, 8]
    for step in steps:
        assert 0 <= step["sampler/mismatch_kl"] < 1e-6
    events = [json.loads(line) for line in (tmp_path / "run" / "cluster.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["worker_mended"]
    assert "SIGKILL" in events[0]["reason"] and events[0]["text"] in out


def test_episodes_begin_during_the_update_and_say_which_weights_drew_them(tokenizer: Any, tmp_path: Path):
    stale = ["cluster.max_staleness=1", "steps=6", "optimizer.learning_rate=0.02"]
    steps, out = steps_of(PROGRAM, *stale, tokenizer=tokenizer, folder=tmp_path)
    assert "killed" not in out
    assert [step["episodes"] for step in steps] == [8] * 6
    ages = [step["sampler/staleness_max"] for step in steps]
    assert ages[0] == 0 and max(ages) == 1
    for step in steps:  # tokens of the step's own weights have the learner's log-probabilities, older ones have not
        if step["sampler/staleness_max"] == 0:
            assert 0 <= step["sampler/mismatch_kl"] < 1e-6
    assert max(step["sampler/mismatch_kl"] for step in steps) > 1e-4


def steps_of(program: str, *arguments: str, tokenizer: Any, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The steps of the run that a program trains in a process of its own, and what it printed."""
    untie(lively_policy(tokenizer)).save(folder / "model")
    (folder / "minute.yaml").write_text(RECIPE.format(model=folder / "model"))
    environment = {"EPO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()], done.stdout
