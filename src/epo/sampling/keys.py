"""Keys and values of the episodes, slot by slot.

Legend: S slots, H key-value heads, L positions, E head size.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


class SlotKeys:
    """`keys[layer]` and `values[layer]`, [S, H, L, E].

    They have addresses for all slots and positions, so that nothing is copied as texts grow. Memory is mapped without
    torch's allocator: the system gives a page when it is first written, full of zeros (a masked NaN would poison
    attention), and has it back at once with `clear`.
    """

    def __init__(
        self, *, layers: int, slots: int, heads: int, positions: int, head_size: int, dtype: torch.dtype
    ) -> None:
        self._layers = layers
        self._shape = (slots, heads, positions, head_size)
        self._dtype = dtype
        self.clear()

    def clear(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self) -> None:
        """Have addresses. What is there stays."""
        if not self.keys:
            self.keys = [self._mapped() for _ in range(self._layers)]
            self.values = [self._mapped() for _ in range(self._layers)]

    def _mapped(self) -> Tensor:
        size = math.prod(self._shape) * self._dtype.itemsize
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=self._dtype).view(self._shape)
