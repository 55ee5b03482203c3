"""`epo eval --server` against a server that others wrote: is a model measured there as it is measured here?

The panels are played greedily in float32 by the local sampler, and once more through `transformers serve` on loopback,
which renders the chat template, encodes, and decodes by itself. Every response of every episode is compared.

corridor       a tiny model that imitated experts in corridors of four doors, in such corridors and in longer ones
scienceworld   SmolLM2-135M-Instruct as it is, with its own template and tokenizer: three episodes of four turns

    make hosted       # installs the server into .venv-server, and runs this
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from epo.evaluation.panels import evaluate
from epo.files import write_atomically
from epo.models.catalogue import pull
from epo.recipe import load_config
from epo.reporting.terminal.console import ConsoleObserver
from epo.tasks import panel
from epo.training.policy import load_policy
from epo.training.preparation import prepare_suite
from epo.training.session import open_pool, use_threads
from epo.training.trainer import make_collector, make_sampler
from epo.types import Trajectory

RESULT = Path(__file__).parent / "results" / "hosted_eval.json"
CORRIDOR = """
name: corridor
environment: {suite: corridor, options: {length: 4, choices: 3, tasks: 32}, workers: 4, max_turns: 10}
agent: {format: think_action, max_response_tokens: 48}
model:
  max_context: 1024
  device: cpu
  threads: 1
  tiny: {vocabulary_size: 320, hidden_size: 64, layers: 2, heads: 4, intermediate_size: 128}
imitation: {demonstrations: 32, batches: 700, batch_size: 4, learning_rate: 0.003}
evaluation: {every: 0, episodes: 32, splits: [iid, ood], temperature: 0}
"""
SCIENCEWORLD = """
extends: smollm2-scienceworld-ppo-epo
name: scienceworld
environment: {workers: 2, max_turns: 4}
model: {threads: 1, device: cpu, compute: float32}
evaluation: {episodes: 3, splits: [iid], temperature: 0}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=".venv-server/bin/transformers", help="the program `transformers`")
    program = Path(parser.parse_args().server).absolute()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipes = {"corridor": CORRIDOR, "scienceworld": SCIENCEWORLD}
        for case, text in recipes.items():
            (folder / f"{case}.yaml").write_text(text)
        corridor, scienceworld = (str(folder / f"{case}.yaml") for case in recipes)
        imitated = json.loads(_epo("imitate", corridor, "--json"))["model"]
        result = {
            "server": f"transformers serve {_version_of(program)}",
            "packages": {package: version(package) for package in ("transformers", "torch", "httpx2")},
            "corridor": _compare(program, corridor, imitated, folder),
            "scienceworld": _compare(program, scienceworld, str(pull("smollm2-135m").folder), folder),
        }
    write_atomically(RESULT, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _compare(program: Path, recipe: str, model: str, folder: Path) -> dict[str, Any]:
    """One model, here and through the server."""
    panels, trajectories = _play_here(recipe, model)
    here = {(t.task.split, t.task.id): [turn.response for turn in t.turns] for t in trajectories}
    out = folder / f"{Path(recipe).stem}-kept"
    with _serving(program, model, folder) as url:
        start = time.monotonic()
        found = json.loads(
            _epo("eval", "--server", url, "--model", model, "--recipe", recipe, "--out", str(out), "--json")
        )
        seconds = time.monotonic() - start
    records = [json.loads(line) for line in (out / "trajectories/step_000000.jsonl").read_text().splitlines()]
    there = {(r["split"], r["task"]): [turn["response"] for turn in r["turns"]] for r in records}
    return {
        "episodes": len(there),
        "responses": sum(map(len, there.values())),
        "same_responses": sum(a == b for key in there for a, b in zip(there[key], here[key], strict=False)),
        "panels_are_equal": all({key: found[split][key] for key in panels[split]} == panels[split] for split in panels),
        "panels": {
            split: {key: found[split][key] for key in ("success", "score", "turns", "invalid", "usage")}
            for split in found
        },
        "seconds_through_the_server": round(seconds, 1),
    }


def _play_here(recipe: str, model: str) -> tuple[dict[str, Any], list[Trajectory]]:
    config = load_config(recipe)
    use_threads(config.model)
    observer = ConsoleObserver(0, Console(stderr=True))
    policy, suite = load_policy(model, config.model), prepare_suite(config, observer)
    panels: dict[str, Any] = {}
    played: list[Trajectory] = []
    with open_pool(config) as pool:
        collector = make_collector(config, pool, policy, make_sampler(config, policy, max_episodes=pool.size))
        for split in config.evaluation.splits:
            tasks = panel(suite.tasks(split), episodes=config.evaluation.episodes, split=split)
            panels[split] = evaluate(collector, tasks, split=split, temperature=0.0, on_done=played.append).as_dict()
    return panels, played


@contextmanager
def _serving(program: Path, model: str, folder: Path) -> Iterator[str]:
    """The address of a server of `model`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    environment.pop("PYTHONPATH", None)
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([program, "serve", model, *options], stdout=log, stderr=log, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"no server at {url}")


def _epo(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "epo", *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _version_of(program: Path) -> str:
    code = "from importlib.metadata import version; print(version('transformers'))"
    found = subprocess.run([program.with_name("python"), "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
