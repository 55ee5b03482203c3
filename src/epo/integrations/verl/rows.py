# pyright: reportMissingImports=false
"""Which trajectory and turn the tokens of verl's rows belong to.

Legend for tensor suffixes: _B rows, _L columns of a response, _N trained tokens of all ranks, _R those of this rank.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.workers.utils.padding import response_to_nested

from epo.errors import UserError
from epo.objectives import gather_tokens, trajectory_weights

TURNS = "epo_turns"
WEIGHTS = "epo_weights"
"""Columns added to a mini-batch, in the layout of `response_mask`; verl's micro-batches carry them along."""


class Tokens(NamedTuple):
    """The trained tokens of this rank's part of a mini-batch."""

    mask_B_L: Tensor
    """Bool: trained."""
    trajectories_R: Tensor
    """int64, the same number on every rank and in every mini-batch."""
    turns_R: Tensor
    """int64, >= 0."""
    total: int
    """Tokens of all ranks."""


def turn_runs(mask_B_L: Tensor) -> Tensor:
    """[B, L] index of the run of ones that a position lies in, or follows: 0 for the first, -1 before it.

    Agent loops write one row per trajectory, whose response mask is 1 on what the model wrote: a run is a turn.
    """
    mask_B_L = mask_B_L.bool()
    before_B_L = torch.nn.functional.pad(mask_B_L, (1, 0))[:, :-1]
    return (mask_B_L & ~before_B_L).long().cumsum(1) - 1


def name_tokens(data: TensorDict, *, group: dist.ProcessGroup | None, device: Any) -> Tokens:
    """Find trajectory and turn of every trained token, and add the columns `TURNS` and `WEIGHTS` to `data`.

    Weights are those of equation E2 over the mini-batch of all ranks: trajectories, their turns, their tokens alike.

    Args:
        data: this rank's rows of one mini-batch, as verl's engines get them.
        group: the data-parallel ranks that share the mini-batch.
        device: where the ranks' communication takes place.

    Raises:
        UserError: the rows do not say which trajectory, or which of its turns, they are.
    """
    padded = data.select("response_mask", "loss_mask").to_padded_tensor()
    mask_B_L = padded["response_mask"].bool()
    # Rejection sampling clears tokens in `response_mask` inside a turn; `loss_mask` is the mask as rolled out.
    rolled_B_L = padded["loss_mask"] if padded["loss_mask"].shape == mask_B_L.shape else padded["response_mask"]
    trajectory_B = torch.tensor(_trajectories(data), dtype=torch.int64, device=mask_B_L.device)
    first_turn_B = _first_turns(data)
    _refuse_unnamed_turns(trajectory_B[mask_B_L.any(1)].to(device), named=first_turn_B is not None, group=group)
    first_B = torch.tensor(first_turn_B or [0] * len(trajectory_B), device=mask_B_L.device)
    turns_B_L = turn_runs(rolled_B_L) + first_B[:, None]
    trajectories_R = trajectory_B[:, None].expand_as(turns_B_L)[mask_B_L]
    turns_R = turns_B_L[mask_B_L]

    (trajectories_N, turns_N), own = gather_tokens(trajectories_R.to(device), turns_R.to(device), group=group)
    weights_N = trajectory_weights(trajectories_N, turns_N, dtype=torch.float64)
    weights_B_L = torch.zeros(mask_B_L.shape, dtype=torch.float64, device=mask_B_L.device)
    weights_B_L[mask_B_L] = weights_N[own].to(mask_B_L.device)
    for name, column_B_L in ((TURNS, turns_B_L), (WEIGHTS, weights_B_L)):
        nested = data["response_mask"].is_nested
        data[name] = response_to_nested(column_B_L, data["response_mask"]) if nested else column_B_L
    return Tokens(mask_B_L, trajectories_R, turns_R, len(trajectories_N))


def column(data: TensorDict, name: str) -> list[Any] | None:
    """A column of the batch as a list with one entry per row, whatever verl keeps it in; None if it is not there."""
    if name not in data.keys():  # noqa: SIM118  # a TensorDict's `in` asks for something else
        return None
    values = cast("list[Any]", cast("Any", data.get(name)).tolist())
    return values


def _trajectories(data: TensorDict) -> list[int]:
    """[B] a number for each row's trajectory, made from its name, so that all ranks agree."""
    names, uids, sessions = column(data, "traj_uid"), column(data, "uid"), column(data, "session_id")
    if names is None:
        if uids is None or sessions is None:
            raise UserError(
                "the batch does not say which trajectory a row belongs to: loss_mode=epo needs the column traj_uid, or "
                "uid and session_id as verl's agent loops of trainer.use_v1=True write them"
            )
        names = list(zip(uids, sessions, strict=True))
    return [_number(repr(name)) for name in names]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


def _first_turns(data: TensorDict) -> list[int] | None:
    """[B] turn at which each row begins, from a column or the agent loop's `extra_fields`; None where neither says."""
    found: list[Any] | None = column(data, "turn_index")
    if found is None:
        extras = column(data, "extra_fields") or [None]
        found = [extra.get("turn_index") if isinstance(extra, dict) else None for extra in extras]
    if None in found:
        return None
    turns = [int(turn) for turn in found]
    if min(turns, default=0) < 0:
        raise UserError(f"turn_index must be >= 0, got {min(turns)}")
    return turns


def _refuse_unnamed_turns(trajectory_R: Tensor, *, named: bool, group: dist.ProcessGroup | None) -> None:
    """Every rank sees the rows of all, so that all of them stop or none. `named`: this rank's rows say their turns."""
    (trajectory_N, named_N), _ = gather_tokens(trajectory_R, torch.full_like(trajectory_R, int(named)), group=group)
    if not bool(named_N.all()) and len(trajectory_N.unique()) < len(trajectory_N):
        raise UserError(
            "a trajectory has several rows in a mini-batch and nothing says which turns they are: give turn_index, "
            "from 0, as a column of the batch or in the agent loop's extra_fields, or set "
            "trainer.v1.trainer_mode=epo_sync"
        )
