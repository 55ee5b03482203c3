"""What a learner is made of, as files: policy, critic, optimiser. Whole, however many ranks hold the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from epo.training.policy import Critic, Policy
from epo.training.ranks import Ranks

Optimizer = torch.optim.Optimizer


def write_learner(folder: Path, *, policy: Policy, critic: Critic | None, optimizer: Optimizer, ranks: Ranks) -> None:
    """Leave `policy/`, `critic.safetensors` and `optimizer.safetensors` in `folder`. All ranks must call it; one
    writes."""
    weights = ranks.policy_weights(policy)
    critic_tensors = {} if critic is None else _whole(critic.state_dict(), ranks)
    optimizer_tensors = _whole(_optimizer_tensors(optimizer), ranks)
    if not ranks.writes:
        return
    policy.save(folder / "policy", weights)
    if critic is not None:
        save_file(critic_tensors, folder / "critic.safetensors")
    save_file(optimizer_tensors, folder / "optimizer.safetensors")


def read_learner(folder: Path, *, critic: Critic | None, optimizer: Optimizer, ranks: Ranks) -> None:
    """Take over critic and optimiser from what `write_learner` left, with however many ranks that was."""
    if critic is not None:
        own = critic.state_dict()
        found = load_file(folder / "critic.safetensors")
        critic.load_state_dict({name: ranks.part(t, own[name]) if name in own else t for name, t in found.items()})
    _load_optimizer(optimizer, load_file(folder / "optimizer.safetensors"), ranks)


def _whole(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    return {name: ranks.whole(tensor).contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = ranks.part(value, like) if value.shape == like.shape else value
    # Groups (parameters, learning rates, betas) come from the configuration; only the moments are restored.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
