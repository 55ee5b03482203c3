"""Clip-Cov: a few tokens, drawn from those whose update costs most entropy, lose their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.covariance import covariances
from epo.objectives.policy import Surrogate, clipped_surrogate


class ClipCovControl(EntropyControl):
    """PPO's clipped loss without the tokens of a random sample of high covariances c_i.

    Candidates are tokens with lower < c_i < upper whose ratio is not clipped anyway; max(1, floor(ratio N)) of them are
    drawn for each mini-batch of N tokens, and their loss is 0.

    Source: arXiv 2505.22617, read in its official code (PRIME-RL/Entropy-Mechanism-of-RL). There the mini-batch is
    whatever one forward pass holds; here it is the mini-batch of the optimiser step, however it is cut up. There is no
    dual clip there; here it is the recipe's, and plays no part in the choice of tokens.
    """

    previews = True

    def __init__(
        self,
        *,
        ratio: float = 2e-4,
        lower: float = 1.0,
        upper: float = 5.0,
        clip_low: float = 1.0,
        clip_high: float = 1.0,
    ) -> None:
        """Set which covariances are too high; the defaults are those of the authors' scripts.

        Args:
            ratio: share of the mini-batch's tokens that is drawn, in (0, 1].
            lower: candidates have a covariance above this.
            upper: candidates have a covariance below this.
            clip_low: width of PPO's clip below 1, in [0, 1]; replaces the recipe's.
            clip_high: width of PPO's clip above 1, >= 0; replaces the recipe's.

        Raises:
            ValueError: a number out of its range.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
        if not lower < upper:
            raise ValueError(f"lower must be below upper, got {lower} and {upper}")
        if not 0 <= clip_low <= 1 or not clip_high >= 0:
            raise ValueError(f"clip_low must lie in [0, 1] and clip_high be >= 0, got {clip_low} and {clip_high}")
        self.ratio = ratio
        self.lower = lower
        self.upper = upper
        self.clip_low = clip_low
        self.clip_high = clip_high

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
        """Bool: the tokens that lose their gradient."""
        del entropy_N, trajectory_ids_N
        covariance_N = covariances(logprobs_N, advantages_N)
        is_clipped_N = clipped_surrogate(
            logprobs_N,
            old_logprobs_N,
            advantages_N,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=None,
        ).is_clipped_N
        is_candidate_N = (covariance_N > self.lower) & (covariance_N < self.upper) & ~is_clipped_N
        candidates = is_candidate_N.nonzero()[:, 0]
        count = max(1, int(self.ratio * len(covariance_N)))
        order = torch.randperm(len(candidates), generator=generator).to(candidates.device)
        marks_N = torch.zeros_like(is_candidate_N)
        marks_N[candidates[order[:count]]] = True
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
        del clip_low, clip_high
        if marks_N is None:
            raise ValueError("clip_cov needs the marks of preview(), called once for the whole mini-batch")
        plain = clipped_surrogate(
            logprobs_N,
            old_logprobs_N,
            advantages_N,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=dual_clip,
        )
        return plain._replace(loss_N=torch.where(marks_N, 0.0, plain.loss_N), is_clipped_N=plain.is_clipped_N | marks_N)
