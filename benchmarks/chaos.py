"""What a run on Ray loses, and how long it takes to go on, when something dies under it.

    make chaos        # on two cores a quarter of an hour; writes benchmarks/results/chaos.json

Two nodes on this machine, two rollout workers, three steps of six episodes in short corridors, a checkpoint after every
step. The fault comes in the second step, when its first episode is back. What comes out is compared with the run of a
single process: every trajectory's tokens, the number of episodes of every step, and the parameters at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on the loopback
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 - what others on the machine need is no fault of ours

import numpy as np
import ray
from ray.cluster_utils import Cluster
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
STORE_BYTES = 100_000_000
LIMIT_SECONDS = 400
"""Of one run; beyond it the case counts as failed."""


def ours(title: str) -> list[int]:
    """Living processes with that title which descend from this one."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return sorted(pid for pid, found in titles.items() if title in found and is_ours(pid))


def below(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                found += below(int(folder.name))
    return found


class Stage:
    """Two nodes, the first of which has the driver."""

    def __init__(self) -> None:
        node = {"num_cpus": 4, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.second: Any = self.cluster.add_node(**node)
        self.held: list[Any] = []
        self.stopped: list[int] = []

    def kill_worker(self) -> None:
        os.kill(ours("ray::RolloutWorker")[0], signal.SIGKILL)

    def kill_rank(self) -> None:
        os.kill(ours("ray::RayTrainWorker")[-1], signal.SIGKILL)

    def lose_node(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def cut_off(self) -> None:
        """No packet comes from the second node any more, and no connection is closed: every process of it stops."""
        raylet = self.second.all_processes["raylet"][0].process.pid
        self.stopped = below(raylet)
        for pid in self.stopped:
            os.kill(pid, signal.SIGSTOP)

    def fill_store(self) -> None:
        """Twice the store's memory in objects that somebody still holds."""
        size = STORE_BYTES // 10
        self.held = [ray.put(np.random.default_rng(n).bytes(size)) for n in range(20)]

    def close(self) -> None:
        for pid in self.stopped:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.cluster.shutdown()


GROUP = ("cluster.workers=1", "cluster.episodes_per_worker=4", "cluster.learners=2")
CASES: dict[str, tuple[Callable[[Stage], None], tuple[str, ...]]] = {
    "nothing": (lambda stage: None, ()),
    "rollout worker killed": (Stage.kill_worker, ()),
    "node lost": (Stage.lose_node, ()),
    "node cut off": (Stage.cut_off, ()),
    "object store full": (Stage.fill_store, ()),
    "learner rank killed": (
        Stage.kill_rank,
        ("cluster.workers=1", "cluster.episodes_per_worker=4", "cluster.learners=2"),
    ),
}


class Injector:
    """Lets the fault happen, and notes when."""

    def __init__(self, fault: Callable[[], None]) -> None:
        self._fault, self._stage = fault, ""
        self.at = self.recovered = 0.0
        self.notes: list[str] = []

    def begin(self, what: str, total: int) -> None:
        self._stage = what

    def advance(self, done: int, note: str = "") -> None:
        if self._stage == "step 2/3" and done == 1 and not self.at:
            self.at = time.monotonic()
            self._fault()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            self.recovered = time.monotonic()

    def evaluated(self, step: int, results: Any) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def draws(run: Path) -> list[Any]:
    files = sorted((run / "trajectories").glob("step_*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [[turn["response_ids"] for turn in line["turns"]] for line in lines]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "checkpoints" / "step_000003" / "policy" / "model.safetensors")


def play(name: str, folder: Path, alone: Path) -> dict[str, Any]:
    fault, overrides = CASES[name]
    stage = Stage()
    injector = Injector(lambda: fault(stage))
    signal.alarm(LIMIT_SECONDS)
    start = time.monotonic()
    try:
        train_run(
            load_config("base", [*RUN, *overrides]), folder, injector, resume=False, cluster=stage.cluster.address
        )
    except BaseException as error:
        return {"finished": False, "error": f"{type(error).__name__}: {error}"[:400], "notes": injector.notes[-5:]}
    finally:
        signal.alarm(0)
        stage.close()
    mine, single = weights(folder), weights(alone)
    events = folder / "cluster.jsonl"
    log = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
    return {
        "finished": True,
        "seconds": round(time.monotonic() - start, 1),
        "seconds_from_fault_to_end_of_step": round(injector.recovered - injector.at, 1),
        "episodes": [int(line["episodes"]) for line in metrics(folder)],
        "episodes_played_again": sum(len(event.get("episodes", ())) for event in log),
        "same_trajectories": draws(folder) == draws(alone),
        "parameter_difference": max((mine[key] - single[key]).abs().max().item() for key in single),
        "log": [event["text"] for event in log],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "chaos.json")
    arguments = parser.parse_args()

    def too_long(number: int, frame: Any) -> None:
        raise TimeoutError(f"not finished after {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "alone")
        train_run(load_config("base", RUN), alone, Injector(lambda: None), resume=False)
        for name in arguments.cases:
            found[name] = []
            for number in range(arguments.repeats):
                outcome = play(name, Path(folder, f"{name} {number}"), alone)
                found[name].append(outcome)
                print(name, json.dumps(outcome), flush=True)
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if not all(
        o["finished"] and o["same_trajectories"] and o["episodes"] == [6] * 3 for c in found.values() for o in c
    ):
        raise SystemExit("something was lost")


if __name__ == "__main__":
    main()
