"""RLOO and REINFORCE++ against verl's and TRL's.

Legend for tensor suffixes: _N trained tokens, _B rows (one trajectory each), _T turns, _L columns of a row.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from batches import ragged
from torch.testing import assert_close
from trl.trainer.rloo_trainer import RLOOTrainer
from trl_stub import advantages as trl_advantages
from verl.trainer.ppo import core_algos

from epo.objectives import whiten
from epo.objectives.groups import group_relative, leave_one_out, reinforce_plus_plus


@pytest.mark.parametrize("seed", range(3))
def test_verl_rloo_agrees_but_for_groups_of_one(seed: int) -> None:
    """`compute_rloo_outcome_advantage` and its vectorised form, to 1e-12. A trajectory alone in its group keeps its raw
    reward in the first and gets 0 in the second, as with us."""
    batch = ragged(seed)
    ours_B = torch.zeros_like(batch.rewards_B)
    for rows in batch.members():
        ours_B[rows] = leave_one_out(batch.rewards_B[rows])
    given = (batch.rewards_at_the_end(), batch.mask_B_L, batch.groups_B)
    loop_N = batch.flat(core_algos.compute_rloo_outcome_advantage(*given)[0])
    vectorised_N = batch.flat(core_algos.compute_rloo_vectorized_outcome_advantage(*given)[0])
    alone_B = torch.from_numpy(batch.groups_B == "task-1")
    assert int(alone_B.sum()) == 1
    assert_close(vectorised_N, batch.spread(ours_B), rtol=1e-12, atol=1e-12)
    assert_close(loop_N, batch.spread(torch.where(alone_B, batch.rewards_B, ours_B)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_trl_rloo_agrees(seed: int) -> None:
    """The advantages of `RLOOTrainer` over groups of four, one of them with equal rewards, to 1e-12."""
    rewards_B = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rewards_B[4:8] = 0.7
    found_B = trl_advantages(rewards_B, trainer=RLOOTrainer, num_generations=4)
    assert_close(found_B, torch.cat([leave_one_out(group) for group in rewards_B.split(4)]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_verl_reinforce_plus_plus_agrees(seed: int, gamma: float) -> None:
    """A reward on every turn, on its last token; token steps, observations skipped on both sides: 1e-7 (verl's
    N / (N - 1) is a float32)."""
    batch = ragged(seed)
    pairs = list(zip(batch.trajectory_ids_N.tolist(), batch.turn_ids_N.tolist(), strict=True))
    is_last_N = torch.tensor([pair != following for pair, following in zip(pairs, [*pairs[1:], None], strict=True)])
    rewards_N = torch.where(is_last_N, batch.normal(), 0.0)
    rewards_B_L = torch.where(batch.mask_B_L.bool(), batch.pad(rewards_N), 0.0)
    found_B_L, _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        rewards_B_L, batch.mask_B_L, config=SimpleNamespace(gamma=gamma)
    )
    ours_N = reinforce_plus_plus(rewards_N[is_last_N], batch.trajectory_ids_N, batch.turn_ids_N, gamma=gamma)
    assert_close(batch.flat(found_B_L), ours_N, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_the_group_baseline_of_reinforce_plus_plus_agrees(seed: int) -> None:
    """`compute_reinforce_plus_plus_baseline_outcome_advantage` is `whiten` of each token's reward over its group's
    mean, to 1e-7 (as above), with no group of one, which keeps its raw reward in verl."""
    batch = ragged(seed, group_sizes=(4, 3, 2, 4))
    ours_B = torch.zeros_like(batch.rewards_B)
    for rows in batch.members():
        ours_B[rows] = group_relative(batch.rewards_B[rows], normalise_std=False)
    found_B_L, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
        batch.rewards_at_the_end(), batch.mask_B_L, batch.groups_B
    )
    assert_close(batch.flat(found_B_L), whiten(batch.spread(ours_B)), rtol=1e-7, atol=1e-7)
