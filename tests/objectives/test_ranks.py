"""One batch on several ranks, one of them without a token, equals the batch on one (conformance T4)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from epo.objectives import gather_tokens, make_control, trajectory_weights
from epo.objectives.ranks import gather_numbers

TRAJECTORIES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
TURNS = torch.tensor([0, 1, 1, 0, 0, 0, 2, 2])
ENTROPY = torch.tensor([[0.3, 1.2, 0.1, 0.9, 2.0, 0.4, 0.6, 1.7], [0.2, 2.2, 0.5, 0.1, 1.0, 0.9, 1.6, 0.3]]).double()
PARTS = (slice(0, 5), slice(5, 5), slice(5, 8))
NUMBERS = ({"a": 0.1 + 0.2, "b": -0.0, "c\n": 1e-310}, {}, {"b": float("nan"), "a": float("-inf"), "d": 1 / 3})
METHODS = {"epo_strong": {}, "epo": {"reference": "per_turn"}, "epo_release": {}}


def updates(part: slice) -> dict[str, object]:
    """Two steps of every method as one rank does them: the loss of its own tokens, and the state in the end."""
    found: dict[str, object] = {}
    for method, options in METHODS.items():
        control = make_control(method, **options)
        gradients = []
        for step, entropy in enumerate(ENTROPY):
            mine = entropy[part], TRAJECTORIES[part], TURNS[part]
            (entropy_N, trajectories_N, turns_N), own = gather_tokens(*mine)
            weights = trajectory_weights(trajectories_N, turns_N, dtype=torch.float64)[own]
            control.shape_advantages(entropy_N, entropy_N, trajectories_N, turns_N, trajectories_N)
            leaf = entropy[part].clone().requires_grad_()
            control.entropy_loss(leaf, weights, TURNS[part], step=step, total_steps=9).loss.backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad.tolist())
            control.observe(entropy_N, trajectories_N, turns_N)
        found[method] = {"gradients": gradients, "state": control.state_dict()}
    return found


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(PARTS))
    Path(folder, f"{rank}.json").write_text(json.dumps(updates(PARTS[rank])))
    numbers = gather_numbers(NUMBERS[rank], device=torch.device("cpu"))
    Path(folder, f"{rank}.numbers").write_text(repr(numbers))
    dist.barrier()
    # What was to be saved is saved. Threads of gloo may still run, and would abort an interpreter that shuts down.
    os._exit(0)


def test_three_ranks_equal_one(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=len(PARTS))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(len(PARTS))]
    alone = json.loads(json.dumps(updates(slice(0, 8))))
    for method in METHODS:
        for rank, part in zip(ranks, PARTS, strict=True):
            assert rank[method]["state"] == alone[method]["state"]
            assert rank[method]["gradients"] == [g[part] for g in alone[method]["gradients"]]
    for rank in range(len(PARTS)):
        assert (tmp_path / f"{rank}.numbers").read_text() == repr(list(NUMBERS))
    assert repr(gather_numbers(NUMBERS[0], device=torch.device("cpu"))) == repr([NUMBERS[0]])


def test_tensors_must_be_aligned() -> None:
    with pytest.raises(ValueError, match=r"all be \[R\]"):
        gather_tokens(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"all be \[R\]"):
        gather_tokens()
