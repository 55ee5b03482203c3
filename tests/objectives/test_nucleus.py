"""Entropy of the nucleus: its definition, and what tiles, dtypes and the order of the vocabulary must not change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from epo.objectives import token_logprobs_and_entropy
from epo.objectives.nucleus import logits_nucleus_entropy, nucleus_entropy


class LargestTensor(TorchDispatchMode):
    """The greatest number of elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_tokens_times_vocabulary_never_exists_neither_forward_nor_backward() -> None:
    num, vocab, dim, tile = 96, 128, 4, 8
    hidden = torch.randn(num, dim, requires_grad=True)
    weight = torch.randn(vocab, dim, requires_grad=True)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept = max(kept, tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            entropy = nucleus_entropy(hidden, weight, top_p=0.8, tile_tokens=tile)
        entropy.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert largest.elements == tile * vocab
    # Between the passes nothing of a tile's size is alive: the weight is the largest that is kept.
    assert kept <= vocab * dim


def test_the_meter_of_that_test_sees_what_it_must() -> None:
    with LargestTensor() as largest:
        nucleus_entropy(torch.randn(96, 4), torch.randn(128, 4), top_p=0.8, tile_tokens=96)
    assert largest.elements == 96 * 128


@settings(max_examples=40, deadline=None)
@given(vocab=st.integers(1, 12), top_p=st.floats(0.05, 0.95), temperature=st.floats(0.3, 3), seed=st.integers(0, 999))
def test_gradient_is_minus_q_times_log_q_plus_entropy_inside_and_nothing_outside(
    vocab: int, top_p: float, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator, dtype=torch.float64, requires_grad=True)
    entropy = logits_nucleus_entropy(logits / temperature, top_p=top_p)
    (slopes,) = torch.autograd.grad(entropy, logits)
    masses = [math.exp(z / temperature) for z in logits.tolist()]
    inside: list[int] = []
    for token in sorted(range(vocab), key=lambda token: -masses[token]):
        inside.append(token)
        if sum(masses[i] for i in inside) >= top_p * sum(masses):
            break
    total = sum(masses[i] for i in inside)
    q = {i: masses[i] / total for i in inside}
    by_hand = -sum(p * math.log(p) for p in q.values())
    assert entropy.item() == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    expected = [-q[i] * (math.log(q[i]) + by_hand) / temperature if i in q else 0.0 for i in range(vocab)]
    assert slopes.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(top_p=st.floats(0.05, 1.0), seed=st.integers(0, 999))
def test_names_and_order_of_tokens_do_not_matter_also_where_they_tie(top_p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (4, 10), generator=generator).double()
    order = torch.randperm(10, generator=generator)
    expected = logits_nucleus_entropy(logits, top_p=top_p)
    torch.testing.assert_close(logits_nucleus_entropy(logits[:, order], top_p=top_p), expected, rtol=1e-12, atol=1e-12)
    # Rows are apart from each other, whatever their arrangement.
    cube = logits_nucleus_entropy(logits.view(2, 2, 10), top_p=top_p)
    assert torch.equal(cube, expected.view(2, 2))


def test_uniform_logits_have_the_logarithm_of_the_nucleus() -> None:
    """Ten alike: 0.75 of the mass needs eight."""
    found = logits_nucleus_entropy(torch.zeros(10, dtype=torch.float64), top_p=0.75)
    assert found.item() == pytest.approx(math.log(8))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), tops=st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)))
def test_entropy_is_at_most_that_of_its_size_and_never_negative(seed: int, tops: tuple[float, float]) -> None:
    logits = 3 * torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))
    low, high = (logits_nucleus_entropy(logits, top_p=top_p) for top_p in sorted(tops))
    assert (low >= 0).all()
    # A larger nucleus adds less likely tokens only: its entropy is not smaller.
    assert (high >= low - 1e-6).all()
    assert (high <= math.log(20) + 1e-6).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_are_computed_in_float32_also_under_autocast(autocast: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(16, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 8, generator=generator).bfloat16().requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = nucleus_entropy(exact_hidden, weight.detach().double(), top_p=0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = nucleus_entropy(hidden, weight, top_p=0.9, tile_tokens=5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
    (weight_slope,) = torch.autograd.grad(found.sum(), weight)
    (expected,) = torch.autograd.grad(exact.sum(), exact_hidden)
    assert slope.dtype == weight_slope.dtype == torch.bfloat16
    torch.testing.assert_close(slope.double(), expected, rtol=1e-2, atol=1e-2)


def test_without_gradient_the_values_are_the_same_bit_for_bit() -> None:
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    with torch.no_grad():
        plain = nucleus_entropy(hidden, weight, top_p=0.8, tile_tokens=4)
    assert not plain.requires_grad
    assert torch.equal(plain, nucleus_entropy(hidden, weight, top_p=0.8, tile_tokens=4).detach())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_N_D": torch.zeros(2, 4)}, r"got \[2, 4\] and \[5, 3\]"),
        ({"head_bias": torch.zeros(4)}, r"head_bias must be \[5\], got \[4\]"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"tile_tokens": 0}, "tile_tokens must be at least 1, got 0"),
        ({"top_p": math.nan}, r"top_p must lie in \(0, 1\], got nan"),
    ],
)
def test_bad_values_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"hidden_N_D": torch.zeros(2, 3), "head_weight_V_D": torch.zeros(5, 3), "top_p": 0.8}
    with pytest.raises(ValueError, match=message):
        nucleus_entropy(**{**options, **changed})
    with pytest.raises(ValueError, match=r"V >= 1, got \[2, 0\]"):
        logits_nucleus_entropy(torch.zeros(2, 0), top_p=0.5)


