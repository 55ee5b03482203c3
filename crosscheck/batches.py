"""The same random batch twice: flat tokens for us, padded rows with a mask for verl and TRL.

Legend for tensor suffixes: _N trained tokens, _B rows (one trajectory each), _L columns of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

GARBAGE = 7.7
"""Stands at every masked position: what reads it disagrees visibly."""


@dataclass
class Ragged:
    """Trajectories of several turns. A row holds turns and the observations between them, then padding."""

    mask_B_L: Tensor
    """int64, 1 on trained tokens: verl's `response_mask`."""
    trajectory_ids_N: Tensor
    turn_ids_N: Tensor
    groups_B: np.ndarray
    """Task of each trajectory, as strings: verl's `uid`."""
    rewards_B: Tensor
    """One reward per trajectory."""
    generator: torch.Generator

    def pad(self, values_N: Tensor) -> Tensor:
        """Our layout to theirs; differentiable."""
        row, column = self.mask_B_L.nonzero(as_tuple=True)
        padded_B_L = torch.full(self.mask_B_L.shape, GARBAGE, dtype=values_N.dtype)
        return padded_B_L.index_put((row, column), values_N)

    def flat(self, values_B_L: Tensor) -> Tensor:
        """Their layout to ours."""
        return values_B_L[self.mask_B_L.bool()]

    def spread(self, values_B: Tensor) -> Tensor:
        """One number per trajectory to all of its tokens."""
        return values_B[self.trajectory_ids_N]

    def normal(self, *, scale: float = 1.0) -> Tensor:
        """[N] float64."""
        return scale * torch.randn(len(self.trajectory_ids_N), dtype=torch.float64, generator=self.generator)

    def tokens_of(self, trajectory: int) -> Tensor:
        """Which of our tokens belong to one trajectory."""
        return self.trajectory_ids_N == trajectory

    def rewards_at_the_end(self) -> Tensor:
        """[B, L] their token-level rewards: everything on the last trained token of the row, 0 elsewhere."""
        rewards_B_L = torch.zeros(self.mask_B_L.shape, dtype=self.rewards_B.dtype)
        for row, mask_L in enumerate(self.mask_B_L):
            rewards_B_L[row, int(mask_L.nonzero().max())] = self.rewards_B[row]
        return rewards_B_L

    def members(self) -> list[Tensor]:
        """Rows of each group: `task-0` first."""
        names = sorted(set(self.groups_B.tolist()))
        return [torch.from_numpy(np.flatnonzero(self.groups_B == name)) for name in names]


def ragged(seed: int, *, group_sizes: tuple[int, ...] = (4, 1, 3, 2, 4)) -> Ragged:
    """Random turns, lengths, gaps and rewards; groups shuffled. `task-1` has one member, `task-2` equal rewards."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows: list[list[int]] = []
    trajectory_ids: list[int] = []
    turn_ids: list[int] = []
    for trajectory in range(sum(group_sizes)):
        row: list[int] = []
        for turn in range(number(1, 5)):
            length = number(1, 7)
            row += [0] * (number(1, 4) if turn else 0) + [1] * length
            trajectory_ids += [trajectory] * length
            turn_ids += [turn] * length
        rows.append(row)
    width = max(len(row) for row in rows) + 2
    names = [f"task-{group}" for group, size in enumerate(group_sizes) for _ in range(size)]
    names = [names[index] for index in torch.randperm(len(names), generator=generator).tolist()]
    rewards_B = torch.randn(len(rows), dtype=torch.float64, generator=generator)
    groups_B = np.array(names, dtype=object)
    rewards_B[torch.from_numpy(groups_B == "task-2")] = 0.7
    return Ragged(
        mask_B_L=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        trajectory_ids_N=torch.tensor(trajectory_ids),
        turn_ids_N=torch.tensor(turn_ids),
        groups_B=groups_B,
        rewards_B=rewards_B,
        generator=generator,
    )
