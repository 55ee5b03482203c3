"""Linear layers that multiply through oneDNN, forward and backward.

For float32 on a CPU, where `epo.objectives.products` says why. Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from epo.objectives.products import product, uses_onednn


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose float32 products on a CPU are oneDNN's; otherwise, and under autocast, torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type) or not uses_onednn(input, self.weight):
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


def through_onednn(model: nn.Module) -> None:
    """Turn the plain linear layers of `model` into `OneDnnLinear`, in place; names and parameters stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_O_I: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight_O_I)
        output_N_O = product(input.reshape(-1, input.shape[-1]), weight_O_I, bias_O)
        return output_N_O.view(*input.shape[:-1], weight_O_I.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        input, weight_O_I = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        grad_N_O = grad.reshape(-1, weight_O_I.shape[0])
        input_N_I = input.reshape(-1, weight_O_I.shape[1])
        return (
            product(grad_N_O, weight_O_I.T).view_as(input) if needs_input else None,
            product(grad_N_O.T, input_N_I.T) if needs_weight else None,
            grad_N_O.sum(dim=0) if needs_bias else None,
        )
