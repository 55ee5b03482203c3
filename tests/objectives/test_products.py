"""The product through oneDNN against float64, in every layout that the head and the linear layers use."""

from __future__ import annotations

import pytest
import torch

from epo.objectives.products import onednn_is_right, product, uses_onednn


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("rows, columns, inner", [(1, 1, 1), (1, 7, 130), (33, 5, 1), (257, 96, 64)])
@pytest.mark.parametrize("left_transposed", [False, True])
@pytest.mark.parametrize("right_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_product_is_left_times_right_transposed(
    rows: int, columns: int, inner: int, left_transposed: bool, right_transposed: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    shapes = [
        ((inner, rows) if left_transposed else (rows, inner)),
        ((inner, columns) if right_transposed else (columns, inner)),
    ]
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    left, right = left.T if left_transposed else left, right.T if right_transposed else right
    exact = torch.einsum("nk,mk->nm", left.double(), right.double())
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}[dtype]
    found = product(left, right)
    assert found.dtype is dtype
    assert relative_error(found, exact) < tolerance
    bias = torch.randn(columns, generator=generator).to(dtype)
    assert relative_error(product(left, right, bias), exact + bias.double()) < tolerance


def test_nothing_to_multiply_gives_the_shapes_and_zeros_of_plain_torch() -> None:
    assert product(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert product(torch.zeros(2, 0), torch.zeros(3, 0)).tolist() == [[0.0] * 3] * 2


def test_only_float32_on_a_cpu_takes_the_private_operator() -> None:
    ones = torch.ones(2, 2)
    assert uses_onednn(ones, ones) == onednn_is_right(torch.float32)
    assert not uses_onednn(ones.double(), ones.double())
    assert not uses_onednn(ones.bfloat16(), ones.bfloat16())
    assert not uses_onednn(ones.to("meta"), ones.to("meta"))


def test_an_operator_that_multiplies_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_is_right.cache_clear()
    monkeypatch.setattr("epo.objectives.products._onednn", lambda x, weight, bias: x @ weight.to_dense().T)  # no bias
    try:
        assert not onednn_is_right(torch.float32)
        ones = torch.ones(2, 2)
        assert product(ones, ones, ones[0]).tolist() == [[3.0, 3.0]] * 2
    finally:
        onednn_is_right.cache_clear()
