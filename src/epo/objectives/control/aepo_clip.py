"""The entropy-balanced clip of agentic AEPO: what PPO clips above keeps a bounded gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.policy import Surrogate, clipped_surrogate, importance_ratio


class AEPOClipControl(EntropyControl):
    """PPO's clip, except that a token with A > 0 and r > 1 + c keeps the gradient of a ratio of 1 + c.

    Its loss is -A (1 + c) r / stop_gradient(r): the value of the clipped loss, with gradient -A (1 + c) by log pi where
    PPO has none. Unlikely tokens that were raised past the clip, often those of high entropy, so go on learning, but no
    faster than at the clip. Everything else is PPO's.

    Source: Agentic Entropy-Balanced Policy Optimization, arXiv 2510.14545. Its abstract says that a stop-gradient in
    the clipping term keeps and rescales the gradients of high-entropy tokens; the factor 1 + c and its conditions come
    from a digest, and could not be checked against equations or code. The paper also balances rollout branches by
    entropy and scales advantages by it; neither is here.
    """

    def __init__(self, *, clip_low: float | None = None, clip_high: float | None = None) -> None:
        """Set the widths.

        Args:
            clip_low: width of the clip below 1, in [0, 1]; none takes the recipe's.
            clip_high: c, width of the clip above 1, >= 0; none takes the recipe's.

        Raises:
            ValueError: a width out of its range.
        """
        if clip_low is not None and not 0 <= clip_low <= 1:
            raise ValueError(f"clip_low must lie in [0, 1] or be None, got {clip_low}")
        if clip_high is not None and not clip_high >= 0:
            raise ValueError(f"clip_high must be >= 0 or None, got {clip_high}")
        self.clip_low = clip_low
        self.clip_high = clip_high

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
        del marks_N
        low = clip_low if self.clip_low is None else self.clip_low
        high = clip_high if self.clip_high is None else self.clip_high
        plain = clipped_surrogate(
            logprobs_N, old_logprobs_N, advantages_N, clip_low=low, clip_high=high, dual_clip=dual_clip
        )
        advantages_N = advantages_N.detach()
        ratio_N = importance_ratio(plain.log_ratio_N)
        is_kept_N = (advantages_N > 0) & (ratio_N > 1 + high)
        # exp(x - stop_gradient(x)) is 1 with gradient 1 by x, however large the ratio.
        one_N = (logprobs_N - logprobs_N.detach()).exp()
        kept_N = -advantages_N * (1 + high) * one_N
        return plain._replace(
            loss_N=torch.where(is_kept_N, kept_N, plain.loss_N), is_clipped_N=plain.is_clipped_N & ~is_kept_N
        )
