"""Ranks that share the work of a learner against one that has it all: the same parameters, statistics and files.

With stochastic gradient descent parameters move in proportion to gradients, so every difference of these shows.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open

from epo.cluster.sharding import ShardedRanks
from epo.recipe import load_config
from epo.training.learner import Learner
from epo.training.policy import Policy, load_policy
from epo.training.tiny import build_model
from epo.training.trainer import control_of
from made_up import groups

BASE = (
    "model.path=unused", "imitation.demonstrations=0", "model.device=cpu", "model.max_context=256", "steps=8",
    "model.compute=float32", "agent.max_response_tokens=8", "optimizer.learning_rate=1", "optimizer.minibatches=2",
    "optimizer.microbatch_tokens=40", "rollout.tasks_per_step=3", "rollout.group_size=2", "health.prompts=2",
)  # fmt: skip
LORA = ("model.lora.rank=4", "algorithm.critic.trunk=separate", "algorithm.kl_coefficient=0.1")
VARIANTS = {
    "ppo-epo": ("entropy.method=epo",),
    "ppo-separate": ("algorithm.critic.trunk=separate",),
    "grpo-kl": ("algorithm.name=grpo", "algorithm.kl_coefficient=0.1"),
    "rescored": ("sampler.old_logprobs=learner", "entropy.method=bonus"),
    "lora": LORA,
    "recomputed": (*LORA, "model.gradient_checkpointing=true"),
}
OF_ONE_RANK = ("ppo-epo", "lora")
"""Those that a group of one rank goes through as well."""
ROUNDING = 2e-5
"""Largest difference of any number of a checkpoint, as a share of the largest change of its tensor, beyond what storing
numbers of its size rounds off. A token that is left out or weighed otherwise changes it by a hundredth or more."""
STORED = 4 * torch.finfo(torch.float32).eps
"""Four roundings of a number in storage, as a share of it: one for every optimiser step."""
STEPS = 3


def learner_in(folder: Path, *overrides: str, ranks: ShardedRanks | None = None) -> Learner:
    """A learner whose policy is in `folder`, and that follows gradients plainly."""
    config = load_config("base", [*BASE, *overrides])
    policy = load_policy(folder, config.model)
    sharing = {} if ranks is None else {"ranks": ranks}
    learner = Learner(policy, config, control_of(config), **sharing)
    parts = [list(policy.parameters())] + ([] if learner.critic is None else [list(learner.critic.parameters())])
    learner.optimizer = torch.optim.SGD([{"params": part} for part in parts], lr=1.0, momentum=0.9)
    return learner


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


def rank_main(process: int, folder: str) -> None:
    """Processes 0 and 1 are a group of two, process 2 is one of its own."""
    group, rank, size = ("pair", process, 2) if process < 2 else ("single", 0, 1)
    here = Path(folder, group)
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{group}", rank=rank, world_size=size)
        for name, overrides in VARIANTS.items():
            if size == 1 and name not in OF_ONE_RANK:
                continue
            learner = learner_in(Path(folder, "model"), *overrides, ranks=ShardedRanks(torch.device("cpu")))
            first = steps(learner, range(STEPS))
            control = learner.write(here / name)
            torch.save([first, control], here / f"{name}-{rank}.pt")
            if name == "ppo-separate":
                learner.config.cluster.sharded_checkpoints = True
                learner.write(here / "shares")
        for name, overrides in (("ppo-separate", VARIANTS["ppo-separate"]), ("lora", LORA)):
            # Goes on from what a single process wrote.
            saved = Path(folder, "alone", name)
            learner = learner_in(saved / "policy", *overrides, ranks=ShardedRanks(torch.device("cpu")))
            learner.read(saved, {})
            steps(learner, range(STEPS, STEPS + 1))
            learner.write(here / f"{name}-resumed")
        dist.barrier()
    except BaseException:
        Path(folder, f"error-{process}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # threads of gloo would abort an interpreter that shuts down


def numbers(state: Any) -> list[float]:
    """Everything in plain nested data that can be compared up to rounding."""
    if isinstance(state, dict):
        return [x for key in sorted(state) for x in numbers(state[key])]
    if isinstance(state, list | tuple):
        return [x for part in state for x in numbers(part)]
    return [float(state)] if isinstance(state, int | float) else []


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of all files of a checkpoint, by file and name, whatever the files are cut into."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a mapping
                name = f"{file.stem.split('-0')[0]} {key}"
                assert name not in found, f"{name} is there twice"
                found[name] = opened.get_tensor(key)
    assert found
    return found


def largest_difference(one: Path, other: Path, before: Path) -> float:
    """Of any tensor, beyond rounding in storage, as a share of its largest change since `before` (from 0, if it is not
    there)."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    begun = tensors(before)
    worst = 0.0
    for name in a:
        moved = (b[name] - begun[name] if name in begun else b[name]).abs().max().item()
        difference = (a[name] - b[name]).abs().max().item() - STORED * b[name].abs().max().item()
        assert moved > 0 or difference <= 0, name
        worst = max(worst, difference / moved if moved else 0.0)
    return worst


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any, tokenizer: Any) -> tuple[Path, dict[str, Any]]:
    """What a single process, a group of two ranks and a group of one made of the same data; what the first one said."""
    folder = tmp_path_factory.mktemp("played")
    policy = Policy(build_model(tokenizer, tiny_config, seed=0).eval(), tokenizer, max_context=256)
    policy.head_weight_V_D.data.mul_(20.0)  # visible preferences
    policy.save(folder / "model")
    for group in ("alone", "pair", "single"):
        (folder / group).mkdir()
    alone: dict[str, Any] = {}
    for name, overrides in VARIANTS.items():
        learner = learner_in(folder / "model", *overrides)
        alone[name] = steps(learner, range(STEPS)), learner.write(folder / "alone" / name)
    try:
        mp.spawn(rank_main, args=(str(folder),), nprocs=3)
    except mp.ProcessExitedException:
        pytest.fail("\n".join(file.read_text() for file in folder.glob("error-*")))
    return folder, alone


