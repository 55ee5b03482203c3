"""What EPO adds to a step, and how the cost of a trajectory grows with its turns.

    python benchmarks/cost.py            # a few minutes on two cores; writes benchmarks/results/cost.json

Everything is compared side by side in this one process: methods take turns on the same trajectories, and the figures
are ratios of medians of CPU time, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epo.config import Config
from epo.environments.pool import EnvPool
from epo.environments.registry import make_suite
from epo.objectives import make_control
from epo.packing import pack
from epo.recipe import parse_config
from epo.rollout import EpisodeSpec, RolloutCollector
from epo.sampling.local import LocalSampler
from epo.training.learner import Learner
from epo.training.policy import Policy
from epo.training.tiny import build_model, build_tokenizer
from epo.types import TrajectoryGroup

TURNS = (5, 10, 20, 40)
METHODS = ("none", "bonus", "epo")
EPO_OPTIONS = {"alpha": 0.05, "kappa_low": 0.5, "kappa_high": 1.5}


def configuration(context: str, *, turns: int, method: str, algorithm: str) -> Config:
    return parse_config(
        {
            "environment": {
                "suite": "corridor",
                "options": {"length": 60, "choices": 8},
                "max_turns": turns,
                "workers": 8,
            },
            "agent": {"context": context, "format": "action", "prompt": "brief", "max_response_tokens": 8},
            "model": {"max_context": 4096, "tiny": {"hidden_size": 128, "layers": 2, "intermediate_size": 384}},
            "rollout": {"tasks_per_step": 4, "group_size": 8},
            "algorithm": {"name": algorithm},
            "entropy": {"method": method} | (EPO_OPTIONS if method == "epo" else {}),
        }
    )


def tiny_policy(config: Config) -> Policy:
    words = ["You stand before a red door. 12 doors are left.", "push pull slide lift turn knock kick press"]
    tokenizer = build_tokenizer(words * 20, vocabulary_size=400)
    return Policy(build_model(tokenizer, config.model, seed=0).eval(), tokenizer, max_context=config.model.max_context)


def collect(config: Config, policy: Policy, pool: EnvPool) -> tuple[list[TrajectoryGroup], LocalSampler, float]:
    """One step's groups, the sampler that drew them, and the CPU seconds it took."""
    sampler = LocalSampler(policy, max_episodes=pool.size)
    collector = RolloutCollector(
        pool,
        sampler,
        policy.chat,
        config.agent,
        max_turns=config.environment.max_turns,
        max_context=config.model.max_context,
    )
    tasks = make_suite("corridor", config.environment.options).tasks("train")[: config.rollout.tasks_per_step]
    size = config.rollout.group_size
    specs = [EpisodeSpec(task=t, seed=(p, m)) for p, t in enumerate(tasks) for m in range(size)]
    start = time.process_time()
    played = collector.collect(specs, temperature=1.0)
    seconds = time.process_time() - start
    groups = [TrajectoryGroup(task=t, trajectories=played[p * size : (p + 1) * size]) for p, t in enumerate(tasks)]
    return groups, sampler, seconds


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def overhead(pool: EnvPool, *, algorithm: str, rounds: int) -> dict[str, Any]:
    """Update time of each method over the plain one, on the same trajectories, in interleaved rounds."""
    base = configuration("transcript", turns=20, method="none", algorithm=algorithm)
    policy = tiny_policy(base)
    groups, _, rollout_seconds = collect(base, policy, pool)
    learners = {}
    for method in METHODS:
        config = configuration("transcript", turns=20, method=method, algorithm=algorithm)
        learners[method] = Learner(tiny_policy(config), config, make_control(method, **config.entropy.options()))
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds + 2):
        for method, learner in learners.items():
            spent = cpu_seconds(partial(learner.update, groups, step=number))
            if number >= 2:  # the first rounds warm caches and give EPO its history
                seconds[method].append(spent)
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    plain = medians["none"]
    return {
        "algorithm": algorithm,
        "rounds": rounds,
        "update_ratio": {m: medians[m] / plain for m in METHODS},
        "step_ratio": {m: (rollout_seconds + medians[m]) / (rollout_seconds + plain) for m in METHODS},
        "spread_of_plain": statistics.stdev(seconds["none"]) / plain,
    }


def growth(pool: EnvPool, *, repeats: int) -> list[dict[str, Any]]:
    """Cost of a trajectory by its number of turns, with the transcript and with the paper's window."""
    table = []
    for turns in TURNS:
        for context in ("transcript", "window"):
            config = configuration(context, turns=turns, method="epo", algorithm="grpo")
            policy = tiny_policy(config)
            learner = Learner(policy, config, make_control("epo", **config.entropy.options()))
            rollout, update = [], []
            for number in range(repeats):
                groups, sampler, spent = collect(config, policy, pool)
                rollout.append(spent)
                update.append(cpu_seconds(partial(learner.update, groups, step=number)))
            trajectories = [t for g in groups for t in g.survivors]
            batch, count = pack(trajectories), len(trajectories)
            table.append(
                {
                    "turns": sum(len(t.turns) for t in trajectories) / count,
                    "context": context,
                    "rows": len(batch.rows) / count,
                    "tokens_sampled": batch.num_trained / count,
                    "tokens_prefilled": sampler.prefilled_tokens / count,
                    "tokens_processed": batch.num_tokens / count,
                    "rollout_cpu_seconds": statistics.median(rollout) / count,
                    "update_cpu_seconds": statistics.median(update) / count,
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds of the overhead measurement")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each cell of the growth table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = configuration("transcript", turns=1, method="none", algorithm="grpo")
    with EnvPool("corridor", config.environment.options, size=config.environment.workers) as pool:
        result = {
            "overhead": [overhead(pool, algorithm=name, rounds=arguments.rounds) for name in ("ppo", "grpo")],
            "growth": growth(pool, repeats=arguments.repeats),
        }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
