"""Causal attention in bfloat16 on a CPU, forward and backward, as a few large products.

torch's own kernel multiplies small blocks, at a tenth of the rate of a large product. Here a block of queries of all
heads meets all keys that it may see in one batched product of oneDNN. Scores are computed again in backward, as in
FlashAttention (arXiv 2205.14135); kept are queries, keys, values, the result, and two numbers for each of its rows.

oneDNN sums in float32 and gives bfloat16 out, in which a score of 20 would be off by 0.06. So what leaves the product
is the score less a number close to the row's largest: it rides along as further columns of the factors, and what is
rounded is small wherever it matters. In backward the same is done with dL/dP - sum(P dL/dP).

Legend: B rows, H query heads, K key heads, G query heads to a key head, T tokens, E head size; Z = B K, Q queries of a
block with those of its G heads one after the other, L keys that they see; W = E + 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "onednn"
"""Of this implementation, for `model.attention` and for transformers."""
_QUERIES = 128
"""Of a block, in each head."""
_ELEMENTS = 2**24
"""Scores of a block at most, unless it has 16 queries only."""
_BELOW = 1.0
"""How far below the largest score of a row 0 lies: most of a row's weight lies around there, if not on one token."""


def causal_attention(query_B_H_T_E: Tensor, key_B_K_T_E: Tensor, value_B_K_T_E: Tensor, *, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the tokens up to each query's own, [B, T, H, E]; all in bfloat16, first order only.

    Query head h reads key head h K // H. Scores beyond some 20,000 overflow.
    """
    return cast(Tensor, _CausalAttention.apply(query_B_H_T_E, key_B_K_T_E, value_B_K_T_E, scale))  # pyright: ignore[reportUnknownMemberType]


def register() -> None:
    """Make transformers know this implementation by its name."""
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it. Masks (padding, windows, joined rows), caches and other types are left to `sdpa`."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    is_plain = (
        attention_mask is None
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and query.shape[2] == key.shape[2]
        and query.shape[3] == value.shape[3]
        and not dropout
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None
        and {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        and query.device.type == "cpu"
    )
    if is_plain:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scale=scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_B_H_T_E: Tensor, key_B_K_T_E: Tensor, value_B_K_T_E: Tensor, scale: float) -> Tensor:
        B, H, T, E = query_B_H_T_E.shape
        K = key_B_K_T_E.shape[1]
        G, Z = H // K, B * K
        out_B_T_H_E = query_B_H_T_E.new_empty(B, T, H, E)
        shift_B_H_T = query_B_H_T_E.new_empty(B, H, T)
        total_B_H_T = torch.empty(B, H, T)
        query_B_K_G_T_E = query_B_H_T_E.unflatten(1, (K, G))
        out_B_T_K_G_E = out_B_T_H_E.unflatten(2, (K, G))
        shift_B_K_G_T, total_B_K_G_T = shift_B_H_T.unflatten(1, (K, G)), total_B_H_T.unflatten(1, (K, G))
        key_Z_T_W = _with_ones(key_B_K_T_E)
        value_Z_T_E = value_B_K_T_E.reshape(Z, T, E)
        blocks = _Blocks(query_B_H_T_E, groups=G)
        for start, end in blocks:
            query_Z_Q_W = query_B_H_T_E.new_zeros(B, K, G, end - start, E + 4)
            query_Z_Q_W[..., :E] = query_B_K_G_T_E[..., start:end, :]
            query_Z_Q_W = query_Z_Q_W.view(Z, -1, E + 4)
            scores_Z_Q_L = blocks.tile(0, start, end)
            # Once to find the largest of each row, once to have the others less it.
            blocks.scores(query_Z_Q_W, key_Z_T_W, start, end, scale, out=scores_Z_Q_L)
            shift_Z_Q = scores_Z_Q_L.amax(-1).float().sub_(_BELOW).to(torch.bfloat16)
            query_Z_Q_W[..., E:] = _columns(shift_Z_Q.float().div_(-scale))
            weights_Z_Q_L = blocks.scores(query_Z_Q_W, key_Z_T_W, start, end, scale, out=scores_Z_Q_L).exp_()
            total_Z_Q = weights_Z_Q_L.sum(-1, dtype=torch.float32)
            mixed_Z_Q_E = torch.bmm(weights_Z_Q_L, value_Z_T_E[:, :end]) / total_Z_Q[..., None]
            out_B_T_K_G_E[:, start:end] = mixed_Z_Q_E.view(B, K, G, -1, E).permute(0, 3, 1, 2, 4)
            shift_B_K_G_T[..., start:end] = shift_Z_Q.view(B, K, G, -1)
            total_B_K_G_T[..., start:end] = total_Z_Q.view(B, K, G, -1)
        ctx.save_for_backward(query_B_H_T_E, key_B_K_T_E, value_B_K_T_E, out_B_T_H_E, shift_B_H_T, total_B_H_T)
        ctx.scale = scale
        return out_B_T_H_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B_T_H_E: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query_B_H_T_E, key_B_K_T_E, value_B_K_T_E, out_B_T_H_E, shift_B_H_T, total_B_H_T = ctx.saved_tensors
        scale: float = ctx.scale
        B, H, T, E = query_B_H_T_E.shape
        K = key_B_K_T_E.shape[1]
        G, Z = H // K, B * K
        # Weights are exp(score - shift), of which each row has `total`: the gradient of its result is divided by that.
        grad_B_H_T_E = grad_B_T_H_E.transpose(1, 2).float() / total_B_H_T[..., None]
        inner_B_H_T = (grad_B_H_T_E * out_B_T_H_E.transpose(1, 2)).sum(-1)
        query_B_K_G_T_W = _widened(query_B_H_T_E, shift_B_H_T.float().div_(-scale)).unflatten(1, (K, G))
        grad_B_K_G_T_W = _widened(grad_B_H_T_E.to(torch.bfloat16), -inner_B_H_T).unflatten(1, (K, G))
        key_Z_T_W, value_Z_T_W = _with_ones(key_B_K_T_E), _with_ones(value_B_K_T_E)
        key_Z_T_E = key_B_K_T_E.reshape(Z, T, E)
        query_grad_B_T_H_E = torch.empty_like(grad_B_T_H_E)
        query_grad_B_T_K_G_E = query_grad_B_T_H_E.unflatten(2, (K, G))
        key_grad_Z_E_T, value_grad_Z_E_T = torch.zeros(Z, E, T), torch.zeros(Z, E, T)
        blocks = _Blocks(query_B_H_T_E, groups=G)
        for start, end in blocks:
            query_Z_Q_W = query_B_K_G_T_W[..., start:end, :].reshape(Z, -1, E + 4)
            grad_Z_Q_W = grad_B_K_G_T_W[..., start:end, :].reshape(Z, -1, E + 4)
            weights_Z_Q_L = blocks.tile(0, start, end)
            blocks.scores(query_Z_Q_W, key_Z_T_W, start, end, scale, out=weights_Z_Q_L).exp_()
            value_grad_Z_E_T[..., :end] += torch.bmm(grad_Z_Q_W[..., :E].mT, weights_Z_Q_L)
            scores_grad_Z_Q_L = torch.bmm(grad_Z_Q_W, value_Z_T_W[:, :end].mT, out=blocks.tile(1, start, end))
            scores_grad_Z_Q_L.mul_(weights_Z_Q_L)
            part_Z_Q_E = torch.bmm(scores_grad_Z_Q_L, key_Z_T_E[:, :end]).float().mul_(scale)
            query_grad_B_T_K_G_E[:, start:end] = part_Z_Q_E.view(B, K, G, -1, E).permute(0, 3, 1, 2, 4)
            key_grad_Z_E_T[..., :end] += torch.bmm(query_Z_Q_W[..., :E].mT, scores_grad_Z_Q_L)
        key_grad_Z_E_T.mul_(scale)

        def laid_out(grad_Z_E_T: Tensor) -> Tensor:
            """[B, K, T, E], in memory token after token, as the linear layers before it are."""
            grad_B_T_K_E = grad_Z_E_T.new_empty(B, T, K, E, dtype=torch.bfloat16)
            return grad_B_T_K_E.copy_(grad_Z_E_T.view(B, K, E, T).permute(0, 3, 1, 2)).transpose(1, 2)

        return query_grad_B_T_H_E.transpose(1, 2), laid_out(key_grad_Z_E_T), laid_out(value_grad_Z_E_T), None


class _Blocks:
    """Blocks of queries from first to last, and memory for what they and their keys make together."""

    def __init__(self, query_B_H_T_E: Tensor, *, groups: int) -> None:
        B, H, T, _ = query_B_H_T_E.shape
        self._batch, self._groups, self._tokens = B * H // groups, groups, T
        self._step = max(16, min(_QUERIES, _ELEMENTS // (B * H * T)))
        self._memory: dict[int, Tensor] = {}
        self._like = query_B_H_T_E
        future = torch.full((self._step, self._step), -math.inf, dtype=query_B_H_T_E.dtype)
        self._future = future.triu_(1)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._tokens, self._step):
            yield start, min(start + self._step, self._tokens)

    def tile(self, number: int, start: int, end: int) -> Tensor:
        """[Z, Q, L] uninitialised; the same memory whenever the number is the same."""
        if number not in self._memory:
            most = self._batch * self._groups * min(self._step, self._tokens) * self._tokens
            self._memory[number] = self._like.new_empty(most)
        rows = self._groups * (end - start)
        return self._memory[number][: self._batch * rows * end].view(self._batch, rows, end)

    def scores(
        self, query_Z_Q_W: Tensor, key_Z_T_W: Tensor, start: int, end: int, scale: float, *, out: Tensor
    ) -> Tensor:
        """scale q k^T, and -inf where a key comes after its query: only among the block's own tokens."""
        out.baddbmm_(query_Z_Q_W, key_Z_T_W[:, :end].mT, beta=0, alpha=scale)
        queries = end - start
        out.unflatten(1, (self._groups, queries))[..., start:end].add_(self._future[:queries, :queries])
        return out


def _with_ones(x_B_K_T_E: Tensor) -> Tensor:
    """[Z, T, W]: takes up the columns of the other factor."""
    ones = x_B_K_T_E.new_ones(4).expand(*x_B_K_T_E.shape[:3], 4)
    return torch.cat([x_B_K_T_E, ones], dim=-1).flatten(0, 1)


def _widened(x: Tensor, number: Tensor) -> Tensor:
    """[..., W] from bfloat16 [..., E] and float32 [...]."""
    return torch.cat([x, _columns(number)], dim=-1)


def _columns(number: Tensor) -> Tensor:
    """[..., 4] in bfloat16 whose sum is a number in float32; a multiple of 4 is what products are fast at."""
    high = number.to(torch.bfloat16)
    rest = number - high
    middle = rest.to(torch.bfloat16)
    low = (rest - middle).to(torch.bfloat16)
    return torch.stack([high, middle, low, torch.zeros_like(high)], dim=-1)
