"""Rows as verl has them, trajectory and turn of every token written out, and the objective in plain loops.

Legend for tensor suffixes: _N trained tokens, in the order of the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

VOCABULARY = 24

STRONG = {"coefficient": 0.3, "alpha": 2.0, "kappa_low": 0.9, "kappa_high": 1.05}
"""A corridor that many tokens lie outside of."""


@dataclass
class Row:
    """One row; what lies at positions with mask 0 was not written by the model."""

    names: dict[str, object]
    """What the row is called: uid, session_id, traj_uid, turn_index, extra_fields."""
    mask: list[int]
    trajectory: str
    """Ours, by hand."""
    turns: list[int]
    """Turn of each trained token, by hand."""
    fields: dict[str, Tensor] = field(default_factory=dict)


def agent_loop_rows() -> list[Row]:
    """One row per trajectory, observations between turns, and a row of verl's padding."""
    return [
        Row({"uid": "a", "session_id": 0}, [1, 1, 0, 0, 1, 1, 1, 0, 1], "a0", [0, 0, 1, 1, 1, 2]),
        Row({"uid": "a", "session_id": 1}, [1, 1, 1], "a1", [0, 0, 0]),
        Row({"uid": "b", "session_id": 0}, [0, 1, 0, 1, 1, 0, 0], "b0", [0, 1, 1]),
        Row({"uid": "pad", "session_id": 0}, [0], "", []),
        Row({"uid": "b", "session_id": 1}, [1, 0, 1], "b1", [0, 1]),
        Row({"uid": "c", "session_id": 0}, [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1], "c0", [0, 0, 0, 0, 1, 1, 1, 1, 1]),
    ]


def turn_rows() -> list[Row]:
    """One row per turn, as verl-agent has them, out of order; one trajectory ends with a turn of two runs."""
    return [
        Row({"uid": "a", "traj_uid": "x", "turn_index": 2}, [1, 1, 1], "x", [2, 2, 2]),
        Row({"uid": "a", "traj_uid": "y", "turn_index": 0}, [1, 1], "y", [0, 0]),
        Row({"uid": "a", "traj_uid": "x", "turn_index": 0}, [1, 1, 1, 1, 0], "x", [0, 0, 0, 0]),
        Row({"uid": "b", "traj_uid": "z", "turn_index": 1}, [1, 0, 1, 1], "z", [1, 2, 2]),
        Row({"uid": "a", "traj_uid": "x", "turn_index": 1}, [1], "x", [1]),
        Row({"uid": "b", "traj_uid": "z", "turn_index": 0}, [1, 1], "z", [0, 0]),
    ]


def fill(rows: list[Row], seed: int, *, dtype: torch.dtype = torch.float64) -> list[Row]:
    """Random prompts, responses, old log-probabilities, advantages and entropies of the sampling policy."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(count: int) -> Tensor:
        return torch.randn(count, dtype=torch.float64, generator=generator).to(dtype)

    def ids(count: int) -> Tensor:
        return torch.randint(1, VOCABULARY, (count,), generator=generator)

    for row in rows:
        length, mask = len(row.mask), torch.tensor(row.mask)
        prompt, response = ids(2 + length % 3), ids(length)
        row.fields = {
            "prompts": prompt,
            "responses": response,
            "input_ids": torch.cat([prompt, response]),
            "position_ids": torch.arange(len(prompt) + length),
            "response_mask": mask,
            "loss_mask": mask,
            "old_log_probs": 0.3 * numbers(length) - math.log(VOCABULARY),
            "advantages": numbers(length),
            "entropy": numbers(length).abs() + 2.0,
        }
    return rows


def batch_of(rows: list[Row]) -> TensorDict:
    """verl's jagged batch, by verl's own function."""
    return list_of_dict_to_tensordict([{**row.names, **row.fields} for row in rows])


def trained(rows: list[Row], name: str) -> Tensor:
    """[N] a field at the trained tokens."""
    return torch.cat([row.fields[name][torch.tensor(row.mask).bool()] for row in rows])


def names_of_tokens(rows: list[Row]) -> list[tuple[str, int]]:
    """[N] trajectory and turn, by hand."""
    return [(row.trajectory, turn) for row in rows for turn in row.turns]


def token_mean_surrogate(logprobs_N: Tensor, rows: list[Row]) -> Tensor:
    """verl's defaults: clip 0.2, dual clip 3, mean over tokens."""
    losses = []
    for logprob, old, advantage in zip(
        logprobs_N, trained(rows, "old_log_probs"), trained(rows, "advantages"), strict=True
    ):
        ratio = (logprob - old).exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        losses.append(torch.minimum(loss, -3.0 * advantage) if advantage < 0 else loss)
    return torch.stack(losses).mean()


def epo_term(
    entropy_N: Tensor,
    rows: list[Row],
    *,
    reference: dict[int, float] | float | None,
    beta: float,
    coefficient: float,
    alpha: float,
    kappa_low: float,
    kappa_high: float,
) -> Tensor:
    """-lambda (L^H - beta L^smooth), equations E2 to E7, trajectory by trajectory and turn by turn."""
    names = names_of_tokens(rows)
    total = entropy_N.new_zeros(())
    trajectories = sorted({trajectory for trajectory, _ in names})
    for trajectory in trajectories:
        turns = sorted({turn for name, turn in names if name == trajectory})
        for turn in turns:
            tokens = [entropy for entropy, name in zip(entropy_N, names, strict=True) if name == (trajectory, turn)]
            for entropy in tokens:
                known = reference.get(turn) if isinstance(reference, dict) else reference
                penalty = entropy_N.new_zeros(())
                if known is not None:
                    penalty = torch.relu(kappa_low * known - entropy) + torch.relu(entropy - kappa_high * known)
                total = total + (entropy - beta * alpha * penalty) / (len(trajectories) * len(turns) * len(tokens))
    return -coefficient * total


def beta_of(step: int, total_steps: int, *, gamma: float = 3.0) -> float:
    """beta_k of equation E6."""
    return 1 + math.exp(-gamma * step / (total_steps // 2))
