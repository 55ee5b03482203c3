"""The forward of the Llama family on a CPU: few large products, nothing padded, keys and values in place.

The same numbers as transformers' modules under the policy's autocast, operation by operation: the residual stream and
the norms in float32; queries, keys, values and the rest of the products in the policy's compute type; positions turned
in float32. Products whose inputs are the same are one product; new tokens of all rows are one matrix, without padding;
in the last layer only the tokens whose hidden states are asked for go on. Attention is computed row by row in a prefill
and in runs of neighbouring slots in a decode.

Legend: N new tokens of all rows, B rows, R rows of a run, D hidden size, H heads (G query heads to a key-value head),
E head size, F intermediate size, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from epo.sampling.attention import attend_new, attend_new_in_products, attend_one, causal_mask
from epo.sampling.forward import Forward, Row
from epo.sampling.keys import SlotKeys
from epo.sampling.packed import PackedLinear, UnknownLinear, weight_and_bias
from epo.training import causal_attention
from epo.training.attention import sliding_window
from epo.training.policy import Policy

_ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_ROTATIONS = ("default", "linear", "llama3", "yarn")  # do not change with the length of the text
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_WIDENED = 2**19
"""Elements of keys that are made float32 at a time in a decode: a core's own cache holds them."""
_ROUND = 32
"""A run's positions are rounded up to a multiple: then sums over them do not depend on the other rows' lengths."""


class NotLean(Exception):
    """The model is something that this forward does not compute, for the reason given."""


@dataclass(slots=True)
class _Layer:
    norm_D: Tensor
    qkv: PackedLinear
    head_norm_H_E: Tensor | None
    """Weights of the norms of queries and keys (Qwen3), head by head."""
    out: PackedLinear
    mlp_norm_D: Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(slots=True)
class _Run:
    """Decode rows first to last, whose slots are neighbours."""

    rows: slice
    slots: slice
    length: int
    mask_R_1_1_L: Tensor


