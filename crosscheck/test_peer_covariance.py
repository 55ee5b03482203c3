"""Clip-Cov and KL-Cov (arXiv 2505.22617): our controls against verl's policy losses, a mini-batch in one piece.

Legend for tensor suffixes: _N trained tokens, _B rows, _L columns of a row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import Ragged, ragged
from torch import Tensor
from torch.testing import assert_close
from verl.trainer.ppo.core_algos import compute_policy_loss_clip_cov, compute_policy_loss_kl_cov
from verl.workers.config import ActorConfig, PolicyLossConfig

from epo.objectives import Surrogate, make_control


def drawn(seed: int, *, spread: float = 0.4) -> tuple[Ragged, Tensor, Tensor, Tensor]:
    """A batch, log-probabilities with gradient, old ones, and advantages per token."""
    batch = ragged(seed)
    old_N = -2.0 * batch.normal().abs()
    logprobs_N = (old_N + batch.normal(scale=spread)).requires_grad_()
    return batch, logprobs_N, old_N, batch.normal()


def actor_config(*, clip: float = 0.2, **policy_loss: Any) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio=clip,
        clip_ratio_low=clip,
        clip_ratio_high=clip,
        policy_loss=PolicyLossConfig(**policy_loss),
    )


def ours(
    method: str, seed: int, drawn_N: tuple[Tensor, Tensor, Tensor], dual_clip: float | None = None, **options: float
) -> tuple[Surrogate, Tensor]:
    """The surrogate and the marks of a control that sees the whole mini-batch."""
    logprobs_N, old_N, advantages_N = drawn_N
    control = make_control(method, **options)
    unused_N = torch.zeros_like(old_N)
    marks_N = control.preview(
        logprobs_N.detach(), old_N, advantages_N, unused_N, unused_N, generator=torch.Generator().manual_seed(seed)
    )
    assert marks_N is not None
    surrogate = control.surrogate(
        logprobs_N, old_N, advantages_N, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip, marks_N=marks_N
    )
    return surrogate, marks_N


def padded(batch: Ragged, logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor) -> dict[str, Tensor]:
    return {
        "old_log_prob": batch.pad(old_N),
        "log_prob": batch.pad(logprobs_N),
        "advantages": batch.pad(advantages_N),
        "response_mask": batch.mask_B_L,
    }


def slope(loss: Tensor, logprobs_N: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logprobs_N, retain_graph=True)[0]


def assert_same(theirs: Tensor, ours_N: Tensor, logprobs_N: Tensor) -> None:
    assert_close(theirs, ours_N.mean(), rtol=1e-12, atol=1e-12)
    assert_close(slope(theirs, logprobs_N), slope(ours_N.mean(), logprobs_N), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("lower", "upper"), [(0.3, 2.0), (1.0, 5.0)])
@pytest.mark.parametrize("ratio", [0.0002, 0.05, 1.0])
@pytest.mark.parametrize("clip", [0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_verl_clip_cov_agrees(seed: int, clip: float, ratio: float, lower: float, upper: float) -> None:
    """Value and gradient to 1e-12, without a dual clip, which theirs has not. Both draw from the candidates in the
    order of the tokens, so equal seeds draw the same tokens. Their `pg_clipfrac` is the share of the
    drawn ones (float32: 1e-6); our `is_clipped_N` has the tokens the clip stops as well."""
    batch, *tensors = drawn(seed)
    torch.manual_seed(seed)
    loss, metrics = compute_policy_loss_clip_cov(
        **padded(batch, *tensors),
        config=actor_config(clip=clip, clip_cov_ratio=ratio, clip_cov_lb=lower, clip_cov_ub=upper),
    )
    options = {"ratio": ratio, "lower": lower, "upper": upper, "clip_low": clip, "clip_high": clip}
    surrogate, marks_N = ours("clip_cov", seed, (tensors[0], tensors[1], tensors[2]), **options)
    assert bool(marks_N.any())
    assert_same(loss, surrogate.loss_N, tensors[0])
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float(marks_N.double().mean()), abs=1e-6)
    assert bool(surrogate.is_clipped_N[marks_N].all())


def test_clip_cov_with_nothing_in_the_band_is_plain_ppo() -> None:
    """Theirs and ours to 1e-12."""
    batch, *tensors = drawn(4)
    config = actor_config(clip=0.2, clip_cov_lb=90.0, clip_cov_ub=100.0)
    loss, metrics = compute_policy_loss_clip_cov(**padded(batch, *tensors), config=config)
    options = {"lower": 90.0, "upper": 100.0, "clip_low": 0.2, "clip_high": 0.2}
    surrogate, marks_N = ours("clip_cov", 4, (tensors[0], tensors[1], tensors[2]), **options)
    assert not bool(marks_N.any()) and metrics["actor/pg_clipfrac"] == 0.0
    assert_same(loss, surrogate.loss_N, tensors[0])


def test_our_clip_cov_keeps_the_dual_clip_of_the_recipe() -> None:
    """Theirs has none; ours obeys the recipe's, so with `dual_clip=1.5` tokens of A < 0 and r > 1.5 weigh less. The
    gap is what they exceed the cap by, unless they were drawn."""
    batch, *tensors = drawn(5, spread=1.0)
    logprobs_N, old_N, advantages_N = tensors
    torch.manual_seed(5)
    loss, _ = compute_policy_loss_clip_cov(**padded(batch, *tensors), config=actor_config(clip_cov_ratio=0.05))
    options = {"ratio": 0.05, "clip_low": 0.2, "clip_high": 0.2}
    surrogate, marks_N = ours("clip_cov", 5, (logprobs_N, old_N, advantages_N), dual_clip=1.5, **options)
    excess_N = (-advantages_N).clamp(min=0) * ((logprobs_N - old_N).exp() - 1.5).clamp(min=0)
    gap = torch.where(marks_N, 0.0, excess_N).mean()
    assert bool(gap > 0.01)
    assert_close(loss - surrogate.loss_N.mean(), gap, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [0.1, 1.0])
@pytest.mark.parametrize("ratio", [0.0002, 0.05, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_verl_kl_cov_agrees(seed: int, ratio: float, weight: float) -> None:
    """Value and gradient to 1e-12. Neither clips the ratio."""
    batch, *tensors = drawn(seed)
    loss, _ = compute_policy_loss_kl_cov(
        **padded(batch, *tensors), config=actor_config(kl_cov_ratio=ratio, ppo_kl_coef=weight)
    )
    surrogate, marks_N = ours("kl_cov", seed, (tensors[0], tensors[1], tensors[2]), ratio=ratio, weight=weight)
    assert int(marks_N.sum()) == max(1, int(ratio * len(marks_N)))
    assert_same(loss, surrogate.loss_N, tensors[0])


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_neither_loss_of_verl_bounds_the_ratio(method: str) -> None:
    """Their covariance losses leave out the bound of 20 on the log-ratio that their PPO has. A token with A < 0 that is
    25 nats off, among many, weighs e^25 there; ours stops at e^20."""
    batch, logprobs_N, old_N, _ = drawn(6)
    advantages_N = torch.full_like(old_N, -1.0)
    logprobs_N = old_N.index_add(0, torch.tensor([3]), torch.tensor([25.0], dtype=torch.float64)).requires_grad_()
    theirs = {"clip_cov": compute_policy_loss_clip_cov, "kl_cov": compute_policy_loss_kl_cov}[method]
    loss, _ = theirs(**padded(batch, logprobs_N, old_N, advantages_N), config=actor_config())
    surrogate, _ = ours(method, 6, (logprobs_N, old_N, advantages_N))
    num = len(old_N)
    excess = torch.tensor([25.0, 20.0], dtype=torch.float64).exp()
    assert_close(loss - surrogate.loss_N.mean(), (excess[0] - excess[1]) / num, rtol=1e-6, atol=0.0)


def test_the_defaults_are_not_the_same() -> None:
    """Ours are those of the authors' 7B scripts: KL-Cov on 0.2 % with weight 1, Clip-Cov inside a clip of width 1.
    verl's configuration says 0.02 %, 0.1 and 0.2; its docstring says weight 1."""
    config = actor_config()
    assert (config.policy_loss.kl_cov_ratio, config.policy_loss.ppo_kl_coef) == (0.0002, 0.1)
    assert (config.policy_loss.clip_cov_ratio, config.clip_ratio) == (0.0002, 0.2)
    assert (config.policy_loss.clip_cov_lb, config.policy_loss.clip_cov_ub) == (1.0, 5.0)
    kl_cov, clip_cov = vars(make_control("kl_cov")), vars(make_control("clip_cov"))
    assert (kl_cov["ratio"], kl_cov["weight"]) == (0.002, 1.0)
    assert (clip_cov["ratio"], clip_cov["clip_low"], clip_cov["clip_high"]) == (0.0002, 1.0, 1.0)
    assert (clip_cov["lower"], clip_cov["upper"]) == (1.0, 5.0)
