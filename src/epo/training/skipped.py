"""Mini-batches whose optimiser step was skipped, kept to be looked at.

Legend: B rows, T tokens of all rows together, N trained tokens of the mini-batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from epo.files import new_folder, write_atomically
from epo.training.step_data import Minibatch, StepData


@dataclass(kw_only=True, slots=True)
class SkippedBatch:
    """One mini-batch whose loss or gradient was not finite."""

    minibatch: int
    """Its place among the optimiser steps of the RL step, from 0."""
    numbers: dict[str, float]
    """What it measured: losses, gradient norms."""
    gradients: list[str]
    """Parameters whose gradient has values that are not finite."""
    tensors: dict[str, Tensor]
    """`row_ids_B`, `row_lengths_B` and `row_trajectories_B`; `token_ids_T` and `trained_T` of these rows, one after the
    other; of the trained tokens, in that order, what the loss was made of, [N] each."""


def skipped_batch(
    data: StepData,
    part: Minibatch,
    member_N: Tensor,
    *,
    minibatch: int,
    numbers: Mapping[str, float],
    networks: Mapping[str, nn.Module],
) -> SkippedBatch:
    """Gather a mini-batch while its gradients are there.

    Args:
        member_N: which of the step's trained tokens are in it.
        networks: whose gradients are examined; the keys go before the parameters' names.
    """
    rows = [data.batch.rows[i] for i in part.rows]
    tensors = {
        "row_ids_B": torch.tensor(part.rows),
        "row_lengths_B": torch.tensor([len(row) for row in rows]),
        "row_trajectories_B": torch.tensor([row.trajectory_id for row in rows]),
        "token_ids_T": torch.cat([torch.from_numpy(row.token_ids_T) for row in rows]),
        "trained_T": torch.cat([torch.from_numpy(row.trained_T) for row in rows]),
    }
    trained = {
        "turn_ids_N": data.tokens.turn_ids_N,
        "old_logprobs_N": data.tokens.old_logprobs_N,
        "sampler_logprobs_N": data.tokens.sampler_logprobs_N,
        "old_entropy_N": data.tokens.old_entropy_N,
        "ratio_N": data.ratio_N,
        "advantages_N": data.advantages_N,
        "importance_N": data.importance_N,
        "values_N": data.values_N,
        "returns_N": data.returns_N,
        "reference_N": data.reference_N,
        "weights_N": part.weights_N,
        "entropy_weights_N": part.entropy_weights_N,
    }
    tensors |= {n: v[member_N].detach().cpu().contiguous() for n, v in trained.items() if v is not None}
    return SkippedBatch(
        minibatch=minibatch,
        numbers=dict(numbers),
        gradients=[
            f"{network}.{name}"
            for network, module in networks.items()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ],
        tensors=tensors,
    )


def save_skipped(folder: Path, batches: Sequence[SkippedBatch], *, step: int, keep: int) -> list[Path]:
    """Write the batches that RL step `step` skipped into `folder`, which holds at most `keep`; returns what was
    written."""
    written: list[Path] = []
    room = keep - sum(1 for _ in folder.glob("step_*"))
    for batch in batches[: max(0, room)]:
        path = folder / f"step_{step:06d}_minibatch_{batch.minibatch}"
        content = {
            "step": step,
            "minibatch": batch.minibatch,
            # Strict JSON has no names for what is not finite.
            "numbers": {k: v if math.isfinite(v) else str(v) for k, v in batch.numbers.items()},
            "gradients_not_finite": batch.gradients,
            "values_not_finite": {
                name: int((~torch.isfinite(value)).sum())
                for name, value in batch.tensors.items()
                if value.is_floating_point() and not bool(torch.isfinite(value).all())
            },
            "shapes": {name: list(value.shape) for name, value in batch.tensors.items()},
        }
        with new_folder(path) as draft:
            save_file(batch.tensors, draft / "batch.safetensors")
            write_atomically(draft / "batch.json", json.dumps(content, indent=1, allow_nan=False))
        written.append(path)
    return written
