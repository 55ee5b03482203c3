"""Log-probability and entropy: `token_logprobs_and_entropy`, `logits_logprobs_and_entropy` against verl and TRL.

Legend for tensor suffixes: _N tokens, _V vocabulary, _D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils
from verl.utils import torch_functional as verl_F
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from epo.objectives import logits_logprobs_and_entropy, token_logprobs_and_entropy

N, V, D = 37, 53, 11
Pair = tuple[Tensor, Tensor]


def random(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def targets(seed: int) -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))


def gradients(outputs: Pair, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a loss that uses both outputs with a different weight for every token."""
    weights_N = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)
    loss = (weights_N * outputs[0]).sum() + (weights_N.flip(0) * outputs[1]).sum()
    return torch.autograd.grad(loss, inputs)


def verl_pair(logprobs: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Pair]:
    return lambda logits, index: (logprobs(logits, index), verl_F.entropy_from_logits(logits))


ON_LOGITS: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "verl.logprobs_from_logits": verl_pair(verl_F.logprobs_from_logits),
    "verl.logprobs_from_logits_v2": verl_pair(verl_F.logprobs_from_logits_v2),
    "verl.logprobs_from_logits_naive": verl_pair(verl_F.logprobs_from_logits_naive),
    "trl.selective_log_softmax": lambda logits, index: (
        trl_utils.selective_log_softmax(logits, index),
        trl_utils.entropy_from_logits(logits, chunk_size=8),
    ),
    "trl.selective_log_softmax_and_entropy": trl_utils.selective_log_softmax_and_entropy,
}


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("seed", range(3))
def test_functions_on_logits_agree(name: str, seed: int) -> None:
    """Values and gradients in float64 to 1e-12."""
    logits_N_V = random(N, V, seed=seed).requires_grad_()
    index_N = targets(seed)
    theirs = ON_LOGITS[name](logits_N_V, index_N)
    ours = logits_logprobs_and_entropy(logits_N_V, index_N, tile_elements=5 * V)
    assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    assert_close(gradients(theirs, logits_N_V), gradients(ours, logits_N_V), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7])
def test_the_temperature_divides_the_logits_in_trl_too(temperature: float) -> None:
    """Values and gradients in float64 to 1e-12."""
    logits_N_V = random(N, V, seed=5).requires_grad_()
    index_N = targets(5)
    theirs = trl_utils.selective_log_softmax_and_entropy(logits_N_V, index_N, temperature=temperature)
    ours = logits_logprobs_and_entropy(logits_N_V, index_N, temperature=temperature)
    assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    assert_close(gradients(theirs, logits_N_V), gradients(ours, logits_N_V), rtol=1e-12, atol=1e-12)


def test_the_chunked_entropy_of_verl_agrees_in_single_precision() -> None:
    """`entropy_from_logits_with_chunking` computes and returns float32 whatever it is given: 2e-6."""
    logits_N_V = random(N, V, seed=6).requires_grad_()
    theirs_N = verl_F.entropy_from_logits_with_chunking(logits_N_V, chunk_size=8)
    ours_N = logits_logprobs_and_entropy(logits_N_V, targets(6))[1]
    assert theirs_N.dtype == torch.float32 and ours_N.dtype == torch.float64
    assert_close(theirs_N.double(), ours_N, rtol=2e-6, atol=2e-6)
    (theirs_grad,) = torch.autograd.grad(theirs_N.sum(), logits_N_V)
    (ours_grad,) = torch.autograd.grad(ours_N.sum(), logits_N_V)
    assert_close(theirs_grad, ours_grad, rtol=2e-6, atol=2e-6)


def trl_head(hidden_N_D: Tensor, weight_V_D: Tensor, index_N: Tensor, temperature: float) -> Pair:
    found = ChunkedLogProbFunction.apply(
        hidden_N_D, weight_V_D, None, index_N, temperature, 16, None, 1.0, ("entropy",)
    )
    return found[0], found[1]


def verl_head(hidden_N_D: Tensor, weight_V_D: Tensor, index_N: Tensor, temperature: float) -> Pair:
    return FusedLinearForPPO(chunk_size=8)(hidden_N_D, weight_V_D, index_N, temperature)


