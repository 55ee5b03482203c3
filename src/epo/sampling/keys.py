"""Keys and values of the episodes, slot by slot.

Legend: S slots, H key-value heads, L positions, E head size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

_STEP = 256
"""Positions of a slot that are made ready at a time."""


class SlotKeys:
    """`keys[layer]` and `values[layer]`, [S, H, L, E], with as many slots as were ever asked for at once.

    Each has room for all positions from the start, so that nothing is copied when texts grow; a system gives memory to
    what is written only. What was made ready and never written holds zeros: a masked NaN would still poison attention.
    """

    def __init__(self, *, layers: int, heads: int, head_size: int, dtype: torch.dtype, positions: int) -> None:
        self._layers, self._heads, self._head_size, self._dtype = layers, heads, head_size, dtype
        self.positions = -(-positions // _STEP) * _STEP
        self.clear()

    def clear(self) -> None:
        self.keys = [self._empty(0)] * self._layers
        self.values = [self._empty(0)] * self._layers
        self._ready: list[int] = []

    @property
    def nbytes(self) -> int:
        """Of what was made ready."""
        return sum(self._ready) * 2 * self._layers * self._heads * self._head_size * self._dtype.itemsize

    def reserve(self, slots: Collection[int], *, length: int) -> None:
        """Make that many positions of the slots ready to be read and written. What is there stays, at its place."""
        if (missing := max(slots) + 1 - len(self._ready)) > 0:
            self._grow(missing)
        length = min(-(-length // _STEP) * _STEP, self.positions)
        for slot in slots:
            if self._ready[slot] < length:
                for tensor in (*self.keys, *self.values):
                    tensor[slot, :, self._ready[slot] : length] = 0
                self._ready[slot] = length

    def _grow(self, missing: int) -> None:
        old_slots, longest = len(self._ready), max(self._ready, default=0)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # one by one: old and new together only for one of them
                tensors[layer] = self._empty(old_slots + missing)
                tensors[layer][:old_slots, :, :longest] = old[:, :, :longest]
        self._ready += [0] * missing

    def _empty(self, slots: int) -> torch.Tensor:
        return torch.empty(slots, self._heads, self.positions, self._head_size, dtype=self._dtype)
