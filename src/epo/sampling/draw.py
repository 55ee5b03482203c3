"""Draw tokens from logits, and score them, in few passes.

Every row is drawn with its own uniform number and summed by itself, so what is drawn does not depend on the other rows.

Legend: B rows, V vocabulary, K blocks of the vocabulary, W entries in a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from epo.errors import UserError
from epo.types import Alternatives

_BLOCK = 256
# exp(-1e4) is 0 in float32: excluded tokens (logit -inf) add nothing to any sum, and 0 * -inf never arises.
_LOWEST = -1e4


class Drawn(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    """At training temperature."""
    entropy: list[float]
    """Of the full distribution at training temperature, in nats."""
    alternatives: Alternatives | None
    """Of each row, if asked for."""


def draw_and_score(
    logits_B_V: Tensor,
    *,
    uniform: Sequence[float] | None,
    temperature: float,
    train_temperature: float,
    alternatives: int = 0,
) -> Drawn:
    """Draw a token a row from softmax(logits / temperature), by inversion of the cumulative distribution.

    Args:
        logits_B_V: float32; overwritten.
        uniform: a number in [0, 1) for each row; None takes the most probable token, whatever the temperature.
        temperature: of the draw.
        train_temperature: of the log-probabilities and entropies returned.
        alternatives: how many of the most probable tokens to return beside the drawn one.

    Raises:
        UserError: the logits are not finite.
    """
    is_other = uniform is not None and temperature != train_temperature
    # Before the logits are overwritten.
    other_B_V = _weights(_shifted(logits_B_V.clone(), temperature)) if is_other else None
    greedy_B = logits_B_V.argmax(-1) if uniform is None else None
    shifted_B_V = _shifted(logits_B_V, train_temperature)
    weights_B_V = _weights(shifted_B_V)
    sums_B_K = _block_sums(weights_B_V)
    total_B = sums_B_K.sum(-1)
    if not torch.isfinite(total_B).all():
        raise UserError(
            "the model's logits are not finite, so nothing can be drawn from them: go on from an earlier checkpoint or "
            "another model, with a lower optimizer.learning_rate"
        )
    log_total_B = total_B.log()
    if greedy_B is not None:
        tokens_B = greedy_B
    else:
        assert uniform is not None
        if other_B_V is None:
            tokens_B = _invert(weights_B_V, sums_B_K, uniform)
        else:
            tokens_B = _invert(other_B_V, _block_sums(other_B_V), uniform)
    logprobs_B = shifted_B_V.gather(1, tokens_B[:, None])[:, 0].double() - log_total_B
    found = None
    if alternatives:
        top = shifted_B_V.topk(min(alternatives, shifted_B_V.shape[1]))
        found = Alternatives(
            top.indices.cpu().numpy(), (top.values.double() - log_total_B[:, None]).float().cpu().numpy()
        )
    entropy_B = log_total_B - _block_sums(weights_B_V.mul_(shifted_B_V)).sum(-1) / total_B
    return Drawn(tokens_B.tolist(), logprobs_B.tolist(), entropy_B.tolist(), found)


def draw_tokens(logits_B_V: Tensor, uniform: Sequence[float]) -> Tensor:
    """[B] one token a row from softmax(logits): the smallest index whose cumulative probability exceeds `uniform`."""
    weights_B_V = _weights(_shifted(logits_B_V.clone(), 1.0))
    return _invert(weights_B_V, _block_sums(weights_B_V), uniform)


def _shifted(logits_B_V: Tensor, temperature: float) -> Tensor:
    """In place: (logits - their maximum) / temperature, which is log softmax up to a number for each row."""
    logits_B_V.sub_(logits_B_V.amax(-1, keepdim=True))
    if temperature != 1.0:
        logits_B_V.div_(temperature)
    return logits_B_V.clamp_(min=_LOWEST)


def _weights(shifted_B_V: Tensor) -> Tensor:
    return shifted_B_V.exp()


def _block_sums(values_B_V: Tensor) -> Tensor:
    """[B, K] in float64: sums over blocks, the last of which may be shorter."""
    whole = values_B_V.shape[1] // _BLOCK * _BLOCK
    sums_B_K = values_B_V[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1) if whole else values_B_V[:, :0]
    if whole < values_B_V.shape[1]:
        sums_B_K = torch.cat([sums_B_K, values_B_V[:, whole:].sum(-1, keepdim=True)], dim=1)
    return sums_B_K.double()


def _invert(weights_B_V: Tensor, sums_B_K: Tensor, uniform: Sequence[float]) -> Tensor:
    """First the block, then the token in it: the cumulative sum of one block instead of the whole vocabulary."""
    vocabulary = weights_B_V.shape[1]
    cumulative_B_K = sums_B_K.cumsum(-1)
    uniform_B_1 = torch.tensor(uniform, dtype=torch.float64, device=weights_B_V.device)[:, None]
    threshold_B_1 = uniform_B_1 * cumulative_B_K[:, -1:]
    block_B_1 = _first_above(cumulative_B_K, threshold_B_1)
    before_B_1 = cumulative_B_K.gather(1, block_B_1) - sums_B_K.gather(1, block_B_1)
    index_B_W = block_B_1 * _BLOCK + torch.arange(_BLOCK, device=weights_B_V.device)
    inside_B_W = weights_B_V.gather(1, index_B_W.clamp(max=vocabulary - 1)).double()
    inside_B_W.masked_fill_(index_B_W >= vocabulary, 0.0)
    place_B_1 = _first_above(inside_B_W.cumsum(-1), threshold_B_1 - before_B_1)
    return (block_B_1 * _BLOCK + place_B_1)[:, 0]


def _first_above(cumulative_B_K: Tensor, threshold_B_1: Tensor) -> Tensor:
    """[B, 1] the first entry above the threshold; where rounding leaves none, the last that has any weight."""
    first_B_1 = torch.searchsorted(cumulative_B_K, threshold_B_1, right=True)
    last_B_1 = (cumulative_B_K < cumulative_B_K[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(first_B_1, last_B_1)
