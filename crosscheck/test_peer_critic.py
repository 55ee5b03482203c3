"""Loss of the critic: `value_loss` against verl's. TRL has no critic.

Legend for tensor suffixes: _N trained tokens.
"""

from __future__ import annotations

import pytest
import torch
from batches import ragged
from torch.testing import assert_close
from verl.trainer.ppo.core_algos import compute_value_loss

from epo.objectives import value_loss


@pytest.mark.parametrize("clip", [0.2, 0.5, None])
@pytest.mark.parametrize("seed", range(3))
def test_verl_value_loss_is_half_of_ours(seed: int, clip: float | None) -> None:
    """Theirs = 0.5 * token mean of ours, value and gradient to 1e-12: they put PPO's 1/2 into the loss, we leave it to
    the coefficient (the EPO release has none). Without clipping theirs needs a bound nothing reaches."""
    batch = ragged(seed)
    old_N, returns_N = batch.normal(), batch.normal()
    values_N = (old_N + batch.normal(scale=0.5)).requires_grad_()
    theirs, clipped = compute_value_loss(
        vpreds=batch.pad(values_N),
        returns=batch.pad(returns_N),
        values=batch.pad(old_N),
        response_mask=batch.mask_B_L,
        cliprange_value=1e6 if clip is None else clip,
    )
    ours_N = value_loss(values_N, old_N, returns_N, clip=clip)
    assert_close(theirs, 0.5 * ours_N.mean(), rtol=1e-12, atol=1e-12)
    (their_slope,) = torch.autograd.grad(theirs, values_N)
    (our_slope,) = torch.autograd.grad(ours_N.mean(), values_N)
    assert_close(their_slope, 0.5 * our_slope, rtol=1e-12, atol=1e-14)
    is_clipped_N = ours_N > value_loss(values_N, old_N, returns_N, clip=None)
    assert float(clipped) == pytest.approx(float(is_clipped_N.double().mean()), abs=1e-6)
