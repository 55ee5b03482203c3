"""Log-probability and differentiable full-vocabulary entropy of sampled tokens, and their ragged means.

`token_logprobs_and_entropy` fuses the language-model head with both, so that the tokens x vocabulary matrix never
exists: one pass over tiles in forward, one recomputation in backward.

Legend for tensor suffixes: _N trained tokens, _V vocabulary, _D hidden size, _U distinct turns.
A value belongs to the distribution the token was drawn from: softmax(logits / temperature). Natural log, nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from epo.objectives._tiles import HeadOptions, fused_head, logit_statistics


def token_logprobs_and_entropy(
    hidden_N_D: Tensor,
    head_weight_V_D: Tensor,
    targets_N: Tensor,
    *,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    float32_logits: bool = True,
    tile_tokens: int = 1024,
    tile_vocab: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, both differentiable, from hidden states.

    H = logsumexp(z) - sum_v softmax(z)_v z_v with z = cap(hidden @ weight^T + bias) / temperature (equation E1 of the
    EPO paper, arXiv 2509.22576), where cap(x) = c tanh(x / c) for `logit_softcap` c, else x. Backward recomputes z tile
    by tile and uses dH/dz_j = -p_j (log p_j + H).

    Logits, sums and accumulators are in float32 (float64 if an input is float64), also for bfloat16 inputs and under
    autocast. If hidden states and weight are both bfloat16, the factors of the two gradient products are too, as in
    autograd of a bfloat16 head, and the sums over tiles stay in float32.
    bfloat16 values are exact in TF32, so `torch.set_float32_matmul_precision("high")` costs no accuracy in the logits.
    A frozen weight or hidden state, and an output without gradient, cost nothing in backward. First order only.

    Args:
        hidden_N_D: [N, D] last hidden states at the positions that predict the targets.
        head_weight_V_D: [V, D] head weight; may be the tied embedding. Under FSDP the gathered weight: call this inside
            the wrapped module's forward, or pass `weight.full_tensor(grad_placements=[Partial()])`.
        targets_N: [N] sampled token ids.
        head_bias: [V] or None; -inf excludes a vocabulary entry.
        temperature: the sampling temperature of the policy that is trained; > 0.
        logit_softcap: c of models that cap their final logits (Gemma 2: `final_logit_softcapping` = 30); > 0, or None.
        float32_logits: False multiplies the logits of bfloat16 inputs in bfloat16, as a plain bfloat16 head does:
            faster on a CPU, but every logit is rounded; log-probabilities and entropies are off by up to 0.1.
        tile_tokens: tokens per tile; a smaller tile needs less memory.
        tile_vocab: vocabulary entries per tile. Two tiles of `tile_tokens * tile_vocab` values are alive at once, three
            with a softcap. The defaults are measured on a CPU (docs/token-head.md); a GPU, where every tile costs
            kernel launches, should want larger ones (not measured).

    Returns:
        logprobs_N and entropy_N, [N] each, float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, or a number out of its range.
    """
    if hidden_N_D.dim() != 2 or head_weight_V_D.dim() != 2 or hidden_N_D.shape[1] != head_weight_V_D.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and head_weight [V, D] with the same D, "
            f"got {list(hidden_N_D.shape)} and {list(head_weight_V_D.shape)}"
        )
    if hasattr(head_weight_V_D, "full_tensor"):
        raise ValueError(
            "head_weight must be a plain tensor, got a DTensor; gather it first: head_weight.full_tensor()"
        )
    vocab = head_weight_V_D.shape[0]
    if head_bias is not None and head_bias.shape != (vocab,):
        raise ValueError(f"head_bias must be [{vocab}], got {list(head_bias.shape)}")
    if tile_tokens < 1 or tile_vocab < 1:
        raise ValueError(f"tile_tokens and tile_vocab must be at least 1, got {tile_tokens} and {tile_vocab}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be > 0 or None, got {logit_softcap}")
    _check(targets_N, hidden_N_D.shape[:1], vocab, temperature)
    options = HeadOptions(temperature, logit_softcap, tile_tokens, tile_vocab, float32_logits)
    return fused_head(hidden_N_D, head_weight_V_D, head_bias, targets_N, options)


