"""The check that keeps broadcasting out of per-token formulas: [N] beside [N, 1] would give [N, N] without a word."""

from __future__ import annotations

from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Raise unless all have one shape.

    Raises:
        ValueError: two shapes differ; names every argument with its shape.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"all must have one shape, got {shapes}")