@pytest.mark.parametrize(
    ("group", "name"), [*(("pair", name) for name in VARIANTS), *(("single", name) for name in OF_ONE_RANK)]
)
def test_ranks_equal_one(played: tuple[Path, dict[str, Any]], group: str, name: str):
    folder, alone = played
    metrics, control = alone[name]
    difference = largest_difference(folder / group / name, folder / "alone" / name, folder / "model")
    assert difference < ROUNDING
    ranks = [torch.load(file) for file in sorted((folder / group).glob(f"{name}-?.pt"))]
    assert len(ranks) == (2 if group == "pair" else 1)
    assert all(found == ranks[0] for found in ranks), "ranks must agree to the last bit"
    assert numbers(ranks[0][1]) == pytest.approx(numbers(control), rel=1e-5)
    for mine, single in zip(ranks[0][0], metrics, strict=True):
        assert mine == pytest.approx(single, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("group", ["pair", "single"])
@pytest.mark.parametrize("name", ["ppo-separate", "lora"])
def test_ranks_go_on_from_a_single_process(played: tuple[Path, dict[str, Any]], name: str, group: str, tmp_path: Path):
    folder, _ = played
    one = went_on(folder / "alone" / name, tmp_path, *VARIANTS[name])
    assert largest_difference(folder / group / f"{name}-resumed", one, folder / "model") < ROUNDING


@pytest.mark.parametrize("saved", ["pair/ppo-separate", "pair/shares", "pair/lora", "single/lora"])
def test_a_single_process_goes_on_from_ranks(played: tuple[Path, dict[str, Any]], saved: str, tmp_path: Path):
    folder, _ = played
    name = "lora" if saved.endswith("lora") else "ppo-separate"
    mine = went_on(folder / saved, tmp_path / "mine", *VARIANTS[name])
    one = went_on(folder / "alone" / name, tmp_path / "one", *VARIANTS[name])
    assert largest_difference(mine, one, folder / "model") < ROUNDING


def went_on(saved: Path, folder: Path, *overrides: str) -> Path:
    """Where a single process that goes on from `saved` is after one more step."""
    learner = learner_in(saved / "policy", *overrides)
    learner.read(saved, {})
    steps(learner, range(STEPS, STEPS + 1))
    learner.write(folder)
    return folder


def test_shares_are_the_whole(played: tuple[Path, dict[str, Any]]):
    """Each rank's files hold about half; together they are, to the last bit, what one file holds; none is a pickle."""
    folder, _ = played
    whole, shares = folder / "pair" / "ppo-separate", folder / "pair" / "shares"
    a, b = tensors(whole), tensors(shares)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for kind in ("policy/model", "critic", "optimizer"):
        sizes = [(shares / f"{kind}-0000{n}-of-00002.safetensors").stat().st_size for n in (1, 2)]
        assert max(sizes) < 0.65 * (whole / f"{kind}.safetensors").stat().st_size
    files = {file.suffix for file in shares.rglob("*") if file.is_file()}
    assert files <= {".safetensors", ".json", ".jinja", ".txt"}
    config = load_config("base", BASE)
    assert load_policy(shares / "policy", config.model).digest() == load_policy(whole / "policy", config.model).digest()
