"""Layers of the Llama family under bfloat16 autocast on a CPU, with fewer passes over memory.

Autocast rounds the normalised states once for every linear layer that reads them, and keeps each copy; norms and
rotary positions make several float32 arrays. Here the norm hands on rounded states, what reads the same input is one
product, and backward is written out. Numbers are rounded where autocast rounds them, but for the gradients of the
layers that read one input, which are summed before they are rounded.

Legend: N tokens, D hidden size, I inputs and O outputs of linear layers, F intermediate size; B rows, T tokens, H query
heads, K key heads, S = H + 2 K, E head size.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from epo.training import causal_attention
from epo.training.linear import OneDnnLinear

_LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
"""Their norms and feed-forward parts are the same code."""
_ATTENTIONS = (LlamaAttention, MistralAttention)


def fuse_layers(model: nn.Module) -> None:
    """Let the layers of `model` compute so wherever bfloat16 autocast is on, in place; names and parameters stay.

    For models with causal attention of `epo.training.causal_attention`. Layers of other classes, with adapters, other
    activations or weights that are not float32 stay as they are.
    """
    for layer in model.modules():
        if type(layer) not in _LAYERS:
            continue
        parts: Any = layer
        attention, mlp = parts.self_attn, parts.mlp
        if _are_plain(attention.q_proj, attention.k_proj, attention.v_proj):
            _turn_into(_RoundedNorm, parts.input_layernorm)
            if type(attention) in _ATTENTIONS and attention.q_proj.bias is None:
                _turn_into(_Attention, attention)
        if _are_plain(mlp.gate_proj, mlp.up_proj):
            _turn_into(_RoundedNorm, parts.post_attention_layernorm)
            if mlp.config.hidden_act == "silu" and mlp.gate_proj.bias is None:
                _turn_into(_FeedForward, mlp)


def unfuse_layers(model: nn.Module) -> None:
    """Undo `fuse_layers`."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = type(module).__bases__[1]


def _are_plain(*linears: nn.Module) -> bool:
    """Linear layers without adapters, in float32."""
    return all(type(x) in (nn.Linear, OneDnnLinear) for x in linears) and all(
        p.dtype is torch.float32 for x in linears for p in x.parameters()
    )


def _turn_into(fused: type[_Fused], module: nn.Module) -> None:
    module.__class__ = _joined(fused, type(module))


@functools.cache
def _joined(fused: type[_Fused], plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{plain.__name__}", (fused, plain), {})


def _is_on(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
    )


class _Fused:
    """Before the class of transformers in the order of resolution."""


class _RoundedNorm(_Fused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _is_on(hidden_states) or hidden_states.dtype is not torch.float32:
            return super().forward(hidden_states)  # type: ignore[misc]
        module = cast(Any, self)
        return _rms_norm(hidden_states, module.weight, module.variance_epsilon)


class _FeedForward(_Fused):
    def forward(self, x: Tensor) -> Tensor:
        if not _is_on(x):
            return super().forward(x)  # type: ignore[misc]
        module = cast(Any, self)
        return module.down_proj(_gated(_products(x, module.gate_proj.weight, module.up_proj.weight)))


class _Attention(_Fused):
    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *arguments: Any, **options: Any
    ) -> tuple[Tensor, None]:
        module = cast(Any, self)
        # Masks and caches go by different names in different versions of transformers.
        others = [*arguments, *(value for name, value in options.items() if name not in ("position_ids", "use_cache"))]
        is_plain = (
            all(value is None for value in others)
            and module.config._attn_implementation == causal_attention.NAME
            and not module.attention_dropout
        )
        if not is_plain or not _is_on(hidden_states):
            return super().forward(hidden_states, position_embeddings, *arguments, **options)  # type: ignore[misc]
        projected = _products(hidden_states, module.q_proj.weight, module.k_proj.weight, module.v_proj.weight)
        projected_B_T_S_E = projected.unflatten(-1, (-1, module.head_dim))
        key_heads = module.k_proj.weight.shape[0] // module.head_dim
        qkv = _turned(projected_B_T_S_E, *position_embeddings, key_heads)
        mixed_B_T_H_E = causal_attention.causal_attention(*qkv, scale=module.scaling)
        return module.o_proj(mixed_B_T_H_E.flatten(2)), None


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) weight, computed in float32, rounded to bfloat16. Keeps x and a number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D).to(torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_D, scale = ctx.saved_tensors
        D = x.shape[-1]
        grad_N_D, x_N_D, scale_N = grad.reshape(-1, D).float(), x.reshape(-1, D), scale.flatten()
        product_N_D = grad_N_D * x_N_D
        weight_grad_D = torch.mv(product_N_D.T, scale_N) if ctx.needs_input_grad[1] else None
        along_N = torch.mv(product_N_D, weight_D).mul_(scale_N.pow(3)).div_(D)
        grad_N_D.mul_(weight_D).mul_(scale_N[:, None]).addcmul_(x_N_D, along_N[:, None], value=-1)
        return grad_N_D.view_as(x), weight_grad_D, None


class _Products(torch.autograd.Function):
    """x W^T in bfloat16 for several W without bias, one after the other in the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        weight_O_I = torch.empty(sum(map(len, weights)), x.shape[-1], dtype=torch.bfloat16)
        for part, weight in zip(weight_O_I.split([len(w) for w in weights]), weights, strict=True):
            part.copy_(weight)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, weight_O_I)
        ctx.sizes = [len(weight) for weight in weights]
        return nn.functional.linear(x, weight_O_I)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_O_I = ctx.saved_tensors
        needs_x, *needed = ctx.needs_input_grad
        grad_N_O = grad.reshape(-1, grad.shape[-1])
        x_grad = (grad_N_O @ weight_O_I).view(*grad.shape[:-1], -1) if needs_x else None
        if x is None:
            return (x_grad, *(None for _ in needed))
        parts = torch.mm(grad_N_O.T, x.reshape(-1, x.shape[-1])).split(ctx.sizes)
        return (x_grad, *(part.float() if needs else None for part, needs in zip(parts, needed, strict=True)))


class _Gated(torch.autograd.Function):
    """silu(gate) up of [..., 2 F] with the gate first. Keeps its input only."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        gate_grad, up_grad = both.chunk(2, dim=-1)
        torch.mul(nn.functional.silu(gate), grad, out=up_grad)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=gate_grad)
        return both