@pytest.mark.parametrize("theirs", [trl_head, verl_head])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_fused_heads_agree(theirs: Callable[[Tensor, Tensor, Tensor, float], Pair], temperature: float) -> None:
    """TRL's `ChunkedLogProbFunction` and verl's `FusedLinearForPPO` accumulate in float32 whatever they are given:
    values and gradients to 1e-5 of the largest."""
    hidden_N_D = random(N, D, seed=7, scale=1.0).requires_grad_()
    weight_V_D = random(V, D, seed=8, scale=1.0).requires_grad_()
    index_N = targets(7)
    ours = token_logprobs_and_entropy(
        hidden_N_D, weight_V_D, index_N, temperature=temperature, tile_tokens=8, tile_vocab=16
    )
    ours_grads = gradients(ours, hidden_N_D, weight_V_D)
    single = [tensor.detach().float().requires_grad_() for tensor in (hidden_N_D, weight_V_D)]
    found = theirs(single[0], single[1], index_N, temperature)
    found_grads = gradients(found, *single)
    for their_tensor, our_tensor in zip((*found, *found_grads), (*ours, *ours_grads), strict=True):
        largest = float(our_tensor.detach().abs().max())
        assert_close(their_tensor.double() / largest, our_tensor / largest, rtol=0.0, atol=1e-5)


def test_the_bias_and_the_softcap_of_trl_agree() -> None:
    """z = cap(hidden @ weight^T + bias) / temperature in this order on both sides. TRL in float32: values and the
    gradients by all three inputs to 1e-5 of the largest."""
    inputs = [random(*shape, seed=11 + shape[0], scale=1.0).requires_grad_() for shape in ((N, D), (V, D), (V,))]
    hidden_N_D, weight_V_D, bias_V = inputs
    index_N = targets(11)
    ours = token_logprobs_and_entropy(
        hidden_N_D, weight_V_D, index_N, head_bias=bias_V, temperature=0.7, logit_softcap=2.5, tile_vocab=16
    )
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    options = (index_N, 0.7, 16, 2.5, 1.0, ("entropy",))
    theirs = ChunkedLogProbFunction.apply(*single, *options)[:2]
    pairs = zip((*theirs, *gradients(theirs, *single)), (*ours, *gradients(ours, *inputs)), strict=True)
    for their_tensor, our_tensor in pairs:
        largest = float(our_tensor.detach().abs().max())
        assert_close(their_tensor.double() / largest, our_tensor / largest, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", ["verl.logprobs_from_logits", "trl.selective_log_softmax"])
def test_an_excluded_entry_makes_their_entropy_nan(name: str) -> None:
    """A logit of -inf (a masked vocabulary entry) is 0 * -inf in their sum of p log p. Ours counts it as 0, which is
    the entropy over the entries that are left. The log-probabilities agree."""
    logits_N_V = random(N, V, seed=9)
    index_N = targets(9) % (V - 3)
    left_N_V = logits_N_V[:, :-3].contiguous()
    logits_N_V[:, -3:] = -torch.inf
    theirs = ON_LOGITS[name](logits_N_V, index_N)
    ours = logits_logprobs_and_entropy(logits_N_V, index_N)
    assert theirs[1].isnan().all()
    assert_close(ours[1], ON_LOGITS[name](left_N_V, index_N)[1], rtol=1e-12, atol=1e-12)
    assert_close(theirs[0], ours[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["verl.logprobs_from_logits", "trl.selective_log_softmax"])
def test_bfloat16_logits_give_them_bfloat16_results(name: str) -> None:
    """Theirs keep the type of the logits: an entropy with 8 significant bits. Ours is float32 from the same logits and
    at least 100 times nearer to float64."""
    logits_N_V = random(N, V, seed=10).bfloat16()
    index_N = targets(10)
    exact = logits_logprobs_and_entropy(logits_N_V.double(), index_N)
    theirs = ON_LOGITS[name](logits_N_V, index_N)
    ours = logits_logprobs_and_entropy(logits_N_V, index_N)
    for their_N, our_N, exact_N in zip(theirs, ours, exact, strict=True):
        assert their_N.dtype == torch.bfloat16 and our_N.dtype == torch.float32
        assert 100 * (our_N - exact_N).abs().max() < (their_N - exact_N).abs().max()
