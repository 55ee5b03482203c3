"""Matrix products in float32 on a CPU, through oneDNN where torch has it.

torch multiplies float32 matrices with MKL, which takes a slow path on processors that are not Intel's: half the rate of
oneDNN on AMD's. The operator for oneDNN is private to torch, so it is used only where it exists and gives
the right numbers on a probe; everywhere else, and for every other type and device, the product is torch's own.

Legend for tensor suffixes: _N, _M rows, _K what is summed over.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def product(left_N_K: Tensor, right_M_K: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """left @ right^T + bias, as [N, M]. Without gradients: what is differentiable calls it in its own forward and
    backward."""
    if uses_onednn(left_N_K, right_M_K):
        return _onednn(left_N_K, right_M_K, bias_M)
    return torch.nn.functional.linear(left_N_K, right_M_K, bias_M)


def uses_onednn(left_N_K: Tensor, right_M_K: Tensor) -> bool:
    """Whether `product` of these two goes through oneDNN."""
    return (
        left_N_K.dtype is right_M_K.dtype is torch.float32
        and left_N_K.device.type == right_M_K.device.type == "cpu"
        and left_N_K.numel() > 0
        and right_M_K.numel() > 0
        and onednn_is_right(torch.float32)
    )


@functools.cache
def onednn_is_right(dtype: torch.dtype) -> bool:
    """Whether torch's private oneDNN operators exist here, take `dtype`, and multiply correctly.

    Asked of dense weights as they are, of transposed ones, and of weights laid out beforehand.
    """
    generator = torch.Generator().manual_seed(0)
    weight_O_I = torch.randn(48, 80, generator=generator).to(dtype)
    bias_O = torch.randn(48, generator=generator).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    with torch.inference_mode():
        try:
            transposed_O_I = weight_O_I.T.contiguous().T
            weights = (weight_O_I, transposed_O_I, torch.ops.mkldnn._reorder_linear_weight(weight_O_I, 16))
            for rows in (1, 3, 40):
                x_N_I = torch.randn(rows, 80, generator=generator).to(dtype)
                exact = torch.nn.functional.linear(x_N_I.double(), weight_O_I.double(), bias_O.double())
                for x in (x_N_I, x_N_I.T.contiguous().T):
                    for weight in weights:
                        error = (_onednn(x, weight, bias_O).double() - exact).square().mean().sqrt()
                        if not error < tolerance * exact.square().mean().sqrt():
                            return False
        except (AttributeError, RuntimeError):  # no such operator, other arguments, or not on this processor
            return False
    return True


def _onednn(x_N_I: Tensor, weight_O_I: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_N_I, weight_O_I, bias_O, "none", [], "")
