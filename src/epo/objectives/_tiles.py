"""Tiled softmax statistics with recomputation in backward: the machinery behind `entropy.py`.

Legend for tensor suffixes: _N trained tokens, _V vocabulary, _D hidden size. A tile is [tokens, vocabulary entries].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_Apply: TypeAlias = Callable[..., tuple[Tensor, Tensor]]

EXCLUDED = -1e30
"""Stands for a logit of -inf. Finite, so that 0 * log 0 = 0 holds for excluded entries."""


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def _ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, step):
        yield start, min(start + step, total)


class _Buffers:
    """Memory for two tiles, reused: fresh pages for every tile would cost more than the arithmetic on them."""

    def __init__(self, elements: int, *, like: Tensor, dtype: torch.dtype) -> None:
        self._flat = torch.empty(2, elements, dtype=dtype, device=like.device)

    def tile(self, index: int, rows: int, columns: int) -> Tensor:
        return self._flat[index, : rows * columns].view(rows, columns)


class _RunningStatistics:
    """Softmax statistics of N rows whose logits arrive tile by tile along the vocabulary.

    Everything is kept relative to the running maximum m, so that large logits do not cancel in the entropy:
    sum_N = sum exp(z - m), dot_N = sum exp(z - m) (z - m).
    """

    def __init__(self, num: int, *, like: Tensor, dtype: torch.dtype) -> None:
        def filled(value: float) -> Tensor:
            return torch.full((num,), value, dtype=dtype, device=like.device)

        self.max_N = filled(torch.finfo(dtype).min)
        self.sum_N = filled(0.0)
        self.dot_N = filled(0.0)
        self.target_N = filled(0.0)

    def absorb(self, tokens: slice, logits: Tensor, scratch: Tensor, local_targets: Tensor) -> None:
        """Take in one tile. Overwrites `logits` and `scratch`; targets outside the tile are ignored."""
        width = logits.shape[1]
        is_here = (local_targets >= 0) & (local_targets < width)
        picked = logits.gather(1, local_targets.clamp(0, width - 1)[:, None])[:, 0]
        self.target_N[tokens] = torch.where(is_here, picked, self.target_N[tokens])

        old_max, old_sum = self.max_N[tokens], self.sum_N[tokens]
        new_max = torch.maximum(old_max, logits.amax(dim=1))
        shift = old_max - new_max
        decay = shift.exp()
        logits.sub_(new_max[:, None])
        torch.exp(logits, out=scratch)
        tile_sum = scratch.sum(dim=1)
        self.dot_N[tokens] = decay * (self.dot_N[tokens] + old_sum * shift) + scratch.mul_(logits).sum(dim=1)
        self.sum_N[tokens] = decay * old_sum + tile_sum
        self.max_N[tokens] = new_max

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """logprobs_N, entropy_N, logsumexp_N."""
        log_sum_N = self.sum_N.log()
        # Rounding can leave a deterministic token a hair below zero, which a corridor with floor 0 would count.
        entropy_N = (log_sum_N - self.dot_N / self.sum_N).clamp_(min=0.0)
        return self.target_N - self.max_N - log_sum_N, entropy_N, self.max_N + log_sum_N


class _LogitGradient:
    """Gradient of the loss with respect to tiles of logits, given the gradients of both outputs.

    dL/dz_j = g_logp ([j = target] - p_j) - g_H p_j (log p_j + H).
    """

    def __init__(
        self, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None, entropy_N: Tensor, lse_N: Tensor
    ) -> None:
        zeros_N = torch.zeros_like(lse_N)
        self.lse_N = lse_N
        self.grad_logprobs_N = zeros_N if grad_logprobs_N is None else grad_logprobs_N
        self.slope_N = None if grad_entropy_N is None else -grad_entropy_N
        entropy_part_N = zeros_N if grad_entropy_N is None else grad_entropy_N * (lse_N - entropy_N)
        self.offset_N = entropy_part_N - self.grad_logprobs_N

    def of(self, tokens: slice, logits: Tensor, scratch: Tensor, local_targets: Tensor) -> Tensor:
        """Overwrite one tile of logits with its gradient; `scratch` is a tile to compute in."""
        width = logits.shape[1]
        torch.sub(logits, self.lse_N[tokens, None], out=scratch)
        scratch.exp_()
        offset = self.offset_N[tokens, None]
        if self.slope_N is None:
            torch.mul(scratch, offset, out=logits)
        else:
            logits.mul_(self.slope_N[tokens, None]).add_(offset).mul_(scratch)
        is_here = (local_targets >= 0) & (local_targets < width)
        hit = torch.where(is_here, self.grad_logprobs_N[tokens], 0.0)
        return logits.scatter_add_(1, local_targets.clamp(0, width - 1)[:, None], hit[:, None])


class FusedHead(torch.autograd.Function):
    """Head product, log-probabilities and entropy in tiles. Vocabulary outside, tokens inside, so that a tile of the
    weight is converted once and its gradient is finished in one go."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_N_D: Tensor,
        weight_V_D: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        tile_tokens: int,
        tile_vocab: int,
    ) -> tuple[Tensor, Tensor]:
        num, vocab = hidden_N_D.shape[0], weight_V_D.shape[0]
        dtype = _compute_dtype(hidden_N_D, weight_V_D, bias_V)
        with torch.autocast(hidden_N_D.device.type, enabled=False):
            statistics = _RunningStatistics(num, like=hidden_N_D, dtype=dtype)
            head = _Head(hidden_N_D, weight_V_D, bias_V, temperature, dtype)
            buffers = _Buffers(min(num, tile_tokens) * tile_vocab, like=hidden_N_D, dtype=dtype)
            for v0, v1 in _ranges(vocab, tile_vocab):
                weight, bias = head.tile(v0, v1)
                for n0, n1 in _ranges(num, tile_tokens):
                    tokens = slice(n0, n1)
                    logits = head.logits(tokens, weight, bias, out=buffers.tile(0, n1 - n0, v1 - v0))
                    statistics.absorb(tokens, logits, buffers.tile(1, n1 - n0, v1 - v0), targets_N[tokens] - v0)
            logprobs_N, entropy_N, lse_N = statistics.results()
        ctx.save_for_backward(hidden_N_D, weight_V_D, bias_V, targets_N, entropy_N, lse_N)
        ctx.set_materialize_grads(False)
        ctx.options = (temperature, tile_tokens, tile_vocab, dtype)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Any, ...]:
        if grad_logprobs_N is None and grad_entropy_N is None:
            return (None,) * 7
        hidden_N_D, weight_V_D, bias_V, targets_N, entropy_N, lse_N = ctx.saved_tensors
        temperature, tile_tokens, tile_vocab, dtype = ctx.options
        num, vocab = hidden_N_D.shape[0], weight_V_D.shape[0]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden_N_D, dtype=dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_V_D) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V) if needs_bias else None
        with torch.autocast(hidden_N_D.device.type, enabled=False):
            gradient = _LogitGradient(grad_logprobs_N, grad_entropy_N, entropy_N, lse_N)
            head = _Head(hidden_N_D, weight_V_D, bias_V, temperature, dtype)
            buffers = _Buffers(min(num, tile_tokens) * tile_vocab, like=hidden_N_D, dtype=dtype)
            for v0, v1 in _ranges(vocab, tile_vocab):
                weight, bias = head.tile(v0, v1)
                grad_tile = None if grad_weight is None else grad_weight[v0:v1].to(dtype)
                grad_bias_tile = None if grad_bias is None else grad_bias[v0:v1].to(dtype)
                for n0, n1 in _ranges(num, tile_tokens):
                    tokens = slice(n0, n1)
                    logits = head.logits(tokens, weight, bias, out=buffers.tile(0, n1 - n0, v1 - v0))
                    grad = gradient.of(tokens, logits, buffers.tile(1, n1 - n0, v1 - v0), targets_N[tokens] - v0)
                    if grad_hidden is not None:
                        grad_hidden[tokens].addmm_(grad, weight, alpha=1.0 / temperature)
                    if grad_tile is not None:
                        grad_tile.addmm_(grad.T, head.hidden_N_D[tokens])
                    if grad_bias_tile is not None:
                        grad_bias_tile.add_(grad.sum(dim=0), alpha=1.0 / temperature)
                if grad_weight is not None and grad_tile is not None and grad_weight.dtype != dtype:
                    grad_weight[v0:v1] = grad_tile
                if grad_bias is not None and grad_bias_tile is not None and grad_bias.dtype != dtype:
                    grad_bias[v0:v1] = grad_bias_tile
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_N_D.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


