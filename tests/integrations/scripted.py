"""Episodes that are written down token by token, and TRL's trainers made to play them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from epo.training.policy import Policy

EPO: dict[str, Any] = {"epo_coefficient": 0.7, "epo_alpha": 2.0, "epo_kappa_low": 0.9, "epo_kappa_high": 1.05}
"""A corridor that tokens leave on both sides, and that can turn the bonus around."""

# (tokens of a response, tokens of the observation after it) for each turn; two prompts with four trajectories each.
SCRIPT = [
    [(3, 2), (1, 1), (4, 0)],
    [(5, 0)],
    [(2, 3), (2, 0)],
    [(1, 1), (1, 1), (1, 1), (6, 0)],
    [(4, 2), (3, 1)],
    [(7, 0)],
    [(2, 1), (5, 2), (2, 0)],
    [(1, 4), (3, 0)],
]
PROMPT = [5, 6, 7]


def literal_turn_ids(row: int) -> list[int]:
    """The turn of each token of a scripted completion, -1 for observations."""
    return [t for turn, (said, seen) in enumerate(SCRIPT[row]) for t in [turn] * said + [-1] * seen]


def tokens_of(row: int, step: int) -> list[int]:
    """The completion's ids: arbitrary, but no end token, and other ones at every RL step."""
    return [10 + (37 * row + 11 * place + 101 * step) % 250 for place in range(len(literal_turn_ids(row)))]


class Gradients(TrainerCallback):
    """Keeps what every optimiser step was given."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Scripted:
    """Trainers that play SCRIPT instead of sampling, all from the same weights."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        self.policy, self.folder = policy, folder

    def run(
        self,
        trainer: type,
        config: type,
        *,
        rewards: bool = True,
        watch: Callable[[Any], None] = lambda model: None,
        **options: Any,
    ) -> tuple[Any, Gradients]:
        """Train and return the trainer with the gradients of its optimiser steps. `watch` sees the sampling model."""
        played = 0

        def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            nonlocal played
            watch(trainer.model)
            count = len(prompts)
            everywhere = count * trainer.accelerator.num_processes
            first = played * everywhere + count * trainer.accelerator.process_index
            rows = [row % len(SCRIPT) for row in range(first, first + count)]
            step = first // len(SCRIPT)
            played += 1
            return {
                "prompt_ids": [PROMPT] * count,
                "completion_ids": [tokens_of(row, step) for row in rows],
                "logprobs": [[0.0] * len(literal_turn_ids(row)) for row in rows],
                "env_mask": [[int(turn >= 0) for turn in literal_turn_ids(row)] for row in rows],
            }

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [sum(ids) % 7 if rewards else 1.0 for ids in completion_ids]

        gradients = Gradients()
        made = trainer(
            model=copy.deepcopy(self.policy.model),
            reward_funcs=reward,
            args=config(**({**plain_options(self.folder), "num_generations": 4} | options)),
            processing_class=copy.deepcopy(self.policy.tokenizer),
            train_dataset=Dataset.from_dict({"prompt": ["x"] * 64}),
            rollout_func=rollout,
            callbacks=[gradients],
        )
        made.train()
        return made, gradients


def plain_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
