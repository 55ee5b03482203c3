"""Advantages from a critic (GAE, whitening) and from groups (GRPO, RLOO, REINFORCE++) against verl's and TRL's.

Legend for tensor suffixes: _N trained tokens, _B rows (one trajectory each), _L columns of a row, _G group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from batches import Ragged, ragged
from torch import Tensor
from torch.testing import assert_close
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl_stub import advantages as trl_advantages
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional as verl_F

from epo.objectives import group_relative, trajectory_gae, whiten


def by_group(batch: Ragged, estimator: Callable[[Tensor], Tensor]) -> Tensor:
    """[B] our estimator applied to each group."""
    result_B = torch.zeros_like(batch.rewards_B)
    for rows in batch.members():
        result_B[rows] = estimator(batch.rewards_B[rows])
    return result_B


def alone(batch: Ragged) -> Tensor:
    """[B] rows whose group has one member."""
    return torch.from_numpy(np.array([(batch.groups_B == name).sum() == 1 for name in batch.groups_B]))


def gae_of_all(batch: Ragged, values_N: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """[N] ours, trajectory by trajectory, with the reward on the last turn."""
    advantages_N, returns_N = torch.empty_like(values_N), torch.empty_like(values_N)
    for trajectory in range(len(batch.rewards_B)):
        tokens_N = batch.tokens_of(trajectory)
        turns = batch.turn_ids_N[tokens_N]
        rewards_T = [0.0] * int(turns.max()) + [float(batch.rewards_B[trajectory])]
        found = trajectory_gae(rewards_T, values_N[tokens_N], turns, gamma=gamma, lam=lam)
        advantages_N[tokens_N], returns_N[tokens_N] = found
    return advantages_N, returns_N


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_verl_gae_is_ours_whitened(seed: int, gamma: float, lam: float) -> None:
    """`compute_gae_advantage_return` skips observations between turns as we do. Returns agree to 1e-12. Advantages are
    `whiten(trajectory_gae)`, always: they have no way to get them raw. Both use the unbiased variance; N / (N - 1) of
    an integer mask is a float32 in verl, hence 1e-7."""
    batch = ragged(seed)
    values_N = batch.normal()
    advantages_N, returns_N = gae_of_all(batch, values_N, gamma=gamma, lam=lam)
    found = core_algos.compute_gae_advantage_return(
        batch.rewards_at_the_end(), batch.pad(values_N), batch.mask_B_L, gamma, lam
    )
    assert_close(batch.flat(found[1]), returns_N, rtol=1e-12, atol=1e-12)
    assert_close(batch.flat(found[0]), whiten(advantages_N), rtol=1e-7, atol=1e-7)


def test_whiten_and_masked_whiten_agree_on_a_spread_batch() -> None:
    """To 1e-7: N / (N - 1) of an integer mask is a float32 in verl. The variance is the unbiased one on both sides; the
    biased one would be off by a factor sqrt(N / (N - 1))."""
    batch = ragged(3)
    values_N = 3.0 + batch.normal(scale=2.0)
    found_N = batch.flat(verl_F.masked_whiten(batch.pad(values_N), batch.mask_B_L))
    assert_close(found_N, whiten(values_N), rtol=1e-7, atol=1e-7)
    num = len(values_N)
    biased_N = (values_N - values_N.mean()) * torch.rsqrt(values_N.var(correction=0) + 1e-8)
    assert_close(found_N, biased_N * ((num - 1) / num) ** 0.5, rtol=1e-7, atol=1e-7)


def test_whitening_without_centring_means_two_things() -> None:
    """verl's `shift_mean=False` centres, scales and adds the mean back, so that the mean survives unscaled; ours with
    `centre=False` only scales, so that no sign flips. Theirs - ours = mean * (1 - 1 / deviation), to 1e-7."""
    batch = ragged(4)
    values_N = 1.0 + batch.normal(scale=3.0)
    found_N = batch.flat(verl_F.masked_whiten(batch.pad(values_N), batch.mask_B_L, shift_mean=False))
    ours_N = whiten(values_N, centre=False)
    offset = values_N.mean() * (1 - 1 / values_N.std())
    assert_close(found_N - ours_N, offset.expand_as(ours_N), rtol=0.0, atol=1e-7)
    assert bool((ours_N.sign() == values_N.sign()).all())
    assert bool((found_N.sign() != values_N.sign()).any())


def test_whitening_one_token_is_an_error_for_verl() -> None:
    """One token has no unbiased variance: they raise, ours is 0."""
    one = torch.tensor([[2.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="sum of the mask is one"):
        verl_F.masked_whiten(one, torch.ones(1, 1, dtype=torch.int64))
    assert float(whiten(one[0])) == 0.0


@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_verl_grpo_agrees_but_for_groups_of_one(seed: int, normalise_std: bool) -> None:
    """`compute_grpo_outcome_advantage`, with and without the standard deviation (Dr. GRPO), both with the unbiased one:
    1e-9 (equal rewards leave them a rounding error over 1e-6). A trajectory alone in its group keeps its raw reward
    there, over 1 + epsilon in float32 (1e-7); ours is 0, because one attempt says nothing about the others."""
    batch = ragged(seed)
    ours_B = by_group(batch, lambda rewards_G: group_relative(rewards_G, normalise_std=normalise_std))
    found_B_L, _ = core_algos.compute_grpo_outcome_advantage(
        batch.rewards_at_the_end(), batch.mask_B_L, batch.groups_B, norm_adv_by_std_in_grpo=normalise_std
    )
    alone_B = alone(batch)
    assert int(alone_B.sum()) == 1
    raw_B = batch.rewards_B / (1 + 1e-6) if normalise_std else batch.rewards_B
    alone_N, found_N = batch.spread(alone_B), batch.flat(found_B_L)
    assert_close(found_N[~alone_N], batch.spread(ours_B)[~alone_N], rtol=1e-9, atol=1e-9)
    assert_close(found_N[alone_N], batch.spread(raw_B)[alone_N], rtol=1e-7, atol=0.0)
    assert bool((ours_B[alone_B] == 0).all())


@pytest.mark.parametrize("normalise_std", [True, False])
def test_the_vectorised_grpo_of_verl_is_the_same_in_single_precision(normalise_std: bool) -> None:
    """`compute_grpo_vectorized_outcome_advantage` finds mean and deviation in float32: 1e-5, and for the group of equal
    rewards a rounding error of 0.7 over 1e-6, up to 0.1. The lone trajectory as above."""
    batch = ragged(3)
    ours_B = by_group(batch, lambda rewards_G: group_relative(rewards_G, normalise_std=normalise_std))
    found_B_L, _ = core_algos.compute_grpo_vectorized_outcome_advantage(
        batch.rewards_at_the_end(), batch.mask_B_L, batch.groups_B, norm_adv_by_std_in_grpo=normalise_std
    )
    equal_B = torch.from_numpy(batch.groups_B == "task-2")
    expected_B = torch.where(alone(batch), batch.rewards_B, ours_B)
    differs_N = (batch.flat(found_B_L) - batch.spread(expected_B)).abs()
    assert float(differs_N[~batch.spread(equal_B)].max()) < 1e-5
    assert float(differs_N[batch.spread(equal_B)].max()) < 0.1


def test_equal_rewards_teach_us_exactly_nothing() -> None:
    """Equal float32 rewards whose rounded mean is another number get, in verl, (reward - mean) / (its own deviation +
    1e-6): an advantage of the same sign for every attempt, several hundredths for some of the rewards and group sizes
    tried here. Ours looks at the rewards and says 0."""
    found: list[float] = []
    for size in range(3, 17):
        for tenth in range(1, 10):
            rewards_B = torch.full((size,), tenth / 10)
            mask_B_L, index = torch.ones(size, 1, dtype=torch.int64), np.array(["task"] * size)
            theirs_B_L, _ = core_algos.compute_grpo_outcome_advantage(rewards_B[:, None], mask_B_L, index)
            assert len(theirs_B_L.unique()) == 1
            found.append(float(theirs_B_L[0, 0].abs()))
            assert bool((group_relative(rewards_B) == 0).all())
    assert 0.02 < max(found) < 1.0


@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_trl_grpo_agrees(seed: int, normalise_std: bool) -> None:
    """The advantages of `GRPOTrainer`, `scale_rewards` "group" or "none", with its epsilon of 1e-4 (ours is 1e-6 and an
    argument): 1e-7 over groups of four, one of them with equal rewards (their n / (n - 1) is a float32)."""
    rewards_B = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rewards_B[4:8] = 0.7
    found_B = trl_advantages(
        rewards_B, trainer=GRPOTrainer, num_generations=4, scale_rewards="group" if normalise_std else "none"
    )
    ours = [group_relative(rewards_G, normalise_std=normalise_std, eps=1e-4) for rewards_G in rewards_B.split(4)]
    assert_close(found_B, torch.cat(ours), rtol=1e-7, atol=1e-7)


def test_trl_groups_of_one_are_zero_as_ours() -> None:
    """Both trainers give a lone attempt 0; verl keeps its raw reward."""
    rewards_B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for trainer in (GRPOTrainer, RLOOTrainer):
        assert bool((trl_advantages(rewards_B, trainer=trainer, num_generations=1) == 0).all())
    assert bool((torch.cat([group_relative(reward_G) for reward_G in rewards_B.split(1)]) == 0).all())