def test_the_whole_mass_leaves_no_token_out_however_unlikely() -> None:
    logits = torch.linspace(0, -25, 4000).requires_grad_()
    (slopes,) = torch.autograd.grad(logits_nucleus_entropy(logits, top_p=1.0), logits)
    assert (slopes != 0).all()


def brute_nucleus(logits: list[float], top_p: float) -> float:
    """Sort, keep until the mass is reached, renormalise, -sum p log p."""
    highest = max(logits)
    masses = sorted((math.exp(z - highest) for z in logits), reverse=True)
    total = sum(masses)
    kept: list[float] = []
    for mass in masses:
        kept.append(mass)
        if sum(kept) / total >= top_p:
            break
    return -sum(m / sum(kept) * math.log(m / sum(kept)) for m in kept if m > 0)


def is_on_an_edge(logits: list[float], top_p: float) -> bool:
    """Rounding decides whether one more token belongs to the nucleus."""
    masses = sorted(torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist(), reverse=True)
    return any(abs(mass - top_p) < 1e-9 for mass in np.cumsum(masses))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-6, 6), min_size=7, max_size=7), min_size=1, max_size=4),
    top_p=st.floats(0.01, 0.999),
)
def test_nucleus_entropy_is_the_definition(rows: list[list[float]], top_p: float) -> None:
    assume(not any(is_on_an_edge(row, top_p) for row in rows))
    found = logits_nucleus_entropy(torch.tensor(rows, dtype=torch.float64), top_p=top_p)
    assert found.tolist() == pytest.approx([brute_nucleus(row, top_p) for row in rows], rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    num=st.integers(0, 6),
    tile=st.integers(1, 8),
    temperature=st.floats(0.4, 2),
    has_bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_tiling_gives_the_same_values_and_gradients(
    num: int, tile: int, temperature: float, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias, upstream = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((num, 3), (11, 3), (11,), (num,))
    )

    def run(fused: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [x.clone().requires_grad_() for x in ((hidden, weight, bias) if has_bias else (hidden, weight))]
        head_bias = leaves[2] if has_bias else None
        if fused:
            options: dict[str, Any] = {"temperature": temperature, "tile_tokens": tile}
            found = nucleus_entropy(leaves[0], leaves[1], top_p=0.7, head_bias=head_bias, **options)
        else:
            logits = torch.nn.functional.linear(leaves[0], leaves[1], head_bias) / temperature
            found = logits_nucleus_entropy(logits, top_p=0.7)
        if num == 0:
            return found, ()
        return found.detach(), torch.autograd.grad((found * upstream).sum(), leaves)

    (tiled, gradients), (whole, expected) = run(True), run(False)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradient_agrees_with_finite_differences() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.3, -0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: logits_nucleus_entropy(z, top_p=0.8), [logits])


def test_the_whole_mass_is_the_whole_entropy_and_one_likely_token_has_none() -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(9, 3)
    _, full = token_logprobs_and_entropy(hidden, weight, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(nucleus_entropy(hidden, weight, top_p=1.0), full, rtol=1e-5, atol=1e-5)
    sharp = torch.tensor([[9.0, 0.0, -torch.inf]])
    assert logits_nucleus_entropy(sharp, top_p=0.5).item() == 0.0
    bias = torch.tensor([0.0] * 8 + [-torch.inf])
    _, without_last = token_logprobs_and_entropy(hidden, weight[:8], torch.zeros(4, dtype=torch.long))
    found = nucleus_entropy(hidden, weight, top_p=1.0, head_bias=bias)
    torch.testing.assert_close(found, without_last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.0, 1.1])
def test_a_nucleus_needs_a_mass(top_p: float) -> None:
    with pytest.raises(ValueError, match="top_p"):
        logits_nucleus_entropy(torch.zeros(1, 2), top_p=top_p)
    with pytest.raises(ValueError, match="top_p"):
        nucleus_entropy(torch.zeros(1, 2), torch.zeros(3, 2), top_p=top_p)


@pytest.mark.parametrize("softcap", [0.7, 30.0])
def test_capped_logits(softcap: float) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, generator=generator, dtype=torch.float64)
    bias[3] = -torch.inf
    options = {"top_p": 0.8, "temperature": 1.3}
    found = nucleus_entropy(hidden, weight, head_bias=bias, logit_softcap=softcap, tile_tokens=4, **options)
    with_entry = [v for v in range(11) if v != 3]
    raw = hidden @ weight[with_entry].T + bias[with_entry]
    exponent = torch.exp(2 * raw / softcap)
    expected = logits_nucleus_entropy(softcap * (exponent - 1) / (exponent + 1) / 1.3, top_p=0.8)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), (hidden, weight)), torch.autograd.grad(expected.sum(), (hidden, weight)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="logit_softcap must be > 0"):
        nucleus_entropy(hidden, weight, top_p=0.8, logit_softcap=0.0)
