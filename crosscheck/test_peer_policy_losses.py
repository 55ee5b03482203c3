"""PPO clip and dual clip: `clipped_surrogate` against verl's policy losses and TRL's GRPO and RLOO losses.

Legend for tensor suffixes: _N trained tokens, _B rows, _L columns of a row.
"""

from __future__ import annotations

import pytest
import torch
from batches import Ragged, ragged
from torch import Tensor
from torch.testing import assert_close
from trl_stub import grpo_loss, rloo_loss
from verl.trainer.ppo.core_algos import compute_policy_loss, compute_policy_loss_vanilla
from verl.workers.config import ActorConfig

from epo.objectives import Surrogate, clipped_surrogate

# `compute_policy_loss` is marked as deprecated, and is what older recipes still call.
pytestmark = pytest.mark.filterwarnings("ignore:.*compute_policy_loss:FutureWarning")

CLIPS = [(0.2, 0.2), (0.2, 0.28), (0.1, 0.4)]


def drawn(seed: int, *, spread: float = 0.7) -> tuple[Ragged, Tensor, Tensor, Tensor]:
    """A batch, log-probabilities with gradient, old ones, and advantages per token of both signs, some exactly 0."""
    batch = ragged(seed)
    old_N = -batch.normal().abs()
    logprobs_N = (old_N + batch.normal(scale=spread)).requires_grad_()
    advantages_N = batch.normal()
    advantages_N[::7] = 0.0
    return batch, logprobs_N, old_N, advantages_N


def actor_config(*, low: float, high: float, dual: float) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual,
    )


def slope(loss: Tensor, logprobs_N: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logprobs_N, retain_graph=True)[0]


def share(is_true_N: Tensor) -> float:
    return float(is_true_N.double().mean())


def assert_same(theirs: Tensor, ours: Surrogate, logprobs_N: Tensor) -> None:
    """Token mean and its gradient, float64."""
    assert_close(theirs, ours.loss_N.mean(), rtol=1e-12, atol=1e-12)
    assert_close(slope(theirs, logprobs_N), slope(ours.loss_N.mean(), logprobs_N), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("low", "high"), CLIPS)
