"""From trajectories to training rows: merge turns while the exact prefix holds, split where it breaks.

Legend: _T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from epo.types import PackedBatch, PackedRow, Trajectory, Turn


def pack(trajectories: Sequence[Trajectory]) -> PackedBatch:
    """Training rows of `trajectories`, in order; `trajectory_id` of a row is the position in the argument.

    A turn joins the row of the turn before it when its prompt *is* that row's tokens plus more (observation) tokens.
    With the transcript context an episode becomes one row, so every token is processed once; with a window context, or
    where anything was rendered anew, a turn gets a row of its own. Only sampled tokens are trained.

    Example, prompts P, observations O, responses A::

        turn 0: P0 -> A0        turn 1: P0 A0 O1 -> A1        turn 2: P2 -> A2
        row 0:  P0 A0 O1 A1     row 1:  P2 A2
        trained 0  1  0  1              0  1
    """
    rows: list[PackedRow] = []
    for trajectory_id, trajectory in enumerate(trajectories):
        rows.extend(_rows(trajectory.turns, trajectory_id=trajectory_id))
    return PackedBatch(rows=rows, num_trajectories=len(trajectories))


def _rows(turns: Sequence[Turn], *, trajectory_id: int) -> list[PackedRow]:
    rows: list[PackedRow] = []
    first = 0
    for end in range(1, len(turns) + 1):
        if end == len(turns) or not extends(turns[end], turns[end - 1]):
            rows.append(_merge(turns[first:end], first_turn=first, trajectory_id=trajectory_id))
            first = end
    return rows


def extends(turn: Turn, previous: Turn) -> bool:
    """Whether the prompt of `turn` starts with exactly what the policy read and wrote in `previous`."""
    split = len(previous.prompt_ids)
    whole = split + len(previous.response_ids)
    return (
        len(turn.prompt_ids) >= whole
        and np.array_equal(turn.prompt_ids[:split], previous.prompt_ids)
        and np.array_equal(turn.prompt_ids[split:whole], previous.response_ids)
    )


def _merge(turns: Sequence[Turn], *, first_turn: int, trajectory_id: int) -> PackedRow:
    last = turns[-1]
    token_ids_T = np.concatenate([last.prompt_ids, last.response_ids]).astype(np.int64)
    trained_T = np.zeros(len(token_ids_T), dtype=np.bool_)
    turn_ids_T = np.full(len(token_ids_T), -1, dtype=np.int64)
    logprobs_T = np.zeros(len(token_ids_T), dtype=np.float32)
    for offset, turn in enumerate(turns):
        span = slice(len(turn.prompt_ids), len(turn.prompt_ids) + len(turn.response_ids))
        trained_T[span] = True
        turn_ids_T[span] = first_turn + offset
        logprobs_T[span] = turn.logprobs
    return PackedRow(
        token_ids_T=token_ids_T,
        trained_T=trained_T,
        turn_ids_T=turn_ids_T,
        logprobs_T=logprobs_T,
        trajectory_id=trajectory_id,
    )
