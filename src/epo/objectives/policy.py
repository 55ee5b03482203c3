"""Per-token losses of policy and critic. Nothing is reduced: any weights, any split into micro-batches.

Legend for tensor suffixes: _N trained tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from epo.objectives._shapes import require_same_shape

KLKind = Literal["k1", "k2", "k3"]

_MAX_LOG_RATIO = 20.0
"""Beyond this a ratio is meaningless, and its exponential overflows; such tokens keep a finite loss and no gradient."""


class Surrogate(NamedTuple):
    """What a policy surrogate says about each token."""

    loss_N: Tensor
    """To be minimised."""
    is_clipped_N: Tensor
    """Bool: clipping removed the gradient of this token."""
    log_ratio_N: Tensor
    """log pi - log pi_old, without gradient, never clamped."""


def clipped_surrogate(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> Surrogate:
    """PPO's clipped surrogate as a loss, per token (Schulman et al., arXiv 1707.06347).

    With r = pi / pi_old: loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); where A < 0 the loss is at most
    -A * dual_clip (Ye et al., arXiv 1912.09729). clip_high > clip_low is Clip-Higher (DAPO, arXiv 2503.14476).

    Args:
        logprobs_N: [N] under the policy that is trained.
        old_logprobs_N: [N] under the policy that sampled; a constant.
        advantages_N: [N]; a constant.
        clip_low: width of the clip below 1, in [0, 1].
        clip_high: width of the clip above 1, >= 0.
        dual_clip: > 1, or None for none.

    Raises:
        ValueError: shapes differ, or a number out of its range.
    """
    require_same_shape(logprobs=logprobs_N, old_logprobs=old_logprobs_N, advantages=advantages_N)
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"clip_low must lie in [0, 1] and clip_high be >= 0, got {clip_low} and {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, got {dual_clip}")
    advantages_N = advantages_N.detach()
    log_ratio_N = logprobs_N - old_logprobs_N.detach()
    ratio_N = importance_ratio(log_ratio_N)
    plain_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = torch.maximum(plain_N, clipped_N)
    is_clipped_N = clipped_N > plain_N
    if dual_clip is not None:
        cap_N = -advantages_N * dual_clip
        is_capped_N = (advantages_N < 0) & (loss_N > cap_N)
        loss_N = torch.where(is_capped_N, cap_N, loss_N)
        is_clipped_N = is_clipped_N | is_capped_N
    return Surrogate(loss_N, is_clipped_N, log_ratio_N.detach())


def importance_ratio(log_ratio_N: Tensor) -> Tensor:
    """pi / pi_old from its logarithm, finite whatever happens: beyond exp(+-20) it is constant, without gradient."""
    return log_ratio_N.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def kl_penalty(logprobs_N: Tensor, reference_logprobs_N: Tensor, *, kind: KLKind = "k3") -> Tensor:
    """Per-token estimate of KL(pi || reference) from tokens drawn from pi (Schulman, "Approximating KL divergence").

    With d = log reference - log pi: k1 = -d (unbiased, may be negative), k2 = d^2 / 2 (biased), k3 = exp(d) - d - 1
    (unbiased, never negative). As a loss on tokens of the current policy, the expected gradient is that of
    KL(pi || reference) for k2, of KL(reference || pi) for k3, and zero for k1: use k1 in rewards and for logging.

    Args:
        logprobs_N: [N] under the policy.
        reference_logprobs_N: [N] under the reference; a constant.
        kind: see above.

    Raises:
        ValueError: shapes differ, or unknown kind.
    """
    require_same_shape(logprobs=logprobs_N, reference_logprobs=reference_logprobs_N)
    log_ratio_N = reference_logprobs_N.detach() - logprobs_N
    if kind == "k1":
        return -log_ratio_N
    if kind == "k2":
        return 0.5 * log_ratio_N.square()
    if kind == "k3":
        log_ratio_N = log_ratio_N.clamp(max=_MAX_LOG_RATIO)
        return log_ratio_N.expm1() - log_ratio_N
    raise ValueError(f"kind must be one of k1, k2, k3, got {kind!r}")


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip: float | None = 0.5) -> Tensor:
    """Squared error of the critic, per token, without the factor 1/2.

    max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2): the critic gains nothing by moving further than `clip`
    from what it said when the batch was drawn.

    Args:
        values_N: [N] of the critic that is trained.
        old_values_N: [N] of the critic when the batch was drawn; a constant.
        returns_N: [N] targets; a constant.
        clip: > 0 in units of the return, or None for the plain squared error.

    Raises:
        ValueError: shapes differ, or a clip that is not positive.
    """
    require_same_shape(values=values_N, old_values=old_values_N, returns=returns_N)
    returns_N = returns_N.detach()
    error_N = (values_N - returns_N).square()
    if clip is None:
        return error_N
    if not clip > 0:
        raise ValueError(f"clip must be > 0 or None, got {clip}")
    old_values_N = old_values_N.detach()
    near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    return torch.maximum(error_N, (near_N - returns_N).square())
