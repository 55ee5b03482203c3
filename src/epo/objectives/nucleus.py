"""Differentiable entropy of the nucleus: of the few most probable tokens that hold a given mass together.

Legend for tensor suffixes: _N trained tokens, _V vocabulary, _D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from epo.objectives._tiles import EXCLUDED


def nucleus_entropy(
    hidden_N_D: Tensor,
    head_weight_V_D: Tensor,
    *,
    top_p: float,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    tile_tokens: int = 64,
) -> Tensor:
    """`logits_nucleus_entropy` of z = cap(hidden @ weight^T + bias) / temperature, from hidden states.

    Logits exist for a tile of tokens at a time and are computed again in backward, so that the tokens x vocabulary
    matrix never exists. Computed in float32 (float64 if an input is float64), also under autocast; a bfloat16 weight is
    copied to float32 once. Backward makes a temporary of the weight's size for every tile.

    Args:
        hidden_N_D: [N, D] last hidden states at the positions that predict the tokens.
        head_weight_V_D: [V, D] head weight; may be the tied embedding.
        top_p: least mass of the nucleus, in (0, 1].
        head_bias: [V] or None; -inf excludes a vocabulary entry.
        temperature: the sampling temperature of the policy that is trained; > 0.
        logit_softcap: c of models that cap their final logits, cap(x) = c tanh(x / c); > 0, or None.
        tile_tokens: tokens per tile; about eight tiles of `tile_tokens * V` values are alive at once.

    Returns:
        entropy_N, [N] nats, float32 (float64 if an input is float64), differentiable by hidden states, weight and bias.

    Raises:
        ValueError: shapes that do not fit, or a number out of its range.
    """
    if hidden_N_D.dim() != 2 or head_weight_V_D.dim() != 2 or hidden_N_D.shape[1] != head_weight_V_D.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and head_weight [V, D] with the same D, "
            f"got {list(hidden_N_D.shape)} and {list(head_weight_V_D.shape)}"
        )
    if head_bias is not None and head_bias.shape != head_weight_V_D.shape[:1]:
        raise ValueError(f"head_bias must be [{head_weight_V_D.shape[0]}], got {list(head_bias.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; a greedy policy has no entropy to train")
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens must be at least 1, got {tile_tokens}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be > 0 or None, got {logit_softcap}")
    _check_mass(top_p)
    is_double = torch.float64 in (hidden_N_D.dtype, head_weight_V_D.dtype)
    dtype = torch.float64 if is_double else torch.float32
    weight_V_D = head_weight_V_D.to(dtype)

    def entropy_of(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden.to(dtype) @ weight_V_D.T
            if head_bias is not None:
                logits = logits + head_bias.to(dtype)
            if logit_softcap is not None:
                capped = logit_softcap * torch.tanh(logits / logit_softcap)
                logits = capped.masked_fill(logits == -torch.inf, -torch.inf)
            return logits_nucleus_entropy(logits / temperature, top_p=top_p)

    # The stubs of torch leave `checkpoint` and `split` untyped.
    recomputed = cast("Callable[..., Tensor]", checkpoint)
    tiles = cast("tuple[Tensor, ...]", hidden_N_D.split(tile_tokens))  # pyright: ignore[reportUnknownMemberType]
    return torch.cat([recomputed(entropy_of, tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles])


def logits_nucleus_entropy(logits: Tensor, *, top_p: float) -> Tensor:
    """H = -sum q log q over the nucleus, with q = p / (mass of the nucleus).

    The nucleus is the smallest set of most probable tokens whose mass is at least `top_p`; the token that crosses the
    threshold belongs to it. Which tokens belong to it is a constant for the gradient: dH/dz_j = -q_j (log q_j + H)
    inside and 0 outside.

    Source: the policy nucleus of SIREN, arXiv 2509.25133; that probabilities are renormalised inside was read from its
    official code. That code leaves out the token that crosses the threshold, so that a token with mass `top_p` or more
    of its own makes an empty nucleus of entropy 0; a nucleus of that one token has entropy 0 too.

    Args:
        logits: [..., V], already divided by the temperature; -inf excludes a vocabulary entry.
        top_p: in (0, 1]; 1 is the entropy of the whole vocabulary.

    Returns:
        entropy, [...] nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: a number out of its range, or logits without a vocabulary.
    """
    _check_mass(top_p)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got {list(logits.shape)}")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ranked = logits.to(dtype).clamp(min=EXCLUDED).sort(dim=-1, descending=True).values
    with torch.no_grad():
        probabilities = ranked.softmax(dim=-1)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        # Rounding can complete the sum too early, hence the second part.
        is_inside = (mass_before < top_p) | (top_p == 1)
    log_q = ranked.masked_fill(~is_inside, EXCLUDED).log_softmax(dim=-1)
    return -(log_q.exp() * log_q).sum(dim=-1)


def _check_mass(top_p: float) -> None:
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
