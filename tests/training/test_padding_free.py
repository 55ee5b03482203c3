"""Rows without padding give what padded rows give.

The variable-length kernel needs a GPU. Here attention under an explicit block-diagonal causal mask stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from epo.training.padding_free import FlatRows, flat_rows
from epo.training.policy import Policy

LENGTHS = [5, 1, 9, 3]


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    ids_B_T = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(LENGTHS):
        ids_B_T[row, length:] = 0
    ids_B_T[0, 4] = 0  # also a real token
    return ids_B_T, torch.tensor(LENGTHS)


def block_mask(rows: FlatRows) -> Tensor:
    """[1, 1, N, N] by brute force from the boundaries alone."""
    count = rows.token_ids_1_N.shape[1]
    mask = torch.zeros(count, count, dtype=torch.bool)
    bounds = rows.boundaries.tolist()
    for start, end in pairwise(bounds):
        for query in range(start, end):
            mask[query, start : query + 1] = True
    return mask[None, None]


def test_rows_are_joined_and_parted(padded: tuple[Tensor, Tensor]) -> None:
    rows = flat_rows(*padded)
    expected = [int(t) for row, length in zip(padded[0], LENGTHS, strict=True) for t in row[:length]]
    assert rows.token_ids_1_N.tolist() == [expected]
    assert rows.position_ids_1_N.tolist() == [[t for length in LENGTHS for t in range(length)]]
    assert rows.boundaries.tolist() == [0, 5, 6, 15, 18] and rows.boundaries.dtype == torch.int32
    assert rows.longest == 9
    flat_1_N_D = torch.randn(1, 18, 2)
    back = rows.padded(flat_1_N_D)
    assert torch.equal(torch.cat([back[b, :length] for b, length in enumerate(LENGTHS)]), flat_1_N_D[0])
    assert back.abs().sum() == pytest.approx(flat_1_N_D.abs().sum().item())  # zeros elsewhere
    assert set(rows.attention_arguments()) == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def test_hidden_states_and_gradients_equal_those_of_padded_rows(
    padded: tuple[Tensor, Tensor], make_policy: Callable[..., Policy]
) -> None:
    ids_B_T, lengths_B = padded
    is_real = torch.arange(9) < lengths_B[:, None]
    found, gradients = [], []
    for flat in (False, True):
        policy = make_policy(lively=False)
        policy.model.double()
        if flat:
            rows = flat_rows(ids_B_T, lengths_B)
            out = policy.trunk(
                input_ids=rows.token_ids_1_N,
                position_ids=rows.position_ids_1_N,
                attention_mask=block_mask(rows),
                use_cache=False,
            )
            hidden_B_T_D = rows.padded(out.last_hidden_state)
        else:
            hidden_B_T_D = policy.hidden(ids_B_T)
        found.append(hidden_B_T_D[is_real])
        (found[-1] * torch.arange(32)).sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


def test_the_policy_hands_its_kernel_rows_without_padding(
    padded: tuple[Tensor, Tensor], make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel can, rows go through it as one; elsewhere lengths change nothing."""
    policy = make_policy(lively=False)
    plain = policy.hidden(padded[0])
    assert torch.equal(policy.hidden(*padded), plain)
    monkeypatch.setattr("epo.training.policy._keeps_rows_apart", lambda model: True)
    seen: list[dict[str, Tensor]] = []
    forward = policy.trunk.forward

    def stand_in(**arguments: Tensor) -> object:
        seen.append(arguments)
        kept = {k: v for k, v in arguments.items() if "seq_lens" not in k and "max_length" not in k}
        return forward(**kept, attention_mask=block_mask(flat_rows(*padded)))

    monkeypatch.setattr(policy.trunk, "forward", stand_in)
    hidden_B_T_D = policy.hidden(*padded)
    is_real = torch.arange(9) < padded[1][:, None]
    torch.testing.assert_close(hidden_B_T_D[is_real], plain[is_real], rtol=1e-4, atol=1e-5)
    assert hidden_B_T_D[~is_real].abs().max() == 0
    (arguments,) = seen
    assert arguments["input_ids"].shape == (1, 18) and "attention_mask" not in arguments
    assert arguments["cu_seq_lens_q"].tolist() == [0, 5, 6, 15, 18]
