"""The command line, in this process where it can be and in one of its own where signals matter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from epo import cli

RECIPE = """
name: minute
steps: 2
environment: {suite: corridor, options: {length: 3, choices: 2, tasks: 4}, workers: 2, max_turns: 4}
agent: {format: action, max_response_tokens: 6}
model:
  max_context: 256
  device: cpu
  threads: 1
  tiny: {vocabulary_size: 320, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}
imitation: {demonstrations: 4, batches: 20, batch_size: 4, learning_rate: 0.005}
rollout: {tasks_per_step: 4}
optimizer: {learning_rate: 0.001, minibatches: 2}
evaluation: {every: 0, episodes: 4, splits: [iid]}
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def cli_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli-cache")


@pytest.fixture(autouse=True)
def _workplace(cli_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory with the minute recipe in it, and a cache of the tests' own."""
    monkeypatch.setenv("EPO_CACHE", str(cli_cache))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minute.yaml").write_text(RECIPE)
    yield


@pytest.fixture
def epo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`epo("train", "minute.yaml", ...)` runs the command as its entry point does."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["epo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
            sys.exit(0)
        code = exit_info.value.code
        captured = capsys.readouterr()
        return Result(0 if code is None else int(code), captured.out, captured.err)

    return run


@pytest.fixture
def start_epo(cli_cache: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `epo` in a process group of its own, so that a test can do what Ctrl-C in a terminal does."""
    started: list[subprocess.Popen[str]] = []
    # As in a terminal: tests that a shell runs in the background inherit that SIGINT is ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from epo.cli import main; main()"

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            env={**os.environ, "EPO_CACHE": str(cli_cache), "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
