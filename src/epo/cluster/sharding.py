"""A learner's weights, gradients and moments spread over ranks by torch's FSDP2, and its rows shared out.

Blocks are gathered one at a time while a pass goes through them. What belongs to no block (embedding, last norm, head)
is gathered once for a pass and stays whole until its backward, for the head is applied after the pass.

Legend: N trained tokens of the step.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from epo.objectives.ranks import gather_numbers
from epo.training.adapters import AdapterTrunk
from epo.training.policy import Critic, Policy
from epo.training.ranks import Ranks, holders_of


class ShardedRanks(Ranks):
    """The ranks of torch's default process group."""

    holds_parts = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.number = dist.get_rank()
        self.size = dist.get_world_size()
        self._mesh: DeviceMesh = init_device_mesh(device.type, (self.size,))

    def own(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Longest rows first, each to the rank that has the fewest tokens so far."""
        load = [0] * self.size
        own: list[int] = []
        for row in sorted(rows, key=lambda row: (-lengths[row], row)):
            rank = load.index(min(load))
            load[rank] += lengths[row]
            if rank == self.number:
                own.append(row)
        return own

    def most(self, count: int) -> int:
        found = torch.tensor([count], device=self._device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def total(self, tensor_N: Tensor) -> Tensor:
        summed_N = tensor_N.clone()
        dist.all_reduce(summed_N)
        return summed_N

    def totals(self, metrics: Mapping[str, float]) -> dict[str, float]:
        summed: dict[str, float] = defaultdict(float)
        for part in gather_numbers(metrics, device=self._device):
            for name, value in part.items():
                summed[name] += value
        return dict(summed)

    def shard(self, policy: Policy, critic: Critic | None, reference: Policy | None) -> None:
        policy.trunk = self._shard_model(policy.model)
        if reference is not None:  # adapters have one model between them
            is_one = reference.model is policy.model
            reference.trunk = policy.trunk if is_one else self._shard_model(reference.model)
        if critic is None:
            return
        if isinstance(critic.trunk, AdapterTrunk):
            critic.trunk.follow(policy.trunk)
            fully_shard(critic.head, mesh=self._mesh)
            return
        # Its values are a view, which nobody changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        if critic.trunk is not None:
            self._shard_blocks(critic.trunk, policy.model)
        fully_shard(critic, mesh=self._mesh)

    def _shard_model(self, model: Any) -> WholeTrunk:
        self._shard_blocks(model, model)
        trunk = WholeTrunk(model)
        fully_shard(trunk, mesh=self._mesh, reshard_after_forward=False)
        return trunk

    def _shard_blocks(self, module: nn.Module, model: Any) -> None:
        names = set(model._no_split_modules or ())  # transformers' own word for the blocks of an architecture
        for block in [m for m in module.modules() if type(m).__name__ in names]:
            fully_shard(block, mesh=self._mesh, reshard_after_forward=True)

    def deal(self, tensors: Mapping[str, Tensor], *, among: int) -> dict[str, Tensor]:
        holders = holders_of(tensors, among)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            whole = self.whole(tensor.detach())
            if holders[name] == self.number:
                found[name] = whole.cpu()
        return found

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return tensor
        # Every rank has the whole tensor, so none needs to send it.
        return distribute_tensor(tensor.to(self._device), like.device_mesh, like.placements, src_data_rank=None)

    def gradient_scale(self) -> float:
        return float(self.size)  # FSDP takes the mean over the ranks


class WholeTrunk(nn.Module):
    """The trunk of a model as a pass that gathers the weights of the model's head, too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, **inputs: Any) -> Any:
        return self.model.base_model(**inputs)
