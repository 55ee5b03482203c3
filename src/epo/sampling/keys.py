"""Keys and values of the episodes, slot by slot, in memory that grows with need.

Legend: S slots, N new tokens, H key-value heads, L positions, E head size.
"""

from __future__ import annotations

import torch

_STEP = 256
"""Positions come in multiples of this."""


class SlotKeys:
    """`keys[layer]` and `values[layer]`, [S, H, L, E]: at least the slots and positions that were asked for at once.

    Positions double when there are too few, up to `most` of them: what is there has to be copied each time.

    Positions that were never written hold zeros: a masked NaN would still poison the attention's output.
    """

    def __init__(self, *, layers: int, heads: int, head_size: int, dtype: torch.dtype, most: int) -> None:
        self._most = _rounded(most)
        self._heads, self._head_size = heads, head_size
        self._dtype = dtype
        self._layers = layers
        self.clear()

    def clear(self) -> None:
        empty = torch.zeros(0, self._heads, 0, self._head_size, dtype=self._dtype)
        self.keys = [empty] * self._layers
        self.values = [empty] * self._layers

    @property
    def shape(self) -> tuple[int, int]:
        """Slots and positions there is memory for."""
        return self.keys[0].shape[0], self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def reserve(self, *, slots: int, length: int) -> None:
        """Room for at least that many slots and positions. What is there stays, at its place."""
        old_slots, old_length = self.shape
        if slots <= old_slots and length <= old_length:
            return
        new_slots = max(slots, old_slots)
        new_length = old_length if length <= old_length else min(max(_rounded(length), 2 * old_length), self._most)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # one by one: old and new together only for one of them
                new = torch.zeros(new_slots, self._heads, new_length, self._head_size, dtype=self._dtype)
                new[:old_slots, :, :old_length] = old
                tensors[layer] = new


def _rounded(length: int) -> int:
    return -(-length // _STEP) * _STEP
