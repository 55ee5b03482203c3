"""Attention of the lean forward over stored keys and values, without a padded position.

torch's fused kernel multiplies small blocks; in bfloat16 on a CPU each of them costs more around the product than for
it. Here one product takes all tokens of a row, or one token of many rows, with the query heads of a group as rows.

Legend: R rows, Q new tokens of a row, H query heads, K key heads, G query heads to a key head, E head size, L
positions; N = Q G, token by token.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

_QUERIES = 128
"""New tokens of a block in `attend_new_in_products`."""
_ELEMENTS = 2**22
"""Scores of a block at most, unless it has 16 new tokens only."""
_BELOW = 1.0
"""How far below the largest score of a row 0 lies: most of a row's weight lies around there, if not on one token."""


def attend_one(
    query_R_K_G_E: Tensor,
    key_R_K_L_E: Tensor,
    value_R_K_L_E: Tensor,
    mask_R_1_1_L: Tensor,
    *,
    scale: float,
    rounds_weights: bool = False,
) -> Tensor:
    """One new token of each row, [R, K, G, E] in the type of the values; scores and their softmax are float32.

    In bfloat16 keys and values are widened for it: keep the rows so few that a cache holds them.

    Args:
        query_R_K_G_E: of the new tokens.
        key_R_K_L_E: of all positions.
        value_R_K_L_E: of all positions.
        mask_R_1_1_L: added to the scores.
        scale: of the scores.
        rounds_weights: leave the values as they are and round the weights; faster where bfloat16 is multiplied.
    """
    query_Z_G_E, key_Z_L_E = query_R_K_G_E.flatten(0, 1).float(), key_R_K_L_E.flatten(0, 1).float()
    scores = torch.bmm(query_Z_G_E, key_Z_L_E.mT)
    scores_R_K_G_L = scores.view(*query_R_K_G_E.shape[:3], -1).mul_(scale).add_(mask_R_1_1_L)
    weights_Z_G_L = scores_R_K_G_L.softmax(-1).flatten(0, 1)
    value_Z_L_E = value_R_K_L_E.flatten(0, 1)
    if rounds_weights:
        mixed_Z_G_E = torch.bmm(weights_Z_G_L.to(value_Z_L_E.dtype), value_Z_L_E)
    else:
        mixed_Z_G_E = torch.bmm(weights_Z_G_L, value_Z_L_E.float()).to(value_Z_L_E.dtype)
    return mixed_Z_G_E.view_as(query_R_K_G_E)


def attend_new(
    query_Q_H_E: Tensor, key_K_L_E: Tensor, value_K_L_E: Tensor, mask_Q_L: Tensor | None, *, scale: float
) -> Tensor:
    """The newest tokens of one row, each over what comes up to it, [Q, H, E], by torch's fused kernel.

    Args:
        query_Q_H_E: of the last Q positions.
        key_K_L_E: of all positions.
        value_K_L_E: of all positions.
        mask_Q_L: `causal_mask`.
        scale: of the scores.
    """
    out_1_H_Q_E = functional.scaled_dot_product_attention(
        query_Q_H_E.transpose(0, 1)[None],
        key_K_L_E[None],
        value_K_L_E[None],
        attn_mask=mask_Q_L,
        is_causal=mask_Q_L is None,
        scale=scale,
        enable_gqa=True,
    )
    return out_1_H_Q_E[0].transpose(0, 1)


def causal_mask(queries: int, length: int, *, dtype: torch.dtype) -> Tensor | None:
    """[Q, L]: 0 for what the last Q of L positions see, else -inf; None where it is the plain triangle."""
    if queries == length:
        return None
    return torch.full((queries, length), -torch.inf, dtype=dtype).triu_(length - queries + 1)


def attend_new_in_products(query_Q_H_E: Tensor, key_K_L_E: Tensor, value_K_L_E: Tensor, *, scale: float) -> Tensor:
    """As `attend_new`, in bfloat16 on a CPU that multiplies it.

    oneDNN sums in float32 and rounds what comes out, in which a score of 20 would be off by 0.06. So scores are
    computed twice: once to find the largest of each row, once to have the others less it, from before they are rounded.
    The largest is found to 1/256 of itself: at scores of thousands that shows. Scores beyond some 20,000 overflow.
    """
    out_Q_H_E = torch.empty_like(query_Q_H_E)
    K, L, E = key_K_L_E.shape
    before = L - len(query_Q_H_E)
    step = max(16, min(_QUERIES, _ELEMENTS // (query_Q_H_E.shape[1] * L)))
    for first in range(0, len(query_Q_H_E), step):
        query_B_K_G_E = query_Q_H_E[first : first + step].unflatten(1, (K, -1))
        queries, _, groups, _ = query_B_K_G_E.shape
        seen = before + first + queries
        query_K_E_N = query_B_K_G_E.transpose(0, 1).reshape(K, -1, E).mT
        key, value = key_K_L_E[:, :seen], value_K_L_E[:, :seen]
        future = _future(groups)[:queries, : queries * groups]
        # Keys are the rows of the product: the other way round it takes half as long again.
        scores_K_L_N = query_Q_H_E.new_empty(K, seen, queries * groups)
        scores_K_L_N.baddbmm_(key, query_K_E_N, beta=0, alpha=scale)
        scores_K_L_N[:, -queries:].add_(future)
        shift_K_1_N = _largest(scores_K_L_N).sub_(_BELOW)
        scores_K_L_N.copy_(-shift_K_1_N)
        scores_K_L_N[:, -queries:].add_(future)
        weights_K_L_N = scores_K_L_N.baddbmm_(key, query_K_E_N, alpha=scale).exp_()
        total_K_N_1 = weights_K_L_N.sum(1, dtype=torch.float32)[..., None]
        mixed_K_N_E = torch.bmm(weights_K_L_N.mT, value) / total_K_N_1
        out_Q_H_E[first : first + queries] = mixed_K_N_E.view(K, queries, -1, E).transpose(0, 1).flatten(1, 2)
    return out_Q_H_E


def _largest(scores_K_L_N: Tensor) -> Tensor:
    """Over L, [K, 1, N]: halves against each other, since torch's `amax` over a middle dimension is slow."""
    while (length := scores_K_L_N.shape[1]) > 1:
        half = (length + 1) // 2
        scores_K_L_N = torch.maximum(scores_K_L_N[:, :half], scores_K_L_N[:, -half:])
    return scores_K_L_N.clone()


@lru_cache
def _future(groups: int) -> Tensor:
    """-inf where a key of a block comes after a query, else 0."""
    future_Q_Q = torch.full((_QUERIES, _QUERIES), -torch.inf, dtype=torch.bfloat16).tril_(-1)
    return future_Q_Q.repeat_interleave(groups, dim=1)
