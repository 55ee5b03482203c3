"""Estimators of the KL divergence: `kl_penalty` against verl's and TRL's.

Legend for tensor suffixes: _N trained tokens, _B rows, _L columns of a row.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from batches import Ragged, ragged
from torch import Tensor
from torch.testing import assert_close
from trl_stub import grpo_loss
from verl.trainer.ppo import core_algos

from epo.objectives import kl_penalty
from epo.objectives.policy import KLKind


def drawn(seed: int, *, spread: float) -> tuple[Ragged, Tensor, Tensor]:
    batch = ragged(seed)
    reference_N = -batch.normal().abs()
    return batch, (reference_N + batch.normal(scale=spread)).requires_grad_(), reference_N


def slope(values_N: Tensor, logprobs_N: Tensor) -> Tensor:
    return torch.autograd.grad(values_N.sum(), logprobs_N)[0]


@pytest.mark.parametrize(
    ("theirs", "ours"), [("kl", "k1"), ("k1", "k1"), ("mse", "k2"), ("k2", "k2"), ("low_var_kl", "k3"), ("k3", "k3")]
)
@pytest.mark.parametrize("seed", range(3))
def test_verl_estimators_agree_near_the_reference(theirs: str, ours: KLKind, seed: int) -> None:
    """Token by token with |d| < 2.5, value and gradient to 1e-12."""
    batch, logprobs_N, reference_N = drawn(seed, spread=0.6)
    assert bool(((logprobs_N - reference_N).abs() < 2.5).all())
    found_N = batch.flat(core_algos.kl_penalty(batch.pad(logprobs_N), batch.pad(reference_N), theirs))
    expected_N = kl_penalty(logprobs_N, reference_N, kind=ours)
    assert_close(found_N, expected_N, rtol=1e-12, atol=1e-12)
    assert_close(slope(found_N, logprobs_N), slope(expected_N, logprobs_N), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["low_var_kl", "k3"])
def test_verl_cuts_k3_at_10(name: str) -> None:
    """Their k3 is min(ours, 10) and loses its gradient there: a token more than about 2.6 nats less likely, or 11
    nats more likely, than under the reference is not pulled back at all. Ours keeps pulling until d = 20."""
    batch, logprobs_N, reference_N = drawn(3, spread=12.0)
    found_N = batch.flat(core_algos.kl_penalty(batch.pad(logprobs_N), batch.pad(reference_N), name))
    ours_N = kl_penalty(logprobs_N, reference_N, kind="k3")
    d_N = (reference_N - logprobs_N).detach()
    is_cut_N = ours_N.detach() > 10
    assert bool((is_cut_N & (d_N > 0)).any()) and bool((is_cut_N & (d_N < 0)).any()) and bool((~is_cut_N).any())
    assert bool((is_cut_N == ((d_N > 2.611) | (d_N < -11.0))).all())
    assert_close(found_N, ours_N.clamp(max=10.0), rtol=1e-12, atol=1e-12)
    ours_slope_N = slope(ours_N, logprobs_N)
    assert_close(slope(found_N, logprobs_N), torch.where(is_cut_N, 0.0, ours_slope_N), rtol=1e-12, atol=1e-12)
    assert bool((ours_slope_N[is_cut_N & (d_N < 20)] != 0).all())


@pytest.mark.parametrize(("name", "value"), [("k1+", "k1"), ("kl+", "k1"), ("k2+", "k2"), ("k3+", "k3")])
def test_the_plus_variants_of_verl_have_the_gradient_of_k2(name: str, value: KLKind) -> None:
    """Value of the estimator, gradient of k2, whose expectation is the gradient of KL(pi || reference). We have no
    such mixture: as a loss use `k2`, which is the same update, and log k1 or k3."""
    batch, logprobs_N, reference_N = drawn(4, spread=0.6)
    found_N = batch.flat(core_algos.kl_penalty(batch.pad(logprobs_N), batch.pad(reference_N), name))
    assert_close(found_N, kl_penalty(logprobs_N, reference_N, kind=value), rtol=1e-12, atol=1e-12)
    expected_N = slope(kl_penalty(logprobs_N, reference_N, kind="k2"), logprobs_N)
    assert_close(slope(found_N, logprobs_N), expected_N, rtol=1e-12, atol=1e-12)


def test_abs_of_verl_has_no_counterpart() -> None:
    """|log pi - log reference| is the size of k1. It estimates no KL divergence, so `kl_penalty` does not offer it."""
    batch, logprobs_N, reference_N = drawn(5, spread=1.0)
    found_N = batch.flat(core_algos.kl_penalty(batch.pad(logprobs_N), batch.pad(reference_N), "abs"))
    assert_close(found_N, kl_penalty(logprobs_N, reference_N, kind="k1").abs(), rtol=1e-12, atol=1e-12)
    assert "abs" not in get_args(KLKind)


def test_verl_pays_k1_in_the_rewards() -> None:
    """`compute_rewards` is reward - coefficient * k1, to 1e-12."""
    batch, logprobs_N, reference_N = drawn(6, spread=1.0)
    scores_N = batch.normal()
    found_B_L = core_algos.compute_rewards(batch.pad(scores_N), batch.pad(logprobs_N), batch.pad(reference_N), 0.3)
    expected_N = scores_N - 0.3 * kl_penalty(logprobs_N, reference_N, kind="k1")
    assert_close(batch.flat(found_B_L), expected_N, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_trl_k3_agrees(seed: int) -> None:
    """The KL term of `GRPOTrainer._compute_loss` (advantages 0, beta 0.4, token mean) is k3 without any bound: value
    and gradient to 1e-12 for d < 20, where ours has none either."""
    batch, logprobs_N, reference_N = drawn(seed, spread=5.0)
    assert bool((reference_N - logprobs_N < 20).all())
    loss, metrics = grpo_loss(
        batch.pad(logprobs_N),
        batch.mask_B_L,
        advantages=torch.zeros_like(batch.rewards_B),
        old_logps_B_L=batch.pad(logprobs_N.detach()),
        reference_logps_B_L=batch.pad(reference_N),
        beta=0.4,
    )
    ours = 0.4 * kl_penalty(logprobs_N, reference_N, kind="k3").mean()
    assert_close(loss, ours, rtol=1e-12, atol=1e-12)
    assert_close(slope(loss, logprobs_N), slope(ours, logprobs_N), rtol=1e-12, atol=1e-12)
    assert metrics["kl"][0] == pytest.approx(float(ours.detach()) / 0.4, rel=1e-6)


def test_trl_k3_grows_beyond_20() -> None:
    """At d = 25 theirs is e^25 - 26 with a gradient of the same size; ours stops at e^20 - 21 and lets go."""
    logprobs = torch.tensor([-25.0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    theirs, _ = grpo_loss(
        logprobs[None],
        torch.ones(1, 1, dtype=torch.int64),
        advantages=zeros[0],
        old_logps_B_L=logprobs[None].detach(),
        reference_logps_B_L=zeros,
        beta=1.0,
    )
    ours = kl_penalty(logprobs, zeros[0], kind="k3").sum()
    d = torch.tensor([25.0, 20.0], dtype=torch.float64)
    assert_close(torch.stack([theirs, ours]), d.exp() - d - 1, rtol=1e-12, atol=0.0)
    expected = torch.stack([1 - d[0].exp(), torch.zeros((), dtype=torch.float64)])
    assert_close(torch.cat([slope(theirs, logprobs), slope(ours, logprobs)]), expected, rtol=1e-12, atol=0.0)
