"""Rows of different lengths as one row without padding, and back.

A variable-length attention kernel keeps the rows apart by their boundaries, so no time goes to padding.

Legend: B rows, T tokens of the longest row, N real tokens of all rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatRows:
    """The real tokens of right-padded rows, row after row."""

    token_ids_1_N: Tensor
    position_ids_1_N: Tensor
    """Starting from 0 in every row."""
    boundaries: Tensor
    """Where rows start and the last one ends, int32 [B + 1]."""
    longest: int
    is_real_B_T: Tensor

    def attention_arguments(self) -> dict[str, Any]:
        """What transformers hands on to FlashAttention's variable-length kernel."""
        return {
            "cu_seq_lens_q": self.boundaries,
            "cu_seq_lens_k": self.boundaries,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }

    def padded(self, flat_1_N_D: Tensor) -> Tensor:
        """[B, T, D] as the padded rows would give it, with zeros at padding."""
        padded_B_T_D = flat_1_N_D.new_zeros(*self.is_real_B_T.shape, flat_1_N_D.shape[-1])
        padded_B_T_D[self.is_real_B_T] = flat_1_N_D[0]
        return padded_B_T_D


def flat_rows(token_ids_B_T: Tensor, lengths_B: Tensor) -> FlatRows:
    """Drop the padding of right-padded rows; every row has at least one token."""
    positions_T = torch.arange(token_ids_B_T.shape[1], device=token_ids_B_T.device)
    is_real_B_T = positions_T < lengths_B[:, None]
    return FlatRows(
        token_ids_1_N=token_ids_B_T[is_real_B_T][None],
        position_ids_1_N=positions_T.expand_as(token_ids_B_T)[is_real_B_T][None],
        boundaries=torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32),
        longest=int(lengths_B.max()),
        is_real_B_T=is_real_B_T,
    )