def logits_logprobs_and_entropy(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, tile_elements: int = 2**21
) -> tuple[Tensor, Tensor]:
    """The same from logits that already exist, for trainers that own the head.

    Rows are worked on in tiles, so the only tensor as large as the logits is their gradient.

    Args:
        logits: [..., V]; -inf excludes a vocabulary entry.
        targets: [...] sampled token ids.
        temperature: divides the logits; > 0.
        tile_elements: values per tile.

    Returns:
        logprobs and entropy, [...] each, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, or a number out of its range.
    """
    if logits.dim() < 1:
        raise ValueError("logits must be [..., V], got a scalar")
    vocab = logits.shape[-1]
    _check(targets, logits.shape[:-1], vocab, temperature)
    rows = max(1, tile_elements // max(1, vocab))
    logprobs_N, entropy_N = logit_statistics(logits.reshape(-1, vocab), targets.reshape(-1), temperature, rows)
    return logprobs_N.view(targets.shape), entropy_N.view(targets.shape)


def trajectory_weights(trajectory_ids_N: Tensor, turn_ids_N: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight of each token in the mean over trajectories of the mean over turns of the mean over tokens.

    w_i = 1 / (B * T_j * n_jt): B trajectories, T_j turns of trajectory j, n_jt tokens of its turn t; sums to 1
    (equation E2 of the EPO paper). Every trajectory counts alike, however long it is.

    Args:
        trajectory_ids_N: [N] any integers.
        turn_ids_N: [N] integers >= 0.
        dtype: of the result.

    Returns:
        weights_N; empty for no tokens.

    Raises:
        ValueError: shapes differ, or a negative turn id, which marks a token that is not trained.
    """
    _check_ids(trajectory_ids_N, turn_ids_N)
    if turn_ids_N.numel() == 0:
        return turn_ids_N.new_zeros(0, dtype=dtype)
    _, trajectory_N, _ = _unique(trajectory_ids_N)
    _, turn_N, _ = _unique(turn_ids_N)
    num_turns = int(turn_N.max()) + 1
    pairs_U, pair_N, tokens_U = _unique(trajectory_N * num_turns + turn_N)
    turns_B = torch.bincount(pairs_U // num_turns)
    return 1.0 / (len(turns_B) * turns_B[trajectory_N].to(dtype) * tokens_U[pair_N].to(dtype))


def trajectory_mean(values_N: Tensor, trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> Tensor:
    """Mean over trajectories of the mean over turns of the mean over tokens: L^H of equation E2 for entropies.

    Args:
        values_N: [N] floats; the gradient flows through.
        trajectory_ids_N: [N] any integers.
        turn_ids_N: [N] integers >= 0.

    Returns:
        Scalar; 0 for no tokens.
    """
    return (values_N * trajectory_weights(trajectory_ids_N, turn_ids_N, dtype=values_N.dtype)).sum()


class TurnMeans(NamedTuple):
    """Means by turn index over all tokens of the batch."""

    turn_ids_U: Tensor
    """[U] the turns that occur, ascending."""
    means_U: Tensor
    """[U] mean over the tokens of that turn, all trajectories together."""
    counts_U: Tensor
    """[U] number of those tokens."""


def turn_means(values_N: Tensor, turn_ids_N: Tensor) -> TurnMeans:
    """Token mean of `values_N` for each turn index. A turn that nobody reached does not occur; no gradient.

    Args:
        values_N: [N] floats.
        turn_ids_N: [N] integers >= 0.
    """
    _check_ids(turn_ids_N, turn_ids_N)
    turn_ids_U, turn_N, counts_U = _unique(turn_ids_N)
    sums_U = torch.zeros(len(turn_ids_U), dtype=torch.float64, device=values_N.device)
    sums_U.index_add_(0, turn_N, values_N.detach().to(torch.float64))
    return TurnMeans(turn_ids_U, sums_U / counts_U, counts_U)


def _unique(ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct ids ascending, the index of each token's id among them, and how often each occurs."""
    unique = cast("Callable[..., tuple[Tensor, Tensor, Tensor]]", torch.unique)  # pyright: ignore[reportUnknownMemberType]
    return unique(ids_N, return_inverse=True, return_counts=True)


def _check(targets: Tensor, shape: torch.Size, vocab: int, temperature: float) -> None:
    if targets.shape != shape:
        raise ValueError(f"targets must be {list(shape)} to match its inputs, got {list(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; a greedy policy has no entropy to train")
    if targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= vocab:
            wrong = low if low < 0 else high
            raise ValueError(f"targets must lie in [0, {vocab}), got {wrong}; select the trained tokens first")


def _check_ids(trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> None:
    if trajectory_ids_N.shape != turn_ids_N.shape or turn_ids_N.dim() != 1:
        raise ValueError(
            f"trajectory_ids and turn_ids must both be [N], "
            f"got {list(trajectory_ids_N.shape)} and {list(turn_ids_N.shape)}"
        )
    if turn_ids_N.numel() and int(turn_ids_N.min()) < 0:
        raise ValueError("turn_ids must be >= 0; -1 marks tokens that are not trained, select the trained tokens first")