@pytest.mark.parametrize("dual", [1.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_verl_clip_and_dual_clip_agree(seed: int, low: float, high: float, dual: float) -> None:
    """Both verl functions: value and gradient to 1e-12. Our clipped share is the sum of their two (the clip, and the
    cap of the dual clip, which no token meets at once), which they compute in float32: 1e-6."""
    batch, logprobs_N, old_N, advantages_N = drawn(seed)
    ours = clipped_surrogate(logprobs_N, old_N, advantages_N, clip_low=low, clip_high=high, dual_clip=dual)
    padded = (batch.pad(old_N), batch.pad(logprobs_N), batch.pad(advantages_N), batch.mask_B_L)

    loss, clipped, kl, capped = compute_policy_loss(
        *padded, cliprange=0.2, cliprange_low=low, cliprange_high=high, clip_ratio_c=dual
    )
    assert_same(loss, ours, logprobs_N)
    assert float(clipped) > 0 and float(capped) > 0
    assert float(clipped + capped) == pytest.approx(share(ours.is_clipped_N), abs=1e-6)
    assert float(kl.detach()) == pytest.approx(-float(ours.log_ratio_N.mean()), abs=1e-8)

    loss, metrics = compute_policy_loss_vanilla(*padded, config=actor_config(low=low, high=high, dual=dual))
    assert_same(loss, ours, logprobs_N)
    both = metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]
    assert both == pytest.approx(share(ours.is_clipped_N), abs=1e-6)


def test_verl_always_has_a_dual_clip() -> None:
    """They have no way to turn it off; a bound above e^20, the largest ratio either side lets through, is ours with
    `dual_clip=None`."""
    batch, logprobs_N, old_N, advantages_N = drawn(3, spread=2.0)
    padded = (batch.pad(old_N), batch.pad(logprobs_N), batch.pad(advantages_N), batch.mask_B_L)
    loss = compute_policy_loss(*padded, cliprange=0.2, clip_ratio_c=1e9)[0]
    assert_same(loss, clipped_surrogate(logprobs_N, old_N, advantages_N, dual_clip=None), logprobs_N)


@pytest.mark.parametrize("dual", [3.0, 1e9])
def test_verl_bounds_the_log_ratio_by_20_as_we_do(dual: float) -> None:
    """Same value and same missing gradient beyond. Their logged KL is bounded too; our `log_ratio_N` never is."""
    batch, logprobs_N, old_N, advantages_N = drawn(4, spread=25.0)
    ours = clipped_surrogate(logprobs_N, old_N, advantages_N, dual_clip=dual)
    padded = (batch.pad(old_N), batch.pad(logprobs_N), batch.pad(advantages_N), batch.mask_B_L)
    loss, _, kl, _ = compute_policy_loss(*padded, cliprange=0.2, clip_ratio_c=dual)
    assert bool((ours.log_ratio_N.abs() > 20).any())
    assert_same(loss, ours, logprobs_N)
    assert float(kl.detach()) == pytest.approx(-float(ours.log_ratio_N.clamp(-20, 20).mean()), rel=1e-8)


@pytest.mark.parametrize(("low", "high"), CLIPS)
@pytest.mark.parametrize("seed", range(3))
def test_trl_clip_agrees(seed: int, low: float, high: float) -> None:
    """`GRPOTrainer._compute_loss` with `loss_type="bnpo"`, the token mean, has no dual clip unless asked: value and
    gradient to 1e-12, and `clip_ratio/region_mean` is our clipped share (float32: 1e-6)."""
    batch, logprobs_N, old_N, advantages_N = drawn(seed)
    ours = clipped_surrogate(logprobs_N, old_N, advantages_N, clip_low=low, clip_high=high, dual_clip=None)
    loss, metrics = grpo_loss(
        batch.pad(logprobs_N),
        batch.mask_B_L,
        advantages=batch.pad(advantages_N),
        old_logps_B_L=batch.pad(old_N),
        clip_low=low,
        clip_high=high,
    )
    assert_same(loss, ours, logprobs_N)
    assert metrics["clip_ratio/region_mean"][0] == pytest.approx(share(ours.is_clipped_N), abs=1e-6)


@pytest.mark.parametrize("delta", [1.5, 3.0])
def test_trl_delta_is_our_dual_clip(delta: float) -> None:
    """Value and gradient to 1e-12 for delta > 1 + clip_high. Their clip share leaves the capped tokens out; ours has
    them, because they carry no gradient either."""
    batch, logprobs_N, old_N, advantages_N = drawn(5)
    ours = clipped_surrogate(logprobs_N, old_N, advantages_N, dual_clip=delta)
    loss, metrics = grpo_loss(
        batch.pad(logprobs_N),
        batch.mask_B_L,
        advantages=batch.pad(advantages_N),
        old_logps_B_L=batch.pad(old_N),
        delta=delta,
    )
    assert_same(loss, ours, logprobs_N)
    capped = share((advantages_N < 0) & (ours.log_ratio_N.exp() > delta))
    assert capped > 0
    assert metrics["clip_ratio/region_mean"][0] == pytest.approx(share(ours.is_clipped_N) - capped, abs=1e-6)


def test_trl_delta_below_the_clip_is_raised_to_it() -> None:
    """TRL caps the ratio and takes the worse of that and the clip, so for A < 0 the cap is max(delta, 1 + clip_high).
    Ours caps at `dual_clip` itself, as the definition of Ye et al. says. Only a delta in (1, 1 + clip_high] differs."""
    low, high, delta = 0.2, 0.4, 1.1
    batch, logprobs_N, old_N, advantages_N = drawn(6)
    advantages_N = -advantages_N.abs() - 0.1
    loss, _ = grpo_loss(
        batch.pad(logprobs_N),
        batch.mask_B_L,
        advantages=batch.pad(advantages_N),
        old_logps_B_L=batch.pad(old_N),
        clip_low=low,
        clip_high=high,
        delta=delta,
    )

    def ours(dual: float) -> Tensor:
        return clipped_surrogate(
            logprobs_N, old_N, advantages_N, clip_low=low, clip_high=high, dual_clip=dual
        ).loss_N.mean()

    assert_close(loss, ours(1 + high), rtol=1e-12, atol=1e-12)
    assert bool(ours(delta) < loss - 0.01)


def test_trl_does_not_bound_the_log_ratio() -> None:
    """A token 25 nats off with A < 0 weighs e^25 in TRL. Ours stops at e^20 and gives it no gradient."""
    logprobs = torch.tensor([25.0], dtype=torch.float64, requires_grad=True)
    zeros, minus = torch.zeros(1, 1, dtype=torch.float64), -torch.ones(1, dtype=torch.float64)
    mask_B_L = torch.ones(1, 1, dtype=torch.int64)
    theirs, _ = grpo_loss(logprobs[None], mask_B_L, advantages=minus, old_logps_B_L=zeros)
    ours = clipped_surrogate(logprobs, zeros[0], minus, dual_clip=None).loss_N.sum()
    size = torch.tensor([25.0, 20.0], dtype=torch.float64).exp()
    assert_close(torch.stack([theirs, ours]), size, rtol=1e-12, atol=0.0)
    assert_close(torch.cat([slope(theirs, logprobs), slope(ours, logprobs)]), size * torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("seed", range(3))
def test_trl_rloo_clips_whole_sequences(seed: int) -> None:
    """`RLOOTrainer._compute_loss` has one ratio per trajectory: it is `clipped_surrogate` of the summed
    log-probabilities, averaged over rows, to 1e-12. Ours used per token is another objective."""
    batch, logprobs_N, old_N, _ = drawn(seed, spread=0.1)
    old_N = old_N.detach()

    def per_row(values_N: Tensor) -> Tensor:
        return torch.zeros(len(batch.rewards_B), dtype=torch.float64).index_add(0, batch.trajectory_ids_N, values_N)

    loss, metrics = rloo_loss(
        batch.pad(logprobs_N), batch.mask_B_L, advantages_B=batch.rewards_B, old_logps_B=per_row(old_N)
    )
    ours = clipped_surrogate(per_row(logprobs_N), per_row(old_N), batch.rewards_B, dual_clip=None)
    assert_same(loss, ours, logprobs_N)
    assert metrics["clip_ratio/region_mean"][0] == pytest.approx(share(ours.is_clipped_N), abs=1e-6)
    by_token = clipped_surrogate(logprobs_N, old_N, batch.spread(batch.rewards_B), dual_clip=None).loss_N.mean()
    assert bool((by_token - loss).abs() > 1e-3)
