"""Responses, the tokens of one turn of one trajectory: statistics by response for methods that weigh whole turns.

Legend for tensor suffixes: _N trained tokens, _R responses, _U distinct turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Nats. Mean entropies that differ by no more are equal: scaled to [0, 1], the difference would be noise."""


class Responses(NamedTuple):
    """Every response with at least one token, by trajectory and then by turn."""

    response_N: Tensor
    """[N] index of the token's response."""
    trajectory_R: Tensor
    """[R] index of the response's trajectory among those of the batch, ascending."""
    counts_R: Tensor
    """[R] number of tokens."""

    def mean(self, values_N: Tensor) -> Tensor:
        """[R] token mean in float64, without gradient."""
        sums_R = torch.zeros(len(self.counts_R), dtype=torch.float64, device=values_N.device)
        sums_R.index_add_(0, self.response_N, values_N.detach().to(torch.float64))
        return sums_R / self.counts_R

    def group(self, group_ids_N: Tensor) -> Tensor:
        """[R] index of each response's group among those of the batch.

        Raises:
            ValueError: tokens of one response lie in different groups.
        """
        _, group_N = _indices(group_ids_N)
        group_R = torch.zeros_like(self.counts_R).index_copy(0, self.response_N, group_N)
        if not torch.equal(group_R[self.response_N], group_N):
            raise ValueError("group_ids must be the same for all tokens of a response")
        return group_R


def find_responses(trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> Responses:
    """The responses of a batch.

    Args:
        trajectory_ids_N: [N] any integers.
        turn_ids_N: [N] integers >= 0.

    Raises:
        ValueError: shapes differ, or a negative turn id, which marks a token that is not trained.
    """
    if trajectory_ids_N.shape != turn_ids_N.shape or turn_ids_N.dim() != 1:
        raise ValueError(
            f"trajectory_ids and turn_ids must both be [N], "
            f"got {list(trajectory_ids_N.shape)} and {list(turn_ids_N.shape)}"
        )
    if turn_ids_N.numel() == 0:
        return Responses(turn_ids_N.long(), turn_ids_N.long(), turn_ids_N.long())
    if int(turn_ids_N.min()) < 0:
        raise ValueError(f"turn_ids must be >= 0, got {int(turn_ids_N.min())}; select the trained tokens first")
    _, trajectory_N = _indices(trajectory_ids_N)
    turns_U, turn_N = _indices(turn_ids_N)
    pairs_R, response_N = _indices(trajectory_N * len(turns_U) + turn_N)
    return Responses(response_N, pairs_R // len(turns_U), torch.bincount(response_N))


def _indices(ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids ascending, and the index of each token's id among them."""
    unique = cast("Callable[..., tuple[Tensor, Tensor]]", torch.unique)  # pyright: ignore[reportUnknownMemberType]
    return unique(ids_N, return_inverse=True)
