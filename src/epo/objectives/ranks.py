"""Tokens of several ranks as one batch: entropy statistics and weights are of all trajectories, wherever they ran.

Legend for tensor suffixes: _N trained tokens of all ranks, _R those of this rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor


class Gathered(NamedTuple):
    """Tokens of all ranks in the order of the ranks."""

    tensors: tuple[Tensor, ...]
    """[N] each, without gradient, the same on every rank."""
    own: slice
    """Where this rank's tokens lie in them."""


def gather_tokens(*tensors_R: Tensor, group: dist.ProcessGroup | None = None) -> Gathered:
    """The tensors of all ranks, whose numbers of tokens may differ; a rank without tokens takes part with empty ones.

    What an `EntropyControl` observes must be the same on every rank, and the weights of a mini-batch must sum to 1 over
    all of them::

        (entropy_N, trajectories_N, turns_N), own = gather_tokens(entropy_R, trajectories_R, turns_R)
        weights_R = trajectory_weights(trajectories_N, turns_N)[own]
        control.observe(entropy_N, trajectories_N, turns_N)

    With gradients summed over the ranks, not averaged, a run on n ranks then equals the run on one. Trajectory ids must
    be unique over all ranks. Outside `torch.distributed` the tensors come back as they are.

    Args:
        tensors_R: [R] each, of the same length; equal dtypes on all ranks.
        group: the ranks that share the batch; all by default.

    Raises:
        ValueError: lengths differ on this rank, or no tensor is given.
    """
    if not tensors_R or any(tensor.shape != tensors_R[0].shape or tensor.dim() != 1 for tensor in tensors_R):
        raise ValueError(f"tensors must all be [R], got {[list(tensor.shape) for tensor in tensors_R]}")
    detached = tuple(tensor.detach() for tensor in tensors_R)
    if not dist.is_available() or not dist.is_initialized():
        return Gathered(detached, slice(0, len(detached[0])))
    # The stubs of torch leave it untyped; a torch built without distributed does not have it.
    all_gather = cast("Callable[..., Any]", dist.all_gather)  # pyright: ignore[reportUnknownMemberType]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    count = torch.tensor([len(detached[0])], device=detached[0].device)
    counts = [torch.zeros_like(count) for _ in range(size)]
    all_gather(counts, count, group=group)
    lengths = [int(length) for length in counts]
    longest = max(lengths)
    gathered: list[Tensor] = []
    for tensor in detached:
        # Equal shapes, which every backend can gather.
        padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor))])
        parts = [torch.empty_like(padded) for _ in range(size)]
        all_gather(parts, padded, group=group)
        gathered.append(torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]))
    start = sum(lengths[:rank])
    return Gathered(tuple(gathered), slice(start, start + lengths[rank]))


def gather_numbers(numbers: Mapping[str, float], *, device: torch.device) -> list[dict[str, float]]:
    """Every rank's numbers, to the last bit and in the order of the ranks; their names may differ.

    As text in a tensor: torch's collectives for objects send pickles.

    Args:
        device: on which the ranks' backend communicates.
    """
    line = json.dumps(dict(numbers)).encode() + b"\n"
    (text_N,), _ = gather_tokens(torch.tensor(list(line), dtype=torch.uint8, device=device))
    text = bytes(cast("list[int]", text_N.tolist()))  # pyright: ignore[reportUnknownMemberType]
    return [json.loads(line) for line in text.splitlines()]
