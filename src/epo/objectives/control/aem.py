"""AEM: turns of a task's rollout group are weighed by how certain they were beside each other.

Legend for tensor suffixes: _N trained tokens, _R responses (the tokens of one turn of one trajectory), _G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.responses import ROUNDING, find_responses


class AEMControl(EntropyControl):
    """A <- a A with a = exp(-rate h) / mean of exp(-rate h) over the responses of the group.

    h is the token-mean entropy of a response (a turn of a trajectory) under the sampling policy, scaled to [0, 1] by
    least and greatest of the group, all its trajectories together. a = 1 where they differ by less than `min_range`.
    A group of one trajectory is a group.

    Source: arXiv 2605.00425, from summaries of the paper that agree on the form; that least, greatest and mean run over
    all responses of a task's rollout group, and `min_range`, are from the most detailed one. The paper and its code
    were not seen.
    """

    def __init__(self, *, rate: float = 1.0, min_range: float = 0.1) -> None:
        """Set the weights.

        Args:
            rate: lambda of the exponential, >= 0; the most certain response counts exp(rate) times the least certain.
            min_range: nats, >= 0; a group whose responses differ less is left alone.

        Raises:
            ValueError: a number out of its range.
        """
        for name, value in (("rate", rate), ("min_range", min_range)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        self.rate = rate
        self.min_range = min_range

    def shape_advantages(
        self,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        turn_ids_N: Tensor,
        group_ids_N: Tensor,
    ) -> Tensor:
        if advantages_N.numel() == 0:
            return advantages_N
        responses = find_responses(trajectory_ids_N, turn_ids_N)
        group_R = responses.group(group_ids_N)
        entropy_R = responses.mean(entropy_N)
        groups = int(group_R.max()) + 1
        empty_G = entropy_R.new_zeros(groups)
        least_R = empty_G.scatter_reduce(0, group_R, entropy_R, "amin", include_self=False)[group_R]
        greatest_R = empty_G.scatter_reduce(0, group_R, entropy_R, "amax", include_self=False)[group_R]
        width_R = greatest_R - least_R
        is_alike_R = (width_R < self.min_range) | (width_R <= ROUNDING)
        h_R = torch.where(is_alike_R, 0.0, (entropy_R - least_R) / width_R)
        raw_R = torch.exp(-self.rate * h_R)
        mean_G = empty_G.index_add(0, group_R, raw_R) / torch.bincount(group_R)
        weight_N = (raw_R / mean_G[group_R])[responses.response_N]
        return (weight_N * advantages_N.detach()).to(advantages_N.dtype)

    def warnings(self) -> list[str]:
        if self.rate == 0:
            return ["rate = 0: every response counts alike, the run equals method 'none'"]
        return []
