"""The forward of any architecture: the modules of transformers, with a cache that has slots.

Legend: S slots, B rows of this forward, Q new tokens, L cached length, H key-value heads, E head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from epo.sampling.forward import Forward, Row
from epo.training.attention import score_cap, sliding_window
from epo.training.policy import Policy


class _SlotLayer(CacheLayerMixin):
    """Keys and values of all slots of one layer. Rows of a forward write at their own positions."""

    def __init__(self, view: _View) -> None:
        super().__init__()
        self._view = view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, H, _, E = key_states.shape
        view = self._view
        # Zeros, not empty: a masked NaN would still poison the attention output.
        self.keys = key_states.new_zeros(view.num_slots, H, view.length, E)
        self.values = value_states.new_zeros(view.num_slots, H, view.length, E)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        view = self._view
        self.keys[view.slots_B_1, :, view.positions_B_Q] = key_states.transpose(1, 2)
        self.values[view.slots_B_1, :, view.positions_B_Q] = value_states.transpose(1, 2)
        if view.is_prefix:
            rows = slice(0, len(view.slots_B_1))
            return self.keys[rows, :, : view.used], self.values[rows, :, : view.used]
        slots_B = view.slots_B_1[:, 0]
        return self.keys[slots_B, :, : view.used], self.values[slots_B, :, : view.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._view.used, 0

    def get_seq_length(self) -> int:
        return self._view.used

    def get_max_length(self) -> int:
        return self._view.length


@dataclass(slots=True)
class _View:
    """Which slots and positions the current forward is about. Shared by all layers."""

    num_slots: int
    length: int
    slots_B_1: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.long))
    positions_B_Q: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    used: int = 0
    is_prefix: bool = False


class GenericForward(Forward):
    name = "generic"

    def __init__(self, policy: Policy, *, num_slots: int) -> None:
        self._policy = policy
        self._config: Any = policy.model.config
        self._window = sliding_window(self._config)
        # The kernels that take a mask of any shape, of those that compute all that the model asks for.
        self._attention = "sdpa" if score_cap(self._config) is None else "eager"
        # Padded queries of a ragged prefill write behind their row's end, at positions that later tokens overwrite
        # before any mask shows them; the spare position takes those that would fall off the end.
        self._length = policy.max_context + 1
        self._view = _View(num_slots=num_slots, length=self._length)
        layers: list[Any] = [_SlotLayer(self._view) for _ in range(policy.model.config.num_hidden_layers)]
        self._cache = Cache(layers=layers)

    def hidden(self, rows: Sequence[Row]) -> Tensor:
        device = self._policy.device
        lengths = [len(row.token_ids) for row in rows]
        width = max(lengths)
        ids_B_Q = torch.tensor([[*row.token_ids, *[0] * (width - len(row.token_ids))] for row in rows])
        starts_B_1 = torch.tensor([row.start for row in rows])[:, None]
        positions_B_Q = (starts_B_1 + torch.arange(width)).clamp_(max=self._length - 1)
        slots = [row.slot for row in rows]
        view = self._view
        view.slots_B_1 = torch.tensor(slots, device=device)[:, None]
        view.positions_B_Q = positions_B_Q.to(device)
        view.used = int(positions_B_Q.max()) + 1
        view.is_prefix = slots == list(range(len(slots)))
        adapters = self._policy.adapters
        using = nullcontext() if adapters is None else adapters.using(self._policy.adapter)
        with self._policy.autocast(), using, _masked_attention(self._config, self._attention):
            out = self._policy.trunk(
                input_ids=ids_B_Q.to(device),
                attention_mask=self._attention_mask(),
                position_ids=view.positions_B_Q,
                past_key_values=self._cache,
                use_cache=True,
            )
        return out.last_hidden_state[torch.arange(len(rows)), torch.tensor(lengths) - 1]

    def logits(self, hidden_B_D: Tensor) -> Tensor:
        # In fp32 whatever the model's precision is, as the learner's head computes it.
        return self._policy.head(hidden_B_D).logits()

    def _attention_mask(self) -> Tensor | dict[str, Tensor]:
        """What the new tokens see: [B, 1, Q, L], or that for each kind of layer."""
        view = self._view
        age_B_1_Q_L = view.positions_B_Q[:, None, :, None] - torch.arange(view.used, device=self._policy.device)
        is_past_B_1_Q_L = age_B_1_Q_L >= 0
        everything = self._as_mask(is_past_B_1_Q_L)
        if self._window is None:
            return everything
        near = self._as_mask(is_past_B_1_Q_L & (age_B_1_Q_L < self._window))
        if getattr(self._config, "layer_types", None) is None:
            return near
        return {"full_attention": everything, "sliding_attention": near}

    def _as_mask(self, is_seen: Tensor) -> Tensor:
        if self._attention == "sdpa":
            return is_seen
        dtype = self._policy.head_weight_V_D.dtype  # eager adds the mask to the scores
        return torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill_(
            ~is_seen, torch.finfo(dtype).min
        )


@contextmanager
def _masked_attention(config: Any, attention: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before
