"""What the local sampler asks of a model: the next hidden states of some slots, and logits of hidden states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one slot, behind the `start` tokens whose keys and values it keeps already."""

    slot: int
    start: int
    token_ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class Forward(ABC):
    """A model with keys and values for each slot. Legend: B rows, D hidden size, V vocabulary."""

    name: str

    @abstractmethod
    def hidden(self, rows: Sequence[Row]) -> Tensor:
        """[B, D] after the last new token of each row; rows in ascending order of their slots."""

    @abstractmethod
    def logits(self, hidden_B_D: Tensor) -> Tensor:
        """[B, V] in float32, of the factors that `Policy.head` defines. The caller may overwrite them."""

    def clear(self) -> None:  # noqa: B027
        """No slot is in use: memory for keys and values may go."""
