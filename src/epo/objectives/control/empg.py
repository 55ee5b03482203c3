"""EMPG, entropy-modulated policy gradients: confident turns count more, and lead to confident turns.

Legend for tensor suffixes: _N trained tokens, _R responses (the tokens of one turn of one trajectory).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.responses import ROUNDING, find_responses


class EMPGControl(EntropyControl):
    """A <- A g(h_t) + zeta f(h_{t+1}), then minus its mean over the batch's turns, each with its token mean.

    h is the token-mean entropy of a turn of a trajectory, under the sampling policy, scaled to [0, 1] by least and
    greatest of the batch; 0 for all turns if all are alike. g = exp(-k h) / mean of exp(-k h) over the batch's turns;
    f = exp(-k' h). The last turn of a trajectory has no second term. The next turn is the next one with tokens.

    Source: arXiv 2509.09265 as ARLArena's code has it, which cites the paper's equations 7 (the mean to subtract, over
    turns), 8 (the sum), 10 (g), 11 (f) and 12 (the scaling); k = k' = 1 and zeta = 0.05 are its defaults. The paper
    itself was not seen. There the tokens of a turn share one advantage; here, with a critic, they may not.
    """

    def __init__(self, *, k: float = 1.0, k_future: float = 1.0, zeta: float = 0.05) -> None:
        """Set both terms.

        Args:
            k: rate of g, by which uncertain turns count less, >= 0.
            k_future: k', rate of f, >= 0.
            zeta: weight of the second term, the bonus for a confident next turn, >= 0.

        Raises:
            ValueError: a number out of its range.
        """
        for name, value in (("k", k), ("k_future", k_future), ("zeta", zeta)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        self.k = k
        self.k_future = k_future
        self.zeta = zeta

    def shape_advantages(
        self,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        turn_ids_N: Tensor,
        group_ids_N: Tensor,
    ) -> Tensor:
        del group_ids_N
        if advantages_N.numel() == 0:
            return advantages_N
        responses = find_responses(trajectory_ids_N, turn_ids_N)
        entropy_R = responses.mean(entropy_N)
        least, greatest = entropy_R.aminmax()
        width = greatest - least
        h_R = (entropy_R - least) / width if float(width) > ROUNDING else torch.zeros_like(entropy_R)
        gain_R = torch.exp(-self.k * h_R)
        gain_R = gain_R / gain_R.mean()
        future_R = torch.zeros_like(h_R)
        has_next = responses.trajectory_R[1:] == responses.trajectory_R[:-1]
        future_R[:-1] = torch.where(has_next, torch.exp(-self.k_future * h_R[1:]), 0.0)
        shaped_N = advantages_N.detach().double() * gain_R[responses.response_N]
        shaped_N = shaped_N + self.zeta * future_R[responses.response_N]
        return (shaped_N - responses.mean(shaped_N).mean()).to(advantages_N.dtype)

    def warnings(self) -> list[str]:
        if self.k == 0 and self.zeta == 0:
            return ["k and zeta are 0: entropy has no effect, advantages are centred over the batch and nothing else"]
        return []