class _Head:
    """The scaled head (hidden @ weight^T + bias) / temperature, one tile at a time, in the compute dtype."""

    def __init__(
        self, hidden_N_D: Tensor, weight_V_D: Tensor, bias_V: Tensor | None, temperature: float, dtype: torch.dtype
    ) -> None:
        self.hidden_N_D = hidden_N_D.to(dtype)
        if temperature != 1.0:
            self.hidden_N_D = self.hidden_N_D / temperature
        self.weight_V_D = weight_V_D
        self.bias_V = None if bias_V is None else (bias_V.to(dtype) / temperature).clamp(min=EXCLUDED)
        self.dtype = dtype

    def tile(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self.weight_V_D[start:stop].to(self.dtype), None if self.bias_V is None else self.bias_V[start:stop]

    def logits(self, tokens: slice, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
        torch.mm(self.hidden_N_D[tokens], weight.T, out=out)
        return out if bias is None else out.add_(bias)


class LogitStatistics(torch.autograd.Function):
    """Log-probabilities and entropy of existing logits, in tiles of whole rows."""

    @staticmethod
    def forward(
        ctx: Any, logits_N_V: Tensor, targets_N: Tensor, temperature: float, tile_rows: int
    ) -> tuple[Tensor, Tensor]:
        num, vocab = logits_N_V.shape
        dtype = _compute_dtype(logits_N_V)
        statistics = _RunningStatistics(num, like=logits_N_V, dtype=dtype)
        buffers = _Buffers(min(num, tile_rows) * vocab, like=logits_N_V, dtype=dtype)
        for n0, n1 in _ranges(num, tile_rows):
            tokens = slice(n0, n1)
            logits = _scaled(logits_N_V[tokens], temperature, out=buffers.tile(0, n1 - n0, vocab))
            statistics.absorb(tokens, logits, buffers.tile(1, n1 - n0, vocab), targets_N[tokens])
        logprobs_N, entropy_N, lse_N = statistics.results()
        ctx.save_for_backward(logits_N_V, targets_N, entropy_N, lse_N)
        ctx.set_materialize_grads(False)
        ctx.options = (temperature, tile_rows, dtype)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Any, ...]:
        if grad_logprobs_N is None and grad_entropy_N is None:
            return (None,) * 4
        logits_N_V, targets_N, entropy_N, lse_N = ctx.saved_tensors
        temperature, tile_rows, dtype = ctx.options
        num, vocab = logits_N_V.shape
        gradient = _LogitGradient(grad_logprobs_N, grad_entropy_N, entropy_N, lse_N)
        buffers = _Buffers(min(num, tile_rows) * vocab, like=logits_N_V, dtype=dtype)
        grad_N_V = torch.empty_like(logits_N_V)
        for n0, n1 in _ranges(num, tile_rows):
            tokens = slice(n0, n1)
            logits = _scaled(logits_N_V[tokens], temperature, out=buffers.tile(0, n1 - n0, vocab))
            grad = gradient.of(tokens, logits, buffers.tile(1, n1 - n0, vocab), targets_N[tokens])
            grad_N_V[tokens] = grad.div_(temperature)
        return grad_N_V, None, None, None


def _scaled(logits: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    return out.copy_(logits).div_(temperature).clamp_(min=EXCLUDED)


# The stubs of torch leave `apply` untyped.
fused_head = cast(_Apply, FusedHead.apply)  # pyright: ignore[reportUnknownMemberType]
logit_statistics = cast(_Apply, LogitStatistics.apply)  # pyright: ignore[reportUnknownMemberType]
