"""The entropy's part of the loss, and the whole EPO loss (arXiv 2509.22576, equations E2 to E7).

Legend for tensor suffixes: _N trained tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from epo.objectives._shapes import require_same_shape
from epo.objectives.corridor import (
    EntropyHistory,
    PenaltyKind,
    Schedule,
    corridor,
    penalty_of,
    penalty_slope,
    phase_weight,
)
from epo.objectives.entropy import trajectory_weights


class EntropyTerm(NamedTuple):
    """What the entropy adds to the loss. Loss and metrics of micro-batches add up to those of the whole batch."""

    loss: Tensor
    """Scalar, to be minimised."""
    metrics: dict[str, float]


class EPOLoss(NamedTuple):
    """The whole loss, and what to log."""

    loss: Tensor
    """Scalar, to be minimised."""
    metrics: dict[str, float]


def epo_loss(
    policy_loss: Tensor,
    entropy_N: Tensor,
    trajectory_ids_N: Tensor,
    turn_ids_N: Tensor,
    history: EntropyHistory,
    *,
    step: int,
    total_steps: int,
    coefficient: float = 0.001,
    alpha: float = 0.05,
    kappa_low: float = 0.0,
    kappa_high: float = 2.0,
    gamma: float = 3.0,
    penalty: PenaltyKind = "relu",
    schedule: Schedule = "paper",
) -> EPOLoss:
    """L^EPO = L^MT - lambda [L^H - beta_k L^smooth] (equation E7) for a whole mini-batch.

    After the update of an RL step, call `history.observe` with the entropies of the sampling policy.

    Args:
        policy_loss: L^MT, scalar, already negative for a good policy (a loss).
        entropy_N: [N] nats of the trained tokens, with gradient.
        trajectory_ids_N: [N] any integers.
        turn_ids_N: [N] integers >= 0.
        history: of the RL steps before this one; empty: L^smooth = 0.
        step: k, the RL step.
        total_steps: K, the configured number of RL steps.
        coefficient: lambda, weight of the entropy bonus.
        alpha: weight of the penalty inside the bonus.
        kappa_low: lower edge of the corridor over H_ref.
        kappa_high: upper edge of the corridor over H_ref.
        gamma: rate of the schedule.
        penalty: `relu`, `squared`, or `indicator` (no gradient).
        schedule: `paper` or `constant`.

    Returns:
        loss and metrics as `corridor_term` names them.

    Raises:
        ValueError: shapes differ, a negative turn id, or a number out of its range.
    """
    term = corridor_term(
        entropy_N,
        trajectory_weights(trajectory_ids_N, turn_ids_N, dtype=entropy_N.dtype),
        history.reference(turn_ids_N),
        level=history.reference(),
        beta=phase_weight(step, total_steps, gamma=gamma, schedule=schedule),
        coefficient=coefficient,
        alpha=alpha,
        kappa_low=kappa_low,
        kappa_high=kappa_high,
        penalty=penalty,
    )
    return EPOLoss(policy_loss + term.loss, term.metrics)


def bonus_term(entropy_N: Tensor, weights_N: Tensor, *, coefficient: float) -> EntropyTerm:
    """-lambda L^H: the entropy bonus alone.

    Args:
        entropy_N: [N] nats, with gradient.
        weights_N: [N] weights that sum to 1 over the mini-batch.
        coefficient: lambda.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(entropy=entropy_N, weights=weights_N)
    return EntropyTerm(-coefficient * (weights_N * entropy_N).sum(), {})


def corridor_term(
    entropy_N: Tensor,
    weights_N: Tensor,
    reference_N: Tensor,
    *,
    level: float | None,
    beta: float,
    coefficient: float,
    alpha: float,
    kappa_low: float,
    kappa_high: float,
    penalty: PenaltyKind = "relu",
) -> EntropyTerm:
    """-lambda [L^H - beta L^smooth] of a mini-batch or of a part of it.

    Its gradient with `relu` is -lambda w_i (1 - alpha beta [above] + alpha beta [below]) for the entropy of token i.

    Args:
        entropy_N: [N] nats, with gradient.
        weights_N: [N] weights that sum to 1 over the mini-batch.
        reference_N: [N] H_ref of each token; NaN without history.
        level: H_ref in one number for the log; None without history.
        beta: beta_k.
        coefficient: lambda.
        alpha: weight of the penalty.
        kappa_low: lower edge of the corridor over H_ref.
        kappa_high: upper edge of the corridor over H_ref.
        penalty: kind of the penalty.

    Returns:
        The term, with metrics that add up over the parts of a mini-batch: `entropy/below`, `entropy/above` (weighted
        share of tokens outside), `entropy/reference` (only with history), `epo/smoothing` (L^smooth), `epo/beta`,
        `epo/effective_weight` (mean weight of the entropy in the gradient; lambda when nothing is outside),
        `epo/gradient_share` (the smoothing's gradient by the entropies over the bonus's, in L1 norm).

    Raises:
        ValueError: shapes differ, or a number out of its range.
    """
    require_same_shape(entropy=entropy_N, weights=weights_N, reference=reference_N)
    weights_N = weights_N.detach()
    distances = corridor(entropy_N, reference_N, kappa_low=kappa_low, kappa_high=kappa_high)
    bonus = (weights_N * entropy_N).sum()
    smoothing = alpha * (weights_N * penalty_of(distances, penalty)).sum()
    smoothing_slope_N = alpha * beta * penalty_slope(distances, penalty)
    effective_N = 1.0 - smoothing_slope_N
    share = float(weights_N.sum())
    metrics = {
        "entropy/below": float(weights_N[distances.below_N > 0].sum()),
        "entropy/above": float(weights_N[distances.above_N > 0].sum()),
        "epo/smoothing": float(smoothing.detach()),
        "epo/beta": beta * share,
        "epo/effective_weight": coefficient * float((weights_N * effective_N).sum()),
        "epo/gradient_share": float((weights_N * smoothing_slope_N.abs()).sum()),
    }
    if level is not None:
        metrics["entropy/reference"] = level * share
    return EntropyTerm(-coefficient * (bonus - beta * smoothing), metrics)
