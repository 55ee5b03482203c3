"""Packed rows as tensors: flat per-token data, and padded micro-batches cut from it.

Legend: N trained tokens of the step, n trained tokens of a micro-batch, B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epo.types import PackedBatch, PackedRow, Trajectory


@dataclass(kw_only=True, slots=True)
class TokenData:
    """What is known of every trained token, in row order. All on the learner's device."""

    trajectory_ids_N: Tensor
    turn_ids_N: Tensor
    old_logprobs_N: Tensor
    """Where the probability ratio starts: the learner's where it computed them, else the sampler's."""
    sampler_logprobs_N: Tensor
    """As drawn."""
    old_entropy_N: Tensor
    """Entropy under the sampling policy."""
    row_spans: list[slice]
    """Where each row's tokens lie in the flat order."""


def flatten(batch: PackedBatch, trajectories: Sequence[Trajectory], *, device: torch.device) -> TokenData:
    spans: list[slice] = []
    start = 0
    for row in batch.rows:
        count = int(row.trained_T.sum())
        spans.append(slice(start, start + count))
        start += count
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    old_logprobs = [turn.logprobs if turn.learner_logprobs is None else turn.learner_logprobs for turn in turns]

    def gather(parts: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(p) for p in parts])).to(device=device, dtype=dtype)

    data = TokenData(
        trajectory_ids_N=gather([np.full(int(r.trained_T.sum()), r.trajectory_id) for r in batch.rows], torch.long),
        turn_ids_N=gather([r.turn_ids_T[r.trained_T] for r in batch.rows], torch.long),
        old_logprobs_N=gather(old_logprobs, torch.float32),
        sampler_logprobs_N=gather([turn.logprobs for turn in turns], torch.float32),
        old_entropy_N=gather([turn.entropy for turn in turns], torch.float32),
        row_spans=spans,
    )
    assert len(data.old_entropy_N) == len(data.trajectory_ids_N)
    return data


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """Some rows, padded on the right."""

    token_ids_B_T: Tensor
    lengths_B: Tensor
    """Real tokens of each row."""
    row_n: Tensor
    """Row of each trained token."""
    source_n: Tensor
    """Position whose hidden state predicts the trained token: one before it."""
    targets_n: Tensor
    index_n: Tensor
    """Position of each trained token in the step's flat order."""


def micro_batches(
    rows: Sequence[PackedRow], spans: Sequence[slice], indices: Sequence[int], *, max_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Cut the rows `indices` into padded micro-batches of at most `max_tokens` (one row is always allowed).

    Rows are sorted by length first, so little is spent on padding.
    """
    order = sorted(indices, key=lambda i: (len(rows[i]), i))
    chunk: list[int] = []
    for i in order:
        if chunk and (len(chunk) + 1) * len(rows[i]) > max_tokens:
            yield _pad(rows, spans, chunk, device=device)
            chunk = []
        chunk.append(i)
    if chunk:
        yield _pad(rows, spans, chunk, device=device)


def empty_micro_batch(device: torch.device) -> MicroBatch:
    """One row that trains nothing: what a rank computes while others still have work."""
    nothing_n = torch.zeros(0, dtype=torch.long, device=device)
    return MicroBatch(
        token_ids_B_T=torch.zeros(1, 1, dtype=torch.long, device=device),
        lengths_B=torch.ones(1, dtype=torch.long, device=device),
        row_n=nothing_n,
        source_n=nothing_n,
        targets_n=nothing_n,
        index_n=nothing_n,
    )


def _pad(
    rows: Sequence[PackedRow], spans: Sequence[slice], chunk: Sequence[int], *, device: torch.device
) -> MicroBatch:
    width = max(len(rows[i]) for i in chunk)
    token_ids_B_T = np.zeros((len(chunk), width), dtype=np.int64)
    row_n: list[np.ndarray] = []
    position_n: list[np.ndarray] = []
    index_n: list[np.ndarray] = []
    for b, i in enumerate(chunk):
        row = rows[i]
        token_ids_B_T[b, : len(row)] = row.token_ids_T
        positions = np.flatnonzero(row.trained_T)
        assert len(positions) == 0 or positions[0] > 0, "the first token of a row has no context to be drawn from"
        row_n.append(np.full(len(positions), b))
        position_n.append(positions)
        index_n.append(np.arange(spans[i].start, spans[i].stop))
    row_ids, positions = np.concatenate(row_n), np.concatenate(position_n)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        token_ids_B_T=tensor(token_ids_B_T),
        lengths_B=tensor(np.array([len(rows[i]) for i in chunk])),
        row_n=tensor(row_ids),
        source_n=tensor(positions - 1),
        targets_n=tensor(token_ids_B_T[row_ids, positions]),
        index_n=tensor(np.concatenate(index_n)),
    )