class LeanForward(Forward):
    """Made from the policy's weights as they are now: make another one after an update.

    Raises:
        NotLean: another architecture, device, or anything in it that is unknown; or its numbers are not the policy's.
    """

    name = "lean"

    @torch.inference_mode()
    def __init__(self, policy: Policy, *, num_slots: int) -> None:
        _refuse_unknown(policy)
        trunk: Any = policy.trunk
        config = trunk.config
        attention = trunk.layers[0].self_attn
        self._policy = policy
        self._compute = policy.compute
        # Where the learner's own attention was chosen, products in bfloat16 are fast.
        self._in_products = self._compute is torch.bfloat16 and config._attn_implementation == causal_attention.NAME
        self._head_size = int(attention.head_dim)
        self._query_heads = int(config.num_attention_heads)
        self._key_heads = int(config.num_key_value_heads)
        self._scale = float(attention.scaling)
        self._epsilon = float(config.rms_norm_eps)
        positions = torch.arange(policy.max_context)[None]
        cos_1_L_E, sin_1_L_E = trunk.rotary_emb(trunk.embed_tokens.weight, positions)
        self._cos_L_1_E, self._sin_L_1_E = cos_1_L_E[0, :, None], sin_1_L_E[0, :, None]
        self._cache = SlotKeys(
            layers=len(trunk.layers),
            slots=max(num_slots, 2),  # `_verify` takes two
            heads=self._key_heads,
            positions=_rounded(policy.max_context),
            head_size=self._head_size,
            dtype=self._compute,
        )
        self._embedding_V_D = trunk.embed_tokens.weight.detach()
        self._final_norm_D = trunk.norm.weight.detach()
        try:
            self._layers = [self._pack(layer) for layer in trunk.layers]
        except UnknownLinear as unknown:
            raise NotLean(str(unknown)) from None
        head = policy.head(self._embedding_V_D[:1])
        bias_V = None if head.bias_V is None else head.bias_V.float()
        self._head = PackedLinear([head.weight_V_D.float()], [bias_V], dtype=torch.float32)
        self._verify()

    def _pack(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp

        def packed(*linears: nn.Module) -> PackedLinear:
            found = [weight_and_bias(linear, adapter=self._policy.adapter) for linear in linears]
            return PackedLinear([weight for weight, _ in found], [bias for _, bias in found], dtype=self._compute)

        head_norm_H_E = None
        if hasattr(attention, "q_norm"):
            query_E, key_E = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
            head_norm_H_E = torch.stack([query_E] * self._query_heads + [key_E] * self._key_heads)
        return _Layer(
            norm_D=layer.input_layernorm.weight.detach(),
            qkv=packed(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norm_H_E=head_norm_H_E,
            out=packed(attention.o_proj),
            mlp_norm_D=layer.post_attention_layernorm.weight.detach(),
            gate_up=packed(mlp.gate_proj, mlp.up_proj),
            down=packed(mlp.down_proj),
        )

    def clear(self) -> None:
        self._cache.clear()

    def logits(self, hidden_B_D: Tensor) -> Tensor:
        return self._head(hidden_B_D.to(self._compute).float())

    def hidden(self, rows: Sequence[Row]) -> Tensor:
        lengths = [len(row.token_ids) for row in rows]
        self._cache.reserve()
        last_B = torch.tensor(lengths).cumsum(0) - 1
        positions_N = torch.tensor([place for row in rows for place in range(row.start, row.end)])
        cos_N_1_E, sin_N_1_E = self._cos_L_1_E[positions_N], self._sin_L_1_E[positions_N]
        x_N_D = self._embedding_V_D[torch.tensor([token for row in rows for token in row.token_ids])]
        is_decode = len(x_N_D) == len(rows)
        slots_B = torch.tensor([row.slot for row in rows])
        runs = self._runs(rows)
        masks: list[Tensor | None] = [None] * len(rows)
        if not is_decode and not self._in_products:
            masks = [causal_mask(len(row.token_ids), row.end, dtype=self._compute) for row in rows]
        ends = list(accumulate(lengths))
        for number, layer in enumerate(self._layers):
            qkv_N_H_E = self._qkv(layer, x_N_D, cos_N_1_E, sin_N_1_E)
            query_N_H_E, key_N_H_E, value_N_H_E = qkv_N_H_E
            keys, values = self._cache.keys[number], self._cache.values[number]
            if is_decode:
                keys[slots_B, :, positions_N] = key_N_H_E
                values[slots_B, :, positions_N] = value_N_H_E
            else:
                for row, end in zip(rows, ends, strict=True):
                    new = slice(end - len(row.token_ids), end)
                    keys[row.slot, :, row.start : row.end] = key_N_H_E[new].transpose(0, 1)
                    values[row.slot, :, row.start : row.end] = value_N_H_E[new].transpose(0, 1)
            is_last = number == len(self._layers) - 1
            if is_last and not is_decode:
                x_N_D, query_N_H_E = x_N_D[last_B], query_N_H_E[last_B]
            if is_decode or is_last:
                mixed_N_D = self._attend_decode(query_N_H_E, keys, values, runs)
            else:
                mixed_N_D = self._attend_prefill(query_N_H_E, keys, values, rows, ends, masks)
            x_N_D = x_N_D.add_(layer.out(mixed_N_D))
            gate_up_N_F = layer.gate_up(self._normed(x_N_D, layer.mlp_norm_D).to(self._compute))
            gate_N_F, up_N_F = gate_up_N_F.chunk(2, dim=-1)
            x_N_D.add_(layer.down(functional.silu(gate_N_F).mul_(up_N_F)))
        return self._normed(x_N_D, self._final_norm_D)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """In float32, over the last dimension."""
        return x.pow(2).mean(-1, keepdim=True).add_(self._epsilon).rsqrt_() * x * weight

    def _qkv(self, layer: _Layer, x_N_D: Tensor, cos_N_1_E: Tensor, sin_N_1_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned by their positions, and values."""
        turned = self._query_heads + self._key_heads
        qkv_N_H_E = layer.qkv(self._normed(x_N_D, layer.norm_D).to(self._compute)).view(len(x_N_D), -1, self._head_size)
        qk_N_H_E = qkv_N_H_E[:, :turned].float()
        if layer.head_norm_H_E is not None:
            scale_N_H_1 = qk_N_H_E.pow(2).mean(-1, keepdim=True).add_(self._epsilon).rsqrt_()
            # Rounded before the weight, as transformers does.
            qk_N_H_E = (qk_N_H_E * scale_N_H_1).to(self._compute) * layer.head_norm_H_E
        half = self._head_size // 2
        first, second = qk_N_H_E[..., :half], qk_N_H_E[..., half:]
        turned_N_H_E = qk_N_H_E * cos_N_1_E
        turned_N_H_E[..., :half].addcmul_(second, sin_N_1_E[..., :half], value=-1)
        turned_N_H_E[..., half:].addcmul_(first, sin_N_1_E[..., half:])
        turned_N_H_E = turned_N_H_E.to(self._compute)
        return turned_N_H_E[:, : self._query_heads], turned_N_H_E[:, self._query_heads :], qkv_N_H_E[:, turned:]

    def _runs(self, rows: Sequence[Row]) -> list[_Run]:
        """Neighbouring slots together, unless too many positions behind the shorter ones would be read in vain.

        Nor, in bfloat16, so many that they have more than `_WIDENED` elements of keys.
        """
        is_widened = self._compute is not torch.float32
        most = _WIDENED // (self._key_heads * self._head_size) if is_widened else math.inf
        bounds: list[tuple[int, int]] = []
        longest = total = 0
        for place, row in enumerate(rows):
            wider = max(longest, row.end)
            read = (place + 1 - bounds[-1][0]) * wider if bounds else 0
            if bounds and rows[place - 1].slot + 1 == row.slot and read <= min(most, 1.25 * (total + row.end) + _ROUND):
                bounds[-1] = (bounds[-1][0], place + 1)
                longest, total = wider, total + row.end
            else:
                bounds.append((place, place + 1))
                longest = total = row.end
        runs: list[_Run] = []
        for first, after in bounds:
            ends_R = torch.tensor([row.end for row in rows[first:after]])
            length = _rounded(int(ends_R.max()))
            hidden_R_1_1_L = (torch.arange(length) >= ends_R[:, None])[:, None, None]
            mask_R_1_1_L = torch.zeros(hidden_R_1_1_L.shape).masked_fill_(hidden_R_1_1_L, -torch.inf)
            slots = slice(rows[first].slot, rows[after - 1].slot + 1)
            runs.append(_Run(slice(first, after), slots, length, mask_R_1_1_L))
        return runs

    def _attend_decode(self, query_B_H_E: Tensor, keys: Tensor, values: Tensor, runs: Sequence[_Run]) -> Tensor:
        """[B, D]: the query heads of a group are rows, so that keys and values are read once for all of them."""
        grouped_B_H_G_E = query_B_H_E.unflatten(1, (self._key_heads, -1))
        parts = [
            attend_one(
                grouped_B_H_G_E[run.rows],
                keys[run.slots, :, : run.length],
                values[run.slots, :, : run.length],
                run.mask_R_1_1_L,
                scale=self._scale,
                rounds_weights=self._in_products,
            ).flatten(1)
            for run in runs
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_prefill(
        self,
        query_N_H_E: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Sequence[Row],
        ends: Sequence[int],
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        out_N_H_E = torch.empty_like(query_N_H_E)
        for row, end, mask in zip(rows, ends, masks, strict=True):
            new = slice(end - len(row.token_ids), end)
            query_Q_H_E = query_N_H_E[new]
            key_K_L_E, value_K_L_E = keys[row.slot, :, : row.end], values[row.slot, :, : row.end]
            if self._in_products:
                out_N_H_E[new] = attend_new_in_products(query_Q_H_E, key_K_L_E, value_K_L_E, scale=self._scale)
            else:
                out_N_H_E[new] = attend_new(query_Q_H_E, key_K_L_E, value_K_L_E, mask, scale=self._scale)
        return out_N_H_E.flatten(1)

    def _verify(self) -> None:
        """Compare with the policy's own modules on a short ragged text, prefilled in two parts and then decoded."""
        vocabulary = len(self._embedding_V_D)
        ids_B_T = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
        hidden_B_T_D = self._policy.hidden(ids_B_T)
        for bounds in ([(0, 5), (0, 3)], [(5, 11), (3, 7)], [(11, 12), (7, 8)]):
            rows = [Row(slot, a, ids_B_T[slot, a:b].tolist()) for slot, (a, b) in enumerate(bounds)]
            got = self.logits(self.hidden(rows))
            expected = self.logits(torch.stack([hidden_B_T_D[slot, b - 1] for slot, (_, b) in enumerate(bounds)]))
            self._compare(got, expected)
        self.clear()

    def _compare(self, got_B_V: Tensor, expected_B_V: Tensor) -> None:
        tolerance = 1e-3 if self._compute is torch.float32 else 0.1
        error = float((got_B_V - expected_B_V).norm() / expected_B_V.norm())
        if not error < tolerance:
            raise NotLean(f"its logits are off by {error:.1e} of their size")


def _rounded(length: int) -> int:
    return -(-length // _ROUND) * _ROUND


def _refuse_unknown(policy: Policy) -> None:
    trunk: Any = policy.trunk
    kind = type(trunk).__name__
    if policy.device.type != "cpu":
        raise NotLean(f"the model is on {policy.device.type}")
    if kind.removesuffix("Model") not in _ARCHITECTURES or not type(trunk).__module__.startswith("transformers."):
        raise NotLean(f"{kind} is not of the Llama family")
    config = trunk.config
    if config.hidden_act != "silu":
        raise NotLean(f"its activation is {config.hidden_act}")
    if (window := sliding_window(config)) is not None and window < policy.max_context:
        raise NotLean(f"some of its layers see {window} tokens only")
    rotation = trunk.rotary_emb.rope_type
    if rotation not in _ROTATIONS:
        raise NotLean(f"its rotary positions are {rotation}")
    if any(parameter.dtype is not torch.float32 for parameter in trunk.parameters()):
        raise NotLean("its weights are not float32")
    if policy.adapter is not None and policy.adapters is not None and policy.compute is not torch.float32:
        raise NotLean("an adapter merged into rounded weights would be rounded away")
    if policy.compute not in (torch.float32, torch.bfloat16):
        raise NotLean(f"it computes in {policy.compute}")
    for layer in trunk.layers:
        attention = {name for name, _ in layer.self_attn.named_children()}
        mlp = {name for name, _ in layer.mlp.named_children()}
        children = {name for name, _ in layer.named_children()}
        if (
            attention not in (_ATTENTION, _ATTENTION | {"q_norm", "k_norm"})
            or mlp - {"act_fn"} != {"gate_proj", "up_proj", "down_proj"}
            or children != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
        ):
            raise NotLean("its layers hold something that is unknown")
