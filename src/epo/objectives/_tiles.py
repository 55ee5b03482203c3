"""Tiled softmax statistics with recomputation in backward: the machinery behind `entropy.py`.

Legend for tensor suffixes: _N trained tokens, _V vocabulary, _D hidden size. A tile is [tokens, vocabulary entries].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epo.objectives.products import product, uses_onednn

_Apply: TypeAlias = Callable[..., tuple[Tensor, Tensor]]

EXCLUDED = -1e30
"""Stands for a logit of -inf. Finite, so that 0 * log 0 = 0 holds for excluded entries."""


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def _slices(total: int, step: int) -> Iterator[slice]:
    """Ranges that cover `total`; one empty range for a total of 0."""
    for start in range(0, max(total, 1), step):
        yield slice(start, min(start + step, total))


class _Buffers:
    """Memory for the tiles of one call, reused: fresh pages for every tile would cost more than the arithmetic."""

    def __init__(self, elements: int, *, like: Tensor, dtype: torch.dtype) -> None:
        self._elements = elements
        self._options: dict[str, Any] = {"dtype": dtype, "device": like.device}
        self._flat: dict[int, Tensor] = {}

    def tile(self, index: int, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        if index not in self._flat:
            self._flat[index] = torch.empty(self._elements, **self._options)
        flat = self._flat[index] if dtype is None else self._flat[index].view(dtype)
        return flat[: rows * columns].view(rows, columns)


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
    """`scale` times the gradient of the loss with respect to tiles of logits, given the gradients of both outputs.

    dL/dz_j = g_logp ([j = target] - p_j) - g_H p_j (log p_j + H).
    """

    def __init__(
        self,
        grad_logprobs_N: Tensor | None,
        grad_entropy_N: Tensor | None,
        entropy_N: Tensor,
        lse_N: Tensor,
        *,
        scale: float,
    ) -> None:
        zeros_N = torch.zeros_like(lse_N)
        self.lse_N = lse_N
        self.grad_logprobs_N = zeros_N if grad_logprobs_N is None else grad_logprobs_N * scale
        self.slope_N = None if grad_entropy_N is None else grad_entropy_N * -scale
        entropy_part_N = zeros_N if self.slope_N is None else self.slope_N * (entropy_N - lse_N)
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


class HeadOptions(NamedTuple):
    """How hidden states become logits, and how the work is cut."""

    temperature: float
    softcap: float | None
    tile_tokens: int
    tile_vocab: int
    float32_logits: bool


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
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        num = hidden_N_D.shape[0]
        with torch.autocast(hidden_N_D.device.type, enabled=False):
            head = _Head(hidden_N_D, weight_V_D, bias_V, options)
            statistics = _RunningStatistics(num, like=hidden_N_D, dtype=head.dtype)
            for vocab in head.vocab_tiles():
                weight = weight_V_D[vocab].to(head.factor_dtype)
                for tokens in head.token_tiles():
                    logits = head.logits(tokens, vocab, weight)
                    statistics.absorb(tokens, logits, head.tile(1, tokens, vocab), targets_N[tokens] - vocab.start)
            logprobs_N, entropy_N, lse_N = statistics.results()
        ctx.save_for_backward(hidden_N_D, weight_V_D, bias_V, targets_N, entropy_N, lse_N)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Any, ...]:
        if grad_logprobs_N is None and grad_entropy_N is None:
            return (None,) * 5
        hidden_N_D, weight_V_D, bias_V, targets_N, entropy_N, lse_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden_N_D.device.type, enabled=False):
            head = _Head(hidden_N_D, weight_V_D, bias_V, ctx.options)
            low = _product_dtype(hidden_N_D, weight_V_D, head.dtype)
            low_hidden_N_D = hidden_N_D.to(low)
            grad_hidden = torch.empty_like(hidden_N_D, dtype=head.dtype) if needs_hidden else None
            grad_weight = torch.empty_like(weight_V_D) if needs_weight else None
            grad_bias = torch.zeros_like(bias_V) if needs_bias else None
            gradient = _LogitGradient(
                grad_logprobs_N, grad_entropy_N, entropy_N, lse_N, scale=1.0 / head.options.temperature
            )
            for vocab in head.vocab_tiles():
                weight = weight_V_D[vocab].to(head.factor_dtype)
                low_weight = weight_V_D[vocab].to(low)
                grad_tile = None if grad_weight is None else head.accumulator(grad_weight[vocab])
                grad_bias_tile = None if grad_bias is None else grad_bias[vocab].to(head.dtype)
                for tokens in head.token_tiles():
                    logits = head.logits(tokens, vocab, weight)
                    cap_slope = head.cap_slope(tokens, vocab, logits)
                    scratch = head.tile(1, tokens, vocab)
                    grad = gradient.of(tokens, logits, scratch, targets_N[tokens] - vocab.start)
                    if cap_slope is not None:
                        grad.mul_(cap_slope)
                    if grad_bias_tile is not None:
                        grad_bias_tile.add_(grad.sum(dim=0))
                    if low != head.dtype:
                        grad = head.tile(1, tokens, vocab, low).copy_(grad)
                    if grad_hidden is not None:
                        _accumulate(grad_hidden[tokens], grad, low_weight, is_first=vocab.start == 0)
                    if grad_tile is not None:
                        _accumulate(grad_tile, grad.T, low_hidden_N_D[tokens], is_first=tokens.start == 0)
                if grad_weight is not None and grad_tile is not None and grad_weight.dtype != head.dtype:
                    grad_weight[vocab] = grad_tile
                if grad_bias is not None and grad_bias_tile is not None and grad_bias.dtype != head.dtype:
                    grad_bias[vocab] = grad_bias_tile
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_N_D.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


class _Head:
    """Tiles of the logits cap((hidden @ weight^T + bias)) / temperature, in the compute dtype."""

    def __init__(self, hidden_N_D: Tensor, weight_V_D: Tensor, bias_V: Tensor | None, options: HeadOptions) -> None:
        self.options = options
        self.dtype = _compute_dtype(hidden_N_D, weight_V_D, bias_V)
        low = _product_dtype(hidden_N_D, weight_V_D, self.dtype)
        self.factor_dtype = self.dtype if options.float32_logits else low
        self.hidden_N_D = hidden_N_D.to(self.factor_dtype)
        self.num, self.vocab = hidden_N_D.shape[0], weight_V_D.shape[0]
        # What the product is multiplied with: the cap is an odd function of raw / cap, and the temperature comes last.
        self.alpha = 1.0 / (options.temperature if options.softcap is None else options.softcap)
        self.bias_V = None if bias_V is None else (bias_V.to(self.dtype) * self.alpha).clamp(min=EXCLUDED)
        self.excluded_V = None if bias_V is None else bias_V == -torch.inf
        self._buffers = _Buffers(
            min(self.num, options.tile_tokens) * min(self.vocab, options.tile_vocab),
            like=hidden_N_D,
            dtype=self.dtype,
        )

    def accumulator(self, part: Tensor) -> Tensor:
        """Uninitialised memory in the compute dtype for a part of a gradient: the part itself where that fits."""
        return part if part.dtype == self.dtype else torch.empty_like(part, dtype=self.dtype)

    def vocab_tiles(self) -> Iterator[slice]:
        return _slices(self.vocab, self.options.tile_vocab)

    def token_tiles(self) -> Iterator[slice]:
        return _slices(self.num, self.options.tile_tokens)

    def tile(self, index: int, tokens: slice, vocab: slice, dtype: torch.dtype | None = None) -> Tensor:
        return self._buffers.tile(index, tokens.stop - tokens.start, vocab.stop - vocab.start, dtype)

    def logits(self, tokens: slice, vocab: slice, weight: Tensor) -> Tensor:
        """One tile, in buffer 0 or, from oneDNN, in memory of its own. Buffer 1 is overwritten if the factors are of a
        lower precision."""
        if uses_onednn(self.hidden_N_D, weight):
            out = product(self.hidden_N_D[tokens], weight)
            if self.alpha != 1.0:
                out.mul_(self.alpha)
        elif self.factor_dtype == self.dtype:
            out = self.tile(0, tokens, vocab)
            torch.addmm(out, self.hidden_N_D[tokens], weight.T, beta=0.0, alpha=self.alpha, out=out)
        else:
            low = torch.mm(self.hidden_N_D[tokens], weight.T, out=self.tile(1, tokens, vocab, self.factor_dtype))
            out = self.tile(0, tokens, vocab)
            out.copy_(low).mul_(self.alpha)
        if self.bias_V is not None:
            out.add_(self.bias_V[vocab])
        if self.options.softcap is not None:
            out.tanh_().mul_(self.options.softcap / self.options.temperature)
            if self.excluded_V is not None:
                out.masked_fill_(self.excluded_V[vocab], EXCLUDED)
        return out

    def cap_slope(self, tokens: slice, vocab: slice, logits: Tensor) -> Tensor | None:
        """Derivative of the cap, 1 - tanh^2, of a tile of logits, in buffer 2; None without a cap."""
        if self.options.softcap is None:
            return None
        out = self.tile(2, tokens, vocab)
        torch.mul(logits, self.options.temperature / self.options.softcap, out=out)
        if self.excluded_V is not None:
            out.clamp_(min=-1.0)
        return out.square_().neg_().add_(1.0)


def _product_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the factors of the two gradient products.

    bfloat16 where the gradients are returned in it anyway: rounding dL/dz as well is what autograd of a bfloat16
    product does, and twice as fast as float32 factors or better. float16 would lose small probabilities.
    """
    return torch.bfloat16 if hidden.dtype == weight.dtype == torch.bfloat16 else dtype


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """total += left @ right, or = for the first product, whose total is not initialised."""
    if left.dtype != total.dtype or uses_onednn(left, right):
        part = product(left, right.T)
        _ = total.copy_(part) if is_first else total.add_(part)
    elif is_first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


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
        for tokens in _slices(num, tile_rows):
            rows = tokens.stop - tokens.start
            logits = _scaled(logits_N_V[tokens], temperature, out=buffers.tile(0, rows, vocab))
            statistics.absorb(tokens, logits, buffers.tile(1, rows, vocab), targets_N[tokens])
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
        gradient = _LogitGradient(grad_logprobs_N, grad_entropy_N, entropy_N, lse_N, scale=1.0 / temperature)
        buffers = _Buffers(min(num, tile_rows) * vocab, like=logits_N_V, dtype=dtype)
        grad_N_V = torch.empty_like(logits_N_V)
        for tokens in _slices(num, tile_rows):
            rows = tokens.stop - tokens.start
            logits = _scaled(logits_N_V[tokens], temperature, out=buffers.tile(0, rows, vocab))
            grad = gradient.of(tokens, logits, buffers.tile(1, rows, vocab), targets_N[tokens])
            grad_N_V[tokens] = grad
        return grad_N_V, None, None, None


def _scaled(logits: Tensor, temperature: float, *, out: Tensor) -> Tensor:
    return out.copy_(logits).div_(temperature).clamp_(min=EXCLUDED)


# The stubs of torch leave `apply` untyped.
fused_head = cast(_Apply, FusedHead.apply)  # pyright: ignore[reportUnknownMemberType]
logit_statistics = cast(_Apply, LogitStatistics.apply)  # pyright: ignore[reportUnknownMemberType]
