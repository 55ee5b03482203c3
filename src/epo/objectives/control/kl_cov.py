"""KL-Cov: tokens whose update costs most entropy are held back by a KL penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.covariance import covariances
from epo.objectives.policy import Surrogate, importance_ratio


class KLCovControl(EntropyControl):
    """-A r for every token, without a clip; the max(1, floor(ratio N)) tokens of highest covariance add w |log r|.

    Of equal covariances the first tokens are taken, so that the choice is the same on any machine.

    Source: arXiv 2505.22617, read in its official code (PRIME-RL/Entropy-Mechanism-of-RL): 0.2 % in its script for 7B
    models, 0.02 % in that for 32B. There the mini-batch is whatever one forward pass holds; here it is that of the
    optimiser step.
    """

    previews = True

    def __init__(self, *, ratio: float = 0.002, weight: float = 1.0) -> None:
        """Set the penalty.

        Args:
            ratio: share of the mini-batch's tokens that is penalised, in (0, 1].
            weight: w, of the penalty, >= 0.

        Raises:
            ValueError: a number out of its range.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
        if not weight >= 0:
            raise ValueError(f"weight must be >= 0, got {weight}")
        self.ratio = ratio
        self.weight = weight

    def preview(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """Bool: the tokens that are penalised."""
        del old_logprobs_N, entropy_N, trajectory_ids_N, generator
        covariance_N = covariances(logprobs_N, advantages_N)
        count = min(len(covariance_N), max(1, int(self.ratio * len(covariance_N))))
        marks_N = torch.zeros(len(covariance_N), dtype=torch.bool, device=covariance_N.device)
        marks_N[covariance_N.argsort(descending=True, stable=True)[:count]] = True
        return marks_N

    def surrogate(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
        marks_N: Tensor | None = None,
    ) -> Surrogate:
        del clip_low, clip_high, dual_clip
        if marks_N is None:
            raise ValueError("kl_cov needs the marks of preview(), called once for the whole mini-batch")
        log_ratio_N = logprobs_N - old_logprobs_N.detach()
        penalty_N = torch.where(marks_N, self.weight * log_ratio_N.abs(), 0.0)
        loss_N = -advantages_N.detach() * importance_ratio(log_ratio_N) + penalty_N
        return Surrogate(loss_N, torch.zeros_like(marks_N), log_ratio_N.detach())

    def warnings(self) -> list[str]:
        if self.weight == 0:
            return ["weight = 0: no token is held back, and this method has no clip either: a plain policy gradient"]
        return []
