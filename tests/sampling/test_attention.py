"""Attention over stored keys and values against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epo.sampling.attention import attend_new, attend_new_in_products, attend_one, causal_mask

BFLOAT16 = torch.bfloat16


def draw(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(query_Q_H_E: Tensor, key_K_L_E: Tensor, value_K_L_E: Tensor, scale: float) -> Tensor:
    """Query by query, head by head."""
    out_Q_H_E = torch.empty(query_Q_H_E.shape, dtype=torch.float64)
    queries, heads, _ = query_Q_H_E.shape
    for place in range(queries):
        seen = key_K_L_E.shape[1] - queries + place + 1
        for head in range(heads):
            key_head = head * len(key_K_L_E) // heads
            scores_L = key_K_L_E[key_head, :seen].double() @ query_Q_H_E[place, head].double() * scale
            out_Q_H_E[place, head] = scores_L.softmax(0) @ value_K_L_E[key_head, :seen].double()
    return out_Q_H_E


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


# Queries, positions, query heads, key heads, head size: one token, a first prompt, a later turn, more than one block.
SHAPES = [(1, 1, 3, 1, 8), (9, 9, 4, 4, 16), (41, 200, 9, 3, 64), (150, 150, 6, 2, 8), (300, 333, 7, 1, 32)]


@pytest.mark.parametrize(("size", "common", "bound"), [(0.3, 2, 5e-3), (3, 2, 5e-3), (12, 2, 5e-3), (12, 60, 3e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_new_tokens_in_products_are_about_as_exact_as_the_fused_kernel(
    shape: tuple[int, ...], size: float, common: float, bound: float
) -> None:
    queries, length, heads, key_heads, head_size = shape
    query = draw(queries, heads, head_size, seed=1, size=size).to(BFLOAT16)
    # A part that all keys share moves all scores of a query alike, by tens, and by hundreds to thousands at 60: only
    # what it costs in rounding may show.
    shared = draw(key_heads, 1, head_size, seed=3, size=common)
    key = (draw(key_heads, length, head_size, seed=2) + shared).to(BFLOAT16)
    value = draw(key_heads, length, head_size, seed=4).to(BFLOAT16)
    scale = head_size**-0.5
    expected = exact(query, key, value, scale)
    fused = attend_new(query, key, value, causal_mask(queries, length, dtype=BFLOAT16), scale=scale)
    got = attend_new_in_products(query, key, value, scale=scale)
    assert got.shape == query.shape
    assert error(fused, expected) < 4e-3
    assert error(got, expected) < bound


@pytest.mark.parametrize(("dtype", "rounds_weights"), [(torch.float32, False), (BFLOAT16, False), (BFLOAT16, True)])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_one_token_of_each_row_sees_its_own_positions_only(
    dtype: torch.dtype, rounds_weights: bool, key_heads: int
) -> None:
    heads, head_size, ends = 6, 16, [3, 64, 41]
    query = draw(3, heads, head_size, seed=1, size=3.0).to(dtype)
    key = draw(3, key_heads, 64, head_size, seed=2, size=2.0).to(dtype)
    value = draw(3, key_heads, 64, head_size, seed=3).to(dtype)
    hidden_R_L = torch.arange(64) >= torch.tensor(ends)[:, None]
    mask = torch.zeros(3, 64).masked_fill_(hidden_R_L, -torch.inf)[:, None, None]
    query_R_K_G_E = query.unflatten(1, (key_heads, -1))
    got = attend_one(query_R_K_G_E, key, value, mask, scale=0.25, rounds_weights=rounds_weights).flatten(1, 2)
    for row, end in enumerate(ends):
        expected = exact(query[row : row + 1], key[row, :, :end], value[row, :, :end], 0.25)
        assert error(got[row : row + 1], expected) < (1e-6 if dtype is torch.float32 else 4e-3)
