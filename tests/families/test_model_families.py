"""Every family the whole way: episodes of many turns, one row each, log-probabilities of sampler, learner and of the
model as transformers computes it, one update, save and load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import FAMILIES, WINDOW, make_directory

from chat_templates import STYLES
from epo.config import Config
from epo.environments import make_suite
from epo.environments.pool import EnvPool
from epo.packing import pack
from epo.recipe import apply_overrides, parse_config
from epo.rollout import EpisodeSpec
from epo.sampling.local import LocalSampler
from epo.training.learner import Learner
from epo.training.policy import Policy, load_policy
from epo.training.trainer import control_of, make_collector
from epo.types import Trajectory, TrajectoryGroup

OPTIONS = {"length": 8, "choices": 2, "tasks": 4, "ood_length": 3}
TASKS = list(make_suite("corridor", OPTIONS).tasks("train"))
TURNS = 6
TOLERANCE = 2e-4


def config_of(folder: Path, algorithm: str) -> Config:
    return parse_config({
        "environment": {"suite": "corridor", "options": OPTIONS, "workers": 2, "max_turns": TURNS},
        "agent": {"prompt": "brief", "format": "action", "max_response_tokens": 7},
        "model": {"path": str(folder), "max_context": 800, "device": "cpu", "compute": "float32"},
        "imitation": {"demonstrations": 0},
        "rollout": {"tasks_per_step": 2, "group_size": 2},
        "algorithm": {"name": algorithm},
        "entropy": {"method": "epo_strong", "coefficient": 0.01},
        "optimizer": {"learning_rate": 1e-3, "minibatches": 1},
    })  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    with EnvPool("corridor", OPTIONS, size=2) as pool:
        yield pool


def play(policy: Policy, config: Config, pool: EnvPool, sampler: LocalSampler) -> list[Trajectory]:
    specs = [EpisodeSpec(task=TASKS[n // 2], seed=(3, n)) for n in range(4)]
    return make_collector(config, pool, policy, sampler).collect(specs, temperature=1.0)


@torch.no_grad()
def as_transformers_says(folder: Path, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies of all drawn tokens: the model's own forward of each turn, without a cache, with
    the attention that its family needs."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for turn in trajectory.turns:
        ids = [*turn.prompt_ids.tolist(), *turn.response_ids.tolist()]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(turn.prompt_ids) - 1 : -1].double()
        logp = logits.log_softmax(-1)
        chosen = logp[torch.arange(len(turn.response_ids)), torch.from_numpy(turn.response_ids)]
        found.append((chosen, -(logp.exp() * logp).sum(-1)))
    return torch.cat([a for a, _ in found]).numpy(), torch.cat([b for _, b in found]).numpy()


def groups_of(trajectories: list[Trajectory]) -> list[TrajectoryGroup]:
    """Of four episodes, two groups, with rewards to learn from."""
    for number, turn in enumerate(turn for t in trajectories for turn in t.turns):
        turn.environment_reward = float(number % 5 == 0)
    return [TrajectoryGroup(task=TASKS[n], trajectories=trajectories[2 * n : 2 * n + 2]) for n in range(2)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_way(name: str, pool: EnvPool, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = make_directory(name, tmp_path / "model")
    config = config_of(folder, "ppo" if list(FAMILIES).index(name) % 2 else "grpo")
    policy = load_policy(folder, config.model)
    assert policy.tokenizer.convert_ids_to_tokens(policy.chat.stop_id) == STYLES[family.template].stop
    sampler = LocalSampler(policy, max_episodes=2)
    assert sampler.path == family.path, sampler.path_reason

    # Episodes: many turns in one row each, and every drawn token is trained as it was drawn.
    trajectories = play(policy, config, pool, sampler)
    assert [len(t.turns) for t in trajectories] == [TURNS] * 4
    rows = pack(trajectories).rows
    assert len(rows) == 4 and min(map(len, rows)) > 3 * WINDOW
    for row, trajectory in zip(rows, trajectories, strict=True):
        drawn = [int(i) for turn in trajectory.turns for i in turn.response_ids]
        assert row.token_ids_T[row.trained_T].tolist() == drawn

    # What the sampler says of them is what transformers says, and what the learner says.
    for trajectory in trajectories[:2]:
        logprobs, entropy = as_transformers_says(folder, trajectory)
        np.testing.assert_allclose(np.concatenate([t.logprobs for t in trajectory.turns]), logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(np.concatenate([t.entropy for t in trajectory.turns]), entropy, atol=TOLERANCE)
        assert entropy.std() > 0.01, "the model minds what it reads"
    learner = Learner(policy, config, control_of(config))
    before = {key: tensor.clone() for key, tensor in policy.model.state_dict().items()}
    metrics = learner.update(groups_of(trajectories), step=0)
    assert metrics["sampler/mismatch_kl"] < 1e-6 and abs(metrics["policy/kl"]) < 1e-6

    # The update reached every weight; what is saved is what was trained.
    after = policy.model.state_dict()
    same = [key for key, parameter in policy.model.named_parameters() if torch.equal(before[key], after[key])]
    assert not same
    policy.save(tmp_path / "saved")
    again = load_policy(tmp_path / "saved", config.model)
    assert again.digest() == policy.digest()
    assert again.chat.first_prompt("Go on.") == policy.chat.first_prompt("Go on.")
    fresh = LocalSampler(again, max_episodes=2)
    for ours, theirs in zip(play(policy, config, pool, sampler), play(again, config, pool, fresh), strict=True):
        for a, b in zip(ours.turns, theirs.turns, strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3"])
def test_rounded_products_and_adapters(name: str, pool: EnvPool, tmp_path: Path) -> None:
    folder = make_directory(name, tmp_path / "model")
    config = apply_overrides(config_of(folder, "grpo"), ["model.compute=bfloat16", "model.lora.rank=4"])
    policy = load_policy(folder, config.model)
    trajectories = play(policy, config, pool, LocalSampler(policy, max_episodes=2))
    metrics = Learner(policy, config, control_of(config)).update(groups_of(trajectories), step=0)
    assert metrics["sampler/mismatch_kl"] < 1e-3 and metrics["policy/grad_norm"] > 0
