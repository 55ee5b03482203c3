"""Random ragged batches of trained tokens, as flat float64 tensors: what every objective must cope with.

Groups of one to four trajectories, trajectories of one to forty turns, turns of no, one or a few tokens. A turn without
tokens leaves a gap in the turn ids; every trajectory keeps at least one token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """One batch; every tensor is [N]."""

    group_ids_N: Tensor
    trajectory_ids_N: Tensor
    turn_ids_N: Tensor
    entropy_N: Tensor
    logprobs_N: Tensor
    old_logprobs_N: Tensor
    advantages_N: Tensor

    def __len__(self) -> int:
        return len(self.turn_ids_N)

    def at(self, index: Tensor | slice) -> Ragged:
        """The same for some tokens, or for all in another order."""
        return Ragged(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@st.composite
def ragged_batches(draw: st.DrawFn, *, max_groups: int = 3, max_members: int = 4, max_turns: int = 40) -> Ragged:
    """A strategy. Shapes are drawn one by one, so that failures shrink; numbers come from a seeded generator."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    all_equal = draw(st.booleans())
    groups: list[int] = []
    trajectories: list[int] = []
    turns: list[int] = []
    number = 0
    for group in range(draw(st.integers(1, max_groups))):
        for _ in range(draw(st.integers(1, max_members))):
            count = draw(st.integers(1, 4) | st.integers(1, max_turns))
            lengths = torch.randint(0, 4, (count,), generator=generator).tolist()
            lengths[draw(st.integers(0, count - 1))] = draw(st.integers(1, 5))
            for turn, length in enumerate(lengths):
                groups += [group] * length
                trajectories += [number] * length
                turns += [turn] * length
            number += 1
    size = len(turns)
    trajectory_ids_N = torch.tensor(trajectories)

    def normal() -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    advantages_N = torch.full((size,), 0.7, dtype=torch.float64) if all_equal else normal()
    old_logprobs_N = -normal().abs() - 0.05
    return Ragged(
        group_ids_N=torch.tensor(groups),
        trajectory_ids_N=trajectory_ids_N,
        turn_ids_N=torch.tensor(turns),
        entropy_N=2 * torch.rand(size, generator=generator, dtype=torch.float64),
        logprobs_N=(old_logprobs_N + 0.3 * normal()).clamp(max=-1e-3),
        old_logprobs_N=old_logprobs_N,
        advantages_N=advantages_N,
    )


def cut(size: int, cuts: list[int]) -> list[slice]:
    """Micro-batches of `size` tokens, cut at any places; some may be empty."""
    edges = sorted({0, size, *(place % (size + 1) for place in cuts)})
    return [slice(start, stop) for start, stop in pairwise(edges)]
