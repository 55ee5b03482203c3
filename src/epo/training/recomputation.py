"""Gradient checkpointing: the layers' activations are computed again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from epo.errors import UserError
from epo.training.adapters import Adapters


def enable_recomputation(model: Any, adapters: Adapters | None) -> None:
    """Let the layers of `model` be recomputed wherever `recomputing` is around the forward pass.

    Raises:
        UserError: the model cannot, or has dropout, which would draw anew in the recomputation of a training mode.
    """
    what = f"model.gradient_checkpointing=true, but the model of type {getattr(model.config, 'model_type', '?')!r}"
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise UserError(f"{what} has no layers that transformers can recompute: set it to false")
    values: dict[str, Any] = model.config.to_dict()
    # GPT-2 and its kin say resid_pdrop.
    if dropout := [k for k, v in values.items() if ("drop" in k) and isinstance(v, float) and v > 0]:
        raise UserError(f"{what} has {', '.join(dropout)} above 0: set it to 0 in the model's config.json")
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if adapters is not None:
        options["context_fn"] = adapters.recomputation
    # Renamed between the transformers releases that are supported.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


@contextmanager
def recomputing(trunk: nn.Module) -> Iterator[None]:
    """Within the context the layers of `trunk` keep no activations, if that was enabled and there will be a backward.

    transformers recomputes in training mode only. So exactly the layers are in it, for the time of this forward:
    nothing inside them is, and neither is whatever the sampler runs.
    """
    layers = [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    if not torch.is_grad_enabled():
        layers = []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
