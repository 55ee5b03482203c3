"""What a run on Ray loses, and how long it takes to go on, when something dies under it.

    make chaos        # on two busy cores three quarters of an hour; writes benchmarks/results/chaos.json

Two nodes on this machine, two rollout workers, three steps of six episodes in short corridors, a checkpoint after every
step. The fault comes in the second step, when its first episode is back. What comes out is compared with the run of a
single process: every trajectory's tokens, the number of episodes of every step, and the parameters at the end. Where
the network is cut, the nodes are in two network namespaces, which takes root. Where vLLM draws, both runs are in the
environment of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from _chaos_stages import (
    Engines,
    Stage,
    TwoHosts,
    TwoNodes,
    connect_hosts,
    disconnect_hosts,
    inside,
    reason_against_hosts,
)
from safetensors.torch import load_file

from epo.recipe import load_config
from epo.training.session import train_run

RUN = (
    "steps=3", "environment.suite=corridor", "environment.options={length: 3, choices: 2, tasks: 4}",
    "environment.workers=2", "environment.max_turns=4", "agent.format=action", "agent.max_response_tokens=6",
    "model.max_context=256", "model.device=cpu", "model.threads=1",
    "model.tiny={vocabulary_size: 320, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}",
    "imitation.demonstrations=4", "imitation.batches=30", "imitation.batch_size=4", "imitation.learning_rate=0.005",
    "rollout.tasks_per_step=6", "optimizer.learning_rate=0.001", "optimizer.minibatches=2", "entropy.method=epo",
    "evaluation.every=0", "evaluation.episodes=2", "evaluation.splits=[iid]", "checkpoint.every=1", "logging.to=[]",
    "cluster={workers: 2, episodes_per_worker: 2, start_seconds: 240, learner_seconds: 120}",
)  # fmt: skip
LIMIT_SECONDS = 400
"""Of one run; beyond it the case counts as failed."""
GROUP = ("cluster.workers=1", "cluster.episodes_per_worker=4", "cluster.learners=2")
ENGINE = (
    "model.tiny={vocabulary_size: 320, hidden_size: 64, layers: 2, heads: 2, intermediate_size: 64}",  # heads of 32
    "model.compute=float32", "sampler={name: vllm, kv_gib: 0.25}",
)  # fmt: skip
VLLM_PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
ADAPTERS = ("model.lora.rank=4", "algorithm.critic.trunk=separate", "algorithm.kl_coefficient=0.05")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What happens, on which stage, and to what kind of run."""

    fault: Callable[[Any], None]
    stage: type[Stage] = TwoNodes
    cluster: tuple[str, ...] = ()
    """Overrides that change where the run computes."""
    run: tuple[str, ...] = ()
    """Overrides that change what it computes; the single process has them, too."""
    is_stale: bool = False
    """Which weights draw depends on timing, so that trajectories are no others' either."""


CASES = {
    "nothing": Case(fault=lambda stage: None),
    "rollout worker killed": Case(fault=Stage.kill_worker),
    "rollout worker killed, stale weights": Case(
        fault=Stage.kill_worker, cluster=("cluster.max_staleness=1",), is_stale=True
    ),
    "node lost": Case(fault=TwoNodes.lose_node),
    "node stopped": Case(fault=TwoNodes.stop_node),
    "object store full": Case(fault=TwoNodes.fill_store),
    "learner rank killed": Case(fault=Stage.kill_rank, cluster=GROUP),
    "learner rank killed, adapters": Case(
        fault=Stage.kill_rank, cluster=(*GROUP, "cluster.sharded_checkpoints=true"), run=ADAPTERS
    ),
    "vLLM engine killed": Case(fault=Engines.kill_engine, stage=Engines, run=ENGINE),
    "vLLM engine killed, stale weights": Case(
        fault=Engines.kill_engine, stage=Engines, cluster=("cluster.max_staleness=1",), run=ENGINE, is_stale=True
    ),
    "hosts, nothing": Case(fault=lambda stage: None, stage=TwoHosts),
    "cable out for good": Case(fault=TwoHosts.unplug, stage=TwoHosts),
    "cable out for 2 s": Case(fault=lambda stage: stage.unplug_for(2.0), stage=TwoHosts),
    "cable out, back once the host is given up": Case(fault=lambda stage: stage.unplug(mend=True), stage=TwoHosts),
    "packets lost, until the host is given up": Case(fault=TwoHosts.lose_packets, stage=TwoHosts),
    "cable of a learner rank out": Case(fault=TwoHosts.unplug, stage=TwoHosts, cluster=GROUP),
}


class Injector:
    """Lets the fault happen, and notes when."""

    def __init__(self, fault: Callable[[], None], on_loss: Callable[[], None] = lambda: None) -> None:
        self._fault, self._on_loss, self._stage = fault, on_loss, ""
        self.at = 0.0
        self.ends: list[float] = []
        self.notes: list[str] = []

    def begin(self, what: str, total: int) -> None:
        self._stage = what

    def advance(self, done: int, note: str = "") -> None:
        if self._stage == "step 2/3" and done == 1 and not self.at:
            self.at = time.monotonic()
            self._fault()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.ends.append(time.monotonic())

    def longest(self) -> float:
        """Seconds of the longest step from the fault on."""
        times = [self.at, *(end for end in self.ends if end > self.at)]
        return max(after - before for before, after in pairwise(times))

    def evaluated(self, step: int, results: Any) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)
        if " is lost" in text:
            self._on_loss()


