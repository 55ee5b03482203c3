"""What a learner is made of, as files: policy, critic, optimiser. Whole tensors, however many ranks hold the parts.

One file of each, or a file of each rank's share (`optimizer-00001-of-00002.safetensors`), as large models come on the
Hugging Face hub: a policy in shares is a model directory that any tool loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from epo.training.policy import Critic, Policy
from epo.training.ranks import Ranks, holders_of

Optimizer = torch.optim.Optimizer
_OF_A_PARAMETER = {"step", "exp_avg", "exp_avg_sq"}
"""What AdamW keeps of a parameter that it has stepped."""


def write_learner(
    folder: Path,
    *,
    policy: Policy,
    critic: Critic | None,
    optimizer: Optimizer,
    ranks: Ranks,
    in_shares: bool = False,
) -> None:
    """Leave `policy/`, `critic` and `optimizer` in `folder`. All ranks must call it.

    Args:
        in_shares: every rank writes a share of the tensors, into a `folder` of its own or a common one; else the first
            rank writes all. Adapters are small, and never cut.
    """
    among = ranks.size if in_shares else 1
    if not ranks.holds_parts:
        policy.save(folder / "policy")
    elif among > 1 and policy.adapters is None:
        _write_model_share(folder / "policy", policy, ranks, among)
    else:
        weights = ranks.deal(policy.tensors(), among=1)
        if ranks.number == 0:
            policy.save(folder / "policy", weights)
    _write_share(folder, "critic", {} if critic is None else critic.state_dict(), ranks, among)
    _write_share(folder, "optimizer", _optimizer_tensors(optimizer), ranks, among)


def read_learner(folder: Path, *, critic: Critic | None, optimizer: Optimizer, ranks: Ranks) -> None:
    """Take over critic and optimiser from what `write_learner` left, with however many ranks that was."""
    if critic is not None:
        own = critic.state_dict()
        critic.load_state_dict(
            {name: ranks.part(t, own[name]) if name in own else t for name, t in _stored(folder, "critic")}
        )
    _load_optimizer(optimizer, _stored(folder, "optimizer"), ranks)


def _file_name(name: str, number: int, among: int) -> str:
    return f"{name}.safetensors" if among == 1 else f"{name}-{number + 1:05d}-of-{among:05d}.safetensors"


def _write_share(folder: Path, name: str, tensors: Mapping[str, Tensor], ranks: Ranks, among: int) -> None:
    share = ranks.deal(tensors, among=among)
    if ranks.number < among and (tensors or name == "optimizer"):
        whole = {key: tensor.contiguous() for key, tensor in share.items()}
        save_file(whole, folder / _file_name(name, ranks.number, among), metadata={"format": "pt"})


def _write_model_share(folder: Path, policy: Policy, ranks: Ranks, among: int) -> None:
    """This rank's file of a model directory; the first rank also writes everything else of it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = policy.tensors()
    _write_share(folder, "model", tensors, ranks, among)
    if ranks.number > 0:
        return
    files = {name: _file_name("model", holder, among) for name, holder in holders_of(tensors, among).items()}
    index = {"metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": files}, indent=1))
    policy.model.config.architectures = [type(policy.model).__name__]
    policy.model.config.save_pretrained(folder)
    if policy.model.generation_config is not None:
        policy.model.generation_config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _stored(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file or of all shares of it, one in memory at a time."""
    shares = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    for file in shares or [folder / f"{name}.safetensors"]:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a mapping
                yield key, opened.get_tensor(key)


def _optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: Optimizer, tensors: Iterator[tuple[str, Tensor]], ranks: Ranks) -> None:
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors:
        index, _, name = key.partition(".")
        like = parameters[int(index)]
        if value.shape != (shape := torch.Size() if name == "step" else like.shape):
            raise ValueError(f"optimizer: {key} is {list(value.shape)}, its parameter asks for {list(shape)}")
        state.setdefault(int(index), {})[name] = ranks.part(value, like) if name != "step" else value
    for index, entries in state.items():
        if isinstance(optimizer, torch.optim.AdamW) and entries.keys() != _OF_A_PARAMETER:
            raise ValueError(f"optimizer: of parameter {index} it has {', '.join(sorted(entries))}")
    # Groups (parameters, learning rates, betas) come from the configuration; only the moments are restored.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
