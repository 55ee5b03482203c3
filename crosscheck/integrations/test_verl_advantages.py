"""Estimators `epo_*` through verl's `compute_advantage` against the equations in plain loops.

Legend for tensor suffixes: _B rows, _L columns of a response.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage

from epo.errors import UserError
from epo.integrations.verl.advantages import StepRows, step_rows

GAMMA, LAM = 0.9, 0.8

# Trajectory, place, mask and turn of each trained token by hand. x: two rows, of which the first has two turns;
# y and z: one row each, z alone in its group; an observation lies at the end of y; the last row is verl's padding.
ROWS: list[tuple[str, int, str, list[int], list[int]]] = [
    ("x", 1, "a", [1, 1, 1, 0, 0, 0], [2, 2, 2]),
    ("y", 0, "a", [0, 1, 1, 0, 1, 0], [0, 0, 1]),
    ("x", 0, "a", [1, 1, 0, 1, 0, 0], [0, 0, 1]),
    ("z", 0, "b", [1, 1, 1, 1, 1, 1], [0] * 6),
    ("pad", 0, "pad", [0, 0, 0, 0, 0, 0], []),
]
LENGTHS = [4, 6, 5, 6, 1]
"""Of each row's response; an observation may lie at its end, and the rest is padding."""
FINAL = {"x": 1.0, "y": -2.0, "z": 0.5, "pad": 0.0}


def batch(*, kl: float = 0.0) -> tuple[DataProto, StepRows]:
    """As verl's trainer has it: the final score on the last position of every row of its trajectory."""
    generator = torch.Generator().manual_seed(0)
    mask_B_L = torch.tensor([mask for _, _, _, mask, _ in ROWS])
    values_B_L = torch.randn(mask_B_L.shape, dtype=torch.float64, generator=generator)
    scores_B_L = torch.zeros(mask_B_L.shape, dtype=torch.float64)
    for row, (trajectory, *_) in enumerate(ROWS):
        scores_B_L[row, LENGTHS[row] - 1] = FINAL[trajectory]
    penalty_B_L = kl * torch.rand(mask_B_L.shape, dtype=torch.float64, generator=generator) * mask_B_L
    data = DataProto.from_dict(
        tensors={"response_mask": mask_B_L, "token_level_rewards": scores_B_L - penalty_B_L, "values": values_B_L},
        non_tensors={"uid": np.array([group for _, _, group, _, _ in ROWS], dtype=object)},
    )
    names = [trajectory for trajectory, *_ in ROWS]
    return data, StepRows(names, [place for _, place, *_ in ROWS], mask_B_L.bool(), scores_B_L, values_B_L)


def estimate(name: str, data: DataProto, rows: StepRows) -> tuple[Tensor, Tensor]:
    config = SimpleNamespace(gamma=GAMMA, lam=LAM, norm_adv_by_std_in_grpo=True)
    with step_rows(rows):
        data = compute_advantage(data, adv_estimator=name, gamma=GAMMA, lam=LAM, config=config)
    return data.batch["advantages"], data.batch["returns"]


def tokens_of(trajectory: str) -> list[tuple[int, int, int]]:
    """Row, column and turn of each token of a trajectory, in order."""
    rows = sorted((place, row) for row, (name, place, *_) in enumerate(ROWS) if name == trajectory)
    return [
        (row, column, turn)
        for _, row in rows
        for column, turn in zip(np.flatnonzero(ROWS[row][3]).tolist(), ROWS[row][4], strict=True)
    ]


def rewards_by_turn(data: DataProto, trajectory: str) -> dict[int, float]:
    """Minus the penalty at each token of a turn, and the final score at the last turn."""
    tokens = tokens_of(trajectory)
    rewards_B_L = data.batch["token_level_rewards"]
    found = dict.fromkeys((turn for *_, turn in tokens), 0.0)
    for row, column, turn in tokens:
        score = FINAL[trajectory] if column == LENGTHS[row] - 1 else 0.0
        found[turn] += float(rewards_B_L[row, column]) - score
    found[tokens[-1][2]] += FINAL[trajectory]
    return found


def gae(rewards: list[float], values: list[float], *, gamma: float, lam: float) -> list[float]:
    """By the definition: A_t = sum over l of (gamma lam)^l delta_{t+l}."""
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    return [
        sum((gamma * lam) ** later * delta for later, delta in enumerate(deltas[step:])) for step in range(len(deltas))
    ]


def by_turn(data: DataProto, trajectory: str, values: list[float]) -> list[float]:
    """V at a turn's first token; tokens share A_t."""
    tokens, rewards = tokens_of(trajectory), rewards_by_turn(data, trajectory)
    turns = sorted(rewards)
    first = [values[[turn for *_, turn in tokens].index(turn)] for turn in turns]
    found = dict(zip(turns, gae([rewards[turn] for turn in turns], first, gamma=GAMMA, lam=LAM), strict=True))
    return [found[turn] for *_, turn in tokens]


