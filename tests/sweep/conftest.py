"""A sweep that takes seconds: two arms in short corridors, in an empty folder, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

RECIPE = """
name: minute
steps: 2
environment: {suite: corridor, options: {length: 3, choices: 2, tasks: 4}, workers: 1, max_turns: 4}
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

SWEEP = """
name: two
recipe: minute.yaml
seeds: [0, 1]
arms:
  plain:
  bonus: {entropy: {method: bonus, coefficient: 0.01}}
"""

Start = Callable[..., "subprocess.Popen[str]"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def sweep_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep-cache")


@pytest.fixture(autouse=True)
def _workplace(sweep_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPO_CACHE", str(sweep_cache))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minute.yaml").write_text(RECIPE)
    (tmp_path / "two.yaml").write_text(SWEEP)


@pytest.fixture
def start_epo() -> Iterator[Start]:
    """Starts `epo` as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "epo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def epo(start_epo: Start) -> Callable[..., Result]:
    """`epo("sweep", "two.yaml")`, to its end."""

    def run(*arguments: str) -> Result:
        process = start_epo(*arguments)
        out, err = process.communicate(timeout=600)
        return Result(process.returncode, out, err)

    return run
