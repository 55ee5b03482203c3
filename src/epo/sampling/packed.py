"""Matrix products with weights packed once for many small batches.

oneDNN can lay a weight out for its kernels beforehand. Besides being faster at a few rows than what torch does by
default, its product of a row does not depend on how many other rows there are: not in the last bit. The operators are
private to torch, so they are used only where they exist and give the right numbers on a probe; elsewhere it is
`torch.nn.functional.linear`.

Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from epo.objectives.products import onednn_is_right
from epo.training.adapters import effective_weight
from epo.training.linear import OneDnnLinear

_ROWS = 16
"""The number of rows that packed weights are laid out for; others are as right, and hardly slower."""

_PLAIN = (nn.Linear, OneDnnLinear)


class UnknownLinear(Exception):
    """A layer that is more than a weight and a bias."""


def weight_and_bias(linear: nn.Module, *, adapter: str | None) -> tuple[Tensor, Tensor | None]:
    """[O, I] and [O]: what `linear` computes with, an adapter merged into its base.

    Raises:
        UnknownLinear: neither a plain `nn.Linear` nor a plain LoRA layer of peft.
    """
    if isinstance(linear, nn.Linear) and type(linear) in _PLAIN:
        return linear.weight.detach(), linear.bias
    if not _is_plain_lora(linear):
        raise UnknownLinear(f"it holds a layer of type {type(linear).__name__}")
    base: Any = linear.get_base_layer()  # pyright: ignore[reportCallIssue]
    weight_O_I = base.weight.detach() if adapter is None else effective_weight(linear, adapter=adapter)
    return weight_O_I, base.bias


def _is_plain_lora(linear: nn.Module) -> bool:
    try:
        from peft.tuners.lora.layer import Linear as LoraLinear
    except ImportError:
        return False
    if type(linear) is not LoraLinear or type(linear.get_base_layer()) not in _PLAIN:
        return False
    layer: Any = linear
    # Variants such as DoRA compute something else than a sum; a bias of its own is no part of the weight.
    has_variant = bool(getattr(layer, "lora_variant", None)) or any(getattr(layer, "use_dora", {}).values())
    has_bias = any(getattr(module, "bias", None) is not None for module in layer.lora_B.values())
    return not (has_variant or has_bias or layer.merged or layer.disable_adapters)


class PackedLinear:
    """x -> x W^T + b for a frozen W, stacked from the layers that read the same input.

    Args:
        weights: [O_i, I], one after the other in the output.
        biases: [O_i] or None for each.
        dtype: in which the product is computed, and of input and output.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, dtype: torch.dtype) -> None:
        weight_O_I = weights[0] if len(weights) == 1 else torch.cat([weight.to(dtype) for weight in weights])
        weight_O_I = weight_O_I.detach().to(dtype).contiguous()
        self._bias_O: Tensor | None = None
        if any(one is not None for one in biases):
            parts = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            self._bias_O = torch.cat(parts).detach().to(dtype)
        self._is_packed = onednn_is_right(dtype)
        self._weight = _pack(weight_O_I) if self._is_packed else weight_O_I

    def __call__(self, x_N_I: Tensor) -> Tensor:
        if self._is_packed:
            return _multiply(x_N_I, self._weight, self._bias_O)
        return nn.functional.linear(x_N_I, self._weight, self._bias_O)


def _pack(weight_O_I: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_O_I, _ROWS)


def _multiply(x_N_I: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_N_I, packed, bias_O, "none", [], "")