def draws(run: Path) -> list[Any]:
    files = sorted((run / "trajectories").glob("step_*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [[turn["response_ids"] for turn in line["turns"]] for line in lines]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in (run / "checkpoints" / "step_000003" / "policy").glob("*.safetensors"):
        found |= load_file(file)
    return found


def tasks(run: Path) -> list[Any]:
    files = sorted((run / "trajectories").glob("step_*.jsonl"))
    return [[json.loads(line)["task"] for line in file.read_text().splitlines()] for file in files]


def play(case: Case, folder: Path, alone: Path) -> dict[str, Any]:
    stage = case.stage()
    injector = Injector(lambda: case.fault(stage), stage.mend)
    signal.alarm(LIMIT_SECONDS)
    start = time.monotonic()
    try:
        config = load_config("base", [*RUN, *case.run, *case.cluster])
        train_run(config, folder, injector, resume=False, cluster=stage.address)
    except BaseException as error:
        return {"finished": False, "error": f"{type(error).__name__}: {error}"[:400], "notes": injector.notes[-5:]}
    finally:
        signal.alarm(0)
        stage.close()
    mine, single = weights(folder), weights(alone)
    events = folder / "cluster.jsonl"
    log = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
    found: dict[str, Any] = {
        "finished": True,
        "seconds": round(time.monotonic() - start, 1),
        "longest_step_from_the_fault": round(injector.longest(), 1),
        "episodes": [int(line["episodes"]) for line in metrics(folder)],
        "episodes_played_again": sum(len(event.get("episodes", ())) for event in log),
        "same_tasks": tasks(folder) == tasks(alone),
        "log": [
            re.sub(r'"/[^"]*/', '"', event["text"]) for event in log
        ],  # folders of this machine are nobody's business
    }
    if case.is_stale:
        return found | {"largest_staleness": max(line["sampler/staleness_max"] for line in metrics(folder))}
    difference = max((mine[key] - single[key]).abs().max().item() for key in single)
    return found | {"same_trajectories": draws(folder) == draws(alone), "parameter_difference": difference}


def is_whole(case: Case, outcome: dict[str, Any]) -> bool:
    """Nothing was lost, and nothing counted twice."""
    if not outcome["finished"] or outcome["episodes"] != [6] * 3 or not outcome["same_tasks"]:
        return False
    return outcome["largest_staleness"] <= 1 if case.is_stale else outcome["same_trajectories"]


def too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"not finished after {LIMIT_SECONDS} s")


def play_alone(case: Case, folder: Path) -> None:
    """The run of a single process, which everything is compared with."""
    train_run(load_config("base", [*RUN, *case.run]), folder, Injector(lambda: None), resume=False)


def play_elsewhere(name: str, folder: Path, alone: Path) -> dict[str, Any]:
    """`play` in a process on the first of two hosts, or in the environment that has vLLM."""
    outcome = folder.with_suffix(".json")
    arguments = [__file__, "--here", name, str(folder), str(alone), "--out", str(outcome)]
    if CASES[name].stage is Engines:
        subprocess.run([VLLM_PYTHON, *arguments], check=False)
    else:
        connect_hosts()
        try:
            inside(arguments)
        finally:
            disconnect_hosts()
    return json.loads(outcome.read_text()) if outcome.is_file() else {"finished": False, "error": "it ended early"}


def reason_against(stage: type[Stage]) -> str | None:
    """Why it cannot be had here; None where it can."""
    if stage is Engines:
        return None if VLLM_PYTHON.is_file() else f"needs vLLM in {VLLM_PYTHON.parents[1].name} (make test-vllm)"
    return reason_against_hosts() if stage is TwoHosts else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "chaos.json")
    parser.add_argument("--here", nargs=3, metavar=("CASE", "FOLDER", "ALONE"), help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, too_long)
    if arguments.here:
        name, folder, alone = arguments.here
        arguments.out.write_text(json.dumps(play(CASES[name], Path(folder), Path(alone))))
        return
    if arguments.alone:
        name, folder = arguments.alone
        play_alone(CASES[name], Path(folder))
        return
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        alone: dict[tuple[str, ...], Path] = {}
        for name in arguments.cases:
            case = CASES[name]
            if (reason := reason_against(case.stage)) is not None:
                print(f"{name}: left out, {reason}", file=sys.stderr)
                continue
            if case.run not in alone:
                alone[case.run] = Path(folder, f"alone-{len(alone)}")
                if case.stage is Engines:
                    command = [VLLM_PYTHON, __file__, "--alone", name, str(alone[case.run])]
                    subprocess.run(command, check=True)
                else:
                    play_alone(case, alone[case.run])
            found[name] = []
            for number in range(arguments.repeats):
                run = Path(folder, f"{name} {number}")
                if case.stage in (TwoHosts, Engines):
                    outcome = play_elsewhere(name, run, alone[case.run])
                else:
                    outcome = play(case, run, alone[case.run])
                found[name].append(outcome)
                print(name, json.dumps(outcome), flush=True)
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")
                if not is_whole(case, outcome):
                    failed.append(name)
    if failed:
        raise SystemExit(f"something was lost: {', '.join(failed)}")


if __name__ == "__main__":
    main()
