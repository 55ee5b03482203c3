"""Ranks that share the work of a learner against one that has it all: the same parameters, statistics and files."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from epo.cluster.sharding import ShardedRanks
from epo.recipe import load_config
from epo.training.learner import Learner
from epo.training.policy import Policy, load_policy
from epo.training.trainer import control_of
from made_up import groups

BASE = (
    "model.path=unused", "imitation.demonstrations=0", "model.device=cpu", "model.max_context=256", "steps=8",
    "agent.max_response_tokens=8", "optimizer.learning_rate=0.001", "optimizer.minibatches=2",
    "optimizer.microbatch_tokens=40", "rollout.tasks_per_step=3", "rollout.group_size=2", "health.prompts=2",
)  # fmt: skip
VARIANTS = {
    "ppo-epo": ("entropy.method=epo",),
    "ppo-separate": ("algorithm.critic.trunk=separate",),
    "grpo-kl": ("algorithm.name=grpo", "algorithm.kl_coefficient=0.1"),
    "rescored": ("sampler.old_logprobs=learner", "entropy.method=bonus"),
}
RANKS = 2
ROUNDING = 0.05
"""Largest difference of the gradients' moments, as a share of the largest. A wrong weight is a third or more."""
DRIFT = 2e-5
"""Mean difference of parameters. Adam takes a step of the learning rate, 1e-3, along gradients that are nothing but
rounding, too, so single parameters may differ by that."""


def steps(learner: Learner, count: range) -> list[dict[str, float]]:
    """Updates on made-up data: three groups, then one trajectory alone, so that most ranks have nothing, then three."""
    found = []
    for step in count:
        data = groups(np.random.default_rng(step), count=1 if step == 1 else 3, size=2)
        if step == 1:
            data[0].trajectories = data[0].trajectories[:1]
        data = learner.rescore(data)
        metrics = learner.input_dependence(data, step=step) | learner.update(data, step=step)
        turns = [turn for group in data for t in group.trajectories for turn in t.turns if turn.ratios is not None]
        found.append(
            metrics | {"noted": sum(float(turn.ratios.sum() + np.abs(turn.advantages).sum()) for turn in turns)}
        )
    return found


def rank_main(rank: int, folder: str) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
        for name, overrides in VARIANTS.items():
            config = load_config("base", [*BASE, *overrides])
            policy = load_policy(Path(folder, "model"), config.model)
            learner = Learner(policy, config, control_of(config), ranks=ShardedRanks(policy.device))
            first = steps(learner, range(3))
            control = learner.write(Path(folder, name))
            torch.save([first, control], Path(folder, f"{name}-{rank}.pt"))
            if name == "ppo-separate":  # goes on from what a single process wrote
                policy = load_policy(Path(folder, "alone", "policy"), config.model)
                learner = Learner(policy, config, control_of(config), ranks=ShardedRanks(policy.device))
                learner.read(Path(folder, "alone"), {})
                steps(learner, range(3, 4))
                learner.write(Path(folder, "resumed"))
        dist.barrier()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # threads of gloo would abort an interpreter that shuts down


def numbers(state: Any) -> list[float]:
    """Everything in plain nested data that can be compared up to rounding."""
    if isinstance(state, dict):
        return [x for key in sorted(state) for x in numbers(state[key])]
    if isinstance(state, list | tuple):
        return [x for part in state for x in numbers(part)]
    return [float(state)] if isinstance(state, int | float) else []


def assert_same(one: Path, other: Path) -> None:
    for name in ("policy/model.safetensors", "critic.safetensors", "optimizer.safetensors"):
        assert (one / name).is_file() == (other / name).is_file()
        if (one / name).is_file():
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys(), name
            for key in a:
                difference, scale = (a[key] - b[key]).abs(), b[key].abs().max().item()
                if "exp_avg" in key:
                    assert difference.max().item() <= ROUNDING * scale, f"{other.name}/{name} {key}"
                else:
                    assert difference.mean().item() < DRIFT, f"{other.name}/{name} {key}"


def test_ranks_equal_one(tmp_path: Path, make_sharp_policy: Callable[..., Policy]):
    make_sharp_policy().save(tmp_path / "model")
    alone: dict[str, Any] = {}
    learners: dict[str, Learner] = {}
    for name, overrides in VARIANTS.items():
        config = load_config("base", [*BASE, *overrides])
        learner = Learner(load_policy(tmp_path / "model", config.model), config, control_of(config))
        alone[name] = steps(learner, range(3)), learner.write(tmp_path / f"alone-{name}")
        learners[name] = learner
    os.rename(tmp_path / "alone-ppo-separate", tmp_path / "alone")
    try:
        mp.spawn(rank_main, args=(str(tmp_path),), nprocs=RANKS)
    except mp.ProcessExitedException:
        pytest.fail("\n".join(file.read_text() for file in tmp_path.glob("error-*")))
    for name, (metrics, control) in alone.items():
        assert_same(tmp_path / name, tmp_path / ("alone" if name == "ppo-separate" else f"alone-{name}"))
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(RANKS)]
        assert all(found == ranks[0] for found in ranks), "ranks must agree to the last bit"
        assert numbers(ranks[0][1]) == pytest.approx(numbers(control), rel=1e-4)
        for mine, single in zip(ranks[0][0], metrics, strict=True):
            assert mine == pytest.approx(single, rel=5e-3, abs=5e-4)
    steps(learners["ppo-separate"], range(3, 4))
    learners["ppo-separate"].write(tmp_path / "went-on")
    assert_same(tmp_path / "resumed", tmp_path / "went-on")