def by_token(data: DataProto, trajectory: str, values: list[float]) -> list[float]:
    """Each turn's reward on its last token."""
    tokens, rewards = tokens_of(trajectory), rewards_by_turn(data, trajectory)
    turns = [turn for *_, turn in tokens]
    paid = [rewards[turn] if turns[i + 1 :].count(turn) == 0 else 0.0 for i, turn in enumerate(turns)]
    return gae(paid, values, gamma=GAMMA, lam=LAM)


def by_both(data: DataProto, trajectory: str, values: list[float]) -> list[float]:
    """V at a turn's last token; inside the turn, discount 1 towards A_t + V_t."""
    tokens, rewards = tokens_of(trajectory), rewards_by_turn(data, trajectory)
    turns = [turn for *_, turn in tokens]
    names = sorted(rewards)
    last = [values[len(turns) - 1 - turns[::-1].index(turn)] for turn in names]
    worth = [a + v for a, v in zip(gae([rewards[t] for t in names], last, gamma=GAMMA, lam=LAM), last, strict=True)]
    return [worth[turn] - value for turn, value in zip(turns, values, strict=True)]


Equation = Callable[[DataProto, str, list[float]], list[float]]


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "equation"), [("epo_turn_gae", by_turn), ("epo_trajectory_gae", by_token), ("epo_bilevel_gae", by_both)]
)
def test_gae_follows_the_trajectory_over_its_rows(name: str, equation: Equation, kl: float) -> None:
    """Whitened over trained tokens; 0 elsewhere. The score counts once, at the last turn, also where it lies on an
    observation; a KL penalty counts where it was paid."""
    data, rows = batch(kl=kl)
    assert rows.values_B_L is not None
    raw_B_L = torch.zeros_like(rows.values_B_L)
    for trajectory in ("x", "y", "z"):
        places = tokens_of(trajectory)
        values = [float(rows.values_B_L[row, column]) for row, column, _ in places]
        for (row, column, _), advantage in zip(places, equation(data, trajectory, values), strict=True):
            raw_B_L[row, column] = advantage
    mask_B_L = rows.mask_B_L
    flat = raw_B_L[mask_B_L]
    wanted_B_L = torch.zeros_like(raw_B_L)
    wanted_B_L[mask_B_L] = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    advantages_B_L, returns_B_L = estimate(name, data, rows)
    assert_close(advantages_B_L, wanted_B_L, rtol=1e-10, atol=1e-10)
    if name != "epo_turn_gae":
        assert_close(returns_B_L[mask_B_L], flat + rows.values_B_L[mask_B_L], rtol=1e-10, atol=1e-10)
    assert bool((returns_B_L[~mask_B_L] == 0).all())


def test_grpo_counts_a_trajectory_once() -> None:
    """x has two rows and one reward, y one of each; z is alone in its group and learns nothing."""
    data, rows = batch()
    advantages_B_L, _ = estimate("epo_grpo", data, rows)
    deviation = float(torch.tensor([1.0, -2.0], dtype=torch.float64).std())
    wanted = {"x": 1.5 / (deviation + 1e-6), "y": -1.5 / (deviation + 1e-6), "z": 0.0, "pad": 0.0}
    for row, (trajectory, *_) in enumerate(ROWS):
        expected_L = wanted[trajectory] * rows.mask_B_L[row].double()
        assert_close(advantages_B_L[row], expected_L, rtol=1e-10, atol=1e-10)


def test_rejected_tokens_get_no_advantage_and_leave_the_others_theirs() -> None:
    """Before whitening, what rejection sampling clears later changes no other token's estimate."""
    data, rows = batch()
    full_B_L, returns_B_L = estimate("epo_trajectory_gae", data, rows)
    data, rows = batch()
    kept_B_L = rows.mask_B_L.clone()
    kept_B_L[3, 2] = kept_B_L[2, 0] = False
    data.batch["response_mask"] = kept_B_L.long()
    found_B_L, found_returns_B_L = estimate("epo_trajectory_gae", data, rows)
    assert bool((found_B_L[~kept_B_L] == 0).all())
    assert_close(found_returns_B_L[kept_B_L], returns_B_L[kept_B_L], rtol=0.0, atol=0.0)
    spread = full_B_L[kept_B_L]
    assert_close(found_B_L[kept_B_L], (spread - spread.mean()) / spread.std(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["epo_grpo", "epo_turn_gae"])
def test_without_the_trainer_the_way_is_said(name: str) -> None:
    data, _ = batch()
    config = SimpleNamespace(gamma=GAMMA, lam=LAM, norm_adv_by_std_in_grpo=True)
    with pytest.raises(UserError, match="trainer_mode=epo_sync"):
        compute_advantage(data, adv_estimator=name, config=config)


def test_without_a_critic_gae_says_so() -> None:
    data, rows = batch()
    rows.values_B_L = None
    with pytest.raises(UserError, match=r"critic\.enable=True"):
        estimate("epo_turn_gae", data, rows)
