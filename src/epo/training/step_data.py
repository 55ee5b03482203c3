"""What the optimiser steps of one RL step read.

Legend: N trained tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from epo.training.batch import TokenData
from epo.types import PackedBatch


@dataclass(kw_only=True, slots=True)
class StepData:
    """Everything the mini-batches of one step read."""

    batch: PackedBatch
    tokens: TokenData
    advantages_N: Tensor
    importance_N: Tensor | None
    """Weights of the surrogate that correct for the sampler's numerics; None where the ratio starts from its own."""
    returns_N: Tensor | None
    values_N: Tensor | None
    reference_N: Tensor | None
    ratio_N: Tensor
    """Of each token when an optimiser step last saw it."""
    mismatch: dict[str, float]
    """Metrics of how far sampler and learner are apart; known after the first mini-batch at the latest."""


@dataclass(kw_only=True, slots=True)
class Minibatch:
    """What one optimiser step reads besides. All [N] over the step's tokens; 0 for tokens of other mini-batches."""

    rows: list[int]
    weights_N: Tensor
    """Of the surrogate, the KL and the value loss."""
    entropy_weights_N: Tensor
    marks_N: Tensor | None = None
    """What the entropy control said of each token."""