class _Turned(torch.autograd.Function):
    """Queries and keys turned by their positions in float32 and rounded, and values: [B, heads, T, E] each, from
    [B, T, S, E]. Keeps nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any, projected_B_T_S_E: Tensor, cos_B_T_E: Tensor, sin_B_T_E: Tensor, key_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_B_T_E, sin_B_T_E)
        sizes = [projected_B_T_S_E.shape[2] - 2 * key_heads, key_heads, key_heads]
        turned = sizes[0] + key_heads
        qkv_B_T_S_E = torch.empty_like(projected_B_T_S_E)
        qkv_B_T_S_E[:, :, :turned] = _turn(projected_B_T_S_E[:, :, :turned], cos_B_T_E, sin_B_T_E, sign=1)
        qkv_B_T_S_E[:, :, turned:] = projected_B_T_S_E[:, :, turned:]
        query, key, value = (part.transpose(1, 2) for part in qkv_B_T_S_E.split(sizes, dim=2))
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos_B_T_E, sin_B_T_E = ctx.saved_tensors
        query, key, value = (grad.transpose(1, 2) for grad in grads)
        heads, turned = query.shape[2], query.shape[2] + key.shape[2]
        grad_B_T_S_E = query.new_empty(*query.shape[:2], turned + value.shape[2], query.shape[3])
        grad_B_T_S_E[:, :, :heads] = _turn(query, cos_B_T_E, sin_B_T_E, sign=-1)
        grad_B_T_S_E[:, :, heads:turned] = _turn(key, cos_B_T_E, sin_B_T_E, sign=-1)
        grad_B_T_S_E[:, :, turned:] = value
        return grad_B_T_S_E, None, None, None


def _turn(x_B_T_H_E: Tensor, cos_B_T_E: Tensor, sin_B_T_E: Tensor, *, sign: int) -> Tensor:
    """x cos + (-second half, first half) sin in float32; with a sign of -1 its transpose."""
    cos, sin = cos_B_T_E[:, :, None], sin_B_T_E[:, :, None]
    half = x_B_T_H_E.shape[-1] // 2
    x = x_B_T_H_E.float()
    out = x * cos
    if sign > 0:
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    else:
        out[..., :half].addcmul_(x[..., half:], sin[..., half:])
        out[..., half:].addcmul_(x[..., :half], sin[..., :half], value=-1)
    return out


# The stubs of torch leave `apply` untyped.
_rms_norm: Any = _RmsNorm.apply  # pyright: ignore[reportUnknownMemberType]
_products: Any = _Products.apply  # pyright: ignore[reportUnknownMemberType]
_gated: Any = _Gated.apply  # pyright: ignore[reportUnknownMemberType]
_turned: Any = _Turned.apply  # pyright: ignore[reportUnknownMemberType]
