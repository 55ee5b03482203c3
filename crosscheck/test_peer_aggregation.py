"""From token losses to one number: our weights against verl's `agg_loss` modes and TRL's loss types, and the entropy
bonus, which both average in their own way.

Ours are the mean over tokens and `trajectory_weights` (trajectory, turn, token; equation E2 of EPO).

Legend for tensor suffixes: _N trained tokens, _B rows, _L columns of a row, _V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from batches import Ragged, ragged
from torch import Tensor
from torch.testing import assert_close
from trl_stub import grpo_loss
from verl.trainer.ppo.core_algos import agg_loss, compute_entropy_loss

from epo.objectives import logits_logprobs_and_entropy, make_control, trajectory_weights


def drawn(seed: int) -> tuple[Ragged, Tensor]:
    batch = ragged(seed)
    return batch, batch.normal().requires_grad_()


def weights_in(loss: Tensor, losses_N: Tensor) -> Tensor:
    """[N] the weight each token's loss has in a scalar."""
    return torch.autograd.grad(loss, losses_N)[0]


def verl_weights(batch: Ragged, losses_N: Tensor, mode: str, **options: int) -> Tensor:
    return weights_in(agg_loss(batch.pad(losses_N), batch.mask_B_L, mode, **options), losses_N)


def trl_weights(batch: Ragged, losses_N: Tensor, loss_type: str) -> Tensor:
    """With advantage -1 and old log-probabilities equal to the new ones, the weight is d loss / d log-probability."""
    loss, _ = grpo_loss(
        batch.pad(losses_N),
        batch.mask_B_L,
        advantages=-torch.ones_like(batch.rewards_B),
        old_logps_B_L=batch.pad(losses_N.detach()),
        loss_type=loss_type,
        max_completion_length=100,
    )
    return weights_in(loss, losses_N)


def whole_trajectory_weights(batch: Ragged) -> Tensor:
    """Ours with every trajectory taken as one turn."""
    one_turn_N = torch.zeros_like(batch.turn_ids_N)
    return trajectory_weights(batch.trajectory_ids_N, one_turn_N, dtype=torch.float64)


def lengths(batch: Ragged) -> Tensor:
    """[N] tokens of the token's trajectory."""
    return batch.mask_B_L.sum(1).double()[batch.trajectory_ids_N]


