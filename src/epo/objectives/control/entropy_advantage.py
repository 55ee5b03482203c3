"""Entropy-based advantage shaping: tokens of high entropy gain advantage, never more than a share of what they have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl


class EntropyAdvantageControl(EntropyControl):
    """A + min(alpha H, |A| / kappa), token by token, H detached.

    The addition is never negative, also where A < 0; as kappa > 1, it never changes the sign of A, and where A = 0 it
    is 0.

    Source: arXiv 2506.14758, equations 5 and 6; kappa = 2 and both values of alpha are those of its section 4. There H
    is of the policy as it is in each update (equation 4); here of the sampling policy, read once per RL step, which
    differs from the second optimiser step on.
    """

    def __init__(self, *, alpha: float = 0.4, kappa: float = 2.0) -> None:
        """Set the addition.

        Args:
            alpha: advantage per nat, >= 0; the paper's for GRPO. Its value for PPO is 0.1.
            kappa: the addition is at most |A| / kappa; > 1.

        Raises:
            ValueError: a number out of its range.
        """
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be >= 0 and finite, got {alpha}")
        if not 1 < kappa < math.inf:
            raise ValueError(f"kappa must be > 1 and finite, got {kappa}")
        self.alpha = alpha
        self.kappa = kappa

    def shape_advantages(
        self,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        turn_ids_N: Tensor,
        group_ids_N: Tensor,
    ) -> Tensor:
        del trajectory_ids_N, turn_ids_N, group_ids_N
        advantages_N = advantages_N.detach()
        addition_N = torch.minimum(self.alpha * entropy_N.detach().to(advantages_N), advantages_N.abs() / self.kappa)
        return advantages_N + addition_N

    def warnings(self) -> list[str]:
        if self.alpha == 0:
            return ["alpha = 0: nothing is added to the advantages, the run equals method 'none'"]
        return []
