"""A column beside a row is refused by every per-token formula, where broadcasting would make a matrix of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from epo.objectives import (
    EntropyHistory,
    clipped_surrogate,
    epo_loss,
    kl_penalty,
    make_control,
    value_loss,
)
from epo.objectives.corridor import corridor
from epo.types import PackedRow, Turn

FLAT = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COLUMN = FLAT[:, None]
TURNS = torch.tensor([0, 0, 1])

SHAPES_DIFFER: dict[str, Callable[[], object]] = {
    "old log-probabilities": lambda: clipped_surrogate(FLAT, COLUMN, FLAT),
    "advantages": lambda: clipped_surrogate(FLAT, FLAT, COLUMN),
    "one advantage": lambda: clipped_surrogate(FLAT, FLAT, torch.tensor(1.0)),
    "reference": lambda: kl_penalty(FLAT, COLUMN),
    "old values": lambda: value_loss(FLAT, COLUMN, FLAT),
    "returns": lambda: value_loss(FLAT, FLAT, COLUMN),
    "returns, no clip": lambda: value_loss(FLAT, FLAT, COLUMN, clip=None),
    "corridor's reference": lambda: corridor(FLAT, COLUMN, kappa_low=0.5, kappa_high=2.0),
    "entropy": lambda: epo_loss(torch.tensor(0.0), COLUMN, TURNS, TURNS, EntropyHistory(), step=0, total_steps=1),
    "bonus": lambda: _entropy_loss("bonus", COLUMN),
    "epo": lambda: _entropy_loss("epo", COLUMN),
    "epo_decay": lambda: _entropy_loss("epo_decay", COLUMN),
}


@pytest.mark.parametrize("case", SHAPES_DIFFER)
def test_no_tensor_is_broadcast(case: str) -> None:
    with pytest.raises(ValueError, match=r"\[3\]"):
        SHAPES_DIFFER[case]()


def _entropy_loss(method: str, weights: Tensor) -> object:
    options = {"max_turns": 3} if method == "epo_decay" else {}
    control = make_control(method, **options)
    return control.entropy_loss(FLAT, weights, TURNS, step=0, total_steps=1)


@pytest.mark.parametrize("name", ["logprobs", "entropy", "learner_logprobs", "advantages", "ratios"])
def test_a_turn_has_one_number_per_response_token(name: str) -> None:
    arrays = dict.fromkeys(("logprobs", "entropy", "learner_logprobs", "advantages", "ratios"), np.zeros(2, np.float32))
    arrays[name] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=rf"{name} .*\(2\), got 3"):
        Turn(
            prompt_ids=np.zeros(4, np.int64),
            response_ids=np.zeros(2, np.int64),
            observation="",
            response="",
            action="",
            is_valid=True,
            **arrays,
        )


@pytest.mark.parametrize("name", ["trained_T", "turn_ids_T", "logprobs_T"])
def test_a_row_has_one_entry_per_token(name: str) -> None:
    arrays = {
        "trained_T": np.zeros(2, np.bool_),
        "turn_ids_T": np.zeros(2, np.int64),
        "logprobs_T": np.zeros(2, np.float32),
    }
    arrays[name] = arrays[name][:1]
    with pytest.raises(ValueError, match=rf"{name} .*\(2\), got 1"):
        PackedRow(token_ids_T=np.zeros(2, np.int64), trajectory_id=0, **arrays)