@pytest.mark.parametrize("seed", range(3))
def test_token_means_agree(seed: int) -> None:
    """verl `token-mean`, TRL `bnpo` and `dapo` (one accumulation step): 1 / N, to 1e-14. verl `token-sum` is that
    without the mean."""
    batch, losses_N = drawn(seed)
    num = len(losses_N)
    mean_N = torch.full((num,), 1 / num, dtype=torch.float64)
    assert_close(verl_weights(batch, losses_N, "token-mean"), mean_N, rtol=1e-14, atol=0.0)
    assert_close(verl_weights(batch, losses_N, "token-sum"), num * mean_N, rtol=1e-14, atol=0.0)
    assert_close(trl_weights(batch, losses_N, "bnpo"), mean_N, rtol=1e-14, atol=0.0)
    assert_close(trl_weights(batch, losses_N, "dapo"), mean_N, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("seed", range(3))
def test_sequence_means_of_token_means_are_ours_over_whole_trajectories(seed: int) -> None:
    """TRL `grpo` to 1e-14; verl `seq-mean-token-mean` divides by length + 1e-8: 1e-8."""
    batch, losses_N = drawn(seed)
    expected_N = whole_trajectory_weights(batch)
    assert_close(trl_weights(batch, losses_N, "grpo"), expected_N, rtol=1e-14, atol=0.0)
    assert_close(verl_weights(batch, losses_N, "seq-mean-token-mean"), expected_N, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("seed", range(3))
def test_sequence_means_of_token_sums_count_a_token_of_any_trajectory_alike(seed: int) -> None:
    """verl `seq-mean-token-sum` and TRL `luspo` weigh every token 1 / B, so they are our token mean times N / B: the
    same direction, with a length that grows with the responses. 1e-7 (verl divides by a float32 count)."""
    batch, losses_N = drawn(seed)
    rows = len(batch.rewards_B)
    expected_N = torch.full_like(losses_N, 1 / rows)
    assert_close(verl_weights(batch, losses_N, "seq-mean-token-sum"), expected_N, rtol=1e-7, atol=0.0)
    assert_close(trl_weights(batch, losses_N, "luspo"), expected_N, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("seed", range(3))
def test_dr_grpo_divides_by_a_constant_length(seed: int) -> None:
    """verl `seq-mean-token-sum-norm` and TRL `dr_grpo` weigh every token 1 / (B * length): our token mean times
    N / (B * length). verl's length is the padded width of the batch unless `loss_scale_factor` is set, TRL's is
    `max_completion_length`. 1e-7 (verl divides by a float32 count)."""
    batch, losses_N = drawn(seed)
    rows, width = batch.mask_B_L.shape

    def constant(length: int) -> Tensor:
        return torch.full_like(losses_N, 1 / (rows * length))

    mode = "seq-mean-token-sum-norm"
    assert_close(verl_weights(batch, losses_N, mode), constant(width), rtol=1e-7, atol=0.0)
    fixed_N = verl_weights(batch, losses_N, mode, loss_scale_factor=100)
    assert_close(fixed_N, constant(100), rtol=1e-7, atol=0.0)
    assert_close(trl_weights(batch, losses_N, "dr_grpo"), constant(100), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("seed", range(3))
def test_neither_has_a_mean_over_turns(seed: int) -> None:
    """Ours (E2) is their sequence mean with each token's weight times length / (turns * tokens of its turn). Laid out
    as one row per turn, `seq-mean-token-mean` weighs every turn alike instead of every trajectory: ours times
    trajectories * turns of the trajectory / all turns. 1e-8 (verl divides by length + 1e-8)."""
    batch, losses_N = drawn(seed)
    ours_N = trajectory_weights(batch.trajectory_ids_N, batch.turn_ids_N, dtype=torch.float64)
    pairs = list(zip(batch.trajectory_ids_N.tolist(), batch.turn_ids_N.tolist(), strict=True))
    turns_N = torch.tensor([len({t for j, t in pairs if j == trajectory}) for trajectory, _ in pairs])
    tokens_N = torch.tensor([pairs.count(pair) for pair in pairs])
    theirs_N = verl_weights(batch, losses_N, "seq-mean-token-mean")
    assert_close(ours_N, theirs_N * lengths(batch) / (turns_N * tokens_N), rtol=1e-8, atol=0.0)
    assert float((ours_N / theirs_N - 1).abs().max()) > 0.5

    rows = sorted(set(pairs))
    mask = torch.zeros(len(rows), 10, dtype=torch.int64)
    for row, pair in enumerate(rows):
        mask[row, : pairs.count(pair)] = 1
    per_turn = Ragged(mask, batch.trajectory_ids_N, batch.turn_ids_N, batch.groups_B, batch.rewards_B, batch.generator)
    by_turn_N = verl_weights(per_turn, losses_N, "seq-mean-token-mean")
    assert_close(by_turn_N, ours_N * len(batch.rewards_B) * turns_N / len(rows), rtol=1e-8, atol=0.0)


def test_entropy_bonuses_are_token_means() -> None:
    """verl `compute_entropy_loss` (default mode) and the bonus of TRL's GRPO are the plain token mean: `bonus` with
    weights 1 / N, to 1e-12. EPO's L^H has the weights of equation E2 instead, which neither knows (test above)."""
    batch = ragged(0)
    num, vocab = len(batch.trajectory_ids_N), 13
    logits_N_V = torch.randn(num, vocab, dtype=torch.float64, generator=batch.generator)
    targets_N = torch.zeros(num, dtype=torch.int64)
    entropy_N = logits_logprobs_and_entropy(logits_N_V, targets_N)[1]
    control = make_control("bonus", coefficient=0.02)
    uniform_N = torch.full_like(entropy_N, 1 / num)
    ours = control.entropy_loss(entropy_N, uniform_N, batch.turn_ids_N, step=0, total_steps=10).loss

    logits_B_L_V = torch.stack([batch.pad(logits_N_V[:, v]) for v in range(vocab)], dim=-1)
    assert_close(-0.02 * compute_entropy_loss(logits_B_L_V, batch.mask_B_L), ours, rtol=1e-12, atol=1e-12)

    zeros_B_L = torch.zeros(batch.mask_B_L.shape, dtype=torch.float64)
    theirs, _ = grpo_loss(
        zeros_B_L,
        batch.mask_B_L,
        advantages=torch.zeros_like(batch.rewards_B),
        old_logps_B_L=zeros_B_L,
        entropies_B_L=batch.pad(entropy_N),
        entropy_coef=0.02,
    )
    assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
