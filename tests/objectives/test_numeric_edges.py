"""Where floating point ends: probability one, huge logits, cold and hot sampling, excluded entries; against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epo.objectives import logits_logprobs_and_entropy, smoothing_penalty, token_logprobs_and_entropy

TEMPERATURES = (0.1, 0.4, 1.0, 2.0)
VOCAB = 7


def by_definition(logits_N_V: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> list[torch.Tensor]:
    """Log-probabilities, entropies, and the gradient of their weighted sum, in float64."""
    z_N_V = (logits_N_V.detach().double() / temperature).requires_grad_()
    logp_N_V = z_N_V.log_softmax(-1)
    # Excluded entries have no part in it.
    terms_N_V = torch.where(logp_N_V > -700, logp_N_V.exp() * logp_N_V.clamp(min=-700), 0.0)
    logprobs_N = logp_N_V.gather(1, targets_N[:, None])[:, 0]
    entropy_N = -terms_N_V.sum(-1)
    probs_N_V = logp_N_V.detach().exp()
    chosen_N_V = torch.nn.functional.one_hot(targets_N, logits_N_V.shape[1])
    finite_N_V = logp_N_V.detach().clamp(min=-700)
    slope_N_V = -probs_N_V * (finite_N_V + entropy_N.detach()[:, None])
    gradient_N_V = (2 * (chosen_N_V - probs_N_V) + 3 * slope_N_V) / temperature
    return [logprobs_N.detach(), entropy_N.detach(), gradient_N_V]


def both_functions(logits_N_V: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> list[list[torch.Tensor]]:
    """The same from logits, and from a head whose weight they are (hidden states are the rows of an identity)."""
    found = []
    logits = logits_N_V.detach().clone().requires_grad_()
    logprobs_N, entropy_N = logits_logprobs_and_entropy(logits, targets_N, temperature=temperature)
    (2 * logprobs_N + 3 * entropy_N).sum().backward()
    found.append([logprobs_N.detach(), entropy_N.detach(), logits.grad])
    if bool(torch.isfinite(logits_N_V).all()):
        weight_V_D = logits_N_V.detach().T.clone().requires_grad_()
        hidden_N_D = torch.eye(len(targets_N), dtype=logits_N_V.dtype)
        logprobs_N, entropy_N = token_logprobs_and_entropy(
            hidden_N_D, weight_V_D, targets_N, temperature=temperature, tile_vocab=3
        )
        (2 * logprobs_N + 3 * entropy_N).sum().backward()
        found.append([logprobs_N.detach(), entropy_N.detach(), weight_V_D.grad.T])
    return found


def assert_as_defined(logits_N_V: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> None:
    expected = by_definition(logits_N_V, targets_N, temperature)
    # A logit is known to one part in 2^24 of the largest in its row (2^8 in gradients of bfloat16 tensors).
    largest = float(logits_N_V.double()[logits_N_V.isfinite()].abs().max()) / temperature
    tolerance = 1e-5 + 2e-7 * largest
    rounding = 1e-2 if logits_N_V.dtype == torch.bfloat16 else 1e-4
    for logprobs_N, entropy_N, gradient_N_V in both_functions(logits_N_V, targets_N, temperature):
        for values, wanted in ((logprobs_N, expected[0]), (entropy_N, expected[1])):
            assert values.dtype == torch.float32 and bool(torch.isfinite(values).all())
            torch.testing.assert_close(values.double(), wanted, atol=tolerance, rtol=1e-5)
        assert bool((entropy_N >= 0).all()) and bool((entropy_N <= math.log(VOCAB) + 1e-5).all())
        assert gradient_N_V.dtype == logits_N_V.dtype and bool(torch.isfinite(gradient_N_V).all())
        torch.testing.assert_close(
            gradient_N_V.double(), expected[2], atol=(rounding + tolerance * 10) / temperature, rtol=rounding
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 88.0, 1e3, 1e4])
def test_values_and_gradients_are_finite_and_those_of_float64(
    dtype: torch.dtype, temperature: float, scale: float
) -> None:
    """A scale of 88 is where exp overflows float32; from 1e3 on one entry has all the mass."""
    generator = torch.Generator().manual_seed(0)
    logits_N_V = (scale * torch.randn(16, VOCAB, generator=generator)).to(dtype)
    for targets_N in (torch.arange(16) % VOCAB, logits_N_V.argmax(-1), logits_N_V.argmin(-1)):
        assert_as_defined(logits_N_V, targets_N, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_all_mass_on_one_token_and_masked_entries(dtype: torch.dtype, temperature: float) -> None:
    rows = [
        [0.0, -20.0, -20.0, -20.0, -20.0, -20.0, -20.0],
        [3e4, 0.0, 0.0, 0.0, 0.0, 0.0, -3e4],
        [0.0, -math.inf, -math.inf, -math.inf, -math.inf, -math.inf, -math.inf],
        [1.0, 2.0, -math.inf, 0.5, -math.inf, -1.0, -math.inf],
        [1e4, 1e4, -math.inf, -1e4, -math.inf, 0.0, -math.inf],
    ]
    logits_N_V = torch.tensor(rows, dtype=dtype)
    targets_N = torch.zeros(len(rows), dtype=torch.long)
    (found, *_) = both_functions(logits_N_V, targets_N, temperature)
    expected = by_definition(logits_N_V, targets_N, temperature)
    for values, wanted in zip(found, expected, strict=True):
        assert bool(torch.isfinite(values).all())
        torch.testing.assert_close(
            values.double(), wanted, atol=1e-2 if dtype == torch.bfloat16 and values.dim() == 2 else 1e-5, rtol=1e-2
        )
    assert found[0][2] == 0 and found[1][2] == 0  # one entry is left: probability one, no entropy
    assert bool((found[2][logits_N_V.isinf()] == 0).all())  # what is excluded is not learnt from


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.lists(st.floats(-1e5, 1e5, width=32), min_size=VOCAB, max_size=VOCAB), min_size=1, max_size=4),
    target=st.integers(0, VOCAB - 1),
    temperature=st.sampled_from(TEMPERATURES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_logits(rows: list[list[float]], target: int, temperature: float, dtype: torch.dtype) -> None:
    logits_N_V = torch.tensor(rows).to(dtype)
    for logprobs_N, entropy_N, gradient_N_V in both_functions(
        logits_N_V, torch.full((len(rows),), target), temperature
    ):
        assert all(bool(torch.isfinite(x).all()) for x in (logprobs_N, entropy_N, gradient_N_V))
        assert bool((logprobs_N <= 0).all()) and bool((entropy_N >= 0).all())


@pytest.mark.parametrize("kind", ["relu", "squared", "indicator"])
@pytest.mark.parametrize("reference", [0.0, 1e-30, 1e-3, 1.0, math.log(150_000)])
def test_the_corridor_is_finite_at_its_ends(kind: str, reference: float) -> None:
    """Through the entropy to the logits of a certain token, of a uniform one, and of one on either edge."""
    logits_N_V = torch.tensor([[1e4, 0, 0, 0], [0.0, 0, 0, 0], [20.0, 0, 0, 0], [1.0, 0, -math.inf, -math.inf]])
    logits_N_V.requires_grad_()
    _, entropy_N = logits_logprobs_and_entropy(logits_N_V, torch.zeros(4, dtype=torch.long))
    for low, high in ((0.0, 2.0), (0.9, 1.1), (0.0, 1e-9)):
        penalty_N = smoothing_penalty(entropy_N, reference, kappa_low=low, kappa_high=high, kind=kind)
        assert bool(torch.isfinite(penalty_N).all()) and bool((penalty_N >= 0).all())
        bounds = low * reference, high * reference
        for penalty, entropy in zip(penalty_N.tolist(), entropy_N.tolist(), strict=True):
            outside = max(bounds[0] - entropy, entropy - bounds[1], 0.0)
            wanted = {"relu": outside, "squared": outside**2, "indicator": float(outside > 0)}[kind]
            assert penalty == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        if penalty_N.requires_grad:
            (gradient_N_V,) = torch.autograd.grad(penalty_N.sum(), logits_N_V, retain_graph=True)
            assert bool(torch.isfinite(gradient_N_V).all())
