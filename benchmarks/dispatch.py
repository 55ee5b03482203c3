"""Episodes in rounds against episodes one by one, rollout workers from one to four, and steps that overlap.

    python benchmarks/dispatch.py        # a few minutes, two cores; writes benchmarks/results/dispatch.json

Environments (first and third part), the model (second part) and the update (third part) only wait, so the machine's
speed hardly counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import _waiting
from _waiting import WaitingSampler, WaitingSuite

from epo.cluster.events import EventLog
from epo.cluster.place import RayCluster
from epo.cluster.rollout_worker import RolloutWorker
from epo.cluster.rollouts import ClusterCollector
from epo.cluster.streaming import Inbox, Job, StreamingCollector
from epo.cluster.weights import policy_files, publisher
from epo.config import Config
from epo.environments.pool import EnvPool
from epo.environments.registry import register_suite
from epo.recipe import parse_config
from epo.rollout import EpisodeSpec, RolloutCollector
from epo.sampling.base import Sampler
from epo.training.policy import Policy
from epo.training.tiny import build_model, build_tokenizer
from epo.training.trainer import make_collector

EPISODES, TURNS = 32, 10
WORKERS, PER_WORKER, SCALED_EPISODES, SCALED_TURNS, MODEL_SECONDS = (1, 2, 4), 8, 64, 5, 0.3
PARTS = ("dispatch", "scaling", "pipeline")
STALENESS, STEPS, UPDATE_SECONDS = (0, 1, 2), 10, 3.0


def configuration(workers: int) -> Config:
    return parse_config(
        {
            "environment": {"suite": "corridor", "options": {"length": 6}, "max_turns": SCALED_TURNS},
            "agent": {"format": "action", "max_response_tokens": 8},
            "model": {
                "max_context": 2048,
                "threads": 1,
                "device": "cpu",
                "tiny": {"vocabulary_size": 320, "hidden_size": 32, "heads": 2, "intermediate_size": 64},
            },
            "cluster": {"workers": workers, "episodes_per_worker": PER_WORKER, "object_store_mb": 200},
        }
    )


def dispatch(policy: Policy, *, repeats: int) -> dict[str, Any]:
    """Seconds for 32 episodes that are all live at once: in rounds, and each as soon as its environment answers."""
    register_suite("waiting", "_waiting:WaitingSuite")
    options = {"turns": TURNS, "tasks": EPISODES}
    specs = [EpisodeSpec(task=task, seed=(n,)) for n, task in enumerate(WaitingSuite(**options).tasks("train"))]
    config = configuration(1).model_copy(deep=True)
    config.environment.max_turns = TURNS
    found: dict[str, list[float]] = {"rounds": [], "one by one": []}
    with EnvPool("waiting", options, size=EPISODES) as pool:
        sampler = WaitingSampler(policy, seconds=0.0)
        rounds = make_collector(config, pool, policy, sampler, kind=RolloutCollector)
        streaming = make_collector(config, pool, policy, sampler, kind=StreamingCollector)
        rounds.collect(specs, temperature=1.0)  # starts the processes
        for _ in range(repeats):
            start = time.perf_counter()
            assert len(rounds.collect(specs, temperature=1.0)) == EPISODES
            found["rounds"].append(time.perf_counter() - start)
            found["one by one"].append(streamed(streaming, specs))
    waits = [[_waiting.latency(spec.task, turn) for turn in range(TURNS)] for spec in specs]
    return {
        "episodes": EPISODES,
        "turns": TURNS,
        "latency_seconds": {"low": _waiting.LOW, "high": _waiting.HIGH, "pareto": _waiting.TAIL},
        "seconds": found,
        "least_seconds": {
            "rounds": sum(max(wait[turn] for wait in waits) for turn in range(TURNS)),
            "one by one": max(sum(wait) for wait in waits),
        },
        "speedup": statistics.median(found["rounds"]) / statistics.median(found["one by one"]),
    }


class Enough(Exception):
    """Ends a service."""


def streamed(collector: StreamingCollector, specs: list[EpisodeSpec]) -> float:
    """Seconds until all are back."""
    inbox, left, done = Inbox(), [len(specs)], threading.Event()

    def answer(found: Any) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()
            raise Enough

    def serve() -> None:
        try:
            collector.serve(inbox, episode_seconds=600, prepare=lambda job: None)
        except Enough:
            return

    start = time.perf_counter()
    for spec in specs:
        inbox.put(Job(spec=spec, temperature=1.0, alternatives=0, answer=answer))
    thread = threading.Thread(target=serve)
    thread.start()
    done.wait()
    seconds = time.perf_counter() - start
    thread.join()
    return seconds


class SlowModelWorker(RolloutWorker):
    """A rollout worker whose model takes the same time for every batch."""

    def _make_sampler(self, policy: Policy, pool: EnvPool) -> Sampler:
        return WaitingSampler(policy, seconds=MODEL_SECONDS)


class WaitingWorker(RolloutWorker):
    """A rollout worker whose model takes no time."""

    def _make_sampler(self, policy: Policy, pool: EnvPool) -> Sampler:
        return WaitingSampler(policy, seconds=0.0)


class Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def scaling(policy: Policy, *, repeats: int) -> dict[str, Any]:
    """Seconds for 64 episodes with one, two and four workers on Ray."""
    from epo.environments import make_suite

    tasks = make_suite("corridor", {"length": 6}).tasks("train")
    specs = [EpisodeSpec(task=tasks[n % len(tasks)], seed=(n,)) for n in range(SCALED_EPISODES)]
    seconds: dict[int, list[float]] = {}
    with RayCluster.connected("local", configuration(max(WORKERS)), Silent()), tempfile.TemporaryDirectory() as folder:
        for workers in WORKERS:
            events = EventLog(Path(folder, "cluster.jsonl"), lambda text: None)
            collector = ClusterCollector(
                configuration(workers),
                model=policy_files(policy),
                weights=publisher(policy),
                events=events,
                worker_class=SlowModelWorker,
            )
            with closing(collector):
                collector.collect(specs[: workers * PER_WORKER], temperature=1.0)  # starts the processes
                seconds[workers] = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    assert len(collector.collect(specs, temperature=1.0)) == SCALED_EPISODES
                    seconds[workers].append(time.perf_counter() - start)
    medians = {workers: statistics.median(found) for workers, found in seconds.items()}
    return {
        "episodes": SCALED_EPISODES,
        "turns": SCALED_TURNS,
        "episodes_per_worker": PER_WORKER,
        "model_seconds": MODEL_SECONDS,
        "seconds": seconds,
        "share_of_linear": {workers: medians[1] / (workers * medians[workers]) for workers in WORKERS},
    }


def pipeline(policy: Policy, *, repeats: int) -> dict[str, Any]:
    """Seconds a step in which 32 episodes are played and an update takes 3 s, on two workers: one after the other, and
    with episodes of later steps during the update."""
    register_suite("waiting", "_waiting:WaitingSuite")
    tasks = WaitingSuite(turns=TURNS, tasks=EPISODES).tasks("train")
    seconds: dict[int, list[float]] = {staleness: [] for staleness in STALENESS}
    found: dict[int, float] = {}
    with RayCluster.connected("local", configuration(2), Silent()), tempfile.TemporaryDirectory() as folder:
        for staleness in STALENESS:
            config = configuration(2).model_copy(deep=True)
            config.environment.suite, config.environment.options = "waiting", {"turns": TURNS, "tasks": EPISODES}
            config.environment.max_turns, config.cluster.max_staleness = TURNS, staleness
            events = EventLog(Path(folder, "cluster.jsonl"), lambda text: None)
            collector = ClusterCollector(
                config, model=policy_files(policy), weights=publisher(policy), events=events,
                worker_class=WaitingWorker,
            )  # fmt: skip
            with closing(collector):
                collector.collect([EpisodeSpec(task=task, seed=(n,)) for n, task in enumerate(tasks[: 2 * PER_WORKER])],
                                  temperature=1.0)  # starts the processes  # fmt: skip
                for repeat in range(repeats):
                    ages = list[int]()
                    start = time.perf_counter()
                    for step in range(STEPS):
                        specs = [
                            [EpisodeSpec(task=task, seed=(repeat, later, n)) for n, task in enumerate(tasks)]
                            for later in range(step, min(step + staleness, STEPS - 1) + 1)
                        ]
                        for expected in specs:
                            collector.expect(expected, temperature=1.0)
                        trajectories = collector.collect(specs[0], temperature=1.0)
                        ages += [policy.version - turn.policy_version for t in trajectories for turn in t.turns]
                        time.sleep(UPDATE_SECONDS)
                        policy.version += 1
                    seconds[staleness].append((time.perf_counter() - start) / STEPS)
                    found[staleness] = statistics.fmean(ages)
    medians = {staleness: statistics.median(values) for staleness, values in seconds.items()}
    return {
        "episodes": EPISODES,
        "turns": TURNS,
        "workers": 2,
        "episodes_per_worker": PER_WORKER,
        "steps": STEPS,
        "update_seconds": UPDATE_SECONDS,
        "seconds_per_step": seconds,
        "mean_staleness": found,
        "speedup": {staleness: medians[0] / medians[staleness] for staleness in STALENESS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dispatch.json")
    arguments = parser.parse_args()
    config = configuration(1)
    tokenizer = build_tokenizer(["Wait until it is over. wait"] * 4, vocabulary_size=320)
    model: Any = build_model(tokenizer, config.model, seed=0)
    policy = Policy(model.eval(), tokenizer, max_context=config.model.max_context)
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    # The environments' processes find `_waiting` beside this file, wherever Ray starts them.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for part in arguments.parts:
        measured = {"dispatch": dispatch, "scaling": scaling, "pipeline": pipeline}[part]
        found[part] = measured(policy, repeats=arguments.repeats)
        found[part]["load"] = {"cores": os.cpu_count(), "load_average": os.getloadavg()}
        print(part, json.dumps(found[part], indent=1))
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
